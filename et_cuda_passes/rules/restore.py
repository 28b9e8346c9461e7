"""Weights that are packed for one kernel, or dequantized by plain operators, get a dequantize operator again.

The rules that follow then see ``linear(x, dequantize(weight))``, whatever the program was exported from.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.constants import strip_parametrization
from et_cuda_passes.graph.finish import eliminate_dead_nodes, finish_program
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, arguments, op_of
from et_cuda_passes.graph.pattern import AnyOf, Call, Capture, Pattern, any_of, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Failure, Notes, Rule, requirement
from et_cuda_passes.ops import (
    DEQUANTIZE_FLOAT4,
    DEQUANTIZE_FLOAT8,
    DEQUANTIZE_INT4_NESTED,
    DEQUANTIZE_INT4_TILES,
)
from et_cuda_passes.quant.decoders import DEQUANTIZE, decode_product, weight_of
from et_cuda_passes.quant.float_forms import FLOAT8
from et_cuda_passes.quant.unsupported import unwrapped
from et_cuda_passes.quant.weight import QuantizedWeight, has_data, weight_values
from et_cuda_passes.rules.patterns import transposed
from et_cuda_passes.rules.values import nonfinite

aten = torch.ops.aten


def _weight(m: Match) -> QuantizedWeight:
    return m.memoize(decode_product, "product")


@requirement("a constant packed weight that holds data")
def packed_weight_has_data(m: Match) -> Failure | None:
    """It is unpacked at compile time."""
    if has_data(m.program, _weight(m)):
        return None
    return Failure("meta or fake tensors", "export with real weights, not on the meta device or under FakeTensorMode")


@requirement("scales and zeros that are finite", stage="values", hint="quantize the weight again")
def packed_scales_are_finite(m: Match) -> Failure | None:
    """Another rule would then leave the weight unpacked."""
    values = weight_values(m.program, _weight(m))
    bad = sum(map(nonfinite, (values.scale, values.zero_point, values.minimum)))
    return Failure(f"{bad} that are NaN or infinite") if bad else None


def registered_op(namespace: str, name: str) -> torch._ops.OpOverload | None:
    """An operator that another package registers, if it was imported."""
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else packet.default


@dataclass(frozen=True)
class UnpackLinear(Rule):
    """product(x, packed weight) -> linear(x, dequantize(packed))

    The products are ``aten._weight_int4pack_mm``, which torchao's ``Int4TilePackedTo4dTensor`` exports, and
    ``int4_plain_mm`` and ``int8_plain_mm`` of ExecuTorch's CUDA backend. A rule after this one packs the weight for a
    kernel of the target. Columns of zeros that torchao appends to x and to the weight are left out.
    """

    requirements = (packed_weight_has_data, packed_scales_are_finite)

    def pattern(self, x: Capture) -> Pattern:
        """A product, of x or of x with columns appended."""
        tiles = op(aten._weight_int4pack_mm.default)
        appended = any_of(
            op(aten.pad.default)(x, ..., name="appended", shared=True),
            op(aten.constant_pad_nd.default)(x, ..., name="appended", shared=True),
        )
        products = [tiles(appended, ..., name="product"), tiles(x, ..., name="product")]
        plain = [registered_op("executorch_cuda", f"int{bits}_plain_mm") for bits in (4, 8)]
        products += [op(each)(x, ..., name="product") for each in plain if each is not None]
        return any_of(*products)

    def summary(self, m: Match) -> str:
        """The form that is given up."""
        return f"unpacked {_weight(m).scheme}"

    def notes(self, *ms: Match) -> Notes:
        """The operator that the weight was packed for."""
        return Notes(f"the program had the weight packed for {op_of(ms[0].root)}")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """A dequantize of the packed weight, and a linear."""
        given, weight = arguments(m.root), _weight(m)
        if weight.encoding != "int4_tiles":
            return b.call(aten.linear.default, m.x, self._dequantize(b, given, weight))
        x, k = m.x, weight.in_features
        group = given["qGroupSize"]
        if "appended" in m.match.bindings:
            if (without := _columns_before_padding(m)) % group == 0:
                k = without
            else:
                x = m.appended
        dequantized = b.call(DEQUANTIZE_INT4_TILES, given["mat2"], given["qScaleAndZeros"], group, k)
        return b.call(aten.linear.default, x, dequantized)

    @staticmethod
    def _dequantize(b: Builder, given: dict[str, Any], weight: QuantizedWeight) -> Node:
        """The dequantized weight of a product of ExecuTorch's CUDA backend."""
        if weight.encoding:
            names = ("qdata", "scale", "scale_step", "zero", "zero_point_step", "group_size")
            return b.call(DEQUANTIZE_INT4_NESTED, *(given[name] for name in names), weight.output_dtype)
        return _dequantize_int8(
            b, given["qdata"], given["scale"], given["zero"], weight.group_size, weight.output_dtype
        )


def _dequantize_int8(
    b: Builder, data: Node, scale: Node, zero_point: Node, group_size: int, dtype: torch.dtype
) -> Node:
    block = [1, group_size]
    return b.call(DEQUANTIZE, data, block, scale, zero_point, torch.int8, -128, 127, output_dtype=dtype)


def _columns_before_padding(m: Match) -> int:
    """K before zeros were appended to it; -1 if something else was padded."""
    given = arguments(m.appended)
    before, after = (m.val(node).shape for node in (m.x, m.appended))
    zeros = given.get("mode", "constant") == "constant" and given["value"] in (None, 0)
    end = list(given["pad"])
    appends = len(end) == 2 and end[0] == 0 and zeros and len(before) == len(after)
    return int(before[-1]) if appends and isinstance(before[-1], int) else -1


# Arithmetic -----------------------------------------------------------------------------------------------------------


_CONVERSIONS = (aten.to.dtype, aten._to_copy.default)


def _converted(x: Pattern, shared: bool = True) -> AnyOf:
    """``x`` in another dtype. Assertions on the metadata of ``x``, which an export adds, are other readers of it."""
    return any_of(*(op(conversion)(x, ..., shared=shared) for conversion in _CONVERSIONS))


@requirement("constants of 8-bit floats and of scales for blocks of them")
def float8_parts_fit(m: Match) -> Failure | None:
    """One scale, or as many axes as the weight has."""
    if not isinstance(m.data, Node) or not isinstance(m.scale, Node):
        return Failure(f"{m.data} and {m.scale}")
    data, scale = m.program.constant(m.data), m.program.constant(m.scale)
    if data is None or scale is None or m.program.is_mutated(m.data) or m.program.is_mutated(m.scale):
        return Failure(f"{m.data.name} and {m.scale.name}")
    fits = scale.numel() == 1 or (
        scale.dim() == data.dim() and all(a % b == 0 for a, b in zip(data.shape, scale.shape, strict=True))
    )
    floats = data.dtype in FLOAT8 and scale.is_floating_point() and m.val(m.product).dtype is torch.float32
    return None if fits and floats else Failure(f"{data.dtype} {list(data.shape)} and scales {list(scale.shape)}")


@requirement("a product that is not converted next")
def product_is_the_weight(m: Match) -> Failure | None:
    """Otherwise the conversion is the root of another match."""
    converted = m.root is m.product and any(op_of(user) in _CONVERSIONS for user in m.root.users)
    return Failure("a conversion") if converted else None


@dataclass(frozen=True)
class RestoreFloat8(Rule):
    """convert(convert(float8 weight) * scale) -> dequantize_float8(weight, scale)

    torchao's ``Float8WeightOnlyConfig`` exports this arithmetic, with the weight and the scale transposed or not.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (product_is_the_weight, float8_parts_fit)

    def pattern(self, data: Capture, scale: Capture) -> Pattern:
        """The product in fp32, and mostly its conversion to the dtype of the model."""

        def product(shared: bool) -> AnyOf:
            multiplied = op(aten.mul.Tensor)
            return any_of(
                multiplied(_converted(transposed(data)), transposed(scale), name="product", shared=shared),
                multiplied(_converted(data), scale, name="product", shared=shared),
            )

        return any_of(_converted(product(shared=True), shared=False), product(shared=False))

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The dequantize, transposed as the weight was."""
        weight = b.call(DEQUANTIZE_FLOAT8, m.data, m.scale, m.val(m.root).dtype)
        turned = m.product.all_input_nodes[0].all_input_nodes[0] is not m.data
        return b.call(aten.t.default, weight) if turned else weight


@requirement("constants of an int4 weight with scales and zero points that are codes times steps")
def nested_parts_fit(m: Match) -> Failure | None:
    """Their shapes are those of ``dequantize_int4_nested``."""
    names = ("qdata", "scale", "scale_step", "zero_point", "zero_point_step")
    nodes = [getattr(m, name) for name in names]
    if not all(isinstance(node, Node) for node in nodes):
        return Failure(", ".join(map(str, nodes)))
    parts = [m.program.constant(node) for node in nodes]
    if any(part is None or m.program.is_mutated(node) for part, node in zip(parts, nodes, strict=True)):
        return Failure(", ".join(node.name for node in nodes))
    shapes = [tuple(m.val(node).shape) for node in nodes]
    (n, half), (_, groups), (_, steps) = shapes[:3]
    views = [tuple(m.val(node).shape) for node in (m.halves, m.integers, m.root)]
    fits = 2 * half % groups == 0 and groups % steps == 0
    fits = fits and shapes[1:] == [(n, groups), (n, steps)] * 2
    fits = fits and views == [(n, groups, half // groups), (n, groups, 2 * half // groups), (n, 2 * half)]
    return None if fits else Failure(f"{shapes}, {views}")


@dataclass(frozen=True)
class RestoreInt4Nested(Rule):
    """(unpack(qdata) - zero_point * zero_point_step) * (scale * scale_step) -> dequantize_int4_nested(...)

    ExecuTorch's ``CudaCoalescedInt4Tensor`` exports this arithmetic for a product with more than four rows. It is
    computed in the dtype of the activations; the operator computes in fp32.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (nested_parts_fit,)

    def pattern(
        self, qdata: Capture, scale: Capture, scale_step: Capture, zero_point: Capture, zero_point_step: Capture
    ) -> Pattern:
        """The weight [N, K]."""
        view = op(aten.view.default)
        low_four = op(aten.__and__.Scalar, aten.bitwise_and.Scalar)
        halves = view(any_of(_converted(qdata), qdata), ..., name="halves", shared=True)
        high = op(aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar)(halves, 4, shared=True)
        both = [_converted(low_four(part, 15, shared=True)) for part in (halves, high)]
        integers = view(op(aten.stack.default)(both, -1, shared=True), ..., name="integers", shared=True)

        def table(codes: Capture, steps: Capture) -> Pattern:
            spread = op(aten.repeat_interleave.self_int)(_converted(steps), ..., shared=True)
            product = op(aten.mul.Tensor)(_converted(codes), spread, shared=True)
            return op(aten.unsqueeze.default)(product, -1, shared=True)

        shifted = op(aten.sub.Tensor)(integers, table(zero_point, zero_point_step), shared=True)
        return view(op(aten.mul.Tensor)(shifted, table(scale, scale_step), shared=True), ...)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The dequantize."""
        group = 2 * m.val(m.qdata).shape[1] // m.val(m.scale).shape[1]
        parts = (m.qdata, m.scale, m.scale_step, m.zero_point, m.zero_point_step)
        return b.call(DEQUANTIZE_INT4_NESTED, *parts, group, m.val(m.root).dtype)


@requirement("constants of an int8 weight in groups")
def int8_parts_fit(m: Match) -> Failure | None:
    """Scales and zero points for each row and group."""
    nodes = (m.integers, m.scale, m.zero_point)
    if not all(isinstance(node, Node) for node in nodes):
        return Failure(", ".join(map(str, nodes)))
    parts = [m.program.constant(node) for node in nodes]
    if any(part is None or m.program.is_mutated(node) for part, node in zip(parts, nodes, strict=True)):
        return Failure(", ".join(node.name for node in nodes))
    data, scale, points = (m.val(node) for node in nodes)
    shape, groups = tuple(data.shape), tuple(m.val(m.groups).shape)
    fits = data.dtype is torch.int8 and len(shape) == 2 and len(groups) == 3 and tuple(m.val(m.root).shape) == shape
    fits = fits and groups[:2] == tuple(scale.shape) == tuple(points.shape) and groups[0] == shape[0]
    return None if fits else Failure(f"{data.dtype} {list(shape)} in {list(groups)}, scales {list(scale.shape)}")


@dataclass(frozen=True)
class RestoreInt8(Rule):
    """(convert(int8 weight) - convert(zero_point)) * convert(scale) -> dequantize_affine(weight, scale, zero_point)

    ExecuTorch's CUDA backend exports this arithmetic for ``IntxWeightOnlyConfig(torch.int8)`` and more than four rows.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (int8_parts_fit,)

    def pattern(self, integers: Capture, scale: Capture, zero_point: Capture) -> Pattern:
        """The weight [N, K], from three dimensions."""
        view = op(aten.view.default)
        groups = view(_converted(integers), ..., name="groups", shared=True)
        scales, points = (view(_converted(part), ..., shared=True) for part in (scale, zero_point))
        shifted = op(aten.sub.Tensor)(groups, points, shared=True)
        return view(op(aten.mul.Tensor)(shifted, scales, shared=True), ...)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The dequantize."""
        size = m.val(m.groups).shape[-1]
        return _dequantize_int8(b, m.integers, m.scale, m.zero_point, int(size), m.val(m.root).dtype)


@requirement("a weight that is decoded")
def weight_is_decoded(m: Match) -> Failure | None:
    """The decoder raises for values that are no constants or contradict each other."""
    weight_of(m)
    return None


@dataclass(frozen=True)
class CompileFloatDequantize(Rule):
    """dequantize_mx(...) -> dequantize_float8(...); dequantize_nvfp4(...) -> dequantize_float4(...)

    ``executorch.extension.llm.export`` registers these operators with a kernel in Python, which no compiled program
    has. Inductor decomposes those of this package.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (weight_is_decoded,)

    def pattern(self) -> Pattern:
        """The operators that are registered now, which may be none."""
        found = (registered_op("torchao", f"dequantize_{kind}") for kind in ("mx", "nvfp4"))
        return Call(tuple(each for each in found if each is not None), name="weight", open=True, label="a dequantize")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same weight from the same constants."""
        given, dtype = arguments(m.root), m.val(m.root).dtype
        if "per_tensor_scale" in given:
            parts = [given[name] for name in ("qdata", "scale", "per_tensor_scale", "block_size")]
            return b.call(DEQUANTIZE_FLOAT4, *parts, dtype)
        return b.call(DEQUANTIZE_FLOAT8, given["qdata"], given["scale"], dtype)


def restoring() -> list[Rule]:
    """The rules of this file, which a target lists before all others."""
    return [UnpackLinear(), RestoreFloat8(), RestoreInt4Nested(), RestoreInt8(), CompileFloatDequantize()]


# Tensor subclasses ----------------------------------------------------------------------------------------------------


def normalised(exported: ExportedProgram) -> tuple[ExportedProgram, str]:
    """:func:`.unwrapped` after :func:`unwrap_nvfp4`."""
    return unwrapped(unwrap_nvfp4(exported))


def unwrap_nvfp4(exported: ExportedProgram) -> ExportedProgram:
    """The program with a dequantize of each wrapped weight of torchao's ``NVFP4Tensor``, which has the parts as inputs.

    ``run_decompositions({})`` fails for them before torch 2.14, and traces the arithmetic of the dequantize after it. A
    weight with quantized activations, of several experts, or transposed stays wrapped, and so does one whose parts the
    program reads.
    """
    program: Program | None = None
    held_by = _held(exported)
    for original in exported.graph.find_nodes(op="placeholder"):
        held: Any = held_by.get(original.name)
        whole = original.users and not any(op_of(user) is ACCESS_SUBCLASS_TENSOR for user in original.users)
        if not whole or not _is_plain_nvfp4(held):
            continue
        program = program or Program(exported)
        node = next(each for each in program.graph.find_nodes(op="placeholder") if each.name == original.name)
        target = program.fqn_key(node)
        assert target is not None
        parent, _, field = strip_parametrization(target).rpartition(".")
        stem = f"{parent}.parametrizations.{field}" if parent else f"parametrizations.{field}"
        parts = [held.qdata.view(torch.uint8), _nvfp4_scales(held), held.per_tensor_scale]
        inner = [
            None if part is None else program.insert_parameter(f"{stem}.original{index}", part, node)
            for index, part in enumerate(parts)
        ]
        # A branch that reads the weight gets a dequantize of its own, so that rules find it beside the reader.
        inputs = [each for each in program.order if each.op == "placeholder" and program.resolve(each) is node]
        for each in reversed(inputs):
            readers = [user for user in each.users if each not in program.subgraphs.captured_operands(user)]
            if not readers:
                continue
            first = min(readers, key=program.order.__getitem__)
            b = Builder(program, [first], "unwrap_nvfp4")
            here = [part and program.subgraphs.thread_through(part, each.graph) for part in inner]
            weight = b.call(DEQUANTIZE_FLOAT4, *here, held.block_size, held.dtype)
            for reader in readers:
                reader.replace_input_with(each, weight)
        program.mark_dead(inputs)
        eliminate_dead_nodes(program)
        program.refresh()
    return exported if program is None else finish_program(program)


def _held(exported: ExportedProgram) -> dict[str, Any]:
    """Parameters and buffers by the name of their placeholder."""
    signature = exported.graph_signature  # it builds each of its dictionaries anew
    values = {**exported.constants, **exported.state_dict}
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {name: values[target] for name, target in targets.items() if target in values}


def _is_plain_nvfp4(weight: Any) -> bool:
    """Whether ``weight`` is an ``NVFP4Tensor`` [N, K] that is dequantized before a product."""
    module = sys.modules.get("torchao.prototype.mx_formats.nvfp4_tensor")
    if module is None or not isinstance(weight, module.NVFP4Tensor):
        return False
    whole = weight.per_tensor_scale
    contiguous = weight.qdata.dim() == 2 and weight.qdata.is_contiguous()
    return weight.act_quant_kwargs is None and contiguous and (whole is None or whole.numel() == 1)


def _nvfp4_scales(weight: Any) -> torch.Tensor:
    """The scales [N, K / block_size]. torchao may store them in blocks of 128 x 4."""
    n, groups = weight.shape[0], weight.shape[1] // weight.block_size
    if not weight.is_swizzled_scales:
        scales: torch.Tensor = weight.scale.reshape(n, groups)
        return scales.contiguous()
    from torchao.prototype.mx_formats.utils import from_blocked

    unblocked: torch.Tensor = from_blocked(weight.scale, n, groups)
    return unblocked.view(n, groups).contiguous()
