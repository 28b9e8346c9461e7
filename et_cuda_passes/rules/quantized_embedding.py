"""embedding(dequantize(table), ids) -> quantized_embedding(packed, scale, zero_point, ids), an operator of ExecuTorch

Only the rows asked for are dequantized, by a kernel of ExecuTorch's runtime outside of any delegate. The program that
loads the ``.pte`` needs ExecuTorch's quantized kernels: ``EXECUTORCH_BUILD_KERNELS_QUANTIZED`` in a C++ build,
``import executorch.kernels.quantized`` in Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_name, op_of
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.layouts import embedding_table
from et_cuda_passes.ops.quantized_embedding import quantized_embedding
from et_cuda_passes.quant.affine import QuantizedWeight, WeightValues, weight_of, weight_values
from et_cuda_passes.quant.candidates import consumers
from et_cuda_passes.quant.forms import is_dequantize
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.packed_table import PackedTable

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The kernels count scales with an int32.
_MOST_SCALES = 1 << 31


@dataclass(frozen=True)
class QuantizedEmbedding(PackedTable):
    """embedding(dequantize(table), ids) -> quantized_embedding(packed, scale, zero_point, ids)

    Attributes:
        check_ids: look each id up in a table of zeros, a byte a row, as well, with the kernel of a float embedding:
            an id outside of the table is then an error of that run. Of ExecuTorch's quantized kernels (executorch
            1.5.1) those of 2 and 4 bits read whatever memory lies there, and that of 8 bits ends the process.
    """

    check_ids: bool = True

    @requirement("a table of at most 8 bits", hint="quantize with weight_dtype=torch.int4")
    def width(self, m: Match) -> Answer:
        """The narrowest of 2, 4 and 8 bits that holds the range, and whose bytes K fills."""
        weight = weight_of(m)
        return bool([*_fitting(weight)]), f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}"

    @requirement("groups of two and more", hint="quantize with PerGroup(32)")
    def group(self, m: Match) -> Answer:
        """ExecuTorch's operator of 8 bits refuses groups of one."""
        size = weight_of(m).group_size
        return size > 1, f"group size {size}"

    @requirement("fewer scales than 2**31", hint="quantize with larger groups")
    def scale_count(self, m: Match) -> Answer:
        """A row behind them would be given the scales of another."""
        weight = weight_of(m)
        count = weight.out_features * (weight.in_features // weight.group_size)
        return count < _MOST_SCALES, f"{count} scales"

    @requirement("scales and a result in float32, float16 or bfloat16", hint="quantize and export in one of them")
    def dtypes(self, m: Match) -> Answer:
        """What the kernels read and write."""
        found = (weight_of(m).scale_dtype, m.val(m.root).dtype)
        return all(dtype in _DTYPES for dtype in found), answers.dtype_names(found)

    @requirement("no minimum beside the zero points", stage="values", hint="quantize the table with torchao")
    def no_minimum(self, m: Match) -> Answer:
        """As a zero point it would be rounded."""
        return weight_values(m.program, weight_of(m)).minimum is None, "minimums"

    @requirement("zero points that are exact in their dtype", stage="values", hint="keep the scales in float32")
    def exact_points(self, m: Match) -> Answer:
        """The kernels read them in the dtype of the scales."""
        weight = weight_of(m)
        points = _points(weight_values(m.program, weight), weight)
        off = int((points.to(_read_in(weight, m.val(m.root).dtype)).double() != points).sum())
        return off == 0, f"{off} that are not"

    @requirement("finite scales", stage="values", hint="quantize the weight again")
    def finite(self, m: Match) -> Answer:
        """A NaN or infinite scale would spread over the output unseen."""
        bad = int((~torch.isfinite(weight_values(m.program, weight_of(m)).scale)).sum())
        return bad == 0, f"{bad} NaN or infinite scales"

    def note(self, m: Match) -> str:
        """What the runtime must have, and who else reads the table."""
        dequantized = [node for node in weight_of(m).data.users if is_dequantize(node)]
        others = [reader for node in dequantized for reader in consumers(node) if not _looks_up(reader)]
        tied = [f"{op_name(reader.target)} ({reader.name})" for reader in others]
        text = "needs ExecuTorch's quantized kernels at run time (Python: import executorch.kernels.quantized)"
        if tied:
            text += f"; the table is tied to {', '.join(tied)}, for which the weight is there a second time"
        return text

    def summary(self, m: Match) -> str:
        """Scheme and operator."""
        return f"{weight_of(m).scheme} -> {quantized_embedding(_bits(weight_of(m)))._schema.name.partition('::')[2]}"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the table. Where scales and result differ in dtype the scales become float32, which loses nothing."""
        weight, dtype = weight_of(m), m.val(m.root).dtype
        bits, read_in = _bits(weight), _read_in(weight, dtype)
        shift = _offset(weight, bits)
        assert shift is not None
        form = ("embedding_table", bits, shift)
        numbers = (*form, read_in, weight.values_key)

        def points() -> Tensor:
            return _points(weight_values(b.program, weight), weight).to(read_in)

        packed = b.constant(
            f"{weight.fqn}.packed",
            (weight.data,),
            (*form, weight.integers_key),
            lambda: embedding_table.pack(weight_values(b.program, weight).data, bits, shift),
        )
        scale = b.constant(
            f"{weight.fqn}.scale",
            weight.sources,
            (*numbers, "scale"),
            lambda: weight_values(b.program, weight).scale.to(
                read_in, copy=True, memory_format=torch.contiguous_format
            ),
        )
        zero_point = None
        if bool(points().any()):
            zero_point = b.constant(f"{weight.fqn}.zero_point", weight.sources, (*numbers, "zero_point"), points)
        # The kernels of 8 bits know int64 alone.
        ids = m.ids if m.val(m.ids).dtype is torch.int64 else b.cast(m.ids, torch.int64)
        if self.check_ids:
            ids = _checked(b, ids, weight)
        half = 1 << bits - 1
        # The kernels take zero points in the result's dtype alone, and end the process otherwise.
        given = dtype if zero_point is None else read_in
        rows = b.call(quantized_embedding(bits), packed, scale, zero_point, -half, half - 1, ids, dtype=given)
        return rows if given is dtype else b.cast(rows, dtype)


def _looks_up(node: Node) -> bool:
    return op_of(node) is aten.embedding.default


def _offset(weight: QuantizedWeight, bits: int) -> int | None:
    """What is added to the integers so that they lie in 0..2**bits - 1; None where the range is wider.

    Half of it where that does it, so that a zero point of 0 stays 0.
    """
    for candidate in (1 << bits - 1, -weight.quant_min):
        if weight.quant_min + candidate >= 0 and weight.quant_max + candidate < 1 << bits:
            return candidate
    return None


def _fitting(weight: QuantizedWeight) -> Iterator[int]:
    """The widths of tables that hold ``weight``, narrowest first."""
    for bits in embedding_table.BITS:
        if _offset(weight, bits) is not None and weight.in_features % embedding_table.weights_per_byte(bits) == 0:
            yield bits


def _bits(weight: QuantizedWeight) -> int:
    found = next(_fitting(weight), None)
    if found is None:
        raise Unmet(f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}")
    return found


def _points(parts: WeightValues, weight: QuantizedWeight) -> Tensor:
    """The zero points of what the kernel reads, u - 2**(bits - 1), in float64 [N, K / group_size]."""
    bits = _bits(weight)
    shift = _offset(weight, bits)
    assert shift is not None
    points = torch.full(parts.scale.shape, shift - (1 << bits - 1), dtype=torch.float64)
    return points if parts.zero_point is None else points + parts.zero_point.double()


def _read_in(weight: QuantizedWeight, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales and zero points: as they are, or float32, which holds each of the others exactly."""
    return dtype if weight.scale_dtype is dtype else torch.float32


def _checked(b: Builder, ids: Node, weight: QuantizedWeight) -> Node:
    """``ids``, as a sum with zeros that the kernel of a float embedding looks up by them, and which it may refuse."""
    rows = weight.out_features
    zeros = b.constant(
        f"{weight.fqn}.zeros", (weight.data,), ("zeros", rows), lambda: torch.zeros(rows, 1, dtype=torch.uint8)
    )
    found = b.call(aten.embedding.default, zeros, ids)
    squeeze = aten.squeeze_copy.dims if b.program.is_edge else aten.squeeze.dims
    return b.call(aten.add.Tensor, ids, b.call(squeeze, found, [-1]))
