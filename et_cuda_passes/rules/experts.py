"""Products of rows with the int4 weights of experts, which are stacked in one tensor [E, N, K].

The stack is packed once, expert by expert, and dequantized inside the kernel. All rules here pack it alike, whichever
way it is stored and multiplied, so that several products can share its constants. A linear whose expert is selected by
a number is a match of ``LinearInt4``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import AnyOf, Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Failure, Notes, Rule, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_EXPERTS
from et_cuda_passes.quant.decoders import dequantized, weight_of
from et_cuda_passes.quant.einsum import ExpertEinsum, parse_einsum
from et_cuda_passes.quant.experts import as_matrix, as_transposed_matrix, num_experts
from et_cuda_passes.quant.weight import QuantizedWeight
from et_cuda_passes.rules.packing import (
    cast_of,
    compute_dtype,
    kernel_notes,
    kernel_of,
    nonfinite_int4,
    or_plain,
    pack_experts,
    packed_weight,
    scale_dtype,
)
from et_cuda_passes.rules.requirements import (
    integers_are_in_range,
    kernel_has_activation_dtype,
    kernel_has_group_size,
    kernel_runs_in_control_flow,
    kernel_tiles_divide_k,
    same_dtype,
    scales_are_finite,
    weight_fits_4_bits,
    weight_has_data,
)

aten = torch.ops.aten

# Patterns ------------------------------------------------------------------------------------------------------------

TRANSPOSED = "transposed"
"""Bound where the last two axes of a stack are swapped."""
WEIGHT_ON_LEFT = "weight_on_left"
"""Bound to the product where the stack is its left operand."""


def stack() -> Pattern:
    """The dequantized weights of all experts."""
    return dequantized(..., name="weight", shared=True)


def transposed_stack(weight: Pattern) -> AnyOf:
    """A stack [E, N, K] as [E, K, N], in every form that torch has for it."""
    pairs = ((first, second) for first in (1, -2) for second in (2, -1))
    return any_of(
        op(aten.mT.default)(weight, name=TRANSPOSED, shared=True),
        op(aten.permute.default)(weight, [0, 2, 1], name=TRANSPOSED, shared=True),
        *(
            op(aten.transpose.int)(weight, *axes, name=TRANSPOSED, shared=True)
            for pair in pairs
            for axes in (pair, pair[::-1])
        ),
    )


def stack_operand(weight: Pattern) -> AnyOf:
    """A stack as it is, or transposed, also through the views that ``run_decompositions`` adds to a matmul."""
    forms = any_of(transposed_stack(weight), weight)
    expanded = op(aten.expand.default)(forms, ..., name="expanded", shared=True)
    return any_of(forms, op(aten.view.default)(expanded, ..., name="viewed", shared=True))


def indexed_stack(weight: Pattern, ids: Pattern | None) -> AnyOf:
    """The matrices of a stack that a tensor of expert ids selects.

    ``index`` counts negative ids from the last expert, ``index_select`` refuses them. The operators that replace both
    count from the last: a rewritten ``index_select`` gives a result for ids at which the exported program stops.
    """
    return any_of(
        op(aten.index.Tensor)(weight, [ids], shared=True),
        op(aten.index_select.default)(weight, 0, ids, shared=True),
    )


# Shared by the rules -------------------------------------------------------------------------------------------------


def kernel_for(m: Match, family: str) -> Kernel:
    """The target's kernel of a family: "int4_experts", or "int4_indexed_experts" for experts that ids select.

    Raises:
        Unmet: the target has no such kernel.
    """
    kernel: Kernel | None = m.target.kernel(family)
    if kernel is None:
        raise Unmet(f"target {m.target.name}, which has none")
    return or_plain(m, kernel) if family == "int4_experts" else kernel


def rows_of_stack(m: Match) -> QuantizedWeight:
    """The rows of all experts as one matrix [E * N, K], for a product that is no einsum.

    Raises:
        Unmet: the weight is no stack of matrices.
    """
    # x @ stack sums over axis 1 of the stack, stack @ x over axis 2.
    stored_as_columns = (TRANSPOSED in m.match.bindings) == (WEIGHT_ON_LEFT in m.match.bindings)
    return as_transposed_matrix(weight_of(m)) if stored_as_columns else as_matrix(weight_of(m))


def summary_of(m: Match) -> str:
    """For the report: number of experts, scheme, kernel and layout."""
    kernel, count = kernel_of(m), num_experts(weight_of(m))
    cast = cast_of(m, m.val(m.x).dtype)
    return f"{count} experts, {packed_weight(m).scheme} -> {kernel.name} ({kernel.layout}{cast})"


def packed_product(b: Builder, m: Match, operator: torch._ops.OpOverload, x: Node, index: Node | None) -> Node:
    """A call of ``operator`` with x, the packed weights, and ``index``: the ids of a bmm, the offs of a grouped mm."""
    weight, kernel, count = packed_weight(m), kernel_of(m), num_experts(weight_of(m))
    packed, qparams = pack_experts(b, weight, count, kernel, scale_dtype(m))
    group_size = kernel.native_group_size(weight.group_size, weight.in_features)
    dtype, result_dtype = compute_dtype(m), m.val(x).dtype
    assert dtype is not None
    x = x if dtype == result_dtype else b.cast(x, dtype)
    y = b.call(operator, x, packed, qparams, index, group_size, weight.out_features // count)
    return y if dtype == result_dtype else b.cast(y, result_dtype)


def packed_bmm(b: Builder, m: Match, ids: Node | None) -> Node:
    """The call that replaces a bmm or a matmul, whose stack is its right or its left operand."""
    x: Node = m.x
    if m.val(x).dim() == 2:
        x = b.call(aten.unsqueeze_copy.default if b.program.is_edge else aten.unsqueeze.default, x, 0)
    elif WEIGHT_ON_LEFT in m.match.bindings:
        x = swap_rows_and_columns(b, x)
    y = packed_product(b, m, INT4_EXPERTS[kernel_of(m).layout].bmm, x, ids)
    if WEIGHT_ON_LEFT not in m.match.bindings:
        return y
    y = swap_rows_and_columns(b, y)
    # The result of the product was contiguous. With one row per matrix it is contiguous without a copy.
    if b.program.is_edge or statically_known_true(m.val(y).shape[2] == 1):
        return y
    return b.call(aten.clone.default, y, memory_format=torch.contiguous_format)


def swap_rows_and_columns(b: Builder, node: Node) -> Node:
    """[S, M, N] as [S, N, M], a view outside of the edge dialect."""
    return b.call(aten.transpose_copy.int if b.program.is_edge else aten.transpose.int, node, 1, 2)


@requirement(
    "a target with a kernel for this product of experts",
    hint="multiply by one expert at a time, selected by its number, as in linear(x, weight[e])",
)
def target_multiplies_experts(m: Match) -> Failure | None:
    """Metal has no such kernel."""
    kernel_of(m)  # raises Unmet
    return None


@requirement("weights [E, N, K] of experts, quantized in groups along K")
def stack_is_grouped_along_k(m: Match) -> Failure | None:
    """One scale per row and group, or per several rows."""
    rows, size = packed_weight(m).block_size
    if size > 1 or rows == 1:
        return None
    return Failure(
        f"blocks of {rows} rows and {size} along K",
        "the groups lie along N: quantize in groups along K, the axis that is summed over, in blocks of (1, 1, 32) of "
        "[E, N, K] or (1, 32, 1) of [E, K, N]",
    )


@requirement("a stack that is multiplied whole, in its own shape", hint="reshape x to [E, M, K] instead")
def stack_keeps_its_shape(m: Match) -> Failure | None:
    """The views that a decomposed matmul puts around its operand may change nothing."""
    views = [m.match.bindings[name] for name in ("expanded", "viewed") if name in m.match.bindings]
    if not views:
        return None
    operand: Any = views[0].args[0]
    shapes = [m.val(node).shape for node in (operand, *views)]
    first, *_, last = shapes
    same_rank = all(len(shape) == len(first) for shape in shapes)
    if same_rank and all(statically_known_true(a == b) for a, b in zip(first, last, strict=True)):
        return None
    return Failure(" as ".join(str(list(shape)) for shape in shapes))


PACKED_STACK = (
    weight_has_data,
    target_multiplies_experts,
    stack_is_grouped_along_k,
    weight_fits_4_bits,
    kernel_has_group_size,
    kernel_tiles_divide_k,
    kernel_runs_in_control_flow,
    kernel_has_activation_dtype,
    same_dtype("x"),
    integers_are_in_range,
    scales_are_finite(nonfinite_int4),
)
"""The requirements of every rule that packs a stack."""


# All experts ---------------------------------------------------------------------------------------------------------


@requirement("rows [E, M, K], or [M, K] for all experts", hint="reshape x")
def x_has_rows_for_all_experts(m: Match) -> Failure | None:
    """Apart from one batch for all experts, the kernel does not broadcast."""
    x, experts = m.val(m.x), num_experts(weight_of(m))
    if x.dim() == 2 and WEIGHT_ON_LEFT not in m.match.bindings:
        return None
    if x.dim() == 3 and any(statically_known_true(x.shape[0] == batches) for batches in (1, experts)):
        return None
    return Failure(f"x {list(x.shape)} for {experts} experts")


@dataclass(frozen=True)
class BmmInt4(Rule):
    """bmm(x, dequantize(int4 weights of all experts)) -> int4_bmm(x, packed, scale_and_zero)

    Each batch of x is multiplied by an expert of its own, or one batch by all experts.

    Attributes:
        cast_to_bf16: as for ``LinearInt4``.
    """

    cast_to_bf16: bool = False

    requirements = (*PACKED_STACK, stack_keeps_its_shape, x_has_rows_for_all_experts)

    def pattern(self, x: Capture) -> Pattern:
        """A product of batches. A grouped mm without offsets is one too."""
        weight = stack_operand(stack())
        return any_of(
            op(aten.bmm.default, aten.matmul.default, aten._grouped_mm.default)(x, weight),
            op(aten.bmm.default, aten.matmul.default)(weight, x, name=WEIGHT_ON_LEFT),
        )

    def kernel_of(self, m: Match) -> Kernel:
        """A kernel that multiplies by all experts."""
        return kernel_for(m, "int4_experts")

    def packed_weight(self, m: Match) -> QuantizedWeight:
        """The rows of all experts."""
        return rows_of_stack(m)

    def summary(self, m: Match) -> str:
        """Number of experts, scheme, kernel and layout."""
        return summary_of(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel."""
        return kernel_notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weights and call the operator."""
        return packed_bmm(b, m, None)


# Experts that a tensor of ids selects --------------------------------------------------------------------------------


@requirement("a vector of expert ids", hint="flatten the ids: weight[ids.reshape(-1)]")
def ids_are_a_vector(m: Match) -> Failure | None:
    """The kernel reads neither a mask nor a matrix of ids."""
    ids = m.val(m.ids)
    if ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64):
        return None
    return Failure(f"ids {ids.dtype} {list(ids.shape)}")


@requirement(
    "a batch of rows for each expert id, or one for all",
    hint="give x as many batches as there are ids, [S, M, K]; repeat the id where all batches read one expert",
)
def x_has_rows_for_each_id(m: Match) -> Failure | None:
    """Apart from one batch for all ids, the kernel does not broadcast."""
    x, ids = m.val(m.x), m.val(m.ids)
    if x.dim() == 3 and any(statically_known_true(x.shape[0] == count) for count in (1, *ids.shape[:1])):
        return None
    return Failure(f"x {list(x.shape)} for ids {list(ids.shape)}")


@dataclass(frozen=True)
class IndexedBmmInt4(Rule):
    """bmm(x, dequantize(int4 weights of experts)[ids]) -> int4_bmm(x, packed, scale_and_zero, ids)

    The experts of a token, as the top_k of its router selects them. The exported program dequantizes the weights of all
    experts and copies those of the selected ones. The kernel reads the selected ones where they are stored.

    Attributes:
        cast_to_bf16: as for ``LinearInt4``.
    """

    cast_to_bf16: bool = False

    requirements = (*PACKED_STACK, stack_keeps_its_shape, ids_are_a_vector, x_has_rows_for_each_id)

    def pattern(self, x: Capture, ids: Capture) -> Pattern:
        """A product with the selected matrices, which are transposed before or after they are selected."""
        weight = any_of(stack_operand(indexed_stack(stack(), ids)), indexed_stack(transposed_stack(stack()), ids))
        return any_of(
            op(aten.bmm.default, aten.matmul.default)(x, weight),
            op(aten.bmm.default, aten.matmul.default)(weight, x, name=WEIGHT_ON_LEFT),
        )

    def kernel_of(self, m: Match) -> Kernel:
        """A kernel that reads single experts."""
        return kernel_for(m, "int4_indexed_experts")

    def packed_weight(self, m: Match) -> QuantizedWeight:
        """The rows of all experts."""
        return rows_of_stack(m)

    def summary(self, m: Match) -> str:
        """Number of experts, scheme, kernel and layout."""
        return summary_of(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel."""
        return kernel_notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weights and call the operator."""
        return packed_bmm(b, m, m.ids)


# Rows that are sorted by expert --------------------------------------------------------------------------------------


@requirement("rows [M, K] and the ends of the experts' rows [E]", hint="sort the rows by expert and flatten them")
def rows_are_sorted_by_expert(m: Match) -> Failure | None:
    """One integer per expert says where the rows of the expert end."""
    x, offs = m.val(m.x), m.val(m.offs)
    if x.dim() == 2 and offs.dim() == 1 and offs.dtype in (torch.int32, torch.int64):
        return None
    return Failure(f"x {list(x.shape)}, offs {offs.dtype} {list(offs.shape)}")


@dataclass(frozen=True)
class GroupedMmInt4(Rule):
    """grouped_mm(x, dequantize(int4 weights of experts), offs) -> int4_grouped_mm(x, packed, scale_and_zero, offs)

    The rows of x are sorted by expert, as in a mixture of experts that computes many tokens. The kernel reads the
    offsets at which the rows of each expert end, and only the experts that have rows.

    Attributes:
        cast_to_bf16: as for ``LinearInt4``.
    """

    cast_to_bf16: bool = False

    requirements = (*PACKED_STACK, stack_keeps_its_shape, rows_are_sorted_by_expert)

    def pattern(self, x: Capture, offs: Capture) -> Pattern:
        """A grouped mm with offsets and without a bias.

        Where the dtype is not bf16, transformers exports an operator of its own, which exists if it was imported.
        """
        fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
        operators = [aten._grouped_mm.default, *([] if fallback is None else [fallback.default])]
        return op(*operators)(x, stack_operand(stack()), offs)

    def kernel_of(self, m: Match) -> Kernel:
        """A kernel that multiplies by all experts."""
        return kernel_for(m, "int4_experts")

    def packed_weight(self, m: Match) -> QuantizedWeight:
        """The rows of all experts."""
        return rows_of_stack(m)

    def summary(self, m: Match) -> str:
        """Number of experts, scheme, kernel and layout."""
        return summary_of(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel."""
        return kernel_notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weights and call the operator."""
        return packed_product(b, m, INT4_EXPERTS[kernel_of(m).layout].grouped_mm, m.x, m.offs)


# An einsum with all experts, or with those that ids select -----------------------------------------------------------


def einsum_of(m: Match) -> ExpertEinsum:
    """The axes of the equation of a matched einsum.

    Raises:
        Unmet: the equation is no product of rows with matrices.
    """
    return parse_einsum(str(m.root.args[0]), 0 if WEIGHT_ON_LEFT in m.match.bindings else 1)


@requirement("expert ids that are integers", hint="look experts up by their numbers: weight[ids]")
def ids_are_integers(m: Match) -> Failure | None:
    """The kernel does not read a mask."""
    if m.ids is None or m.val(m.ids).dtype in (torch.int32, torch.int64):
        return None
    return Failure(f"ids {m.val(m.ids).dtype}")


@requirement("axes of x as long as those of the weights", hint="expand x first")
def axes_match(m: Match) -> Failure | None:
    """An einsum would repeat an axis of length 1."""
    axes, of_x = einsum_of(m), m.val(m.x).shape
    operands: Any = m.root.args[1]
    weights = m.val(operands[0 if WEIGHT_ON_LEFT in m.match.bindings else 1]).shape
    letters = axes.batch + (axes.k + axes.n if axes.as_columns else axes.n + axes.k)
    pairs = [(of_x[axes.x.index(a)], n) for a, n in zip(letters, weights, strict=True) if a in axes.x]
    if all(statically_known_true(a == b) for a, b in pairs):
        return None
    return Failure(f"x {list(of_x)} for weights {list(weights)}")


@requirement(
    "sizes that are known at export, of all axes but one", hint="flatten x and the ids to one axis of tokens each"
)
def one_dynamic_axis(m: Match) -> Failure | None:
    """The view that flattens several axes into one can infer one size only."""
    axes, x = einsum_of(m), m.val(m.x).shape
    unknown = [letter for letter in axes.shared + axes.rows if not isinstance(x[axes.x.index(letter)], int)]
    joined = [part for part in (axes.shared, axes.rows) if len(part) > 1 and {*part} & {*unknown}]
    return None if len(joined) <= 1 else Failure(", ".join(unknown))


@dataclass(frozen=True)
class EinsumInt4(Rule):
    """einsum(x, dequantize(int4 weights of experts)[ids]) -> int4_bmm(x, packed, scale_and_zero, ids)

    With all experts, or with those that ids select, as in ``einsum("ti,taoi->tao", x, weight[ids])``. The axes of x and
    of the result are permuted and flattened for the kernel's product.

    Attributes:
        cast_to_bf16: as for ``LinearInt4``.
    """

    cast_to_bf16: bool = False

    requirements = (*PACKED_STACK, ids_are_integers, axes_match, one_dynamic_axis)

    def pattern(self, x: Capture, ids: Capture | None = None) -> Pattern:
        """An einsum of two operands, either of them the weights."""
        weight = any_of(indexed_stack(stack(), ids), stack())
        einsum = op(aten.einsum.default)
        return any_of(einsum(..., [x, weight], ...), einsum(..., [weight, x], ..., name=WEIGHT_ON_LEFT))

    def kernel_of(self, m: Match) -> Kernel:
        """A kernel that multiplies by all experts, or one that reads single experts."""
        return kernel_for(m, "int4_experts" if m.ids is None else "int4_indexed_experts")

    def packed_weight(self, m: Match) -> QuantizedWeight:
        """The rows of all experts."""
        return as_transposed_matrix(weight_of(m)) if einsum_of(m).as_columns else as_matrix(weight_of(m))

    def summary(self, m: Match) -> str:
        """Number of experts, scheme, kernel and layout."""
        return summary_of(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel."""
        return kernel_notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weights, and call the operator between permutations and reshapes of x and of the result."""
        axes, ids = einsum_of(m), m.ids
        x = permuted(b, m.x, axes.x, axes.shared + axes.rows + axes.k)
        x = b.call(aten.reshape.default, x, flattened_sizes(b, m, (axes.shared, axes.rows, axes.k)))
        if ids is not None and m.val(ids).dim() != 1:
            ids = b.call(aten.reshape.default, ids, [-1])
        y = packed_product(b, m, INT4_EXPERTS[kernel_of(m).layout].bmm, x, ids)
        computed = axes.batch + axes.rows + axes.n
        y = b.call(aten.reshape.default, y, flattened_sizes(b, m, computed))
        # The result has the strides of the einsum's: a view of it may flatten axes.
        stored = "".join(axes.out[axis] for axis in stride_order(m.val(m.root)))
        if stored != computed:
            y = b.call(aten.clone.default, permuted(b, y, computed, stored), memory_format=torch.contiguous_format)
        return permuted(b, y, stored, axes.out)


def permuted(b: Builder, node: Node, letters: str, wanted: Sequence[str]) -> Node:
    """``node``, whose axes are ``letters``, with its axes in the order of ``wanted``."""
    order = [letters.index(letter) for letter in wanted]
    return node if order == sorted(order) else b.call(aten.permute.default, node, order)


def stride_order(value: Tensor) -> list[int]:
    """The axes of a dense tensor by falling stride; axes of equal strides stay in their order."""

    def compare(axis: int, other: int) -> int:
        strides = value.stride(axis), value.stride(other)
        return statically_known_true(strides[1] >= strides[0]) - statically_known_true(strides[0] >= strides[1])

    return sorted(range(value.dim()), key=cmp_to_key(compare))


def flattened_sizes(b: Builder, m: Match, parts: Sequence[str]) -> list[int | Node]:
    """For each part, the product of the sizes of its axes, as arguments of a reshape.

    One product that is not known is -1, if possible that of several axes, which no node computes.
    """
    axes, of_x = einsum_of(m), m.val(m.x).shape
    size = dict(zip(axes.x + axes.out, (*of_x, *m.val(m.root).shape), strict=True))
    known = [all(isinstance(size[letter], int) for letter in part) for part in parts]
    joined = [not good and len(part) > 1 for good, part in zip(known, parts, strict=True)]
    inferred = joined.index(True) if any(joined) else known.index(False) if False in known else None

    def one(index: int, part: str) -> int | Node:
        if known[index]:
            return int(prod(size[letter] for letter in part))
        if index == inferred:
            return -1
        return b.size(m.x, axes.x.index(part)) if part in axes.x else b.size(m.ids, axes.batch.index(part))

    return [one(index, part) for index, part in enumerate(parts)]


# Rows of each expert --------------------------------------------------------------------------------------------------

_CASTS = (aten._to_copy.default, aten.to.dtype)


@requirement("whole numbers, as integers or converted to float32 from integers", hint="count integers")
def counts_whole_numbers(m: Match) -> Failure | None:
    """Other numbers fall between two of the integers that they are compared with."""
    node, dtype = m.ids, m.val(m.ids).dtype
    while isinstance(node, Node) and op_of(node) in _CASTS and m.val(node).dtype in (dtype, torch.float32):
        node = node.args[0]
    exact = isinstance(node, Node) and not m.val(node).dtype.is_floating_point
    return None if exact and (dtype is torch.float32 or not dtype.is_floating_point) else Failure(str(dtype))


@requirement("one bin for each of two or more integers from 0 on", hint="give bins=n, min=0, max=n - 1")
def bins_are_integers(m: Match) -> Failure | None:
    """With ``max`` equal to ``min`` the range is that of the values."""
    given = arguments(m.root)
    bins, low, high = given["bins"], given["min"], given["max"]
    return None if bins > 1 and (low, high) == (0, bins - 1) else Failure(f"{bins} bins from {low} to {high}")


@dataclass(frozen=True)
class CountExperts(Rule):
    """histc(ids, n, 0, n - 1) -> sum(ids == arange(n))

    transformers counts the rows of each expert with histc. ExecuTorch's CUDA backend (executorch 1.5.1) has no kernel
    of it, and its lowering fails: "missing fallback kernels".
    """

    reports_misses: ClassVar[bool] = False

    requirements = (counts_whole_numbers, bins_are_integers)

    def pattern(self, ids: Capture) -> Pattern:
        """A histogram with any bins."""
        return op(aten.histc.default)(ids, ...)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The number of ids that equal each integer, in the dtype of the histogram."""
        val = m.val(m.ids)
        integers = b.call(aten.arange.default, arguments(m.root)["bins"], dtype=val.dtype, device=val.device)
        flat = b.call(aten.reshape.default, m.ids, [-1, 1])
        return b.call(aten.sum.dim_IntList, b.call(aten.eq.Tensor, flat, integers), [0], dtype=val.dtype)
