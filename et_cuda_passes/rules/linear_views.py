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
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.ops import INT4_LINEARS, INT8_LINEAR
from et_cuda_passes.rules.int4_activation import epilogue_of

_view = op(torch.ops.aten.view.default)


@dataclass(frozen=True)
class LinearViews(Rule):
    """view(packed linear(view(x, [M, K])), [..., N]) -> packed linear(x)"""

    after: ClassVar[tuple[str, ...]] = ("linear_int4", "linear_int8")

    def pattern(self, x: Capture) -> Pattern:
        """A linear of ours between views, those behind it one of another up to three times."""
        operators = op(*(form.op for form in INT4_LINEARS.values()), INT8_LINEAR)
        once = _view(operators(_view(x, ..., shared=True), ..., name="linear"), ...)
        twice = _view(once, ...)
        return any_of(_view(twice, ...), twice, once)

    @requirement("a linear with nothing behind its product")
    def bare(self, m: Match) -> Answer:
        """What follows it came between the views: it reads and makes tensors of the inner shape."""
        given = epilogue_of(m.linear)
        return not given, ", ".join(given)

    @requirement("views that only join and split the rows")
    def rows(self, m: Match) -> Answer:
        """The outer view has the shape of what x is a view of, or of x itself, with N in place of K."""
        given, result = m.val(m.x).shape, m.val(m.root).shape
        return self._source(m) is not None, f"{list(given)} -> {list(result)}"

    @staticmethod
    def _source(m: Match) -> Node | None:
        """The farthest from the linear of what its input is a view of, that has the result's rows."""
        node, found = m.linear.args[0], None
        n, k = m.val(m.linear).shape[-1], m.val(node).shape[-1]
        rows = m.val(m.root).shape[:-1]
        while op_of(node) is torch.ops.aten.view.default and node not in m.program.boundary_nodes:
            node = node.args[0]
            wanted, shape = (*rows, k), m.val(node).shape
            alike = len(shape) == len(wanted) and statically_known_true(m.val(m.root).shape[-1] == n)
            if alike and all(statically_known_true(a == b) for a, b in zip(shape, wanted, strict=True)):
                found = node
        return found

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same linear, of that."""
        return b.call(m.linear.target, self._source(m), *m.linear.args[1:])
