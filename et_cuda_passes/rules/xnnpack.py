"""Quantized weights that ExecuTorch's XNNPACK delegate computes correctly are kept for it.

The delegate recognizes some quantized patterns and computes them with its own integer kernels. It ignores many of the
graph's parameters. Each requirement of a ``Keep...`` rule excludes a case in which executorch 1.5.1 gave another result
than the graph without an error, or failed late without naming the layer.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Keep, Notes, Rule, requirement
from et_cuda_passes.quant.activations import (
    QUANTIZE_PER_TENSOR,
    decode_dynamic,
    dynamically_quantized,
    dynamically_quantized_per_tensor,
    least_scale,
    static_qparams,
    statically_quantized,
)
from et_cuda_passes.quant.decoders import DEQUANTIZE, decode, dequantized, is_dequantize, weight_of
from et_cuda_passes.quant.weight import QuantizedWeight
from et_cuda_passes.rules.requirements import (
    dtype_names,
    integers_are_in_range,
    is_vector,
    same_dtype,
    stored_scales,
    weight_has_data,
)

aten = torch.ops.aten
LINEAR = aten.linear.default

_LARGEST_EPS = 1.2e-7
"""torchao's default, the smallest positive step of float32. The delegate ignores a larger one."""
_CLAMPS = frozenset({aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default})
"""XNNPACK fuses these into the operator before them."""
_INT4 = (-8, 7)
"""The range of the delegate's 4-bit kernel. It computes any other range as int8."""


# Requirements of several rules.


@requirement(
    "a place outside control flow",
    hint="executorch 1.5.1 delegates nothing inside it to XNNPACK: move the layer out of it, or leave its activations "
    "float, so that the weight is folded",
)
def is_outside_control_flow(m: Match) -> Failure | None:
    """The delegate reads a weight as a constant of the program; in a subgraph the weight is an operand."""
    subgraphs = m.program.subgraphs
    return Failure(subgraphs.path(m.root)) if subgraphs.in_control_flow(m.root) else None


@requirement("no bias, or a constant one", hint="add such a bias behind the linear")
def bias_is_constant(m: Match) -> Failure | None:
    """The partitioner skips a linear with a computed bias, and the lowering adds such a bias behind the linear."""
    if m.bias is None or m.program.constant(m.bias) is not None:
        return None
    return Failure(f"{m.bias}, which the program computes")


@requirement("zero points that are all 0", stage="values", hint="quantize with a symmetric mapping type")
def zero_points_are_zero(m: Match) -> Failure | None:
    """The delegate ignores zero points, and fails to load with a single one that is not 0."""
    weight = weight_of(m)
    if weight.constant_qparams is not None:
        zero_point = weight.constant_qparams[1]
        return Failure(str(zero_point)) if zero_point != 0 else None
    points = None if weight.zero_point is None else m.program.constant(weight.zero_point)
    count = 0 if points is None else int((points != 0).sum())
    return Failure(f"{count} that are not") if count else None


@requirement("scales that are positive, finite and normal", stage="values", hint="quantize the weight again")
def scales_are_normal(m: Match) -> Failure | None:
    """The delegate refuses other scales when the method is loaded, without naming the layer.

    It stores those of 4-bit weights in bfloat16, in which the largest float32 numbers are infinite.
    """
    scale = stored_scales(m).float()
    good = torch.isfinite(scale.bfloat16()) & (scale >= torch.finfo(torch.float32).smallest_normal)
    return None if bool(good.all()) else Failure(f"{int((~good).sum())} that are not")


# Requirements of activations that torchao quantizes dynamically.


@requirement(
    "activations quantized per token, asymmetric, in -128..127",
    hint="the delegate always computes that: quantize with Int8DynamicActivationIntxWeightConfig",
)
def activation_is_per_token(m: Match) -> Failure | None:
    """The delegate computes exactly this, for whatever parameters the graph has."""
    a = m.memoize(decode_dynamic, "activation")
    token = all(size == 1 for size in a.block_size[:-1]) and a.block_size[-1] == m.val(m.weight).shape[-1]
    scheme = (a.mapping, a.dtype, a.quant_min, a.quant_max) == ("ASYMMETRIC", torch.int8, -128, 127)
    if token and scheme and (a.eps is None or a.eps <= _LARGEST_EPS):
        return None
    return Failure(f"{a.mapping}, {a.quant_min}..{a.quant_max}, blocks of {list(a.block_size)}, eps {a.eps}")


@requirement(
    "quantized activations that only quantized linears read", hint="let other readers read the float activation"
)
def activation_has_no_other_reader(m: Match) -> Failure | None:
    """The delegate replaces the quantization as a whole."""
    integers, scale, *rest = m.activation.all_input_nodes
    nodes = (m.activation, integers, scale, *rest, *scale.all_input_nodes)
    for node in nodes[1:]:
        others = [user for user in node.users if user not in nodes]
        if others:
            return Failure(f"{others[0].name}, which reads {node.name} too")
    for reader in m.activation.users:
        weight = reader.args[1] if op_of(reader) is LINEAR and reader.args[0] is m.activation else None
        if not isinstance(weight, Node) or not is_dequantize(weight):
            return Failure(f"{reader.name}, which reads the dequantized activation too")
    return None


@requirement("activations of two dimensions or more", hint="unsqueeze the input")
def activation_has_two_dimensions(m: Match) -> Failure | None:
    """The delegate fails on a vector."""
    rank = m.val(m.x).dim()
    return None if rank >= 2 else Failure(f"{rank} dimension")


@requirement("activations in float32 or float16", hint="export in float32")
def activation_is_fp32_or_fp16(m: Match) -> Failure | None:
    """A method with the 8-bit kernel and bf16 activations does not load."""
    dtype = m.val(m.x).dtype
    return None if dtype in (torch.float32, torch.float16) else Failure(dtype_names([dtype]))


@requirement("activations in float32 or float16", hint="export in float32, or lower with enable_bf16=True")
def activation_is_fp32_fp16_or_enabled_bf16(m: Match) -> Failure | None:
    """The partitioner skips bf16 linears unless its option enables them."""
    if m.rule.bf16 and m.val(m.x).dtype is torch.bfloat16:
        return None
    return activation_is_fp32_or_fp16.check(m)


@requirement("one scale and one zero point for these integers", hint="clone the integers for the second scale")
def integers_have_one_scale(m: Match) -> Failure | None:
    """The delegate identifies a weight by its integers alone."""
    weight = weight_of(m)

    def scales(decoded: QuantizedWeight) -> tuple[Any, ...]:
        return decoded.scale, decoded.zero_point, decoded.constant_qparams, decoded.block_size

    for other in filter(is_dequantize, weight.data.users):
        if scales(m.program.memoize(decode, other)) != scales(weight):
            return Failure(f"{other.name}, which dequantizes the same integers with another scale or zero point")
    return None


@requirement(
    "integers and scales that own their memory",
    stage="values",
    hint="the delegate serializes the whole storage: .clone() the weight before the export",
)
def constants_own_their_memory(m: Match) -> Failure | None:
    """The delegate would serialize a view from the start of the larger tensor."""
    for part in weight_of(m).sources[:2]:
        tensor = m.program.constant(part)
        assert tensor is not None
        size = tensor.numel() * tensor.element_size()
        if tensor.storage_offset() != 0 or tensor.untyped_storage().nbytes() != size:
            return Failure(f"{part.name}, a view into a larger tensor")
    return None


def _linear_of_dynamic_activation(x: Capture, bias: Capture | None) -> Pattern:
    """A linear as written; the delegate would take a decomposed one for a float linear."""
    weight = op(DEQUANTIZE)(..., name="weight", shared=True)
    return op(LINEAR)(dynamically_quantized(x, name="activation"), weight, bias)


def _unreadable_storage(weight: QuantizedWeight) -> Failure | None:
    """Why no kernel of the delegate can read the weight."""
    if weight.storage_dtype is not torch.int8:
        return Failure(f"{weight.storage_dtype} storage")
    if weight.zero_point is None:
        return Failure("no zero point tensor")
    if weight.block_size[0] != 1:
        return Failure(f"one scale for {weight.block_size[0]} rows")
    return None


def _kept(*ms: Match) -> Notes:
    return Notes("XNNPACK has its own kernel for it and takes the pattern as it stands", kernel="XNNPACK")


@requirement("a 4-bit weight", hint="quantize with weight_dtype=torch.int4")
def weight_is_4_bit(m: Match) -> Failure | None:
    """The range of the 4-bit kernel."""
    weight = weight_of(m)
    if (weight.quant_min, weight.quant_max) == _INT4:
        return None
    return Failure(f"{weight.quant_min}..{weight.quant_max}")


@requirement(
    "int8 storage, a zero point tensor, and groups of a multiple of 32",
    hint="quantize with Int8DynamicActivationIntxWeightConfig and PerGroup(32), or leave this layer unquantized",
)
def int4_storage_is_readable(m: Match) -> Failure | None:
    """The delegate rounds the scales to bf16 itself."""
    weight = weight_of(m)
    unreadable = _unreadable_storage(weight)
    if unreadable is not None or weight.group_size % 32 == 0:
        return unreadable
    return Failure(f"group size {weight.group_size}, no multiple of 32")


INT4_KERNEL = (
    int4_storage_is_readable,
    integers_have_one_scale,
    constants_own_their_memory,
    zero_points_are_zero,
    scales_are_normal,
    weight_is_4_bit,
    integers_are_in_range,
)
"""The requirements of the delegate's 4-bit kernel for a weight."""


@dataclass(frozen=True)
class KeepDynamicInt4(Keep):
    """linear(dequantize(quantize(x)), dequantize(int4 weight), bias) -> itself, for XNNPACK's own kernel

    torchao exports this pattern for ``Int8DynamicActivationIntxWeightConfig``.

    Attributes:
        bf16: the partitioner has the option ``enable_bf16=True``; without it, the partitioner skips bf16 linears.
    """

    bf16: bool = False

    requirements = (
        weight_has_data,
        is_outside_control_flow,
        activation_is_per_token,
        activation_has_no_other_reader,
        activation_has_two_dimensions,
        activation_is_fp32_fp16_or_enabled_bf16,
        same_dtype("x", "bias"),
        bias_is_constant,
        *INT4_KERNEL,
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear whose operands are both dequantized."""
        return _linear_of_dynamic_activation(x, bias)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit dynamic activation, {weight_of(m).scheme}"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return _kept(*ms)


@requirement("a weight in int8, not 4-bit", hint="4 bits are kept by keep_dynamic_int4")
def weight_is_not_4_bit(m: Match) -> Failure | None:
    """The delegate selects its kernel by the range."""
    weight = weight_of(m)
    if (weight.quant_min, weight.quant_max) != _INT4:
        return None
    return Failure(f"{weight.quant_min}..{weight.quant_max}")


@requirement("int8 storage, a zero point tensor, and one float32 scale for each output")
def int8_storage_is_readable(m: Match) -> Failure | None:
    """The delegate reads the bytes of the scales as float32."""
    weight = weight_of(m)
    unreadable = _unreadable_storage(weight)
    if unreadable is not None:
        return unreadable
    if weight.group_size != weight.shape[1]:
        return Failure(f"group size {weight.group_size}, where int8 is per-axis only: quantize with PerAxis(0)")
    if weight.scale_dtype is torch.float32:
        return None
    dtype = dtype_names([weight.scale_dtype])
    return Failure(f"{dtype} scales, read as float32: quantize with weight_scale_dtype=torch.float32")


@dataclass(frozen=True)
class KeepDynamicInt8(Keep):
    """linear(dequantize(quantize(x)), dequantize(int8 per-axis weight), bias) -> itself, for XNNPACK's own kernel

    torchao exports this pattern for ``Int8DynamicActivationIntxWeightConfig``.
    """

    requirements = (
        weight_has_data,
        is_outside_control_flow,
        activation_is_per_token,
        activation_has_no_other_reader,
        activation_has_two_dimensions,
        activation_is_fp32_or_fp16,
        same_dtype("x", "bias"),
        bias_is_constant,
        int8_storage_is_readable,
        integers_have_one_scale,
        constants_own_their_memory,
        zero_points_are_zero,
        scales_are_normal,
        weight_is_not_4_bit,
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear whose operands are both dequantized."""
        return _linear_of_dynamic_activation(x, bias)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit dynamic activation, {weight_of(m).scheme}"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return _kept(*ms)


# Requirements of what executorch's XNNPACKQuantizer quantizes.


@requirement("activations in int8, -128..127", hint="quantize with executorch's XNNPACKQuantizer")
def activation_is_int8(m: Match) -> Failure | None:
    """The delegate computes with this range."""
    low, high, dtype = m.memoize(static_qparams, "activation")
    if (low, high, dtype) == (-128, 127, torch.int8):
        return None
    return Failure(f"{dtype_names([dtype])}, {low}..{high}")


@requirement("a weight in int8 and activations in float32", hint="quantize with executorch's XNNPACKQuantizer")
def weight_is_int8_and_activation_fp32(m: Match) -> Failure | None:
    """The dtypes of the delegate's kernels."""
    weight, x = weight_of(m), m.val(m.x).dtype
    if (weight.storage_dtype, weight.output_dtype, x) == (torch.int8, torch.float32, torch.float32):
        return None
    return Failure(f"{weight.storage_dtype} dequantized to {weight.output_dtype}, activations {x}")


@requirement(
    "float32 scales with zero points, or a number for the whole weight",
    hint="quantize with executorch's XNNPACKQuantizer",
)
def scales_are_fp32(m: Match) -> Failure | None:
    """The delegate reads the bytes of the scales as float32."""
    weight = weight_of(m)
    if weight.constant_qparams is not None:
        return None
    if weight.zero_point is None:
        return Failure("no zero point tensor")
    return None if weight.scale_dtype is torch.float32 else Failure(f"{dtype_names([weight.scale_dtype])} scales")


@requirement("a least scale of at most 2^-12", hint="quantize with executorch's XNNPACKQuantizer")
def least_scale_is_small(m: Match) -> Failure | None:
    """The delegate has none. For activations whose scale would be less, its result is closer to the float one."""
    eps = m.memoize(least_scale, "activation")
    return None if eps <= 2**-12 else Failure(f"{eps}")


@requirement(
    "activations of one row",
    hint="the delegate quantizes each row by itself; KeepDynamicPerTensor(per_row=True) accepts that, and "
    "Int8DynamicActivationIntxWeightConfig says it in the graph",
)
def activation_has_one_row(m: Match) -> Failure | None:
    """With one row, the delegate's scale is the graph's."""
    rows = m.val(m.x).shape[:-1]
    if m.rule.per_row or (all(isinstance(size, int) for size in rows) and prod(rows) == 1):
        return None
    return Failure(f"rows {' x '.join(map(str, rows))}")


@requirement("one scale for each output", hint="quantize with is_per_channel=True")
def weight_is_per_axis(m: Match) -> Failure | None:
    """The delegate skips a linear with one scale for the whole weight."""
    weight = weight_of(m)
    if weight.block_size == (1, *weight.shape[1:]) and weight.scale is not None:
        return None
    return Failure(weight.scheme)


@dataclass(frozen=True)
class KeepDynamicPerTensor(Keep):
    """linear(dequantize(quantize(x)), dequantize(int8 per-axis weight), bias) -> itself, one row of x, for XNNPACK

    executorch's XNNPACKQuantizer writes this pattern with ``is_dynamic=True``. The graph chooses one scale for the
    tensor, the delegate one for each row. With one row they are equal.

    Attributes:
        per_row: accept that the delegate chooses a scale for each row where the graph chooses one for all rows. The
            result then differs from the graph's, and is closer to that of the unquantized model.
    """

    per_row: bool = False

    requirements = (
        weight_has_data,
        is_outside_control_flow,
        activation_is_int8,
        least_scale_is_small,
        activation_has_no_other_reader,
        weight_is_int8_and_activation_fp32,
        scales_are_fp32,
        integers_have_one_scale,
        constants_own_their_memory,
        zero_points_are_zero,
        scales_are_normal,
        activation_has_one_row,
        weight_is_per_axis,
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear whose operands are both dequantized."""
        weight = dequantized(..., name="weight", shared=True)
        return op(LINEAR)(dynamically_quantized_per_tensor(x, name="activation"), weight, bias)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit dynamic activation per tensor, {weight_of(m).scheme}"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return _kept(*ms)


@requirement(
    "an int8 weight with one scale for each output, or one for all",
    hint="quantize with executorch's XNNPACKQuantizer, and a transposed convolution in groups per tensor",
)
def weight_has_scales_of_outputs(m: Match) -> Failure | None:
    """The partitioner skips other weights, or they fail when the method is loaded.

    4 bits of torchao's operator would select the 4-bit kernel, which needs a dynamic activation.
    """
    weight = weight_of(m)
    if weight.constant_qparams is not None:
        return None
    transposed = op_of(m.root) is aten.conv_transpose2d.input
    axis, groups = (1, arguments(m.root)["groups"]) if transposed else (0, 1)
    wanted = tuple(1 if each == axis else size for each, size in enumerate(weight.shape))
    is_int4 = op_of(m.weight) is DEQUANTIZE and (weight.quant_min, weight.quant_max) == _INT4
    if weight.block_size == wanted and groups == 1 and not is_int4:
        return None
    return Failure(weight.scheme if groups == 1 else f"{weight.scheme} and {groups} groups")


@requirement("no bias, or a constant one, of a convolution", hint="add such a bias behind the convolution")
def convolution_bias_is_constant(m: Match) -> Failure | None:
    """The partitioner skips a convolution with a computed bias; the lowering adds that of a linear behind it."""
    return None if op_of(m.root) is LINEAR else bias_is_constant.check(m)


@requirement("a result that is quantized", hint="quantize the output too: XNNPACKQuantizer().set_global(...) does")
def result_is_quantized(m: Match) -> Failure | None:
    """The delegate skips an operator whose result has no scale, and then no kernel computes it."""
    users = list(m.root.users)
    if len(users) == 1 and op_of(users[0]) in _CLAMPS:
        users = list(users[0].users)
    for user in users:
        if op_of(user) is not QUANTIZE_PER_TENSOR or user.args[3:] != (-128, 127, torch.int8):
            return Failure(f"{user.name}, which reads the result itself")
    return None if users else Failure("a result without a reader")


@dataclass(frozen=True)
class KeepStaticInt8(Keep):
    """linear(dequantize(quantize(x)), dequantize(int8 weight), bias) -> itself, where calibrated, for XNNPACK

    Convolutions are kept in the same way. executorch's XNNPACKQuantizer writes this pattern in a PT2E flow. The result
    is within one step of the scale that it is quantized to.
    """

    requirements = (
        weight_has_data,
        is_outside_control_flow,
        activation_is_int8,
        weight_is_int8_and_activation_fp32,
        weight_has_scales_of_outputs,
        convolution_bias_is_constant,
        scales_are_fp32,
        integers_have_one_scale,
        constants_own_their_memory,
        zero_points_are_zero,
        scales_are_normal,
        result_is_quantized,
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear or convolution whose operands are both dequantized."""
        operators = op(LINEAR, aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input)
        weight = dequantized(..., name="weight", shared=True)
        return operators(statically_quantized(x, name="activation"), weight, bias, ...)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit calibrated activation, {weight_of(m).scheme}"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return _kept(*ms)


@requirement("a bias that is no vector [out_features]")
def bias_broadcasts(m: Match) -> Failure | None:
    """The delegate reads a vector correctly."""
    bias = m.val(m.bias)
    return Failure(f"{m.bias.name} {list(bias.shape)}") if is_vector(bias, m.val(m.weight).shape[0]) else None


@dataclass(frozen=True)
class SplitBroadcastBias(Rule):
    """linear(x, weight, bias) -> linear(x, weight) + bias, where the bias is no vector [out_features]

    ``torch.nn.functional.linear`` accepts any bias that broadcasts. With executorch 1.5.1 the delegate reads
    out_features numbers from a constant bias of any shape, beyond the end of a shorter one, and reports no error. This
    concerns float linears as well as quantized ones.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (bias_is_constant, bias_broadcasts)

    def pattern(self, x: Capture, weight: Capture, bias: Capture) -> Pattern:
        """Any linear with a bias, quantized or not."""
        return op(LINEAR)(x, weight, bias)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """A linear without a bias, and a sum."""
        return b.call(aten.add.Tensor, b.call(LINEAR, m.x, m.weight), m.bias)
