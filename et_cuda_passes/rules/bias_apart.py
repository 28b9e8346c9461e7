"""linear(x, weight, bias) -> linear(x, weight) + bias, where XNNPACK would read a bias that is not one

``torch.nn.functional.linear`` takes whatever broadcasts. With executorch 1.5.1 the delegate reads out_features numbers
from a constant bias of any shape, behind its end too, and reports no error; of a float linear as of a quantized one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.rules.packed_linear import is_vector

_LINEAR, _ADD = torch.ops.aten.linear.default, torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class BiasApart(Rule):
    """linear(x, weight, bias) -> linear(x, weight) + bias, where the bias is no vector [out_features]"""

    before: ClassVar[tuple[str, ...]] = (
        "keep_dynamic_int4",
        "keep_dynamic_int8",
        "keep_dynamic_per_tensor",
        "keep_static_int8",
        "quantized_embedding",
        "fold_dequantize",
    )
    reports_misses: ClassVar[bool] = False

    def pattern(self, x: Capture, weight: Capture, bias: Capture) -> Pattern:
        """Any linear with a bias, quantized or not."""
        return op(_LINEAR)(x, weight, bias)

    @requirement("a constant bias that is no vector [out_features]")
    def wide(self, m: Match) -> Answer:
        """A computed one is added behind the linear by the lowering itself."""
        bias = m.val(m.bias)
        constant = m.program.constant(m.bias) is not None
        return constant and not is_vector(bias, m.val(m.weight).shape[0]), f"{m.bias.name} {list(bias.shape)}"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The linear without it, and a sum."""
        return b.call(_ADD, b.call(_LINEAR, m.x, m.weight), m.bias)
