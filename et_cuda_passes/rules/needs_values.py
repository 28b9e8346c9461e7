"""What every rule asks that computes something from a weight's values at compile time."""

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.quant.affine import has_data, weight_of


class NeedsValues(Rule):
    """A rule over a dequantized weight that its pattern calls ``weight``."""

    @requirement("a constant weight that holds data")
    def data(self, m: Match) -> Answer:
        """Values are needed at compile time."""
        hint = "export with real weights, not on the meta device or under FakeTensorMode"
        return has_data(m.program, weight_of(m)), "meta or fake tensors", hint
