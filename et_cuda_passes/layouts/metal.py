"""metal: the layout of `torchao::_linear_fp_act_4bit_weight`, the int4 linear of ExecuTorch's Metal backend.

The weight is uint8 [N, K/2], row-major, the even k in the low nibble. The mps layout has the same bytes in another
shape. Scale and zero are two planes [2, N, K/group], and the kernel computes q * S + Z with q in 0..15.

Source: executorch, backends/apple/metal/runtime/ops/op_linear_4bit.mm, and torchao,
experimental/ops/mps/linear_fp_act_xbit_weight_aten.mm. The kernel needs K % 8 == 0, a group size in 32, 64, 128, 256,
S and Z of the dtype of the activations, and N % 4 == 0 unless M is 1. ExecuTorch's kernel has fp32 and bf16; torchao's
also has fp16.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ._checks import CHUNK_BYTES, require_dtype, require_four_bits, require_tensor, require_weight, rows_per_chunk
from .layout import Layout, unsigned_shift
from .scale_and_zero import planes_of_rows, require_finite, require_pair, unpack_planes
from .threads import for_chunks


def pack(
    q: torch.Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Pack q [N, K] into uint8 [N, K/2], on q's device.

    q: uint8 or int8, any strides; q + offset must lie in 0..15 (offset=8 takes int8 weights in -8..7 as they are).
    K must be a multiple of 8.
    out_rows: rows of the result; those beyond N hold the weight 0. By default N.
    chunk_bytes: bytes of weights that a thread packs at a time; it uses as much in addition to q and the result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, or a
    meta or fake q.
    """
    q, n, _ = require_weight(q, offset, 1, 8, "metal", out_rows)
    return pack_bytes(q, offset, chunk_bytes, n)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, K] in 0..15, on packed's device.

    Raises TypeError when packed is not uint8, ValueError when it is not [N, K/2], or is meta or fake.
    """
    packed = require_tensor(packed, "packed")
    require_dtype(packed, "packed", (torch.uint8,), "give the result of pack")
    if packed.dim() != 2 or packed.numel() == 0:
        raise ValueError(f"packed must have shape [N, K/2], got {tuple(packed.shape)}")
    return unpack_bytes(packed)


def scale_and_zero(
    scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's (S, Z), each `dtype` [N, K/group], from scale and zero [N, K/group] of (q - 8) * scale + zero.

    S = round(scale) and Z = round(zero - 8 * S), in fp32 before the last rounding. Z is computed from the rounded S so
    that a zero of 0 stays exact: -8 * S has the mantissa of S.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32 or a scale or zero that is not floating; ValueError for
    shapes that differ, and for values that are NaN or infinite, or become so in `dtype`.
    """
    scale, zero = require_pair(scale, zero, dtype)
    s = scale.to(dtype)
    z = (zero.float() - 8 * s.float()).to(dtype)
    return require_finite(s, "scale").contiguous(), require_finite(z, "zero - 8 * scale").contiguous()


def pack_bytes(q: torch.Tensor, offset: int, chunk_bytes: int, out_rows: int) -> torch.Tensor:
    """Pack weights [N, K], K even, into uint8 [out_rows, K/2]: two of a row per byte, the even k in the low nibble."""
    n, k = q.shape
    rows = min(n, rows_per_chunk(k, chunk_bytes, 1))
    out = torch.empty(out_rows, k // 2, dtype=torch.uint8, device=q.device)
    out[n:] = offset * 17
    # The sums may overflow: int8 and uint8 wrap to the same byte.
    same_bytes = out.view(q.dtype)

    def worker() -> Callable[[int, int], None]:
        all_weights = torch.empty(rows, k, dtype=q.dtype, device=q.device)

        def pack_rows(start: int, stop: int) -> None:
            require_four_bits(q[start:stop], offset)
            weights = torch.add(q[start:stop], offset, out=all_weights[: stop - start])
            torch.add(weights[:, 0::2], weights[:, 1::2], alpha=16, out=same_bytes[start:stop])

        return pack_rows

    for_chunks(n, rows, worker, q.device)
    return out


def unpack_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_bytes`: uint8 [N, K] from uint8 [N, K/2]."""
    n, half = packed.shape
    q = torch.empty(n, half, 2, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=q[..., 0])
    torch.bitwise_right_shift(packed, 4, out=q[..., 1])
    return q.view(n, half * 2)


def rows_of_bytes(ids: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Rows of `pack_bytes`'s result as uint8 [*ids.shape, K]."""
    row = F.embedding(ids, packed)
    return torch.stack((row & 15, row >> 4), dim=-1).flatten(-2)


def _pack_scales(scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, in_features: int) -> torch.Tensor:
    return torch.stack(scale_and_zero(scale, zero, dtype))


def _check(count: int, scale_shape: tuple[int, ...], group_size: int, in_features: int) -> int | None:
    if len(scale_shape) != 3 or scale_shape[0] != 2:
        return None
    _, rows, groups = scale_shape
    return groups * group_size if count == rows * groups * group_size else None


def _shift(low: int, high: int) -> int | None:
    """Prefer the smallest power of two that makes the integers unsigned.

    Z is -(shift + zero point) * scale. A small shift keeps Z small. A power of two makes Z, for a zero point of 0, the
    scale with another exponent, which is exact.
    """
    return unsigned_shift(low, high, preferred=1 << (-low - 1).bit_length() if low < 0 else 0)


def _torchao_linear(x: torch.Tensor, packed: torch.Tensor, qparams: torch.Tensor, group_size: int) -> torch.Tensor:
    # torchao registers this operator on macOS only, so look it up at the call.
    kernel = torch.ops.torchao._linear_fp_act_4bit_weight.default
    y: torch.Tensor = kernel(x, packed, group_size, qparams[0], qparams[1])
    return y


LAYOUT = Layout(
    "metal",
    pack=lambda q, shift, rows: pack(q, shift, out_rows=rows),
    unpack=unpack,
    pack_scales=_pack_scales,
    unpack_scales=unpack_planes,
    check=_check,
    zero_offset=0,
    shift=_shift,
    kernels={"mps": _torchao_linear},
    rows=rows_of_bytes,
    row_scales=planes_of_rows,
)
