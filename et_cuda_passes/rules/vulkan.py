"""Quantized weights that ExecuTorch's Vulkan delegate computes with its own 4-bit kernels are kept for it.

Sources: ``executorch/backends/vulkan/patterns`` of executorch 1.5.1, which replaces the patterns, and the checks and
shaders of the runtime (``runtime/graph/ops``), which is not part of the Python package. Where the delegate takes a
place without an error and its runtime would compute something else, or refuse to load the program, a requirement
excludes the place; its first line says what happens there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_name, op_of
from et_cuda_passes.graph.pattern import AnyOf, Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Failure, Keep, Notes, Rule, requirement
from et_cuda_passes.quant.activations import dynamically_quantized
from et_cuda_passes.quant.candidates import consumers
from et_cuda_passes.quant.decoders import DEQUANTIZE, is_dequantize, weight_of
from et_cuda_passes.quant.weight import weight_values
from et_cuda_passes.rules.patterns import transposed
from et_cuda_passes.rules.requirements import (
    backend_has_dtype,
    bias_is_a_constant_vector,
    each_row_has_its_scales,
    same_dtype,
    scales_fit,
    stands_in_main_graph,
    storage_is_int8,
    weight_has_data,
    zero_points_are_a_tensor,
    zero_points_are_all_zero,
)
from et_cuda_passes.rules.xnnpack import (
    activation_has_no_other_reader,
    activation_has_two_dimensions,
    activation_is_per_token,
)

aten = torch.ops.aten
LINEAR = aten.linear.default

_LOW, _HIGH = -8, 7
"""The integers of the 4-bit kernels."""
_WEIGHT_MULTIPLE = 8
"""K is stored in multiples of 8, and the runtime takes K from what is stored."""
_OUT_MULTIPLE = 4
_GROUP_MULTIPLE = 4
_TABLE_MULTIPLE = 32
_MATRIX = 2
"""Dimensions of activations that the lowering does not put views around."""
_VIEWS = frozenset(
    {
        aten.view.default,
        aten.view_copy.default,
        aten.view_as.default,
        aten.ravel.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.reshape_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }
)
"""The operators that become a view in the program that is lowered."""
_CONTRACTIONS = frozenset(
    {aten.einsum.default, aten.tensordot.default, aten.inner.default, aten.bilinear.default, aten.matmul.default}
)
"""The operators that may become several with a view as the last."""


# Requirements ---------------------------------------------------------------------------------------------------------


@requirement(
    "integers in -8..7", stage="values", hint="quantize with weight_dtype=torch.int4; Vulkan has no kernel for int8"
)
def integers_are_4_bit(m: Match) -> Failure | None:
    """The partitioner takes any other weight too, and the runtime then has no operator ``dequantize_affine``."""
    low, high = (int(end) for end in torch.aminmax(weight_values(m.program, weight_of(m)).data))
    return None if low >= _LOW and high <= _HIGH else Failure(f"integers {low}..{high}")


@requirement(f"in_features that {_WEIGHT_MULTIPLE} divides", hint="leave this layer unquantized")
def k_is_a_multiple_of_8(m: Match) -> Failure | None:
    """The delegate pads the stored weight to a multiple of 8, and its kernels then read past the activations."""
    k = weight_of(m).in_features
    return None if k % _WEIGHT_MULTIPLE == 0 else Failure(f"K = {k}")


@requirement(f"out_features that {_OUT_MULTIPLE} divides", hint="leave this layer unquantized")
def n_is_a_multiple_of_4(m: Match) -> Failure | None:
    """The lowering fails otherwise."""
    n = weight_of(m).out_features
    return None if n % _OUT_MULTIPLE == 0 else Failure(f"N = {n}")


@requirement(f"a group size that {_GROUP_MULTIPLE} divides", hint="quantize with PerGroup(32)")
def group_is_a_multiple_of_4(m: Match) -> Failure | None:
    """The kernels read four integers at a time, and would multiply them by one scale."""
    size = weight_of(m).group_size
    return None if size % _GROUP_MULTIPLE == 0 else Failure(f"group size {size}")


@requirement("a table of scales [N, K / group]", hint="quantize with granularity PerGroup or PerAxis(0)")
def scales_are_a_table(m: Match) -> Failure | None:
    """The delegate computes the group size from the shape of the scales."""
    weight = weight_of(m)
    if weight.scale is None:
        return Failure("a number")
    shape = m.val(weight.scale).shape
    wanted = (weight.out_features, weight.in_features // weight.group_size)
    return None if tuple(shape) == wanted else Failure(f"scales {list(shape)}")


def _other_reader(m: Match) -> str:
    """The name of another operator that reads the integers or scales, or the dequantized weight; empty if none does."""
    weight = weight_of(m)
    for part in weight.sources[:2]:
        for user in part.users:
            if user is not m.weight:
                return str(user.name)
    readers = list(consumers(m.weight))
    return str(readers[1].name) if len(readers) > 1 else ""


@requirement("a weight with one reader", hint="dequantize it once for each reader")
def weight_has_one_reader(m: Match) -> Failure | None:
    """The delegate packs the integers in place for the first reader, and the lowering fails at the second."""
    other = _other_reader(m)
    return Failure(f"{other}, which reads it too") if other else None


@requirement("integers or scales that an earlier dequantize reads too")
def weight_is_dequantized_before(m: Match) -> Failure | None:
    """The first dequantize of a tied weight stays."""
    return None if _index_of_dequantize(m) else Failure(f"{m.weight.name}, the first")


def _index_of_dequantize(m: Match) -> int:
    """How many operators before this one dequantize the same integers, or others with the same scales."""
    nodes = {user for part in weight_of(m).sources[:2] for user in part.users if is_dequantize(user)}
    return sorted(nodes, key=m.program.order.__getitem__).index(m.weight)


@requirement(
    "activations of which at most the last two axes are longer than 1", hint="export the model for a batch of 1"
)
def rows_are_one_axis(m: Match) -> Failure | None:
    """The kernel addresses rows in one axis, and reads those of a batch from outside of the activations."""
    x = m.val(m.x)
    return Failure(f"activations {list(x.shape)}") if _is_batch(x) else None


@requirement(
    "activations that are no view of others with another last axis or with a batch",
    hint="insert an axis behind the view, as in linear(x.flatten(1).unsqueeze(0)).squeeze(0)",
)
def view_keeps_rows(m: Match) -> Failure | None:
    """The delegate removes a view between the activations and a matrix product, and reads its input instead."""
    x: Node = m.x
    shape = m.val(x).shape
    if len(shape) != _MATRIX:
        return None
    if op_of(x) in _CONTRACTIONS and any(m.val(operand).dim() != _MATRIX for operand in x.all_input_nodes):
        return Failure(f"activations {list(shape)} of {op_name(x.target)}, which ends in a view")
    if op_of(x) not in _VIEWS:
        return None
    before = m.val(x.all_input_nodes[0])
    if before.dim() > 0 and statically_known_true(before.shape[-1] == shape[-1]) and not _is_batch(before):
        return None
    return Failure(f"activations {list(shape)} that are a view of {list(before.shape)}")


def _is_batch(x: Tensor) -> bool:
    return not all(isinstance(size, int) and size == 1 for size in x.shape[:-2])


@requirement("a table with integers declared as -8..7", hint="quantize with weight_dtype=torch.int4")
def table_is_declared_4_bit(m: Match) -> Failure | None:
    """The partitioner takes the pattern for this range alone."""
    weight = weight_of(m)
    if (weight.quant_min, weight.quant_max) == (_LOW, _HIGH):
        return None
    return Failure(f"{weight.quant_min}..{weight.quant_max}")


@requirement(f"rows of a length that {_TABLE_MULTIPLE} divides", hint="leave this layer unquantized")
def row_is_a_multiple_of_32(m: Match) -> Failure | None:
    """The kernel of an embedding reads 32 integers at a time."""
    k = weight_of(m).in_features
    return None if k % _TABLE_MULTIPLE == 0 else Failure(f"K = {k}")


_WEIGHT = (
    weight_has_data,
    stands_in_main_graph,
    backend_has_dtype,
    storage_is_int8,
    each_row_has_its_scales,
    group_is_a_multiple_of_4,
    scales_are_a_table,
    zero_points_are_all_zero,
    integers_are_4_bit,
    scales_fit(torch.float32, "because it reads them as float32 or float16"),
)
"""The requirements of the 4-bit kernels for a weight."""
_LINEAR = (zero_points_are_a_tensor, k_is_a_multiple_of_8, n_is_a_multiple_of_4, *_WEIGHT, weight_has_one_reader)
_TABLE = (table_is_declared_4_bit, row_is_a_multiple_of_32, n_is_a_multiple_of_4, *_WEIGHT, weight_has_one_reader)


# Rules ----------------------------------------------------------------------------------------------------------------


def _weight() -> Pattern:
    return op(DEQUANTIZE)(..., name="weight", shared=True)


def _linear(x: Pattern, bias: Capture | None) -> AnyOf:
    """A linear as written or decomposed. The delegate takes no other product."""
    return any_of(
        op(LINEAR)(x, _weight(), bias),
        op(aten.addmm.default)(bias, x, transposed(_weight())),
        op(aten.mm.default)(x, transposed(_weight())),
    )


@dataclass(frozen=True)
class KeepVulkanLinear(Keep):
    """linear(x, dequantize(int4 weight), bias) -> itself, which Vulkan computes with et_vk.linear_q4gsw

    The kernel is symmetric: it ignores zero points. It has any group size that 4 divides, one scale for each row too.
    """

    requirements = (
        *_LINEAR,
        same_dtype("x", "bias"),
        bias_is_a_constant_vector,
        rows_are_one_axis,
        view_keeps_rows,
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear."""
        return _linear(x, bias)

    def summary(self, m: Match) -> str:
        """Scheme and operator."""
        return f"{weight_of(m).scheme} for et_vk.linear_q4gsw"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return _kept()


@dataclass(frozen=True)
class KeepVulkanDynamicLinear(Keep):
    """linear(dequantize(quantize(x)), dequantize(int4 weight), bias) -> itself, for et_vk.linear_dq8ca_q4gsw

    torchao exports this pattern for ``Int8DynamicActivationIntxWeightConfig``. On a GPU without an integer dot product
    the delegate computes with the float activations.
    """

    requirements = (
        *_LINEAR,
        activation_is_per_token,
        activation_has_no_other_reader,
        activation_has_two_dimensions,
        same_dtype("x", "bias"),
        bias_is_a_constant_vector,
        rows_are_one_axis,
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear whose operands are both dequantized."""
        return op(LINEAR)(dynamically_quantized(x, name="activation"), _weight(), bias)

    def summary(self, m: Match) -> str:
        """Scheme and operator."""
        return f"8-bit dynamic activation, {weight_of(m).scheme} for et_vk.linear_dq8ca_q4gsw"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return _kept()


@dataclass(frozen=True)
class KeepVulkanEmbedding(Keep):
    """embedding(dequantize(int4 table), ids) -> itself, which Vulkan computes with et_vk.embedding_q4gsw"""

    requirements = _TABLE

    def pattern(self, ids: Capture) -> Pattern:
        """An embedding."""
        return op(aten.embedding.default)(_weight(), ids, ...)

    def summary(self, m: Match) -> str:
        """Scheme and operator."""
        return f"{weight_of(m).scheme} for et_vk.embedding_q4gsw"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return _kept()


def _kept() -> Notes:
    return Notes("Vulkan has its own kernel for it and takes the pattern as it stands")


@dataclass(frozen=True)
class CopyTiedWeight(Rule):
    """dequantize(integers, scales), both dequantized before -> dequantize(copies of them)

    Two layers of one weight, as an embedding and the last linear of a language model, are then two weights for the
    delegate, which packs each for itself. Without this rule the lowering fails.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (weight_is_dequantized_before, zero_points_are_a_tensor, n_is_a_multiple_of_4, *_WEIGHT)

    def pattern(self) -> Pattern:
        """A dequantized weight."""
        return op(DEQUANTIZE)(..., name="weight")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same operator over copies."""
        index, weight, given = _index_of_dequantize(m), weight_of(m), dict(arguments(m.root))

        def copy_of(source: Node, name: str) -> Node:
            def clone() -> Tensor:
                tensor = b.program.constant(source)
                assert tensor is not None
                return tensor.detach().clone(memory_format=torch.contiguous_format)

            return b.constant(f"{weight.fqn}.{name}{index}", [source], ("copy", index), clone)

        names = ("input", "integers"), ("scale", "scale"), ("zero_point", "zero_point")
        copies = {argument: copy_of(given[argument], name) for argument, name in names}
        operator: Callable[..., Any] = cast(Any, op_of(m.root))
        return b.call(operator, **{**given, **copies})
