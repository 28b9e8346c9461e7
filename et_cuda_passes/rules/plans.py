"""Plans of constants whose rows are computed in chunks, straight into their place.

No step needs a tensor of a weight's size beside the weight and the constant: the integers of a chunk are unpacked,
joined with those of other weights, and packed while they are in a cache.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from et_cuda_passes.graph.constants import Planned
from et_cuda_passes.graph.program import Program
from et_cuda_passes.layouts import Layout, embedding_table
from et_cuda_passes.layouts.rows import CHUNK_BYTES, pad_rows, rows_per_chunk
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues, weight_rows
from et_cuda_passes.rules.values import scale_and_zero_of
from et_cuda_passes.threads import ranges

Write = Callable[[int, int, Tensor], None]
"""``(start, stop, out)``: writes rows start..stop of a constant into ``out``, which is these rows of it."""
Buffers = dict[Hashable, Any]
_DEVICE_CHUNK_BYTES = 16 << 20
"""Bytes of weights that each thread packs at a time on another device, where a call costs more than its arithmetic."""


@dataclass(frozen=True, eq=False)
class RowPlan(Planned):
    """A constant whose rows are computed in chunks; ``pieces`` are the ranges of rows.

    Attributes:
        rows: number of rows, or for a stack of parts that of one part.
        writer: returns the function that writes rows, with the buffers of its thread.
        axis: of the rows, in a part; an index of it may hold several rows.
        stack_axis: of the parts; None if there is one part.
    """

    rows: int
    writer: Callable[[Buffers], Write]
    axis: int = 0
    stack_axis: int | None = field(default=None, kw_only=True)

    def worker(self, buffers: Buffers) -> Callable[[tuple[int, int], Tensor], Tensor]:
        """The function that writes a range of rows and returns their place."""
        write = self.writer(buffers)

        def work(piece: tuple[int, int], out: Tensor) -> Tensor:
            start, stop = piece
            part, first = divmod(start, self.rows)
            here = out if self.stack_axis is None else out.select(self.stack_axis, part)
            together = self.rows // here.shape[self.axis]
            place = here.narrow(self.axis, first // together, (stop - start) // together)
            write(start, stop, place)
            return place

        return work


class WeightRows:
    """The rows of weights one after another, in parts of ``rows``, each with rows of zeros behind it.

    Args:
        program: holds the weights.
        weights: of one K and one form of integers.
        rows: of a part; all rows by default.
        multiple: a part is padded to a multiple of so many rows.
    """

    def __init__(
        self, program: Program, weights: Sequence[QuantizedWeight], rows: int | None = None, multiple: int = 1
    ) -> None:
        self._readers = [(weight_rows(program, weight), weight) for weight in weights]
        self._rows = rows or sum(weight.shape[0] for weight in weights)
        self.padded = self._rows + -self._rows % multiple
        self.device = program.pool.device
        """Where the integers are packed; None for where they are."""

    def _values(self, start: int, stop: int) -> Iterator[WeightValues]:
        """The values of rows start..stop of one part, without the padding."""
        part, first = divmod(start, self.padded)
        last = min(first + stop - start, self._rows) + part * self._rows
        first = min(first, self._rows) + part * self._rows
        base = 0
        for read, weight in self._readers:
            some = slice(max(first - base, 0), min(last - base, weight.shape[0]))
            if some.start < some.stop:
                yield read(some)
            base += weight.shape[0]

    def joined(self, start: int, stop: int, table: Callable[[WeightValues], Tensor]) -> Tensor:
        """``table`` of the values of rows start..stop, and zeros for the padding."""
        found = [table(values) for values in self._values(start, stop)]
        if not found:
            found = [table(self._readers[0][0](slice(0, 1)))[:0]]
        return pad_rows(found[0] if len(found) == 1 else torch.cat(found), stop - start)


def as_bytes(q: Tensor, signed: bool) -> Tensor:
    """Integers as int8 or uint8; wider ones are converted."""
    return q if q.dtype in (torch.int8, torch.uint8) else q.to(torch.int8 if signed else torch.uint8)


def int4_plan(
    rows: WeightRows, layout: Layout, shift: int, weight: QuantizedWeight, count: int | None, sources: Any, form: Any
) -> RowPlan:
    """The packed integers: of one matrix, or of a stack of ``count`` matrices.

    Args:
        rows: the rows of all matrices; each is a part.
        layout: of each matrix.
        shift: what is added to the integers.
        weight: one of the weights.
        count: number of matrices; None for one that is no stack.
        sources: the tensors of the integers.
        form: beside the bytes of ``sources``, what determines the constant.
    """
    k, signed = weight.in_features, weight.quant_min < 0
    shape, dtype = layout.packed_form(rows.padded, k)
    multiple = layout.block_rows()
    device = rows.device
    if layout.host_specific:
        # This host's operator shows the layout.
        device, form = None, (form, torch.backends.cpu.get_cpu_capability())
    size = CHUNK_BYTES if device is None else _DEVICE_CHUNK_BYTES
    step = rows.padded if multiple is None else rows_per_chunk(k, size, multiple)

    def writer(buffers: Buffers) -> Write:
        def write(start: int, stop: int, out: Tensor) -> None:
            q = rows.joined(start, stop, lambda values: as_bytes(values.data, signed)).to(device or out.device)
            key = (layout.name, k, shift, step, q.dtype, q.device)
            if key not in buffers:
                buffers[key] = layout.packer(k, shift, step, q)
            if q.device == out.device:
                buffers[key](q, out)
            else:
                there = torch.empty(out.shape, dtype=out.dtype, device=q.device)
                buffers[key](q, there)
                out.copy_(there)

        return write

    stack = () if count is None else (count,)
    pieces = ranges((count or 1) * rows.padded, step, rows.padded)
    return RowPlan(
        (*stack, *shape),
        dtype,
        sources,
        repr(form),
        pieces,
        rows.padded,
        writer,
        stack_axis=None if count is None else 0,
    )


def int4_scales_plan(
    rows: WeightRows,
    layout: Layout,
    shift: int,
    dtype: torch.dtype,
    group_size: int,
    has_zeros: bool,
    weight: QuantizedWeight,
    count: int | None,
    sources: Any,
    form: Any,
) -> RowPlan:
    """The scales and zeros for :func:`int4_plan` in ``dtype``, in groups of ``group_size``."""
    k = weight.in_features
    repeats, groups = weight.group_size // group_size, k // group_size

    def repeated(part: Tensor) -> Tensor:
        return part if repeats == 1 else part.repeat_interleave(repeats, dim=1)

    def in_layout(scale: Tensor, zero: Tensor | None) -> Tensor:
        # All rows agree on whether there are zeros: a layout may leave them out.
        return layout.pack_scales(scale, zero if has_zeros else None, dtype, k)

    def write(start: int, stop: int, out: Tensor) -> None:
        if not has_zeros:
            out.copy_(in_layout(repeated(rows.joined(start, stop, lambda values: values.scale.float())), None))
            return
        pair = rows.joined(start, stop, lambda values: torch.cat(scale_and_zero_of(values, shift), dim=1))
        out.copy_(in_layout(*map(repeated, pair.chunk(2, dim=1))))

    one = torch.ones(1, groups)
    shape = list(in_layout(one, one).shape)
    shape[1] = rows.padded
    if count is not None:
        assert layout.experts_axis is not None
        shape.insert(layout.experts_axis, count)
    pieces = ranges((count or 1) * rows.padded, rows_per_chunk(8 * groups, CHUNK_BYTES, 1), rows.padded)
    return RowPlan(
        tuple(shape),
        dtype,
        sources,
        repr(form),
        pieces,
        rows.padded,
        lambda _: write,
        axis=1,
        stack_axis=None if count is None else layout.experts_axis,
    )


def embedding_plan(
    program: Program, weight: QuantizedWeight, bits: int, offset: int, sources: Any, form: Any
) -> RowPlan:
    """The packed table of :mod:`.layouts.embedding_table`."""
    rows, k = WeightRows(program, [weight]), weight.in_features
    step = rows_per_chunk(k, CHUNK_BYTES, 1)

    def writer(buffers: Buffers) -> Write:
        def write(start: int, stop: int, out: Tensor) -> None:
            q = rows.joined(start, stop, lambda values: values.data)
            key = ("embedding_table", k, bits, offset, step, q.dtype, q.device)
            if key not in buffers:
                buffers[key] = embedding_table.packer(k, bits, offset, step, q)
            buffers[key](q, out)

        return write

    n, dtype = weight.shape[0], torch.int8 if bits == 8 else torch.uint8
    shape = (n, k // embedding_table.weights_per_byte(bits))
    return RowPlan(shape, dtype, sources, repr(form), ranges(n, step), n, writer)


def table_plan(
    program: Program,
    weight: QuantizedWeight,
    columns: int,
    dtype: torch.dtype,
    table: Callable[[WeightValues], Tensor],
    sources: Any,
    form: Any,
) -> RowPlan:
    """``table`` of the values of each row of ``weight``, [N, columns] in ``dtype``."""
    rows = WeightRows(program, [weight])

    def write(start: int, stop: int, out: Tensor) -> None:
        out.copy_(rows.joined(start, stop, table))

    n = weight.shape[0]
    pieces = ranges(n, rows_per_chunk(columns * 8, CHUNK_BYTES, 1))
    return RowPlan((n, columns), dtype, sources, repr(form), pieces, n, lambda _: write)


def interleaved(gate: RowPlan, up: RowPlan, block: int, form: Any) -> RowPlan:
    """``block`` rows of ``gate``, ``block`` of ``up``, and so on; a constant is one part with one row to an index."""
    axis = gate.axis
    shape = list(gate.shape)
    shape[axis] *= 2

    def writer(buffers: Buffers) -> Write:
        writes = [plan.writer(buffers) for plan in (gate, up)]

        def write(start: int, stop: int, out: Tensor) -> None:
            halves = out.unflatten(axis, (-1, 2, block))
            first, last = start // 2, stop // 2
            half = list(out.shape)
            half[axis] //= 2
            for index, each in enumerate(writes):
                rows = out.new_empty(half)
                each(first, last, rows)
                halves.select(axis + 1, index).copy_(rows.unflatten(axis, (-1, block)))

        return write

    # The chunks of the gate, twice as long; a range ends where a block does.
    step = max(stop - start for start, stop in gate.pieces)
    pieces = ranges(2 * gate.rows, max(block, step // block * block) * 2)
    return RowPlan(
        tuple(shape),
        gate.dtype,
        (*gate.sources, *up.sources),
        repr((form, gate.form, up.form)),
        pieces,
        2 * gate.rows,
        writer,
        axis,
    )


def plan_of(program: Program, node: Any, axis: int) -> RowPlan:
    """The plan of a constant, or one that copies its rows along ``axis``."""
    plan = program.plan(node)
    if isinstance(plan, RowPlan):
        return plan
    held = program.constant(node)
    assert held is not None
    tensor, rows = held.detach(), held.shape[axis]

    def write(start: int, stop: int, out: Tensor) -> None:
        out.copy_(tensor.narrow(axis, start, stop - start))

    step = rows_per_chunk(max(1, tensor.nbytes // rows), CHUNK_BYTES, 8)
    return RowPlan(
        tuple(tensor.shape), tensor.dtype, (tensor,), "constant", ranges(rows, step), rows, lambda _: write, axis
    )
