"""Values of quantized weights that decide whether they can be packed, read in chunks of rows.

A chunk stays in a cache, and no tensor of a weight's size is created.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from et_cuda_passes.graph.program import Program
from et_cuda_passes.layouts.layout import ZERO_OFFSET
from et_cuda_passes.layouts.rows import CHUNK_BYTES, rows_per_chunk
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues, weight_rows
from et_cuda_passes.threads import for_chunks, ranges, single_threaded_operators

_T = TypeVar("_T")


def scale_and_zero_of(parts: WeightValues, shift: int) -> tuple[Tensor, Tensor]:
    """``scale`` and ``zero`` of ``(q - 8) * scale + zero``, fp32 [N, K / group_size].

    With ``q = data + shift`` the weight ``(data - zero_point) * scale - minimum`` has
    ``zero = (8 - shift - zero_point) * scale - minimum``.
    """
    scale, steps = parts.scale.float(), ZERO_OFFSET - shift
    zero = scale * steps if parts.zero_point is None else (steps - parts.zero_point.float()).mul_(scale)
    return scale, zero if parts.minimum is None else zero - parts.minimum.float()


def chunks(weight: QuantizedWeight, numbers: int) -> list[tuple[int, int]]:
    """Ranges of rows with ``CHUNK_BYTES`` numbers each, where a row has so many numbers."""
    return ranges(weight.shape[0], rows_per_chunk(numbers, CHUNK_BYTES, 1))


def of_integers(program: Program, weight: QuantizedWeight, value: Callable[[WeightValues], _T]) -> list[_T]:
    """``value`` of each chunk of rows, in any order."""
    read, found = weight_rows(program, weight), []

    def work(piece: tuple[int, int]) -> None:
        found.append(value(read(slice(*piece))))

    for_chunks(chunks(weight, weight.in_features), lambda: work, torch.device("cpu"))
    program.pool.page_out(map(program.constant, weight.sources))
    return found


def of_tables(program: Program, weight: QuantizedWeight, value: Callable[[WeightValues], _T]) -> list[_T]:
    """``value`` of each chunk of rows, in their order, for one that reads scales, zero points and minimums alone."""
    read = weight_rows(program, weight)
    with single_threaded_operators():
        found = [value(read(slice(*piece))) for piece in chunks(weight, weight.in_features // weight.group_size)]
    program.pool.page_out(map(program.constant, weight.sources))
    return found


def integer_ends(program: Program, weight: QuantizedWeight) -> tuple[int, int]:
    """The smallest and the largest integer."""
    ends = of_integers(program, weight, lambda parts: torch.aminmax(parts.data))
    return min(int(low) for low, _ in ends), max(int(high) for _, high in ends)


def nonfinite(table: Tensor | None) -> int:
    """The number of values that are NaN or infinite."""
    if table is None or not table.is_floating_point() or not table.numel():
        return 0
    # The ends are NaN if any value is. They need no tensor of the table's size.
    if all(bool(end.isfinite()) for end in torch.aminmax(table)):
        return 0
    return int((~torch.isfinite(table)).sum())


def nonfinite_int4_scales(program: Program, weight: QuantizedWeight, shift: int, dtype: torch.dtype) -> int:
    """The number of scales and zeros of :func:`scale_and_zero_of` that are NaN or infinite in ``dtype``."""

    def count(parts: WeightValues) -> int:
        if bool(_bound(parts, shift).to(dtype).isfinite()):
            return 0
        return sum(nonfinite(part.to(dtype)) for part in scale_and_zero_of(parts, shift))

    return sum(of_tables(program, weight, count))


def _bound(parts: WeightValues, shift: int) -> Tensor:
    """No scale or zero is larger than this, because rounding keeps the order of numbers; NaN if a value is."""
    steps = torch.tensor(float(abs(ZERO_OFFSET - shift)))
    if parts.zero_point is not None:
        steps = steps + _largest(parts.zero_point)
    bound = torch.clamp(steps, min=1.0) * _largest(parts.scale)
    return bound if parts.minimum is None else bound + _largest(parts.minimum)


def _largest(table: Tensor) -> Tensor:
    low, high = torch.aminmax(table)
    return torch.maximum(low.float().abs(), high.float().abs())


def nonfinite_tables(program: Program, weight: QuantizedWeight, dtype: torch.dtype | None) -> int:
    """The number of scales in ``dtype``, by default their own, and of zero points and minimums that are not finite."""

    def count(parts: WeightValues) -> int:
        scale = parts.scale if dtype is None else parts.scale.to(dtype)
        return sum(map(nonfinite, (scale, parts.zero_point, parts.minimum)))

    return sum(of_tables(program, weight, count))


def always(table: Tensor | None, value: int) -> bool:
    """Whether ``table`` is ``value`` everywhere; None stands for zeros."""
    return value == 0 if table is None else all(bool(end == value) for end in torch.aminmax(table))


def has_zeros(program: Program, weight: QuantizedWeight, shift: int) -> bool:
    """Whether any zero of :func:`scale_and_zero_of` is not 0."""
    read = weight_rows(program, weight)
    for piece in chunks(weight, weight.in_features // weight.group_size):
        parts = read(slice(*piece))
        if parts.minimum is None and always(parts.zero_point, ZERO_OFFSET - shift):
            continue
        if bool(scale_and_zero_of(parts, shift)[1].any()):
            return True
    return False
