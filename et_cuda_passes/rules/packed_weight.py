"""What every rule demands that packs a weight's integers."""

import torch

from et_cuda_passes.graph.context import MatchContext
from et_cuda_passes.graph.rule import Answer, require
from et_cuda_passes.quant.affine import affine, values
from et_cuda_passes.rules.needs_values import NeedsValues


class PackedWeight(NeedsValues):
    """dequantize(weight) read -> the packed weight read"""

    @require(
        "integers within the quantized range", stage="values", hint="the checkpoint is damaged or of another scheme"
    )
    def in_range(self, m: MatchContext) -> Answer:
        """An integer outside of it would overwrite its neighbour, or wrap."""
        weight = affine(m)
        low, high = (int(end) for end in torch.aminmax(values(m.program, weight).data))
        inside = weight.quant_min <= low and high <= weight.quant_max
        return inside, f"integers {low}..{high} for a range of {weight.quant_min}..{weight.quant_max}"
