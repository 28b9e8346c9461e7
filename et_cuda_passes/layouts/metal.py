"""metal: the layout of `torchao::_linear_fp_act_4bit_weight`, the int4 linear of ExecuTorch's Metal backend.

The weight is uint8 [N, K/2], row-major, the even k in the low nibble: the bytes of the mps layout in their own shape.
Scale and zero are two tensors [N, K/group], and the kernel computes q * S + Z with q in 0..15.

Source, read: executorch, backends/apple/metal/runtime/ops/op_linear_4bit.mm, and torchao,
experimental/ops/mps/linear_fp_act_xbit_weight_aten.mm. The kernel wants K % 8 == 0, a group size in 32, 64, 128, 256,
S and Z of the activation's dtype, and N % 4 == 0 unless M is 1. ExecuTorch's has fp32 and bf16, torchao's fp16 too.
"""

import torch

from ._checks import CHUNK_BYTES, require_dtype, require_tensor, require_weight
from ._row_major import pack_rows, unpack_rows
from .scale_and_zero import require_finite, require_pair


def pack(
    q: torch.Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Packs q [N, K] into uint8 [N, K/2], on q's device.

    q: uint8 or int8, any strides; q + offset must lie in 0..15 (offset=8 takes int8 weights in -8..7 as they are).
    K must be a multiple of 8.
    out_rows: rows of the result; those beyond N hold the weight 0. By default N.
    chunk_bytes: how many weights are worked on at a time; as much memory is used above q and the result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, or a
    meta or fake q.
    """
    q, n, _ = require_weight(q, offset, 1, 8, "metal", out_rows)
    return pack_rows(q, offset, chunk_bytes, n)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, K] in 0..15, on packed's device.

    Raises TypeError when packed is not uint8, ValueError when it is not [N, K/2], or is meta or fake.
    """
    packed = require_tensor(packed, "packed")
    require_dtype(packed, "packed", (torch.uint8,), "give what pack returned")
    if packed.dim() != 2 or packed.numel() == 0:
        raise ValueError(f"packed must have shape [N, K/2], got {tuple(packed.shape)}")
    return unpack_rows(packed)


def scale_and_zero(
    scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's (S, Z), each `dtype` [N, K/group], from scale and zero [N, K/group] of (q - 8) * scale + zero.

    S = round(scale) and Z = round(zero - 8 * S), in fp32 before the last rounding. Z comes from the rounded S so that
    a zero of 0 stays exact: -8 * S has S's mantissa.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32 or a scale or zero that is not floating; ValueError for
    shapes that differ, and for values that are NaN or infinite, or become so in `dtype`.
    """
    scale, zero = require_pair(scale, zero, dtype)
    s = scale.to(dtype)
    z = (zero.float() - 8 * s.float()).to(dtype)
    return require_finite(s, "scale").contiguous(), require_finite(z, "zero - 8 * scale").contiguous()
