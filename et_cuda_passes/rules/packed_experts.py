"""What the rules share that pack the int4 weights of experts for a product with all or some of them."""

from abc import abstractmethod
from functools import cmp_to_key
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.quant.affine import QuantizedWeight
from et_cuda_passes.quant.experts import as_matrix, as_transposed_matrix, num_experts
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.needs_values import NeedsValues
from et_cuda_passes.rules.packing import pack_experts
from et_cuda_passes.rules.stack import TURNED

aten = torch.ops.aten
LEFT = "left"
"""Bound to the product where the weights are its left operand."""


def in_memory(value: Tensor) -> list[int]:
    """The axes of a dense tensor as they lie in memory, the outermost first; of the same stride, as they are."""

    def farther(axis: int, other: int) -> int:
        strides = value.stride(axis), value.stride(other)
        ahead = statically_known_true(strides[0] >= strides[1]) - statically_known_true(strides[1] >= strides[0])
        return -ahead

    return sorted(range(value.dim()), key=cmp_to_key(farther))


class PackedExperts(NeedsValues):
    """product(x, dequantize(int4 weights [E, N, K])) -> a kernel's product of x and the packed weights"""

    @staticmethod
    @abstractmethod
    def form(m: Match) -> Kernel | None:
        """How the target holds the weights for this product."""

    def kernel(self, m: Match) -> Kernel:
        """:meth:`form`, which there is.

        Raises:
            Unmet: the target has no kernel.
        """
        found = self.form(m)
        if found is None:
            raise Unmet(f"target {m.target.name}, which has none")
        return found

    @staticmethod
    def weights(m: Match) -> QuantizedWeight:
        """All experts' rows as one matrix, whichever way they are stored and multiplied."""
        bound = m.match.bindings
        as_columns = (TURNED in bound) == (LEFT in bound)
        return m.memoize(as_transposed_matrix if as_columns else as_matrix, "weight")

    @requirement(
        "a target with a kernel for this product of experts",
        hint="multiply by one expert at a time, picked by its number, as in linear(x, weight[e])",
    )
    def has_kernel(self, m: Match) -> Answer:
        """Metal has none."""
        return self.form(m) is not None, f"target {m.target.name}, which has none"

    @requirement("weights [E, N, K] of experts, quantized in groups along K")
    def groups(self, m: Match) -> Answer:
        """One scale for each row and group."""
        weight = self.weights(m)
        rows, size = weight.block_size
        along_n = "its groups lie along N: make them along K, the axis that is summed over, in blocks of "
        along_n += "(1, 1, 32) of [E, N, K] or (1, 32, 1) of [E, K, N]"
        return size > 1 or rows == 1, f"blocks of {rows} rows and {size} along K", along_n

    @requirement("weights of at most 4 bits", hint="quantize with weight_dtype=torch.int4")
    def four_bits(self, m: Match) -> Answer:
        """The range fits 0..15 once shifted."""
        return answers.four_bits(self.weights(m))

    @requirement("a group size that one of the kernel's divides", hint="quantize in groups of 32")
    def native_group(self, m: Match) -> Answer:
        """As for a linear."""
        weight = self.weights(m)
        size = weight.group_size
        return self.kernel(m).native_group_size(size, weight.in_features) is not None, f"group size {size}"

    @requirement("in_features that the kernel's tiles divide")
    def in_features(self, m: Match) -> Answer:
        """K a multiple of the kernel's ``in_multiple``."""
        return answers.whole_tiles(self.weights(m), self.kernel(m).in_multiple, "these experts")

    @requirement("a place that the kernel is compiled in", hint="take the experts out of the control flow")
    def place(self, m: Match) -> Answer:
        """Some kernels are not compiled inside control flow."""
        return answers.compiled_there(m, self.kernel(m))

    @requirement("activations of a dtype that the kernel has")
    def activations(self, m: Match) -> Answer:
        """The kernel's own dtypes."""
        kernel, dtype = self.kernel(m), m.val(m.x).dtype
        hint = f"{kernel.name} has {answers.dtype_names(kernel.dtypes)}: export the model in one of these"
        return dtype in kernel.dtypes, answers.dtype_names([dtype]), hint

    @requirement("activations and result of one dtype")
    def one_dtype(self, m: Match) -> Answer:
        """As they are but under autocast."""
        return answers.one_dtype(m, m.x)

    @requirement("a stack that is used whole, in its own shape")
    def shape(self, m: Match) -> Answer:
        """The views of a decomposed matmul change nothing."""
        views = [m.match.bindings[name] for name in ("expanded", "viewed") if name in m.match.bindings]
        if not views:
            return True, ""
        inner: Any = views[0].args[0]
        before, after = m.val(inner).shape, m.val(views[-1]).shape
        same = len(before) == len(after) == m.val(views[0]).dim()
        same = same and all(statically_known_true(a == b) for a, b in zip(before, after, strict=True))
        return same, f"{list(before)} as {list(after)}"

    @requirement(
        "integers within the quantized range", stage="values", hint="the checkpoint is damaged or of another scheme"
    )
    def in_range(self, m: Match) -> Answer:
        """An integer outside of it would overwrite its neighbour."""
        return answers.in_range(m, self.weights(m))

    @requirement(
        "scales and zeros that are finite in the kernel's dtype", stage="values", hint="quantize the weight again"
    )
    def finite(self, m: Match) -> Answer:
        """A NaN or infinite scale would spread over the output unseen."""
        return answers.finite_pair(m, self.weights(m), self.kernel(m).scale_dtype or m.val(m.x).dtype)

    def summary(self, m: Match) -> str:
        """Scheme, number of experts, kernel and layout."""
        kernel, count = self.kernel(m), m.memoize(num_experts, "weight")
        return f"{count} experts, {self.weights(m).scheme} -> {kernel.name} ({kernel.layout})"

    def product(self, b: Builder, m: Match, operator: torch._ops.OpOverload, x: Node, chosen: Node | None) -> Node:
        """A call of ``operator`` of x, the packed weights, and what chooses among them."""
        weight, kernel, count = self.weights(m), self.kernel(m), m.memoize(num_experts, "weight")
        packed, qparams = pack_experts(b, weight, count, kernel, kernel.scale_dtype or m.val(m.x).dtype)
        group_size = kernel.native_group_size(weight.group_size, weight.in_features)
        return b.call(operator, x, packed, qparams, chosen, group_size, weight.out_features // count)

    @staticmethod
    def rows(b: Builder, m: Match) -> Node:
        """x as batches of rows [B, M, K]; one batch for all where it has two dimensions."""
        x: Node = m.x
        if m.val(x).dim() == 2:
            return b.call(aten.unsqueeze_copy.default if b.program.is_edge else aten.unsqueeze.default, x, 0)
        return PackedExperts.swapped(b, x) if LEFT in m.match.bindings else x

    @staticmethod
    def swapped(b: Builder, node: Node) -> Node:
        """[S, M, N] as [S, N, M]; the operators of experts take it as it lies."""
        return b.call(aten.transpose_copy.int if b.program.is_edge else aten.transpose.int, node, 1, 2)

    def result(self, b: Builder, m: Match, y: Node) -> Node:
        """What replaces the root, from the kernel's result [S, M, N]."""
        if LEFT not in m.match.bindings:
            return y
        y = self.swapped(b, y)
        # Contiguous, as a product's result is; of one row it is so already.
        if b.program.is_edge or statically_known_true(m.val(y).shape[2] == 1):
            return y
        return b.call(aten.clone.default, y, memory_format=torch.contiguous_format)
