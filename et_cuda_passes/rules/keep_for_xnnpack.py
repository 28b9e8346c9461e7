"""What every rule asks that keeps a quantized pattern because XNNPACK computes it."""

from dataclasses import dataclass

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, Keep, requirement
from et_cuda_passes.rules.needs_values import NeedsValues


@dataclass(frozen=True)
class KeepForXnnpack(NeedsValues, Keep):
    """linear(dequantize(quantize(x)), dequantize(weight), bias) -> itself"""

    @requirement(
        "a place outside control flow",
        hint="executorch 1.5.1 lowers no linear inside it for XNNPACK, a float one neither: take the layer out of it",
    )
    def no_branch(self, m: Match) -> Answer:
        """The delegate reads a weight as a constant of the program; in a branch it is an operand."""
        subgraphs = m.program.subgraphs
        return not subgraphs.in_control_flow(m.root), subgraphs.path(m.root)

    def note(self, m: Match) -> str:
        """Why it is kept."""
        return "XNNPACK has its own kernel for it and takes the pattern as it stands"
