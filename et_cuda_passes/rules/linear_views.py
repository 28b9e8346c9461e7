"""view(packed linear(view(x, [M, K])), [..., N]) -> packed linear(x)

``run_decompositions`` turns a linear of more than two dimensions into a matrix product between two views. The operators
of :mod:`et_cuda_passes.ops` take any number of dimensions, so the views are no longer needed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.context import MatchContext
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, Rule, require
from et_cuda_passes.ops import INT4_LINEARS, INT8_LINEAR
from et_cuda_passes.rules.int4_activation import epilogue_of

_view = op(torch.ops.aten.view.default)


@dataclass(frozen=True)
class LinearViews(Rule):
    """view(packed linear(view(x, [M, K])), [..., N]) -> packed linear(x)"""

    after: ClassVar[tuple[str, ...]] = ("linear_int4", "linear_int8")

    def pattern(self, x: Capture) -> Pattern:
        """A linear of ours between two views."""
        operators = op(*(form.op for form in INT4_LINEARS.values()), INT8_LINEAR)
        return _view(operators(_view(x, ..., shared=True), ..., name="linear"), ...)

    @require("a linear with nothing behind its product")
    def bare(self, m: MatchContext) -> Answer:
        """What follows it came between the views: it reads and makes tensors of the inner shape."""
        given = epilogue_of(m.linear)
        return not given, ", ".join(given)

    @require("views that only join and split the rows")
    def rows(self, m: MatchContext) -> Answer:
        """The outer view has x's own shape with N in place of K."""
        given, result = m.val(m.x).shape, m.val(m.root).shape
        wanted = (*given[:-1], m.val(m.linear).shape[-1])
        same = len(result) == len(wanted) and all(
            statically_known_true(a == b) for a, b in zip(result, wanted, strict=True)
        )
        return same and statically_known_true(given[-1] == self._in_features(m)), f"{list(given)} -> {list(result)}"

    @staticmethod
    def _in_features(m: MatchContext) -> int | torch.SymInt:
        return m.val(m.linear.args[0]).shape[-1]

    def emit(self, b: Builder, m: MatchContext) -> Node:
        """The same linear, of x itself."""
        return b.call(m.linear.target, m.x, *m.linear.args[1:])
