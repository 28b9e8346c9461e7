"""Float operators that the XNNPACK delegate computes wrongly or does not compile, rewritten to others."""

import math
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Rule, requirement

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandTanhGelu(Rule):
    """gelu(x, approximate="tanh") -> x * (0.5 + 0.5 * tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))

    With executorch 1.5.1 the delegate ignores ``approximate`` and computes the exact function, which differs by up to
    4.7e-4, and reports no error.
    """

    reports_misses: ClassVar[bool] = False

    def pattern(self, x: Capture) -> Pattern:
        """The operator that GELUTanh and ``gelu_pytorch_tanh`` call."""
        return op(aten.gelu.default)(x, approximate="tanh")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The formula of the documentation of torch, in the dtype of x."""
        cubic = b.call(aten.mul.Scalar, b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, m.x, m.x), m.x), 0.044715)
        argument = b.call(aten.mul.Scalar, b.call(aten.add.Tensor, m.x, cubic), math.sqrt(2 / math.pi))
        half = b.call(aten.mul.Scalar, b.call(aten.tanh.default, argument), 0.5)
        return b.call(aten.mul.Tensor, m.x, b.call(aten.add.Scalar, half, 0.5))


@requirement("indices that nothing reads")
def indices_are_not_read(m: Match) -> Failure | None:
    """amax gives no indices. torch.export leaves a getitem of them, which has no reader."""
    readers = [user for pair in m.largest.users if pair is not m.root for user in pair.users]
    return Failure(readers[0].name) if readers else None


@dataclass(frozen=True)
class LargestAlone(Rule):
    """max(x, dim)[0], whose indices are not read -> amax(x, dim)

    With executorch 1.5.1 the partitioner takes the first form for any axis, and the delegate then raises "amax.default
    only supports dim == 2 or dim == 3".
    """

    reports_misses: ClassVar[bool] = False
    requirements = (indices_are_not_read,)

    def pattern(self, x: Capture) -> Pattern:
        """The values."""
        return op(operator.getitem)(op(aten.max.dim)(x, ..., name="largest", shared=True), 0)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same values. Both operators give NaN if there is one."""
        given = arguments(m.largest)
        return b.call(aten.amax.default, m.x, [given["dim"]], given["keepdim"])


@requirement("a constant matrix")
def matrix_is_constant(m: Match) -> Failure | None:
    """The delegate has another kernel for the product of two activations."""
    return None if m.program.constant(m.w) is not None else Failure(f"{m.w.name}, which the program computes")


@requirement("activations of two dimensions or more")
def product_has_rows(m: Match) -> Failure | None:
    """The product of a vector has no rows."""
    rank = m.val(m.x).dim()
    return None if rank >= 2 else Failure(f"{rank} dimension")


@dataclass(frozen=True)
class ProductAsLinear(Rule):
    """x @ w.t(), where w is constant -> linear(x, w)

    Weights of torchao that are dequantized in the graph leave the first form, with a sum of the bias behind it. With
    executorch 1.5.1 the delegate makes one linear of both, whose bias is an input. XNNPACK then reads the weight in
    each call, and the runtime has freed it: the process ends if the file is mapped into memory.
    """

    reports_misses: ClassVar[bool] = False
    requirements = (matrix_is_constant, product_has_rows)

    def pattern(self, x: Capture, w: Capture) -> Pattern:
        """The product."""
        return op(aten.matmul.default, aten.mm.default)(x, op(aten.t.default)(w))

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The linear."""
        return b.call(aten.linear.default, m.x, m.w)
