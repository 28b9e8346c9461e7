"""What the rules share that pack a quantized table whose rows are looked up."""

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import dequantized, weight_of
from et_cuda_passes.rules.packed_weight import PackedWeight


class PackedTable(PackedWeight):
    """embedding(dequantize(table), ids) -> rows of the packed table, dequantized"""

    def pattern(self, ids: Capture) -> Pattern:
        """An embedding; what its other arguments say concerns training."""
        return op(torch.ops.aten.embedding.default)(dequantized(..., name="weight", shared=True), ids, ...)

    @requirement("a table [N, K] quantized in groups along K", hint="quantize with granularity PerGroup or PerAxis(0)")
    def groups(self, m: Match) -> Answer:
        """One scale for each row and group."""
        size = weight_of(m).group_size
        return True, f"group size {size}"
