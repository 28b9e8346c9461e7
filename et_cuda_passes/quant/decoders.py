"""The one decoder of dequantized weights: every operator and argument form becomes a frozen :class:`QuantizedWeight`.

Each operator computes ``(input - zero_point) * scale`` in blocks. torchao's ``dequantize_affine`` is always registered.
The other operators are registered by a PT2E quantizer or by ExecuTorch's export of checkpoints. A program can contain
one only after that import, so the patterns look the operators up when they are built.

Sources: ``torchao.quantization.quant_primitives.dequantize_affine`` and ``torch.ao.quantization.fx._decomposed``. The
operators of the latter check the range that they are given and do not use it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torchao.quantization.quant_primitives  # noqa: F401  (registers the operator)
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import AnyOf, Call, any_of, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.experts import expert_weight, find_expert, selected_expert
from et_cuda_passes.quant.float_forms import FLOAT_DECODERS
from et_cuda_passes.quant.packed_forms import (
    PRODUCT_DECODERS,
    decode_gguf,
    decode_int4_nested,
    decode_int4_tensor,
    decode_int4_tiles,
)
from et_cuda_passes.quant.weight import QuantizedWeight, check_blocks, constant, integer_range, optional_constant

DEQUANTIZE = torch.ops.torchao.dequantize_affine.default

Decode = Callable[[Program, Node], QuantizedWeight]
Shape = tuple[int, ...]


def dequantized(*args: Any, **kwargs: Any) -> Call:
    """``dequantize(..., name="weight", shared=True)``: the call pattern of a dequantized weight, in every form."""
    return replace(op(*dequantize_ops())(*args, **kwargs), label="a dequantized weight", hint=_weight_hint)


_CONVERSIONS = frozenset({torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout, torch.ops.aten._to_copy.default})


def _weight_hint(found: Any) -> str:
    """The fix for a weight that is not quantized, or that the program converts after its dequantize."""
    if isinstance(found, Node) and found.op == "placeholder":
        return "the weight is not quantized: quantize this layer"
    if not isinstance(found, Node) or op_of(found) not in _CONVERSIONS:
        return ""
    source = found.all_input_nodes[0]
    while op_of(source) in _CONVERSIONS:
        source = source.all_input_nodes[0]
    if not is_dequantize(source):
        return ""
    before, after = (str(node.meta["val"].dtype).removeprefix("torch.") for node in (source, found))
    return (
        f"the model converts the weight from {before} to {after}: remove that, and convert the activations to {before} "
        f"instead, or quantize the model in {after}"
    )


def dequantized_matrix(name: str = "weight") -> AnyOf:
    """A dequantized matrix [N, K]: a weight, or one of the experts of a stack [E, N, K]."""
    return any_of(dequantized(..., name=name, shared=True), selected_expert(dequantized(..., shared=True), name))


def weight_of(m: Match, name: str = "weight") -> QuantizedWeight:
    """The decoded weight of the node that the pattern calls ``name``, decoded once for each node.

    Raises:
        Unmet: the node's arguments describe no weight that could be packed; the text says what was found.
    """
    return m.memoize(decode, name)


def decode(program: Program, node: Node) -> QuantizedWeight:
    """Decode ``node``, which dequantizes a weight or selects one expert of it, in ATen or edge form.

    Constants may be plain or inside a tensor subclass.

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
        TypeError: ``node`` neither dequantizes nor selects an expert.
    """
    decoder = decoder_for(op_of(node))
    if decoder is not None:
        return decoder(program, node)
    stack, index = find_expert(node)
    decoder = decoder_for(op_of(stack))
    if decoder is None:
        raise TypeError(f"{stack.name} calls no operator that dequantizes")
    return expert_weight(decoder(program, stack), index)


# torchao -------------------------------------------------------------------------------------------------------------


def _decode_affine(program: Program, node: Node) -> QuantizedWeight:
    """The weight of ``dequantize_affine``, with plain or tensor-subclass constants."""
    bound = arguments(node)
    data, integers = constant(program, bound["input"], "the quantized data")
    scale, scales = constant(program, bound["scale"], "the scale")
    zero_point, points = optional_constant(program, bound["zero_point"], "the zero point")
    low, high = integer_range(bound.get("quant_min"), bound.get("quant_max"), integers.dtype)
    output = bound["output_dtype"]
    weight = QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=scale,
        zero_point=zero_point,
        shape=tuple(integers.shape),
        block_size=tuple(int(size) for size in bound["block_size"]),
        quant_min=low,
        quant_max=high,
        storage_dtype=integers.dtype,
        scale_dtype=scales.dtype,
        # The schema's default is float32, which the schema spells as a number.
        output_dtype=output if isinstance(output, torch.dtype) else torch.float32,
    )
    check_blocks(weight, scales, points)
    return weight


# PT2E ----------------------------------------------------------------------------------------------------------------


def _decode_per_channel(program: Program, node: Node) -> QuantizedWeight:
    """One scale for each index of an axis."""
    bound = arguments(node)

    def block(shape: Shape) -> Shape:
        axis = int(bound["axis"]) % len(shape)
        return tuple(1 if index == axis else size for index, size in enumerate(shape))

    return _decode_pt2e(program, bound, "scales", "zero_points", block)


def _decode_per_channel_group(program: Program, node: Node) -> QuantizedWeight:
    """One scale for each row and group of a matrix."""
    bound = arguments(node)
    bound["out_dtype"] = bound["output_dtype"]
    group = int(bound["group_size"])
    # The operator treats a group longer than a row as the whole row.
    return _decode_pt2e(program, bound, "scales", "zero_points", lambda shape: (1, min(group, shape[-1])))


def _decode_per_tensor(program: Program, node: Node) -> QuantizedWeight:
    """One scale for the whole weight: a number in the graph, or a tensor."""
    return _decode_pt2e(program, arguments(node), "scale", "zero_point", lambda shape: shape)


def _decode_pt2e(
    program: Program, bound: dict[str, Any], scale_name: str, zero_name: str, block: Callable[[Shape], Shape]
) -> QuantizedWeight:
    data, integers = constant(program, bound["input"], "the quantized data")
    scale, scales, zero_point, points, numbers = None, None, None, None, None
    if isinstance(bound[scale_name], Node):
        scale, scales = constant(program, bound[scale_name], "the scale")
        zero_point, points = optional_constant(program, bound[zero_name], "the zero point")
    else:
        numbers = (float(bound[scale_name]), int(bound[zero_name]))
    shape = tuple(integers.shape)
    ends = (bound["quant_min"], bound["quant_max"])
    if any(isinstance(end, Node) for end in ends):
        raise Unmet(f"a quantized range that the program computes, {ends[0]}..{ends[1]}")
    low, high = integer_range(*ends, integers.dtype)
    weight = QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=scale,
        zero_point=zero_point,
        shape=shape,
        block_size=block(shape),
        quant_min=low,
        quant_max=high,
        storage_dtype=integers.dtype,
        scale_dtype=torch.float32 if scales is None else scales.dtype,
        output_dtype=bound["out_dtype"] or torch.float32,
        constant_qparams=numbers,
    )
    check_blocks(weight, scales, points)
    return weight


# The table -----------------------------------------------------------------------------------------------------------

_DECODERS: Mapping[str, Decode] = {
    "torchao::dequantize_affine": _decode_affine,
    "quantized_decomposed::dequantize_per_channel": _decode_per_channel,
    "quantized_decomposed::dequantize_per_channel_group": _decode_per_channel_group,
    "quantized_decomposed::dequantize_per_tensor": _decode_per_tensor,
    "quantized_decomposed::dequantize_per_tensor.tensor": _decode_per_tensor,
    "quantized_decomposed::dequantize_per_tensor.tensor2": _decode_per_tensor,
    "torchao::dequantize_int4_tensor": decode_int4_tensor,
    "torchao::dequantize_gguf": decode_gguf,
    "et_cuda_passes::dequantize_int4_tiles": decode_int4_tiles,
    "et_cuda_passes::dequantize_int4_nested": decode_int4_nested,
    **FLOAT_DECODERS,
}
_PYTHON_KERNELS = frozenset({"torchao::dequantize_int4_tensor", "torchao::dequantize_gguf"})


def decoder_for(target: Any) -> Decode | None:
    """The decoder of a call of the operator ``target``; None if the operator does not dequantize."""
    # Torch's registry holds one operator under a qualified name.
    return _DECODERS.get(target.name()) if isinstance(target, torch._ops.OpOverload) else None


def is_dequantize(node: Node) -> bool:
    """Whether ``node`` dequantizes a tensor, in ATen or edge form."""
    return decoder_for(op_of(node)) is not None


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies with a weight that is packed for its operator."""
    target = op_of(node)
    return isinstance(target, torch._ops.OpOverload) and target.name() in PRODUCT_DECODERS


def decode_product(program: Program, node: Node) -> QuantizedWeight:
    """The weight of ``node``, an operator that multiplies with a weight which is packed for it.

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
        TypeError: ``node`` is no such operator.
    """
    target = op_of(node)
    decoder = PRODUCT_DECODERS.get(target.name()) if isinstance(target, torch._ops.OpOverload) else None
    if decoder is None:
        raise TypeError(f"{node.name} multiplies with no packed weight")
    return decoder(program, node)


def needs_python_kernel(node: Node) -> bool:
    """Whether ``node`` dequantizes by an operator that has only a Python kernel.

    AOTInductor can call such an operator, and no library that it compiles contains it.
    """
    target = op_of(node)
    return isinstance(target, torch._ops.OpOverload) and target.name() in _PYTHON_KERNELS


def dequantized_data(node: Node) -> Node | None:
    """The integers that dequantize ``node`` reads; None for any other node, or if they are no tensor."""
    if not is_dequantize(node):
        return None
    data = next(iter(arguments(node).values()), None)
    return data if isinstance(data, Node) else None


def dequantize_ops() -> list[torch._ops.OpOverload]:
    """Every dequantize operator that is registered now, torchao's own first."""
    found = []
    for name in _DECODERS:
        namespace, _, rest = name.partition("::")
        operator, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.append(getattr(packet, overload or "default"))
    return found
