"""``torchao.dequantize_affine``: ``(input - zero_point) * scale`` in blocks of ``block_size``.

Source: ``torchao.quantization.quant_primitives.dequantize_affine``.
"""

import torch
from torch.fx import Node

from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.weight import QuantizedWeight, check_blocks, constant, integer_range, optional_constant


def decode(program: Program, node: Node) -> QuantizedWeight:
    """The weight of ``dequantize_affine``, with plain or tensor-subclass constants.

    Raises:
        Unmet: it reads something else than constants, or its arguments contradict each other.
    """
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
        # Left out, it is the schema's default: float32, which the schema spells as a number.
        output_dtype=output if isinstance(output, torch.dtype) else torch.float32,
    )
    check_blocks(weight, scales, points)
    return weight
