"""What every rule demands that packs a weight's integers."""

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import weight_of
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.needs_values import NeedsValues


class PackedWeight(NeedsValues):
    """dequantize(weight) read -> the packed weight read"""

    @requirement(
        "integers within the quantized range", stage="values", hint="the checkpoint is damaged or of another scheme"
    )
    def in_range(self, m: Match) -> Answer:
        """An integer outside of it would overwrite its neighbour, or wrap."""
        return answers.in_range(m, weight_of(m))
