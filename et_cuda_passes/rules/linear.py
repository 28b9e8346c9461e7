"""A linear or a pointwise convolution with an int4 or int8 weight becomes the linear of a kernel of the target.

The weight is packed once, by the rewrite. The numbers change only by the rounding of scales and zeros to the kernel's
dtype. A convolution of kernel size 1 multiplies each position by the same matrix: it is a linear, and the positions are
its rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Failure, Notes, Rule, requirement
from et_cuda_passes.kernels.choose import Weight, describe
from et_cuda_passes.kernels.gpus import HOPPER
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_LINEARS, INT8_LINEAR, MMA_TILED
from et_cuda_passes.quant.activations import decode_dynamic, dynamically_quantized
from et_cuda_passes.quant.decoders import decode, dequantized, dequantized_matrix, needs_python_kernel, weight_of
from et_cuda_passes.quant.weight import QuantizedWeight, has_data
from et_cuda_passes.rules.packing import (
    cast_of,
    compute_dtype,
    int8_shift,
    is_symmetric,
    kernel_notes,
    kernel_of,
    nonfinite_int4,
    nonfinite_int8,
    or_plain,
    pack_int4,
    pack_int8,
    scale_dtype,
    supports,
)
from et_cuda_passes.rules.patterns import convolution, linear
from et_cuda_passes.rules.requirements import (
    integers_are_in_range,
    is_vector,
    kernel_has_activation_dtype,
    kernel_has_group_size,
    kernel_runs_in_control_flow,
    kernel_tiles_divide_k,
    same_dtype,
    scales_are_finite,
    weight_fits_4_bits,
    weight_fits_8_bits,
    weight_has_data,
    weight_is_grouped_along_k,
)

aten = torch.ops.aten


# Patterns -------------------------------------------------------------------------------------------------------------


def activations(x: Capture, before_quantization: bool) -> Pattern:
    """``x`` as the operator reads it, or with ``before_quantization`` also as it was before its dynamic quantization.

    In the second case the match binds ``activation`` to the dequantize node, and ``rows`` to a view of it.
    """
    if not before_quantization:
        return x
    quantized = dynamically_quantized(x, name="activation")
    return any_of(quantized, op(aten.view.default)(quantized, ..., name="rows", shared=True), x)


# Requirements ---------------------------------------------------------------------------------------------------------


@requirement(
    "activations whose quantization can be dropped",
    hint="drop_activation_quantization=False keeps it as it is",
)
def activation_quantization_can_be_dropped(m: Match) -> Failure | None:
    """The quantization parameters come from the activations themselves, and the dtype is the same before and after."""
    if "activation" not in m.match.bindings:
        return None
    m.memoize(decode_dynamic, "activation")
    before, after = m.val(m.x).dtype, m.val(m.activation).dtype
    return None if before is after else Failure(f"{before} quantized and dequantized to {after}")


@requirement("a target with an int8 kernel")
def target_has_int8_kernel(m: Match) -> Failure | None:
    """If it has none, its int4 kernel is the nearest."""
    try:
        kernel_of(m)
    except Unmet as unmet:
        k, narrower = weight_of(m).in_features, m.target.kernels.get("int4_linear", ())
        fits = any(k % kernel.in_multiple == 0 for kernel in narrower)
        advised = f"quantize with {m.target.advised.eight_bits}"
        return Failure(str(unmet), advised if fits else "leave this layer unquantized")
    return None


@requirement("zero points that are all 0", stage="values")
def kernel_adds_zeros_or_weight_is_symmetric(m: Match) -> Failure | None:
    """A kernel without zeros computes ``integers * scale``."""
    weight, kernel = weight_of(m), kernel_of(m)
    if kernel.zeros or is_symmetric(m.program, weight):
        return None
    return Failure("others", f"{kernel.name} is symmetric: quantize with mapping_type=MappingType.SYMMETRIC")


@requirement("kernels of size 1", hint="larger kernels have no quantized form: leave this layer unquantized")
def convolution_is_pointwise(m: Match) -> Failure | None:
    """A larger kernel reads several positions."""
    sizes = list(m.val(m.weight).shape[2:])
    return None if all(size == 1 for size in sizes) else Failure(f"kernels of {' x '.join(map(str, sizes))}")


@requirement("stride 1, no padding, one group, not transposed", hint="leave this layer unquantized")
def convolution_is_plain(m: Match) -> Failure | None:
    """Otherwise an output is not a linear of one input position. The dilation of a single element has no effect."""
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
    return Failure(", ".join(found)) if found else None


# Kernels --------------------------------------------------------------------------------------------------------------


def int4_kernel(m: Match) -> Kernel:
    """The int4 kernel that the rule's option ``kernel`` names.

    The default is plain operators for a weight that the target's first kernel does not support, if the target has them.

    Raises:
        ValueError: the target has no kernel of that name.
        Unmet: the target has no int4 kernel at all.
    """
    kernel: Kernel | None = m.target.kernel("int4_linear", m.rule.kernel)
    if kernel is None:
        raise Unmet(f"target {m.target.name}, which has no int4 kernel")
    return or_plain(m, kernel) if m.rule.kernel is None else kernel


def int8_kernel(m: Match) -> Kernel:
    """The int8 kernel that the rule's option ``kernel`` names.

    The default is plain operators for integers that the target's kernel does not support. On a target without a kernel
    they are only for a weight whose dequantize operator does not compile.

    Raises:
        ValueError: the target has no kernel of that name.
        Unmet: the target has no int8 kernel at all.
    """
    kernel: Kernel | None = m.target.kernel("int8_linear", m.rule.kernel)
    plain: Kernel | None = m.target.kernel("int8_plain")
    if plain is not None and m.rule.kernel is None:
        other = needs_python_kernel(m.weight) if kernel is None else _lacks_form(kernel, m)
        kernel = plain if other else kernel
    if kernel is None:
        raise Unmet(f"target {m.target.name}, which has no int8 kernel")
    return kernel


def _lacks_form(kernel: Kernel, m: Match) -> bool:
    """Whether the weight is a matrix of integers, and ``kernel`` lacks its group size, K, zeros, or the dtype of x.

    A weight of floats is folded on these targets, so that no call converts it.
    """
    weight = weight_of(m)
    if weight.numbers or weight_is_grouped_along_k.check(m):
        return False
    return not supports(m, kernel, weight) or (not kernel.zeros and m.memoize(_needs_zeros, "weight"))


def _needs_zeros(program: Program, node: Node) -> bool:
    """Whether the weight has zeros as int8. Without values, or with more bits, it is not packed."""
    weight = decode(program, node)
    return has_data(program, weight) and int8_shift(weight) is not None and not is_symmetric(program, weight)


# Texts of the report --------------------------------------------------------------------------------------------------


def describe_tilings(m: Match, x: Tensor, n: int, k: int, group_size: int, bits: int = 4) -> str:
    """The Triton kernel's tilings for a weight [n, k], for the rows of x or, if these are dynamic, for each range."""
    gpu = m.target.gpu or HOPPER
    rows = math.prod(x.shape) // k if all(isinstance(size, int) for size in x.shape) else None
    chosen = describe(gpu, Weight(n, k, group_size, bits), rows)
    return f"tilings on {gpu} for {n} x {k}, group size {group_size}: {chosen}"


def int4_summary(m: Match) -> str:
    """Scheme, kernel and layout."""
    kernel, cast = kernel_of(m), cast_of(m, m.val(m.x).dtype)
    return f"{weight_of(m).scheme} -> {kernel.name} ({kernel.layout}{cast}){_dropped(m)}"


def int8_summary(m: Match) -> str:
    """Scheme and kernel."""
    return f"{weight_of(m).scheme} -> {kernel_of(m).name}{cast_of(m, m.val(m.x).dtype)}{_dropped(m)}"


def _dropped(m: Match) -> str:
    return ", activation quantization dropped" if "activation" in m.match.bindings else ""


def int4_notes(*ms: Match) -> Notes:
    """Measurements of the kernel, and the tilings of the Triton kernel for the rows of all weights of ``ms``."""
    first, kernel, weight = ms[0], kernel_of(ms[0]), weight_of(ms[0])
    x, group_size = first.val(first.x), kernel.native_group_size(weight.group_size, weight.in_features)
    if INT4_LINEARS[kernel.layout] is not MMA_TILED or group_size is None:
        return kernel_notes(first)
    n = sum(weight_of(m).out_features for m in ms)
    return kernel_notes(first, describe_tilings(first, x, n, weight.in_features, group_size))


def int8_notes(m: Match) -> Notes:
    """Measurements of the kernel, and the tilings of the Triton kernel."""
    kernel, weight, x = kernel_of(m), weight_of(m), m.val(m.x)
    group_size = kernel.native_group_size(weight.group_size, weight.in_features)
    if kernel.name != "triton" or group_size is None:
        return kernel_notes(m)
    n, k = weight.out_features, weight.in_features
    return kernel_notes(m, describe_tilings(m, x, n, k, group_size, bits=8))


# Rewrites -------------------------------------------------------------------------------------------------------------


def kernel_input(b: Builder, m: Match) -> Node:
    """The activations that the kernel multiplies, [..., K]."""
    x: Node = m.x
    if "rows" not in m.match.bindings:
        return x
    view = aten.view_copy.default if b.program.is_edge else aten.view.default
    return b.call(view, x, *m.rows.args[1:])


def kernel_bias(m: Match) -> Node | None:
    """The bias if it is a vector [N], which a kernel adds. A matrix product accepts whatever broadcasts."""
    bias: Node | None = m.bias
    return bias if bias is not None and is_vector(m.val(bias), weight_of(m).shape[0]) else None


def add_other_bias(b: Builder, m: Match, y: Node) -> Node:
    """``y`` plus the bias, if that is not :func:`kernel_bias`."""
    return y if m.bias is kernel_bias(m) else b.call(aten.add.Tensor, y, m.bias)


def packed_int4_linear(
    b: Builder, m: Match, x: Node, weights: Sequence[QuantizedWeight], bias: Node | None, name: str = ""
) -> Node:
    """The int4 kernel's linear of x and the rows of ``weights``, packed into one constant with the prefix ``name``."""
    kernel, dtype, result_dtype = kernel_of(m), compute_dtype(m), m.val(x).dtype
    assert dtype is not None
    packed, scale_and_zero = pack_int4(b, weights, kernel, scale_dtype(m), name)
    group_size = kernel.native_group_size(weights[0].group_size, weights[0].in_features)
    if dtype != result_dtype:
        x = b.cast(x, dtype)
        bias = None if bias is None else b.cast(bias, dtype)
    operator, out_features = INT4_LINEARS[kernel.layout].op, sum(weight.shape[0] for weight in weights)
    y = b.call(operator, x, packed, scale_and_zero, bias, group_size, out_features)
    return y if dtype == result_dtype else b.cast(y, result_dtype)


def packed_int8_linear(b: Builder, m: Match, x: Node, bias: Node | None) -> Node:
    """The int8 kernel's linear of x and the packed weight."""
    weight = weight_of(m)
    group_size = kernel_of(m).native_group_size(weight.group_size, weight.in_features)
    dtype, result_dtype = compute_dtype(m), m.val(x).dtype
    assert group_size is not None and dtype is not None
    packed, scale, zero = pack_int8(b, weight, group_size, scale_dtype(m))
    if dtype != result_dtype:
        x = b.cast(x, dtype)
        bias = None if bias is None else b.cast(bias, dtype)
    y = b.call(INT8_LINEAR, x, packed, scale, zero, bias, group_size)
    return y if dtype == result_dtype else b.cast(y, result_dtype)


def channels_last(b: Builder, m: Match, x: Node) -> Node:
    """A convolution's input with the channels as its last axis: the positions are the rows of a linear."""
    channels = _channels_axis(m)
    return _permute(b, x, [axis for axis in range(m.val(x).dim()) if axis != channels] + [channels])


def channels_back(b: Builder, m: Match, y: Node) -> Node:
    """A linear's result as the convolution's, in its memory format too: a view of the result may rely on that."""
    channels, last = _channels_axis(m), m.val(y).dim() - 1
    y = _permute(b, y, [*range(channels), last, *range(channels, last)])
    if b.program.is_edge or statically_known_true(m.val(m.root).stride(channels) == 1):
        return y
    return b.call(aten.clone.default, y, memory_format=torch.contiguous_format)


def _channels_axis(m: Match) -> int:
    """The axis of x that holds the channels: the second, or the first if x has no batch."""
    return m.val(m.x).dim() - m.val(m.weight).dim() + 1


def _permute(b: Builder, x: Node, order: list[int]) -> Node:
    return b.call(aten.permute_copy.default if b.program.is_edge else aten.permute.default, x, order)


# Rules ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearInt4(Rule):
    """linear(x, dequantize(int4 weight), bias) -> int4_linear(x, packed, scale_and_zero, bias)

    The weight is packed once, by the rewrite. The numbers change only by the rounding of scales and zeros to the
    kernel's dtype.

    Attributes:
        kernel: name of one of the target's int4 kernels; None for its first.
        cast_to_bf16: if the kernel lacks the dtype of the activations, compute in bf16 and cast back, with the
            precision of bf16. Off, plain operators compute such a linear on the CPU, and on other targets it is missed.
        drop_activation_quantization: if the activations are quantized dynamically, compute with the activations before
            the quantization. It is faster and closer to the unquantized model, but not what the graph computes. Off,
            the quantization stays, and only the weight is packed.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False
    drop_activation_quantization: bool = False

    requirements = (
        weight_has_data,
        integers_are_in_range,
        same_dtype("x", "bias"),
        activation_quantization_can_be_dropped,
        weight_is_grouped_along_k,
        weight_fits_4_bits,
        kernel_has_group_size,
        kernel_tiles_divide_k,
        kernel_runs_in_control_flow,
        kernel_has_activation_dtype,
        scales_are_finite(nonfinite_int4),
    )
    kernel_of = staticmethod(int4_kernel)

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear in any form, with a dequantized weight or one expert of a dequantized stack."""
        return linear(activations(x, self.drop_activation_quantization), dequantized_matrix(), bias)

    def summary(self, m: Match) -> str:
        """Scheme, kernel and layout."""
        return int4_summary(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel, and its tilings."""
        return int4_notes(*ms)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weight and call the kernel's operator."""
        y = packed_int4_linear(b, m, kernel_input(b, m), [weight_of(m)], kernel_bias(m))
        return add_other_bias(b, m, y)


@dataclass(frozen=True)
class LinearInt8(Rule):
    """linear(x, dequantize(weight of at most 8 bits), bias) -> int8_linear(x, packed, scale, zero, bias)

    The integers stay as they are, one byte each. A weight of fewer bits that no narrower kernel of the target supports
    is packed as int8 too, which holds its integers.

    Attributes:
        kernel: name of one of the target's int8 kernels; None for its first, or plain operators where a weight needs
            them.
        cast_to_bf16: as for ``LinearInt4``.
        drop_activation_quantization: as for ``LinearInt4``.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False
    drop_activation_quantization: bool = False

    requirements = (
        weight_has_data,
        integers_are_in_range,
        same_dtype("x", "bias"),
        activation_quantization_can_be_dropped,
        weight_is_grouped_along_k,
        target_has_int8_kernel,
        weight_fits_8_bits,
        kernel_has_group_size,
        kernel_tiles_divide_k,
        kernel_has_activation_dtype,
        kernel_adds_zeros_or_weight_is_symmetric,
        scales_are_finite(nonfinite_int8),
    )
    kernel_of = staticmethod(int8_kernel)

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear in any form, with a dequantized weight or one expert of a dequantized stack."""
        return linear(activations(x, self.drop_activation_quantization), dequantized_matrix(), bias)

    def summary(self, m: Match) -> str:
        """Scheme and kernel."""
        return int8_summary(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel, and its tilings."""
        return int8_notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weight and call the operator."""
        return add_other_bias(b, m, packed_int8_linear(b, m, kernel_input(b, m), kernel_bias(m)))


@dataclass(frozen=True)
class ConvInt4(Rule):
    """conv(x, dequantize(int4 weight [N, K, 1, 1]), bias) -> permute(int4_linear(permute(x), packed, ...))

    A convolution of kernel size 1 multiplies each position by the same matrix: it is a linear, and the positions are
    its rows.

    Attributes:
        kernel: as for ``LinearInt4``.
        cast_to_bf16: as for ``LinearInt4``.
        drop_activation_quantization: as for ``LinearInt4``.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False
    drop_activation_quantization: bool = False

    requirements = (*LinearInt4.requirements, convolution_is_pointwise, convolution_is_plain)
    kernel_of = staticmethod(int4_kernel)

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A convolution with a dequantized weight."""
        weight = dequantized(..., name="weight", shared=True)
        return convolution(activations(x, self.drop_activation_quantization), weight, bias)

    def summary(self, m: Match) -> str:
        """Scheme, kernel and layout."""
        return int4_summary(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel, and its tilings."""
        return int4_notes(*ms)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weight and call the kernel's operator on the positions as rows."""
        x = channels_last(b, m, kernel_input(b, m))
        y = packed_int4_linear(b, m, x, [weight_of(m)], kernel_bias(m))
        return channels_back(b, m, add_other_bias(b, m, y))


@dataclass(frozen=True)
class ConvInt8(Rule):
    """conv(x, dequantize(weight of at most 8 bits [N, K, 1, 1]), bias) -> permute(int8_linear(permute(x), ...))

    It is to ``LinearInt8`` what ``ConvInt4`` is to ``LinearInt4``.

    Attributes:
        kernel: as for ``LinearInt8``.
        cast_to_bf16: as for ``LinearInt4``.
        drop_activation_quantization: as for ``LinearInt4``.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False
    drop_activation_quantization: bool = False

    requirements = (*LinearInt8.requirements, convolution_is_pointwise, convolution_is_plain)
    kernel_of = staticmethod(int8_kernel)

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A convolution with a dequantized weight."""
        weight = dequantized(..., name="weight", shared=True)
        return convolution(activations(x, self.drop_activation_quantization), weight, bias)

    def summary(self, m: Match) -> str:
        """Scheme and kernel."""
        return int8_summary(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel, and its tilings."""
        return int8_notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weight and call the operator on the positions as rows."""
        x = channels_last(b, m, kernel_input(b, m))
        return channels_back(b, m, add_other_bias(b, m, packed_int8_linear(b, m, x, kernel_bias(m))))
