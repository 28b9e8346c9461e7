"""What makes a convolution of kernel size 1 a linear: its channels are the last axis, and the rest are rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import dequantized
from et_cuda_passes.rules.packed_linear import PackedLinear

aten = torch.ops.aten

_convolution = op(
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)


@dataclass(frozen=True, kw_only=True)
class PointwiseConv(PackedLinear):
    """convolution of kernel size 1 -> linear, between two permutes

    A mixin before a rule that packs a linear: it finds a convolution, and hands the rows over.
    """

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A convolution, its weight dequantized."""
        return _convolution(self.activation(x), dequantized(..., name="weight", shared=True), bias, ...)

    @requirement("a weight [N, K] quantized in groups along K")
    def groups(self, m: Match) -> Answer:
        """Only kernels of size 1 make a matrix, whatever granularity is asked for."""
        return super().groups(m)

    @requirement("kernels of size 1", hint="larger kernels have no quantized form: leave this layer unquantized")
    def kernel_size(self, m: Match) -> Answer:
        """What makes it a linear."""
        sizes = list(m.val(m.weight).shape[2:])
        return all(size == 1 for size in sizes), f"kernels of {' x '.join(map(str, sizes))}"

    @requirement("stride 1, no padding, one group, not transposed", hint="leave this layer unquantized")
    def plain(self, m: Match) -> Answer:
        """Otherwise not every output is a linear of one input position. The dilation of one element says nothing."""
        bound = arguments(m.root)
        wanted: dict[str, tuple[Any, ...]] = {
            "stride": (1,),
            "padding": (0, "valid", "same"),
            "groups": (1,),
            "transposed": (False,),
        }
        found = []
        for name, allowed in wanted.items():
            value = bound.get(name, allowed[0])
            if any(part not in allowed for part in (value if isinstance(value, (list, tuple)) else [value])):
                found.append(f"{name} {value}")
        return not found, ", ".join(found)

    def input(self, b: Builder, m: Match) -> Node:
        """The channels last."""
        x, channels = super().input(b, m), self._channels(m)
        rank = m.val(x).dim()
        return self._permute(b, x, [axis for axis in range(rank) if axis != channels] + [channels])

    def output(self, b: Builder, m: Match, y: Node) -> Node:
        """The channels where a convolution has them, in its memory format: a view after it may rely on that."""
        channels, y = self._channels(m), super().output(b, m, y)
        order = list(range(m.val(y).dim() - 1))
        y = self._permute(b, y, [*order[:channels], len(order), *order[channels:]])
        if b.program.is_edge or statically_known_true(m.val(m.root).stride(channels) == 1):
            return y
        return b.call(aten.clone.default, y, memory_format=torch.contiguous_format)

    @staticmethod
    def _channels(m: Match) -> int:
        """The axis of x that holds the channels: the second, or the first of an input without a batch."""
        return m.val(m.x).dim() - m.val(m.weight).dim() + 1

    @staticmethod
    def _permute(b: Builder, x: Node, order: list[int]) -> Node:
        return b.call(aten.permute_copy.default if b.program.is_edge else aten.permute.default, x, order)
