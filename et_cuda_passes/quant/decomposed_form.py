"""``quantized_decomposed.dequantize_*``, which a PT2E quantizer leaves: ``(input - zero_point) * scale``, in float32.

Source: ``torch.ao.quantization.fx._decomposed``. The operators check the range that they are given and do not use it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.weight import QuantizedWeight, check_blocks, constant, integer_range, optional_constant

Shape = tuple[int, ...]


def decode_per_channel(program: Program, node: Node) -> QuantizedWeight:
    """One scale for each index of an axis.

    Raises:
        Unmet: it reads something else than constants, or its arguments contradict each other.
    """
    bound = arguments(node)

    def block(shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = int(bound["axis"]) % len(shape)
        return tuple(1 if index == axis else size for index, size in enumerate(shape))

    return _decode(program, bound, "scales", "zero_points", block)


def decode_per_channel_group(program: Program, node: Node) -> QuantizedWeight:
    """One scale for each row and group of a matrix.

    Raises:
        Unmet: it reads something else than constants, or its arguments contradict each other.
    """
    bound = arguments(node)
    bound["out_dtype"] = bound["output_dtype"]
    group = int(bound["group_size"])
    # The operator reads a group longer than a row as the whole row.
    return _decode(program, bound, "scales", "zero_points", lambda shape: (1, min(group, shape[-1])))


def decode_per_tensor(program: Program, node: Node) -> QuantizedWeight:
    """One scale for all, a number in the graph or a tensor.

    Raises:
        Unmet: it reads something else than constants, or its arguments contradict each other.
    """
    return _decode(program, arguments(node), "scale", "zero_point", lambda shape: shape)


def _decode(
    program: Program, bound: dict[str, Any], scale_name: str, zero_name: str, block: Callable[[Shape], Shape]
) -> QuantizedWeight:
    data, integers = constant(program, bound["input"], "the quantized data")
    scale, scales, zero_point, points, literal = None, None, None, None, None
    if isinstance(bound[scale_name], Node):
        scale, scales = constant(program, bound[scale_name], "the scale")
        zero_point, points = optional_constant(program, bound[zero_name], "the zero point")
    else:
        literal = (float(bound[scale_name]), int(bound[zero_name]))
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
        constant_qparams=literal,
    )
    check_blocks(weight, scales, points)
    return weight
