"""einsum(x, dequantize(int4 weights of experts)[ids]) -> int4_bmm(x, packed, scale_and_zero, ids)

Of all experts, or of those that ids choose: ``einsum("ti,taoi->tao", x, weight[ids])`` and what is like it. The axes of
x and of the result are put in order around the kernel's product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_EXPERTS
from et_cuda_passes.quant.affine import QuantizedWeight, dequantized
from et_cuda_passes.quant.einsum import ExpertEinsum, parse_einsum
from et_cuda_passes.quant.experts import as_matrix, as_transposed_matrix
from et_cuda_passes.rules.packed_experts import LEFT, PackedExperts, in_memory
from et_cuda_passes.rules.stack import chosen

aten = torch.ops.aten


@dataclass(frozen=True)
class EinsumInt4(PackedExperts):
    """einsum(x, dequantize(int4 weights of experts)[ids]) -> int4_bmm(x, packed, scale_and_zero, ids)"""

    def pattern(self, x: Capture, ids: Capture | None = None) -> Pattern:
        """Of two operands, either of them the weights."""
        stack = dequantized(..., name="weight", shared=True)
        assert ids is not None
        weight = any_of(chosen(stack, ids), stack)
        einsum = op(aten.einsum.default)
        return any_of(einsum(..., [x, weight], ...), einsum(..., [weight, x], ..., name=LEFT))

    @staticmethod
    def form(m: Match) -> Kernel | None:
        """One for all experts, or one that can be read expert by expert."""
        found: Kernel | None = m.target.kernel("int4_experts" if m.ids is None else "int4_indexed_experts")
        return found

    @staticmethod
    def axes(m: Match) -> ExpertEinsum:
        """What the equation says.

        Raises:
            Unmet: it is another sum.
        """
        return parse_einsum(str(m.root.args[0]), 0 if LEFT in m.match.bindings else 1)

    @classmethod
    def weights(cls, m: Match) -> QuantizedWeight:
        """All experts' rows as one matrix."""
        return m.memoize(as_transposed_matrix if cls.axes(m).as_columns else as_matrix, "weight")

    @requirement("experts' numbers that are integers", hint="look experts up by their numbers: weight[ids]")
    def numbers(self, m: Match) -> Answer:
        """No mask."""
        if m.ids is None:
            return True, ""
        dtype = m.val(m.ids).dtype
        return dtype in (torch.int32, torch.int64), f"ids {dtype}"

    @requirement("axes of x as long as those of the weights", hint="expand x first")
    def lengths(self, m: Match) -> Answer:
        """An einsum would repeat an axis of length 1."""
        axes, of_x = self.axes(m), m.val(m.x).shape
        operands: Any = m.root.args[1]
        weights = m.val(operands[0 if LEFT in m.match.bindings else 1]).shape
        letters = axes.batch + (axes.k + axes.n if axes.as_columns else axes.n + axes.k)
        pairs = [(of_x[axes.x.index(a)], n) for a, n in zip(letters, weights, strict=True) if a in axes.x]
        return all(statically_known_true(a == b) for a, b in pairs), f"x {list(of_x)} for weights {list(weights)}"

    @requirement(
        "sizes that are known at export, of all axes but one", hint="flatten x and the ids to one axis of tokens each"
    )
    def sizes(self, m: Match) -> Answer:
        """Of axes that become one, a view can leave one product open."""
        axes, x = self.axes(m), m.val(m.x).shape
        unknown = [letter for letter in axes.shared + axes.rows if not isinstance(x[axes.x.index(letter)], int)]
        joined = [part for part in (axes.shared, axes.rows) if len(part) > 1 and {*part} & {*unknown}]
        return len(joined) <= 1, ", ".join(unknown)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """x as batches of rows, the product, and its axes as the equation has them."""
        axes, ids = self.axes(m), m.ids
        x = self._ordered(b, m.x, axes.x, axes.shared + axes.rows + axes.k)
        x = b.call(aten.reshape.default, x, self._shape(b, m, (axes.shared, axes.rows, axes.k)))
        if ids is not None and m.val(ids).dim() != 1:
            ids = b.call(aten.reshape.default, ids, [-1])
        y = self.product(b, m, INT4_EXPERTS[self.kernel(m).layout].bmm, x, ids)
        made = axes.batch + axes.rows + axes.n
        y = b.call(aten.reshape.default, y, self._shape(b, m, made))
        # In memory as the sum itself lies, whose axes a view behind it may put together.
        lies = "".join(axes.out[axis] for axis in in_memory(m.val(m.root)))
        if lies != made:
            y = b.call(aten.clone.default, self._ordered(b, y, made, lies), memory_format=torch.contiguous_format)
        return self._ordered(b, y, lies, axes.out)

    def _shape(self, b: Builder, m: Match, parts: Sequence[str]) -> list[int | Node]:
        """The product of the sizes of each part's axes; -1 for one of those that are not known, a joined one first."""
        axes, of_x = self.axes(m), m.val(m.x).shape
        size = dict(zip(axes.x + axes.out, (*of_x, *m.val(m.root).shape), strict=True))
        known = [all(isinstance(size[letter], int) for letter in part) for part in parts]
        joined = [not good and len(part) > 1 for good, part in zip(known, parts, strict=True)]
        left_open = joined.index(True) if any(joined) else known.index(False) if False in known else None

        def one(index: int, part: str) -> int | Node:
            if known[index]:
                return int(prod(size[letter] for letter in part))
            if index == left_open:
                return -1
            return b.size(m.x, axes.x.index(part)) if part in axes.x else b.size(m.ids, axes.batch.index(part))

        return [one(index, part) for index, part in enumerate(parts)]

    @staticmethod
    def _ordered(b: Builder, node: Node, letters: str, wanted: Sequence[str]) -> Node:
        """``node``, whose axes are ``letters``, with them in the order of ``wanted``."""
        order = [letters.index(letter) for letter in wanted]
        return node if order == sorted(order) else b.call(aten.permute.default, node, order)
