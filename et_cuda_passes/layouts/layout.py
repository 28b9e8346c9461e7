"""The type of a layout of int4 weights, and the choice of the shift that makes a weight's integers unsigned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, dtype

from .rows import RowPacker

ZERO_OFFSET = 8
"""Scales and zeros are given for ``(q - ZERO_OFFSET) * scale + zero`` with q in 0..15."""

Matmul = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(x [M, K], packed, scale_and_zero, group_size) -> [M, rows]``, where rows includes the padding of ``packed``."""


def unsigned_shift(low: int, high: int, preferred: int = ZERO_OFFSET) -> int | None:
    """The number to add to integers in low..high so that they lie in 0..15, or None if no number in 0..15 does.

    ``preferred`` is used if it fits. 8 keeps the zero of a zero point of 0 at 0.
    """
    for shift in (preferred, ZERO_OFFSET, 0, -low):
        if 0 <= shift <= 15 and low + shift >= 0 and high + shift <= 15:
            return shift
    return None


@dataclass(frozen=True)
class Layout:
    """Where a layout puts the bits of a weight q [N, K] in 0..15, and its scales and zeros.

    N is out_features, padded to whole tiles; K' is in_features K with the layout's padding.

    Attributes:
        name: the end of the names of the operators that read the layout, as in ``int4_linear_<name>``.
        pack: ``(q, shift, rows) -> packed`` for uint8 or int8 q with q + shift in 0..15; rows beyond N hold weight 0.
            Several rows, if the layout has blocks, belong to one index of the first axis.
        packed_form: ``(N, K) -> shape, dtype`` of ``packed``.
        packer: ``(k, shift, rows, like) -> function that packs at most so many rows`` of q with the dtype and device of
            ``like``; it may be called for any run of whole blocks.
        block_rows: number of rows of a block, None if all rows must be packed at once. Called when it is needed.
        unpack: ``packed -> q`` as uint8 [N, K'].
        pack_scales: ``(scale, zero, dtype, in_features) -> scale_and_zero``, from scale and zero [N, K / group_size] of
            ``(q - 8) * scale + zero``; zero is None if all zeros are 0. Axis 1 of the result is N.
        unpack_scales: ``(scale_and_zero, groups) -> scale, zero``, each [N, groups], of
            ``(q - zero_offset) * scale + zero``.
        row_multiple, column_multiple: the numbers that N, with its padding, and K must be multiples of.
        check: ``(count, scale_shape, group_size, in_features) -> K`` for ``count`` packed weights and the shape of
            scale_and_zero, or None if these do not fit each other. ``in_features`` decides where K is padded.
        zero_offset: the number that the layout's kernels subtract from q.
        shift: ``(low, high)`` of a weight's range -> the number that makes its integers unsigned, or None.
        kernels: device type -> the kernel of the device's libraries. Inductor traces it with fake tensors, so it cannot
            read values. Other devices compute from the unpacked weight.
        rows: ``(ids, packed) -> q [*ids.shape, K']``, or None if single rows cannot be read. Plain operators only,
            because Inductor fuses them into one kernel.
        row_scales: ``(ids, scale_and_zero, groups) -> scale, zero``, each [*ids.shape, groups]; None as for ``rows``.
        experts_axis: the axis of scale_and_zero along which experts are stacked, or None if the layout has no operators
            for experts.
        host_specific: whether a packed weight is valid only on hosts with the instruction set of the host that packed.
    """

    name: str
    pack: Callable[[Tensor, int, int], Tensor]
    packed_form: Callable[[int, int], tuple[tuple[int, ...], dtype]]
    packer: Callable[[int, int, int, Tensor], RowPacker]
    unpack: Callable[[Tensor], Tensor]
    pack_scales: Callable[[Tensor, Tensor | None, dtype, int], Tensor]
    unpack_scales: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    check: Callable[[int, tuple[int, ...], int, int], int | None]
    row_multiple: int = 1
    column_multiple: int = 1
    block_rows: Callable[[], int | None] = lambda: 1
    zero_offset: int = ZERO_OFFSET
    shift: Callable[[int, int], int | None] = unsigned_shift
    kernels: Mapping[str, Matmul] = field(default_factory=dict)
    rows: Callable[[Tensor, Tensor], Tensor] | None = None
    row_scales: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
    experts_axis: int | None = None
    host_specific: bool = False
