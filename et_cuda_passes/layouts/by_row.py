"""by_row: uint8 [N, K/2], row-major, the even k in the low nibble, for products in plain operators on the CPU.

Scales and zeros are planes [1 or 2, N, K/group]: the scales, and then the zeros if there are any. K is even, and so is
the group size.

No kernel reads this layout. Inductor fuses the unpacking with the product, so no order of rows or columns depends on
the host, and there is no padding. The even and the odd columns of x are multiplied with the low and the high nibbles,
because an unpacked row in its own order would be written element by element.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import metal
from .layout import ZERO_OFFSET, Layout
from .plain_products import multiply_in_pieces, stored
from .rows import CHUNK_BYTES
from .scale_and_zero import planes_of_rows, require_finite, require_pair, unpack_planes


def pack(q: Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Pack q [N, K] into uint8 [N, K/2], on q's device.

    q: uint8 or int8, any strides; q + offset must lie in 0..15 (offset=8 takes int8 weights in -8..7 as they are).
    K must be even.
    out_rows: rows of the result; those beyond N hold the weight 0. By default N.
    chunk_bytes: bytes of weights that a thread packs at a time; it uses twice as much in addition to q and the result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, or a
    meta or fake q.
    """
    return metal.pack_pairs(q, offset, 2, "by_row", out_rows, chunk_bytes)


unpack = metal.unpack
"""The weights of `pack` as uint8 [N, K] in 0..15."""


def _planes(scale: Tensor, zero: Tensor | None, dtype: torch.dtype, in_features: int) -> Tensor:
    scale, zero = require_pair(scale, zero, dtype)
    planes = torch.stack([scale] if zero is None else [scale, zero]).to(dtype)
    return require_finite(planes, "scale or zero")


def _check(count: int, scale_shape: tuple[int, ...], group_size: int, in_features: int) -> int | None:
    if len(scale_shape) != 3 or scale_shape[0] not in (1, 2) or group_size < 1:
        return None
    _, rows, groups = scale_shape
    return groups * group_size if count == rows * groups * group_size else None


def _nibbles(packed: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The low and the high nibbles less the offset, each fp32 [N, groups, group / 2]."""
    grouped = packed.view(packed.shape[0], groups, -1)
    return (grouped & 15).float() - ZERO_OFFSET, (grouped >> 4).float() - ZERO_OFFSET


def _halves(packed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Rows of the weight in fp32 [N, K]: the even columns, and then the odd ones."""
    n, groups = scale.shape
    halves = []
    for nibbles in _nibbles(packed, groups):
        half = nibbles * scale.float().unsqueeze(-1)
        halves.append((half if zero is None else half + zero.float().unsqueeze(-1)).view(n, -1))
    return torch.cat(halves, dim=1)


def _matmul(x: Tensor, packed: Tensor, planes: Tensor, group_size: int) -> Tensor:
    groups = planes.shape[2]
    scale, zero = planes[0], planes[1] if planes.shape[0] == 2 else None
    if packed.shape[0] == 1 or not statically_known_true(x.shape[0] == 1):
        return multiply_in_pieces(torch.cat([x[:, ::2], x[:, 1::2]], dim=1), [packed, scale, zero], _halves)
    even, odd = (stored(x[0, first::2].float()).view(groups, -1) for first in (0, 1))
    low, high = _nibbles(packed, groups)
    y = ((low * even + high * odd) * scale.float().unsqueeze(-1)).sum((1, 2))
    if zero is not None:
        y = y + (zero.float() * stored((even + odd).sum(1))).sum(1)
    return y.to(x.dtype).unsqueeze(0)


LAYOUT = Layout(
    "by_row",
    pack=lambda q, shift, rows: pack(q, shift, out_rows=rows),
    packed_form=lambda n, k: ((n, k // 2), torch.uint8),
    packer=metal.packer,
    unpack=unpack,
    pack_scales=_planes,
    unpack_scales=unpack_planes,
    column_multiple=2,
    check=_check,
    kernels={"cpu": _matmul},
    rows=metal.rows_of_bytes,
    row_scales=planes_of_rows,
    experts_axis=1,
)
