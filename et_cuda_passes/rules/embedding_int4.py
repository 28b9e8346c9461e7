"""embedding(dequantize(int4 table), ids) -> int4_embedding(ids, packed, scale_and_zero)

Only the rows asked for are dequantized. The table is packed as an int4 linear of the target packs it, where that can be
read row by row: a table tied to a linear is then held once for both.
"""

from dataclasses import dataclass

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_EMBEDDINGS
from et_cuda_passes.quant.affine import weight_of
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.packed_table import PackedTable
from et_cuda_passes.rules.packing import pack_int4


@dataclass(frozen=True)
class EmbeddingInt4(PackedTable):
    """embedding(dequantize(int4 table), ids) -> int4_embedding(ids, packed, scale_and_zero)"""

    @staticmethod
    def table(m: Match) -> Kernel:
        """How the target holds an int4 table.

        Raises:
            Unmet: it has no such form.
        """
        found: Kernel | None = m.target.kernel("int4_table")
        if found is None:
            raise Unmet(f"target {m.target.name}, which has no int4 table")
        return found

    @requirement("a table of at most 4 bits", hint="quantize with weight_dtype=torch.int4")
    def four_bits(self, m: Match) -> Answer:
        """The range fits 0..15 once shifted."""
        return answers.four_bits(weight_of(m))

    @requirement("a group size that one of the layout's divides", hint="quantize with PerGroup(32)")
    def native_group(self, m: Match) -> Answer:
        """As for a linear."""
        weight = weight_of(m)
        size = weight.group_size
        return self.table(m).native_group_size(size, weight.in_features) is not None, f"group size {size}"

    @requirement("rows that the layout's tiles divide", hint="leave this layer unquantized")
    def row_length(self, m: Match) -> Answer:
        """K a multiple of the layout's ``in_multiple``."""
        k = weight_of(m).in_features
        return k % self.table(m).in_multiple == 0, f"K = {k}"

    @requirement("a result in a dtype that the layout's scales have", hint="export the model in bfloat16")
    def result_dtype(self, m: Match) -> Answer:
        """Scales in bf16 are not precise enough for more."""
        dtype = m.val(m.root).dtype
        return dtype in self.table(m).dtypes, answers.dtype_names([dtype])

    @requirement("scales and zeros that are finite in their dtype", stage="values", hint="quantize the weight again")
    def finite(self, m: Match) -> Answer:
        """A NaN or infinite scale would spread over the output unseen."""
        return answers.finite_pair(m, weight_of(m), self.table(m).scale_dtype or m.val(m.root).dtype)

    def summary(self, m: Match) -> str:
        """Scheme and layout."""
        return f"{weight_of(m).scheme} -> table ({self.table(m).layout})"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the table and call the operator."""
        weight, form, dtype = weight_of(m), self.table(m), m.val(m.root).dtype
        packed, qparams = pack_int4(b, [weight], form, form.scale_dtype or dtype)
        group_size = form.native_group_size(weight.group_size, weight.in_features)
        # Said where there is padding behind them, which an id may not name.
        rows = [weight.out_features] if weight.out_features % form.out_multiple else []
        operator = INT4_EMBEDDINGS[form.layout]
        return b.call(operator, m.ids, packed, qparams, group_size, weight.in_features, dtype, *rows)
