"""The launches of the int4 and the int8 linear, one for each bucket of rows.

The tensors are passed in the shape that they have: for a view, Inductor would write a copy for every launch.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from et_cuda_passes.kernels.buckets import (
    buckets_for,
    launch_buckets,
    launch_matmul,
    stream_k_schedule,
    tma_descriptor,
)
from et_cuda_passes.kernels.choose import Weight
from et_cuda_passes.kernels.device import gpu_for
from et_cuda_passes.kernels.int4_matmul import int4_matmul
from et_cuda_passes.kernels.int8_matmul import int8_matmul
from et_cuda_passes.kernels.tiling import Tiling

INT4_GROUP_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Epilogue:
    """The operations that are fused after the product, in this order; None or an empty text for an absent one.

    Attributes:
        bias: [N], added.
        activation: one of :data:`~et_cuda_passes.kernels.epilogue.ACTIVATIONS`.
        factor: [..., N], multiplied.
        addend: [..., N], added.
        gated: whether the weight has 2 N rows, in blocks of 16: eight rows of the gate, then the eight rows that the
            gate multiplies. The bias is then [2 N], and ``activation`` is that of the gate.
    """

    bias: Tensor | None = None
    activation: str = ""
    factor: Tensor | None = None
    addend: Tensor | None = None
    gated: bool = False


def int4_linear(
    x: Tensor,
    packed: Tensor,
    qparams: Tensor,
    group_size: int,
    epilogue: Epilogue,
    gpu_name: str = "",
    float4: bool = False,
) -> Tensor:
    """``x [..., K] @ weight.T`` and its epilogue on CUDA, [..., N], in the tilings of the GPU ``gpu_name``.

    All are contiguous. The weight has the mma_tiled layout; with ``float4`` its nibbles are numbers in float4_e2m1fn.
    """
    m, k, n = math.prod(x.shape[:-1]), x.shape[-1], packed.shape[0]
    gpu = gpu_for(x, gpu_name)
    tensors = 1 + (epilogue.factor is not None) + (epilogue.addend is not None)
    weight = Weight(n, k, group_size, outputs=tensors / 2 if epilogue.gated else tensors)

    def one(y: Tensor, parts: Tensor | None, tiling: Tiling, flag: int | SymInt) -> tuple[Tensor, Tensor | None]:
        return launch_int4(
            x, m, packed, qparams, epilogue, y, parts, group_size, tiling, flag, gpu.wgmma, gpu.processors, float4
        )

    return launch_buckets(x, n // 2 if epilogue.gated else n, buckets_for(m, weight, gpu), gpu.processors, one)


def launch_int4(
    x: Tensor,
    m: int | SymInt,
    packed: Tensor,
    qparams: Tensor,
    epilogue: Epilogue,
    y: Tensor,
    parts: Tensor | None,
    group_size: int,
    tiling: Tiling,
    flag: int | SymInt,
    wgmma: bool,
    processors: int,
    float4: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch one tiling over a grid multiplied by ``flag``, 0 or 1; ``parts`` is the fp32 buffer for split tiles.

    Returns:
        The mutated y and parts.
    """
    k, n = x.shape[-1], packed.shape[0]
    programs = stream_k_schedule(tiling, m, n, packed.shape[1] * 8, processors)
    # A pointer that the kernel does not read must still be a tensor.
    given = {"bias_ptr": epilogue.bias, "factor_ptr": epilogue.factor, "addend_ptr": epilogue.addend}
    common: dict[str, Any] = {name: qparams if tensor is None else tensor for name, tensor in given.items()}
    common |= {"HAS_BIAS": epilogue.bias is not None, "HAS_FACTOR": epilogue.factor is not None}
    common |= {"HAS_ADDEND": epilogue.addend is not None, "ACTIVATION": epilogue.activation, "USE_ASM": True}
    common |= {"GATED": epilogue.gated}
    common |= {"M": m, "N": n}
    common |= {"BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k, "SLOTS": programs.slots}
    described = tma_descriptor(x, tiling, tiling.block_m)
    extra = tma_descriptor(x, tiling, tiling.extra_m) if tiling.extra_m else None
    arguments = {
        **common,
        "K_UNITS": k // (16 if group_size == 16 else 32),
        "x_ptr": described or x,
        "extra_ptr": extra or x,
        "BLOCK_M": tiling.block_m,
        "EXTRA_M": tiling.extra_m,
        "BULK": 0 if described is None else x.dim(),
        "words_ptr": packed,
        "qparams_ptr": qparams,
        "SEGMENTS": tiling.segments,
        "GROUP_SIZE": group_size,
        # Words and scales are padded to whole steps of a bulk copy, and a descriptor reads zeros beyond x.
        "EVEN_K": described is not None or k % (tiling.block_k * tiling.segments) == 0,
        "HAS_ZERO": qparams.shape[0] == 2,
        "FLOAT4": float4,
        "WGMMA": wgmma,
    }
    adding = {**common, "K32": -(-k // 32)}
    return launch_matmul(int4_matmul, y, parts, tiling, programs, flag, arguments, adding, f"{m} {n} {k}")


INT8_GROUP_SIZES = (16, 32, 64, 128, 256)
INT8_IN_MULTIPLE = 16
"""K is a multiple of this, so that rows of the weight and of x are aligned."""
INT8_MAX_UNIT = 4096


def has_int8(x: Tensor, scale: Tensor, group_size: int) -> bool:
    """Whether the kernel has these dtypes and this group size."""
    k, floats = x.shape[-1], (torch.bfloat16, torch.float16)
    native = group_size == k or group_size in INT8_GROUP_SIZES
    return x.dtype in floats and scale.dtype is x.dtype and native and k % INT8_IN_MULTIPLE == 0


def int8_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    gpu_name: str = "",
    float8: int = 0,
) -> Tensor:
    """``x [..., K] @ (packed * scale + zero).T + bias`` on CUDA, [..., N], in the tilings of the GPU ``gpu_name``.

    All are contiguous. packed is int8 [N, K]; ``float8`` as in ``dequantize_bytes``. scale has x's dtype, zero is fp32,
    both [N, K / group_size]. The group size is one of INT8_GROUP_SIZES, or K.
    """
    m, k, n = math.prod(x.shape[:-1]), x.shape[-1], packed.shape[0]
    gpu = gpu_for(x, gpu_name)
    weight = Weight(n, k, group_size, bits=8)

    def one(y: Tensor, parts: Tensor | None, tiling: Tiling, flag: int | SymInt) -> tuple[Tensor, Tensor | None]:
        return launch_int8(
            x, m, packed, scale, zero, bias, y, parts, group_size, tiling, flag, gpu.wgmma, gpu.processors, float8
        )

    return launch_buckets(x, n, buckets_for(m, weight, gpu), gpu.processors, one)


def launch_int8(
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
    float8: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Launch one tiling over a grid multiplied by ``flag``, 0 or 1; ``parts`` is the fp32 buffer for split tiles.

    Returns:
        The mutated y and parts.
    """
    k, n = x.shape[-1], y.shape[-1]
    programs = stream_k_schedule(tiling, m, n, k, processors)
    # A pointer that the kernel does not read must still be a tensor.
    common: dict[str, Any] = {"bias_ptr": scale if bias is None else bias, "HAS_BIAS": bias is not None}
    common |= {"M": m, "N": n, "SLOTS": programs.slots, "USE_ASM": True}
    common |= {"BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k}
    unit = min(k & -k, INT8_MAX_UNIT)
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
        "FLOAT8": float8,
        "WGMMA": wgmma,
    }
    adding = {**common, "K32": -(-k // 32), "factor_ptr": scale, "addend_ptr": scale}
    adding |= {"ACTIVATION": "", "HAS_FACTOR": False, "HAS_ADDEND": False, "GATED": False}
    return launch_matmul(int8_matmul, y, parts, tiling, programs, flag, arguments, adding, f"int8 {m} {n} {k}")
