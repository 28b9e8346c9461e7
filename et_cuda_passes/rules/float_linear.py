"""A linear whose weight has 8-bit or 4-bit floats becomes the linear of a kernel that converts them in registers.

The numbers stay as they are. The scales are rounded to the dtype of the activations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Notes, Rule, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import DEQUANTIZE_FLOAT4, DEQUANTIZE_FLOAT8, FLOAT8_DTYPES, FLOAT8_LINEAR, INT4_LINEARS
from et_cuda_passes.quant.decoders import weight_of
from et_cuda_passes.quant.float_forms import as_codes
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues
from et_cuda_passes.rules.linear import (
    add_other_bias,
    int4_notes,
    int4_summary,
    int8_notes,
    int8_summary,
    kernel_bias,
)
from et_cuda_passes.rules.packing import (
    compute_dtype,
    constant_tensors,
    kernel_of,
    pack_int4,
    scale_dtype,
    table_sources,
)
from et_cuda_passes.rules.patterns import linear
from et_cuda_passes.rules.plans import table_plan
from et_cuda_passes.rules.requirements import (
    kernel_has_activation_dtype,
    kernel_has_group_size,
    kernel_tiles_divide_k,
    same_dtype,
    weight_has_data,
    weight_is_grouped_along_k,
)
from et_cuda_passes.rules.values import of_integers, of_tables

_EXPONENT_BITS = {str(dtype).removeprefix("torch."): bits for bits, dtype in FLOAT8_DTYPES.items()}

# Requirements ---------------------------------------------------------------------------------------------------------


@requirement("numbers that are finite", "quantize the weight again", "values")
def numbers_are_finite(m: Match) -> Failure | None:
    """The kernel would read the code of NaN as a number."""
    bad = sum(of_integers(m.program, weight_of(m), lambda values: int((~values.data.isfinite()).sum())))
    return Failure(f"{bad} that are NaN or infinite") if bad else None


@requirement(
    "scales that the dtype of the kernel holds to its precision",
    "quantize the weight again, or export the model in bfloat16, which has the exponents of float32",
    "values",
)
def scales_keep_their_precision(m: Match) -> Failure | None:
    """No scale is infinite there, or loses a part of it that counts beside the largest scale."""
    dtype = scale_dtype(m)

    def largest(values: WeightValues) -> float:
        return float(values.scale.float().abs().max())

    most = max(of_tables(m.program, weight_of(m), largest))

    def lost(values: WeightValues) -> int:
        scale = values.scale.double()
        off = (scale.to(dtype).double() - scale).abs()
        return int((~(off <= torch.clamp(scale.abs() * 2**-8, min=most * 2**-16))).sum())

    bad = sum(of_tables(m.program, weight_of(m), lost))
    return Failure(f"{bad} that it does not, in {str(dtype).removeprefix('torch.')}") if bad else None


# Rules ----------------------------------------------------------------------------------------------------------------


def _kernel(m: Match, family: str) -> Kernel:
    kernel: Kernel | None = m.target.kernel(family, m.rule.kernel)
    if kernel is None:
        raise Unmet(f"target {m.target.name}, which has no kernel for {family.partition('_')[0]} weights")
    return kernel


def float8_kernel(m: Match) -> Kernel:
    """The kernel for 8-bit floats that the rule's option ``kernel`` names."""
    return _kernel(m, "float8_linear")


def float4_kernel(m: Match) -> Kernel:
    """The kernel for 4-bit floats that the rule's option ``kernel`` names."""
    return _kernel(m, "float4_linear")


def _cast(b: Builder, m: Match, node: Node | None) -> Node | None:
    dtype = compute_dtype(m)
    assert dtype is not None
    return node if node is None or m.val(node).dtype is dtype else b.cast(node, dtype)


def _cast_back(b: Builder, m: Match, y: Node) -> Node:
    dtype = m.val(m.x).dtype
    return add_other_bias(b, m, y if m.val(y).dtype is dtype else b.cast(y, dtype))


@dataclass(frozen=True)
class LinearFloat8(Rule):
    """linear(x, dequantize(float8 weight), bias) -> float8_linear(x, packed, scale, bias)

    The weight has one scale per row, per group along K, or per block. It stays in 8 bits, and the kernel converts it to
    the dtype of the activations, which holds each of its numbers exactly.

    Attributes:
        kernel: name of one of the target's kernels for 8-bit floats; None for its first.
        cast_to_bf16: as for ``LinearInt4``.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False

    requirements = (
        weight_has_data,
        same_dtype("x", "bias"),
        weight_is_grouped_along_k,
        kernel_has_group_size,
        kernel_tiles_divide_k,
        kernel_has_activation_dtype,
        numbers_are_finite,
        scales_keep_their_precision,
    )
    kernel_of = staticmethod(float8_kernel)

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear in any form, with a dequantized weight."""
        return linear(x, op(DEQUANTIZE_FLOAT8)(..., name="weight", shared=True), bias)

    def summary(self, m: Match) -> str:
        """Scheme and kernel."""
        return int8_summary(m)

    def notes(self, *ms: Match) -> Notes:
        """The tilings of the kernel."""
        return int8_notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Lay the bytes and the scales out by row, and call the operator."""
        weight = weight_of(m)
        group_size = kernel_of(m).native_group_size(weight.group_size, weight.in_features)
        assert group_size is not None
        packed, scale = _pack_float8(b, weight, group_size, scale_dtype(m))
        bits = _EXPONENT_BITS[weight.numbers]
        x, bias = _cast(b, m, m.x), _cast(b, m, kernel_bias(m))
        return _cast_back(b, m, b.call(FLOAT8_LINEAR, x, packed, scale, bias, group_size, bits))


def _pack_float8(b: Builder, weight: QuantizedWeight, group_size: int, dtype: torch.dtype) -> tuple[Node, Node]:
    """The constants ``<fqn>.packed`` int8 [N, K], the bytes of the numbers, and ``<fqn>.scale`` [N, K / group_size]."""
    program, repeats = b.program, weight.group_size // group_size
    k, storage = weight.in_features, weight.storage_dtype

    def packed(values: WeightValues) -> Tensor:
        return values.data.to(storage).view(torch.int8)

    def scales(values: WeightValues) -> Tensor:
        scale = values.scale.to(dtype)
        return scale if repeats == 1 else scale.repeat_interleave(repeats, dim=1)

    integers, form = ("float8", weight.integers_key), ("float8", group_size, dtype, weight.values_key)
    data, tables = (constant_tensors(program, nodes) for nodes in ((weight.data,), table_sources(weight)))
    return (
        b.constant(
            f"{weight.fqn}.packed",
            (weight.data,),
            integers,
            table_plan(program, weight, k, torch.int8, packed, data, integers),
        ),
        b.constant(
            f"{weight.fqn}.scale",
            weight,
            form,
            table_plan(program, weight, k // group_size, dtype, scales, tables, form),
        ),
    )


def _codes_of(m: Match) -> QuantizedWeight:
    return as_codes(weight_of(m))


@dataclass(frozen=True)
class LinearFloat4(Rule):
    """linear(x, dequantize(float4 weight), bias) -> int4_linear(x, packed, scale_and_zero, bias, float4)

    The weight is nvfp4 or mxfp4. It is packed as 4-bit integers are, and the same kernel multiplies with it, so that
    the rules which fuse operators into that kernel apply. Each number is exact; a scale is rounded once.

    Attributes:
        kernel: name of one of the target's kernels for 4-bit floats; None for its first.
        cast_to_bf16: as for ``LinearInt4``.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False

    requirements = (
        weight_has_data,
        same_dtype("x", "bias"),
        kernel_has_group_size,
        kernel_tiles_divide_k,
        kernel_has_activation_dtype,
        scales_keep_their_precision,
    )
    kernel_of = staticmethod(float4_kernel)

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear in any form, with a dequantized weight."""
        return linear(x, op(DEQUANTIZE_FLOAT4)(..., name="weight", shared=True), bias)

    def summary(self, m: Match) -> str:
        """Scheme, kernel and layout."""
        return int4_summary(m)

    def notes(self, *ms: Match) -> Notes:
        """The tilings of the kernel."""
        return int4_notes(*ms)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the codes and call the kernel's operator."""
        kernel, weight = kernel_of(m), _codes_of(m)
        group_size = kernel.native_group_size(weight.group_size, weight.in_features)
        packed, scales = pack_int4(b, [weight], kernel, scale_dtype(m))
        x, bias = _cast(b, m, m.x), _cast(b, m, kernel_bias(m))
        operator = INT4_LINEARS[kernel.layout].op
        y = b.call(operator, x, packed, scales, bias, group_size, weight.out_features, float4=True)
        return _cast_back(b, m, y)
