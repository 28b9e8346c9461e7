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
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.ops import INT8_EMBEDDING
from et_cuda_passes.quant.affine import dequantized, weight_of
from et_cuda_passes.rules.packing import int8_scales, pack_int8
from et_cuda_passes.rules.requirements import (
    integers_are_in_range,
    scales_are_finite,
    weight_fits_8_bits,
    weight_has_data,
    weight_is_grouped_along_k,
)


@dataclass(frozen=True)
class EmbeddingInt8(Rule):
    """embedding(dequantize(table of at most 8 bits), ids) -> int8_embedding(ids, packed, scale, zero)"""

    # What int4 tables take is half the size there.
    after: ClassVar[tuple[str, ...]] = ("embedding_int4",)
    requirements = (
        weight_has_data,
        integers_are_in_range,
        weight_is_grouped_along_k,
        weight_fits_8_bits,
        scales_are_finite(lambda m: int8_scales(m, m.val(m.root).dtype)),
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
