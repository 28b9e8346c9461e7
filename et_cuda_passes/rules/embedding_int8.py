"""embedding(dequantize(table of at most 8 bits), ids) -> int8_embedding(ids, packed, scale, zero)

Only the rows asked for are dequantized. The constants are those of an int8 linear: a table tied to one is held once.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.ops import INT8_EMBEDDING
from et_cuda_passes.quant.affine import weight_of, weight_values
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.packed_table import PackedTable
from et_cuda_passes.rules.packing import int8_shift, pack_int8


@dataclass(frozen=True)
class EmbeddingInt8(PackedTable):
    """embedding(dequantize(table of at most 8 bits), ids) -> int8_embedding(ids, packed, scale, zero)"""

    # What int4 tables take is half the size there.
    after: ClassVar[tuple[str, ...]] = ("embedding_int4",)

    @requirement("a table of at most 8 bits", hint="quantize with weight_dtype=torch.int8")
    def eight_bits(self, m: Match) -> Answer:
        """The range fits -128..127 once shifted."""
        weight = weight_of(m)
        return int8_shift(weight) is not None, f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}"

    @requirement("scales that are finite in the result's dtype", stage="values", hint="quantize the weight again")
    def finite(self, m: Match) -> Answer:
        """A NaN or infinite scale would spread over the output unseen."""
        return answers.finite([weight_values(m.program, weight_of(m)).scale.to(m.val(m.root).dtype)])

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"{weight_of(m).scheme} -> table (int8)"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Take the integers and call the operator."""
        weight, dtype = weight_of(m), m.val(m.root).dtype
        # Plain operators have every group size.
        packed, scale, zero = pack_int8(b, weight, weight.group_size, dtype)
        return b.call(INT8_EMBEDDING, m.ids, packed, scale, zero, weight.group_size, dtype)
