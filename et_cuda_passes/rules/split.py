"""Parts of a tensor as slices, for ExecuTorch's CUDA backend.

``split``, ``chunk`` and ``unbind`` give views. With executorch 1.5.1 the stock CUDA partitioner lowers no program that
has one of them, quantized or not. The backend turns the copying form in the edge program back into the view, and a
later pass of its own refuses that: "Cannot preserve operator aten.split.Tensor because it is a view". It lowers slices.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Rule, requirement

aten = torch.ops.aten
_OPS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.unbind.int,
)


@requirement("an axis whose size is known at export")
def axis_is_static(m: Match) -> Failure | None:
    """The parts' places are numbers then."""
    size = m.val(m.x).shape[_axis(m)]
    return None if isinstance(size, int) else Failure(f"{size}")


@requirement("sizes that are known at export")
def sizes_are_static(m: Match) -> Failure | None:
    """A size that the program computes is a node."""
    computed = [node.name for node in m.parts.all_input_nodes[1:]]
    return Failure(", ".join(computed)) if computed else None


@dataclass(frozen=True)
class ReplaceSplit(Rule):
    """getitem(split(x, sizes, dim), i) -> slice(x, dim, start, end)"""

    reports_misses: ClassVar[bool] = False
    requirements = (axis_is_static, sizes_are_static)

    def pattern(self, x: Capture, index: Capture) -> Pattern:
        """One part; other readers may take the others."""
        return op(operator.getitem)(op(*_OPS)(x, ..., name="parts", shared=True), index)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """A slice; of ``unbind``, whose parts lack the axis, one index of it."""
        axis = _axis(m)
        if op_of(m.parts) is aten.unbind.int:
            return b.call(aten.select.int, m.x, axis, m.index)
        # Each part has the size of the export's own value of it.
        sizes = [int(part.shape[axis]) for part in cast(Any, m.parts.meta["val"])]
        start = sum(sizes[: m.index])
        return b.call(aten.slice.Tensor, m.x, axis, start, start + sizes[m.index])


def _axis(m: Match) -> int:
    """The axis that is split, counted from the first."""
    dim = arguments(m.parts).get("dim", 0)
    return int(dim) % m.val(m.x).dim()
