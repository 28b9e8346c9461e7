"""The requirements that several rules share, each of a match whose pattern calls the dequantize node ``weight``."""

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Failure, requirement
from et_cuda_passes.quant.affine import has_data, weight_of, weight_values


@requirement("a constant weight that holds data")
def weight_has_data(m: Match) -> Failure | None:
    """Values are needed at compile time."""
    if has_data(m.program, weight_of(m)):
        return None
    return Failure("meta or fake tensors", "export with real weights, not on the meta device or under FakeTensorMode")


@requirement(
    "integers within the quantized range", stage="values", hint="the checkpoint is damaged or of another scheme"
)
def integers_are_in_range(m: Match) -> Failure | None:
    """An integer outside of the range would overwrite its neighbour, or wrap."""
    weight = weight_of(m)
    low, high = (int(end) for end in torch.aminmax(weight_values(m.program, weight).data))
    if weight.quant_min <= low and high <= weight.quant_max:
        return None
    return Failure(f"integers {low}..{high} for a range of {weight.quant_min}..{weight.quant_max}")


@requirement("a table [N, K] quantized in groups along K", hint="quantize with granularity PerGroup or PerAxis(0)")
def table_is_grouped_along_k(m: Match) -> Failure | None:
    """A weight that can be decoded is."""
    weight_of(m)
    return None
