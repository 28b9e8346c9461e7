"""embedding(dequantize(table of at most 8 bits), ids) -> int8_embedding(ids, packed, scale, zero)

Only the rows asked for are dequantized. The constants are those of an int8 linear: a table tied to one is held once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Rule, requirement
from et_cuda_passes.ops import INT8_EMBEDDING
from et_cuda_passes.quant.affine import dequantized, weight_of, weight_values
from et_cuda_passes.rules.packing import int8_shift, pack_int8
from et_cuda_passes.rules.requirements import integers_are_in_range, table_is_grouped_along_k, weight_has_data


@requirement("a table of at most 8 bits", hint="quantize with weight_dtype=torch.int8")
def table_fits_8_bits(m: Match) -> Failure | None:
    """The range fits -128..127 once shifted."""
    weight = weight_of(m)
    if int8_shift(weight) is not None:
        return None
    return Failure(f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}")


@requirement("scales that are finite in the result's dtype", stage="values", hint="quantize the weight again")
def scales_are_finite(m: Match) -> Failure | None:
    """A NaN or infinite scale would make every number of its group NaN or infinite."""
    scale = weight_values(m.program, weight_of(m)).scale.to(m.val(m.root).dtype)
    bad = int((~torch.isfinite(scale)).sum())
    return Failure(f"{bad} that are NaN or infinite") if bad else None


@dataclass(frozen=True)
class EmbeddingInt8(Rule):
    """embedding(dequantize(table of at most 8 bits), ids) -> int8_embedding(ids, packed, scale, zero)"""

    # What int4 tables take is half the size there.
    after: ClassVar[tuple[str, ...]] = ("embedding_int4",)
    requirements = (
        weight_has_data,
        integers_are_in_range,
        table_is_grouped_along_k,
        table_fits_8_bits,
        scales_are_finite,
    )

    def pattern(self, ids: Capture) -> Pattern:
        """An embedding; its other arguments concern training."""
        return op(torch.ops.aten.embedding.default)(dequantized(..., name="weight", shared=True), ids, ...)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"{weight_of(m).scheme} -> table (int8)"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Take the integers and call the operator."""
        weight, dtype = weight_of(m), m.val(m.root).dtype
        # Plain operators have every group size.
        packed, scale, zero = pack_int8(b, weight, weight.group_size, dtype)
        return b.call(INT8_EMBEDDING, m.ids, packed, scale, zero, weight.group_size, dtype)
