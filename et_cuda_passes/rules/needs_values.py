"""What every rule asks that computes something from a weight's values at compile time."""

from et_cuda_passes.graph.match import MatchContext
from et_cuda_passes.graph.rule import Answer, Rule, require
from et_cuda_passes.quant.affine import affine, has_data


class NeedsValues(Rule):
    """A rule over a dequantized weight that its pattern calls ``weight``."""

    @require("a constant weight that holds data")
    def data(self, m: MatchContext) -> Answer:
        """Values are needed at compile time."""
        hint = "export with real weights, not on the meta device or under FakeTensorMode"
        return has_data(m.program, affine(m)), "meta or fake tensors", hint
