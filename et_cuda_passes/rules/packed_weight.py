"""What every rule demands that packs a weight's integers."""

from et_cuda_passes.graph.match import MatchContext
from et_cuda_passes.graph.rule import Answer, require
from et_cuda_passes.quant.affine import affine
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.needs_values import NeedsValues


class PackedWeight(NeedsValues):
    """dequantize(weight) read -> the packed weight read"""

    @require(
        "integers within the quantized range", stage="values", hint="the checkpoint is damaged or of another scheme"
    )
    def in_range(self, m: MatchContext) -> Answer:
        """An integer outside of it would overwrite its neighbour, or wrap."""
        return answers.in_range(m, affine(m))
