"""Weights of a narrow dtype that the program itself converts to floating point, with no dequantize to match.

torchao's ``Float8WeightOnlyConfig`` and ``Int8WeightOnlyConfig`` export so: a conversion and a product.
"""

import torch
from torch.fx import Node

from et_cuda_passes.graph.ops import called
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.decomposed import STEPS

aten = torch.ops.aten

CONVERSIONS = (aten.to.dtype, aten._to_copy.default)
_NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_TRANSPOSES = frozenset(
    {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.permute.default, aten.view.default}
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


def converted_weight(program: Program, node: Node) -> Node | None:
    """The narrow constant that ``node`` converts to floating point, transposed or not; None for any other node."""
    if called(node) not in CONVERSIONS:
        return None
    value, source = node.meta.get("val"), node.args[0]
    while isinstance(source, Node) and called(source) in _TRANSPOSES:
        source = source.args[0]
    held = program.constant(source) if isinstance(source, Node) else None
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dtype.itemsize > 1
    narrow = held is not None and held.dim() > 1 and held.dtype in _NARROW
    if held is not None and held.dtype.itemsize == 1 and not held.dtype.is_floating_point:
        # Integers that are scaled next: a dequantize that was decomposed, of which the report warns.
        narrow = narrow and all(called(user) not in STEPS for user in node.users)
    return source if isinstance(source, Node) and floating and narrow else None


def advice(program: Program, weight: Node) -> str:
    """Why no kernel takes it, and what to do."""
    held = program.constant(weight)
    assert held is not None
    return (
        f"its weight is {str(held.dtype).removeprefix('torch.')}, converted by the program itself, and no kernel takes "
        "that: quantize with IntxWeightOnlyConfig, which leaves a dequantize"
    )
