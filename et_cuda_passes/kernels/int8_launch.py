"""Which kernels compute an int8 linear, and their launches: as :mod:`et_cuda_passes.kernels.int4_launch` does."""

import math
from typing import Any

from torch import SymInt, Tensor

from et_cuda_passes.kernels.choose import Weight
from et_cuda_passes.kernels.int8_matmul import int8_matmul
from et_cuda_passes.kernels.launching import gpu_of, over_buckets, possible, product, wave
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
    gpu = gpu_of(x.device)
    weight = Weight(n, k, group_size, bits=8)

    def one(y: Tensor, parts: Tensor | None, tiling: Tiling, flag: int | SymInt) -> tuple[Tensor, Tensor | None]:
        return launch(x, m, packed, scale, zero, bias, y, parts, group_size, tiling, flag, gpu.wgmma, gpu.processors)

    return over_buckets(x, n, possible(m, weight, gpu), gpu.processors, one)


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
) -> tuple[Tensor, Tensor | None]:
    """Launch one tiling over a grid multiplied by ``flag``, 0 or 1; ``parts`` is fp32, as many as cut tiles need.

    Returns:
        y and parts, as they are then.
    """
    k, n = x.shape[-1], y.shape[-1]
    programs = wave(tiling, m, n, k, processors)
    # A pointer that is not read still has to be one.
    common: dict[str, Any] = {"bias_ptr": scale if bias is None else bias, "HAS_BIAS": bias is not None}
    common |= {"M": m, "N": n, "SLOTS": programs.slots, "USE_ASM": True}
    common |= {"BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k}
    unit = min(k & -k, MOST_UNIT)
    grouped = group_size if group_size != k else 0
    arguments = {
        **common,
        "x_ptr": x,
        "BLOCK_M": tiling.block_m,
        "packed_ptr": packed,
        "scale_ptr": scale,
        "zero_ptr": scale if zero is None else zero,
        "K_UNITS": k // unit,
        "UNIT": unit,
        "SEGMENTS": tiling.segments,
        "GROUP_SIZE": grouped,
        "EVEN_K": k % (tiling.block_k * tiling.segments) == 0,
        "PAIRS": grouped > 0 and k // group_size % 2 == 0,
        "HAS_ZERO": zero is not None,
        "WGMMA": wgmma,
    }
    adding = {**common, "K32": -(-k // 32), "factor_ptr": scale, "addend_ptr": scale}
    adding |= {"ACTIVATION": "", "HAS_FACTOR": False, "HAS_ADDEND": False, "GATED": False}
    return product(int8_matmul, y, parts, tiling, programs, flag, arguments, adding, f"int8 {m} {n} {k}")
