"""Weights of a narrow dtype that the program itself computes with, with no dequantize to match.

torchao's ``Float8WeightOnlyConfig`` and ``Int8WeightOnlyConfig`` export a conversion and a product. With quantized
activations (``Float8DynamicActivationFloat8WeightConfig``, ``Int8DynamicActivationInt8WeightConfig``, MX formats) the
product is one of the narrow numbers themselves.
"""

import torch
from torch.fx import Node

from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.advised import SuggestedSchemes
from et_cuda_passes.quant.decomposed import DEQUANTIZE_STEPS
from et_cuda_passes.quant.unwrapping import bits_of

aten = torch.ops.aten

CONVERSIONS = (aten.to.dtype, aten._to_copy.default)
_NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2)
_MOVE_OPS = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.slice.Tensor,
        aten.clone.default,
        aten.detach.default,
    }
)
PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.matmul.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.convolution.default,
    }
)
"""Readers of a weight; a table or a mask of bytes has others."""
_NARROW_PRODUCTS = frozenset({aten._int_mm.default, aten._scaled_mm.default, aten._scaled_mm_v2.default})


def converted_weight(program: Program, node: Node) -> Node | None:
    """The narrow constant that ``node`` converts to floating point, moved or not; None for any other node."""
    if op_of(node) not in CONVERSIONS:
        return None
    value, source = node.meta.get("val"), _moved(node.args[0])
    held = program.constant(source) if source is not None else None
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dtype.itemsize > 1
    narrow = held is not None and held.dim() > 1 and held.dtype in _NARROW
    if held is not None and held.dtype.itemsize == 1 and not held.dtype.is_floating_point:
        # Integers that are scaled next: a dequantize that was decomposed, of which the report warns.
        narrow = narrow and all(op_of(user) not in DEQUANTIZE_STEPS for user in node.users)
    return source if floating and narrow else None


def multiplied_weight(program: Program, node: Node) -> Node | None:
    """The narrow constant that ``node`` multiplies as it is, moved or not; None for any other node."""
    if op_of(node) not in _NARROW_PRODUCTS:
        return None
    for source in map(_moved, node.args[:2]):
        held = program.constant(source) if source is not None else None
        if held is not None and held.dtype in _NARROW:
            return source
    return None


def _moved(source: object) -> Node | None:
    """What ``source`` moves, itself where it moves nothing; None where that is no node."""
    while isinstance(source, Node) and op_of(source) in _MOVE_OPS:
        source = source.args[0]
    return source if isinstance(source, Node) else None


def unsupported_reason(program: Program, weight: Node, how: str, elements: int, advised: SuggestedSchemes) -> str:
    """Why no kernel takes a weight of so many elements, which the program computes with as ``how`` says; what to do."""
    held = program.constant(weight)
    assert held is not None
    kind, bits = str(held.dtype).removeprefix("torch."), 4 if held.dtype is torch.float4_e2m1fn_x2 else 8
    whole = program.constant(weight.args[0]) if op_of(weight) is ACCESS_SUBCLASS_TENSOR else None  # type: ignore[arg-type]
    if whole is not None and bits_of(whole) < bits:
        # Its scales are what is converted.
        kind, bits = type(whole).__name__, bits_of(whole)
    elif held.numel() * 8 // bits < elements:
        largest = _largest_part(program, weight)
        bits = 8 * largest.numel() * largest.element_size() // elements
        scales = "" if largest is held else f", with scales in {kind}"
        kind = f"packed in {bits} bits an element{scales}"
    return (
        f"its weight is {kind}, {how} by the program itself, and no kernel takes that: "
        f"quantize with {advised.for_bits(bits)}, which leaves a dequantize"
    )


def _largest_part(program: Program, part: Node) -> torch.Tensor:
    """Of the constants of the weight that ``part`` is one of, the one of the most bytes: they share its FQN."""
    fqn = program.fqn(part)
    parts = (program.constant(node) for node in part.graph.find_nodes(op="placeholder") if program.fqn(node) == fqn)
    return max((held for held in parts if held is not None), key=lambda held: held.numel() * held.element_size())
