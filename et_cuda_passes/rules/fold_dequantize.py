"""dequantize(constant) -> a float constant, computed at compile time

For a target that has no kernel for a quantized weight, and that would not refuse it but compute something else. The
weight takes as much room as it had before it was quantized; the report says so, and names the scheme that avoids it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node, map_arg

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Pattern
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import dequantized, weight_of, weight_values
from et_cuda_passes.quant.candidates import consumers
from et_cuda_passes.quant.dynamic import quantized_activation_of
from et_cuda_passes.rules.needs_values import NeedsValues

_ALTERNATIVE = (
    "for a 4-bit kernel quantize with Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, "
    "weight_granularity=PerGroup(32))"
)
_ALTERNATIVE_FOR_A_TABLE = (
    "for a quantized embedding quantize with IntxWeightOnlyConfig(torch.int4, PerGroup(32)): quantized_embedding takes "
    "up to 8 bits in groups along K"
)


@dataclass(frozen=True)
class FoldDequantize(NeedsValues):
    """dequantize(constant) -> a float constant, computed at compile time"""

    after: ClassVar[tuple[str, ...]] = (
        "keep_dynamic_int4",
        "keep_dynamic_int8",
        "keep_dynamic_per_tensor",
        "keep_static_int8",
        "quantized_embedding",
    )

    def pattern(self) -> Pattern:
        """Any dequantized weight, whoever reads it."""
        return dequantized(..., name="weight")

    @requirement(
        "readers of float activations",
        hint="a float weight under quantized activations has no kernel either: meet what the kernels above ask for",
    )
    def float_activations(self, m: Match) -> Answer:
        """The delegate has no operator for an activation's quantization apart from a linear that it takes whole."""
        kept = m.program.kept
        found = (quantized_activation_of(reader) for reader in consumers(m.weight) if reader not in kept)
        text = next(filter(None, found), "")
        return not text, text

    @requirement("finite scales", stage="values", hint="quantize the weight again")
    def finite(self, m: Match) -> Answer:
        """A NaN or infinite scale would spread over the output unseen."""
        weight = weight_of(m)
        scale = None if weight.scale is None else m.program.constant(weight.scale)
        if scale is None:
            scale = (
                torch.tensor(weight.constant_qparams[0])
                if weight.constant_qparams
                else weight_values(m.program, weight).scale
            )
        bad = int((~torch.isfinite(scale)).sum())
        return bad == 0, f"{bad} NaN or infinite scales"

    def note(self, m: Match) -> str:
        """What the fold costs and what would avoid it."""
        dtype = str(m.val(m.weight).dtype).removeprefix("torch.")
        table = all(op_of(reader) is torch.ops.aten.embedding.default for reader in consumers(m.weight))
        return (
            f"target {m.target.name} has no kernel for a weight-only {weight_of(m).scheme} weight: folded to {dtype}, "
            f"as large as before it was quantized; {_ALTERNATIVE_FOR_A_TABLE if table else _ALTERNATIVE}"
        )

    def summary(self, m: Match) -> str:
        """The scheme that was given up."""
        return f"{weight_of(m).scheme} -> float weight"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Run the dequantize operator itself, on the constants: nothing is rounded otherwise than before."""
        weight, node = weight_of(m), m.root
        operator: Callable[..., torch.Tensor] = cast(Any, op_of(node))

        def value(argument: Node) -> Any:
            tensor = b.program.constant(argument)
            assert tensor is not None
            return tensor.detach()

        def folded() -> torch.Tensor:
            args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
            result: torch.Tensor = operator(*args, **kwargs)
            return result

        # All that is no constant: numbers and dtypes as the graph has them, under their names.
        said = [(name, "" if isinstance(given, Node) else repr(given)) for name, given in arguments(node).items()]
        form = ("dequantized", operator, tuple(said))
        return b.constant(f"{weight.fqn}.dequantized", weight.sources, form, folded)
