"""Which kernels compute an int8 linear, and their launches: as :mod:`et_cuda_passes.kernels.int4_launch` does."""

import math
import zlib

import torch
from torch import SymInt, Tensor
from torch.library import wrap_triton

from et_cuda_passes.kernels.int8_matmul import int8_matmul
from et_cuda_passes.kernels.launching import ADDED_ROWS, gpu_of, inside, possible, wave
from et_cuda_passes.kernels.tiles import add_parts
from et_cuda_passes.kernels.tiling import Tiling

GROUP_SIZES = (16, 32, 64, 128, 256)
IN_MULTIPLE = 16
"""K is a multiple of this: a row of the weight starts at as many bytes, and so does one of x."""
MOST_UNIT = 4096


def int8_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """``x [..., K] @ (packed * scale + zero).T + bias`` on CUDA, [..., N].

    All are contiguous. packed is int8 [N, K], scale of x's dtype and zero fp32, [N, K / group_size], the group size one
    of GROUP_SIZES or K. The tensors are used in the shape that they have: of a view, Inductor would write a copy for
    every launch.
    """
    m, k, n = math.prod(x.shape[:-1]), x.shape[-1], packed.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    gpu, processors = gpu_of(x.device)
    buckets = possible(m, n, k, group_size, gpu, bits=8)
    # One for all buckets: only one of them runs, and allocating costs more time than it does space.
    most = max(tiling.waves * tiling.block_m * tiling.block_n for tiling in buckets.values()) * processors
    parts = x.new_empty(most, dtype=torch.float32) if most else None
    first: int = 0
    for bound, tiling in buckets.items():
        flag = 1 if len(buckets) == 1 else inside(m, first, bound)
        launch(x, m, packed, scale, zero, bias, y, parts, group_size, tiling, flag, gpu.wgmma, processors)
        first = bound + 1
    return y


def launch(
    x: Tensor,
    m: int | SymInt,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    parts: Tensor | None,
    group_size: int,
    tiling: Tiling,
    flag: int | SymInt,
    wgmma: bool,
    processors: int,
) -> None:
    """Launch one tiling over a grid multiplied by ``flag``, 0 or 1; ``parts`` is fp32, as many as cut tiles need."""
    k, n = x.shape[-1], y.shape[-1]
    programs = wave(tiling, m, n, k, processors)
    slots = programs.slots
    shape = {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k, "SLOTS": slots}
    # Inductor makes a kernel of its own for each set of numbers that are passed: these.
    shape["SALT"] = 1 + zlib.crc32(f"int8 {m} {n} {k}".encode()) % 2**30
    unit = min(k & -k, MOST_UNIT)
    # A pointer that is not read still has to be one.
    given, offset = scale if bias is None else bias, scale if zero is None else zero
    into = parts if slots and parts is not None else scale
    grouped = group_size if group_size != k else 0
    wrap_triton(int8_matmul)[(programs.grid * flag,)](
        x,
        packed,
        scale,
        offset,
        given,
        y,
        into,
        m,
        n,
        k // unit,
        **shape,
        UNIT=unit,
        SEGMENTS=tiling.segments,
        GROUP_SIZE=grouped,
        EVEN_K=k % (tiling.block_k * tiling.segments) == 0,
        PAIRS=grouped > 0 and k // group_size % 2 == 0,
        HAS_ZERO=zero is not None,
        HAS_BIAS=bias is not None,
        USE_ASM=True,
        WGMMA=wgmma,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if slots:
        height = min(tiling.block_m, ADDED_ROWS)
        finish = {"HAS_BIAS": bias is not None, "ACTIVATION": "", "HAS_FACTOR": False, "HAS_ADDEND": False}
        wrap_triton(add_parts)[(programs.rest * flag, tiling.block_m // height)](
            into, given, scale, scale, y, m, n, -(-k // 32), **shape, **finish, HEIGHT=height
        )
