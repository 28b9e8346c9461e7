"""What the rules share that pack a linear's quantized weight for a kernel of the target."""

from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import dequantized_matrix, weight_of
from et_cuda_passes.quant.dynamic import decode_dynamic, dynamically_quantized
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.linear import linear
from et_cuda_passes.rules.packed_weight import PackedWeight

aten = torch.ops.aten


def is_vector(tensor: torch.Tensor, length: int) -> bool:
    """Whether it is known to be one of ``length`` numbers."""
    return tensor.dim() == 1 and statically_known_true(tensor.shape[0] == length)


@dataclass(frozen=True, kw_only=True)
class PackedLinear(PackedWeight):
    """linear(x, dequantize(weight), bias) -> a kernel's linear of x and the packed weight

    Attributes:
        drop_activation_quantization: where the activations are quantized on the fly, compute with the activations
            themselves: faster and closer to the unquantized model, but not what the graph says. Off, their
            quantization stays as it is, exact, and the weight alone is packed.
    """

    drop_activation_quantization: bool = False

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear in any form, its weight dequantized; of stacked experts, one."""
        return linear(self.activation(x), dequantized_matrix(), bias)

    def activation(self, x: Capture) -> Pattern:
        """``x``, or with the option on what ``x`` was before it was quantized on the fly."""
        if not self.drop_activation_quantization:
            return x
        quantized = dynamically_quantized(x, name="activation")
        return any_of(quantized, op(aten.view.default)(quantized, ..., name="rows", shared=True), x)

    @requirement("activations, bias and result of one dtype")
    def one_dtype(self, m: Match) -> Answer:
        """As they are but under autocast."""
        return answers.one_dtype(m, m.x, *([] if m.bias is None else [m.bias]))

    @requirement(
        "activations whose quantization can be left out",
        hint="drop_activation_quantization=False keeps it as it is",
    )
    def droppable(self, m: Match) -> Answer:
        """Quantized with parameters chosen from themselves, and of one dtype before and after."""
        if "activation" not in m.match.bindings:
            return True, ""
        m.memoize(decode_dynamic, "activation")
        before, after = m.val(m.x).dtype, m.val(m.activation).dtype
        return before is after, f"{before} quantized and dequantized to {after}"

    @requirement(
        "a weight [N, K] quantized in groups along K",
        hint="quantize with granularity PerGroup or PerAxis(0)",
    )
    def groups(self, m: Match) -> Answer:
        """One scale for each row and group, or for several rows, for each of which it is then repeated."""
        size = weight_of(m).group_size
        return True, f"group size {size}"

    def input(self, b: Builder, m: Match) -> Node:
        """What the kernel multiplies, [..., K]."""
        x: Node = m.x
        if "rows" not in m.match.bindings:
            return x
        view = aten.view_copy.default if b.program.is_edge else aten.view.default
        return b.call(view, x, *m.rows.args[1:])

    def kernel_bias(self, m: Match) -> Node | None:
        """The bias if it is what a kernel adds, a vector [N]; a matrix product takes whatever broadcasts."""
        bias: Node | None = m.bias
        return bias if bias is not None and is_vector(m.val(bias), weight_of(m).shape[0]) else None

    def output(self, b: Builder, m: Match, y: Node) -> Node:
        """What replaces the root, from the kernel's result [..., N]."""
        return y if m.bias is self.kernel_bias(m) else b.call(aten.add.Tensor, y, m.bias)

    def dropped(self, m: Match) -> str:
        """For :meth:`detail`: that the activations are no longer quantized."""
        return ", activation quantization dropped" if "activation" in m.match.bindings else ""
