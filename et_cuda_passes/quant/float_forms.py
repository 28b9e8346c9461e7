"""Decoders of weights whose elements are floating-point numbers of 8 or 4 bits, with a scale for each block.

``float8_e4m3fn`` and ``float8_e5m2`` have one byte an element. ``float4_e2m1fn`` has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and
their negatives, two in a byte, the low nibble first. Twice such a number is an integer, so the weight decodes as
integers -12..12 of half the scale: a kernel of 8-bit integers holds it exactly.

Sources: ``executorch.extension.llm.export.mx`` and ``.nvfp4``, which register ``torchao::dequantize_mx`` and
``torchao::dequantize_nvfp4``; the numbers are those of the OCP Microscaling Formats (MX) Specification 1.0.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.weight import (
    QuantizedWeight,
    RowReader,
    WeightValues,
    check_blocks,
    constant,
    optional_constant,
    per_row,
)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT4 = "float4_e2m1fn"
TWICE_FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the number of each code: the sign is bit 3."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decode_float8(program: Program, node: Node) -> QuantizedWeight:
    """The weight of ``et_cuda_passes::dequantize_float8``: [N, K], with a table of scales whose blocks divide it.

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
    """
    bound = arguments(node)
    return _float8(program, bound["data"], bound["scale"], bound["output_dtype"])


def decode_mx(program: Program, node: Node) -> QuantizedWeight:
    """The weight of ``torchao::dequantize_mx``: numbers of 8 bits, in groups with a power of two as their scale.

    Raises:
        Unmet: as :func:`decode_float8`; or the elements have another type.
    """
    bound = arguments(node)
    weight = _float8(program, bound["qdata"], bound["scale"], bound["output_dtype"])
    if weight.storage_dtype is not bound["elem_dtype"] or weight.block_size != (1, bound["block_size"]):
        raise Unmet(f"{bound['elem_dtype']} in groups of {bound['block_size']} for a weight in {weight.scheme}")
    return weight


def _float8(program: Program, data: Node, scale: Node, output: object) -> QuantizedWeight:
    data, numbers = constant(program, data, "the quantized data")
    scale, scales = constant(program, scale, "the scale")
    if numbers.dtype not in FLOAT8:
        raise Unmet(f"quantized data of dtype {numbers.dtype}")
    largest = int(torch.finfo(numbers.dtype).max)
    weight = QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=scale,
        zero_point=None,
        shape=tuple(numbers.shape),
        block_size=_blocks(numbers, scales),
        quant_min=-largest,
        quant_max=largest,
        storage_dtype=numbers.dtype,
        scale_dtype=scales.dtype,
        output_dtype=_output_dtype(output),
        loader=_read_float8,
        encoding="float8",
        numbers=_name(numbers.dtype),
    )
    check_blocks(weight, scales, None)
    return weight


def _blocks(data: Tensor, scales: Tensor) -> tuple[int, ...]:
    """The block size of a table of scales with as many axes as the weight; a whole axis if the table has none."""
    if scales.numel() == 1:
        return tuple(data.shape)
    if scales.dim() != data.dim() or any(size % count for size, count in zip(data.shape, scales.shape, strict=True)):
        raise Unmet(f"scales {list(scales.shape)} for a weight {list(data.shape)}")
    return tuple(size // count for size, count in zip(data.shape, scales.shape, strict=True))


def _read_float8(program: Program, weight: QuantizedWeight) -> RowReader:
    """The numbers are fp32, which holds them exactly."""
    tensors = [program.constant(node) for node in weight.sources]
    data, scale = (tensor.detach() for tensor in tensors if tensor is not None)

    def read(rows: slice) -> WeightValues:
        some = data[rows]
        return WeightValues(some.float, per_row(weight, scale.float(), rows), None)

    return read


def decode_float4(program: Program, node: Node) -> QuantizedWeight:
    """The weight of ``et_cuda_passes::dequantize_float4`` and of ``torchao::dequantize_nvfp4``.

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
    """
    bound = arguments(node)
    data, packed = constant(program, bound["qdata"], "the quantized data")
    scale, scales = constant(program, bound["scale"], "the scale")
    whole, of_all = optional_constant(program, bound["per_tensor_scale"], "the scale of the whole weight")
    if packed.dim() != 2 or (of_all is not None and of_all.numel() != 1):
        raise Unmet(f"a weight {list(packed.shape)} with scales of experts: only a matrix is decoded")
    if scales.dtype is torch.uint8:
        scales = scales.view(torch.float8_e4m3fn)
    k = packed.shape[1] * packed.element_size() * 2
    group = int(bound["block_size"])
    weight = QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=scale,
        zero_point=None,
        shape=(packed.shape[0], k),
        block_size=(1, group),
        quant_min=-12,
        quant_max=12,
        storage_dtype=packed.dtype,
        scale_dtype=torch.float32,
        output_dtype=_output_dtype(bound["output_dtype"]),
        loader=_read_float4,
        encoding="float4",
        others=() if whole is None else (whole,),
        numbers=FLOAT4,
    )
    check_blocks(weight, scales, None)
    return weight


def _read_float4(program: Program, weight: QuantizedWeight) -> RowReader:
    """The integers are twice the numbers, and the scales half."""
    tensors = [program.constant(node) for node in weight.sources]
    packed, scale, *whole = (tensor.detach() for tensor in tensors if tensor is not None)
    scale = scale.view(torch.float8_e4m3fn) if scale.dtype is torch.uint8 else scale
    table = torch.tensor(TWICE_FLOAT4, dtype=torch.int8)

    def read(rows: slice) -> WeightValues:
        data = packed[rows]
        scales = scale.reshape(weight.shape[0], -1)[rows].float()
        # In the order in which the operators multiply; halving is exact.
        scales = (whole[0].float() * scales if whole else scales) * 0.5

        def load() -> Tensor:
            codes = _codes(data)
            return table.to(codes.device)[codes.int()]

        return WeightValues(load, scales, None)

    return read


def float4_numbers(codes: Tensor) -> Tensor:
    """The numbers of codes 0..15, in fp32."""
    return torch.tensor(TWICE_FLOAT4, dtype=torch.float32, device=codes.device)[codes.int()] * 0.5


def as_codes(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight in float4_e2m1fn with its codes 0..15 as integers, and its scales whole.

    Its zero points are those of a packed int4 weight without zeros: 8.
    """
    return replace(weight, quant_min=0, quant_max=15, loader=_read_codes, encoding="float4_codes")


def _read_codes(program: Program, weight: QuantizedWeight) -> RowReader:
    read_numbers = _read_float4(program, weight)
    packed = program.constant(weight.data)
    assert packed is not None
    data = packed.detach()

    def read(rows: slice) -> WeightValues:
        scale = read_numbers(rows).scale * 2
        points = torch.full(scale.shape, 8, dtype=torch.int8, device=scale.device)
        return WeightValues(lambda: _codes(data[rows]), scale, points)

    return read


def _codes(packed: Tensor) -> Tensor:
    """The codes [N, K] of two a byte, the low nibble first."""
    data = packed.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def _output_dtype(dtype: object) -> torch.dtype:
    # The schema's default is float32, which the schema spells as a number.
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


FLOAT_DECODERS: dict[str, Callable[[Program, Node], QuantizedWeight]] = {
    "et_cuda_passes::dequantize_float8": decode_float8,
    "et_cuda_passes::dequantize_float4": decode_float4,
    "torchao::dequantize_mx": decode_mx,
    "torchao::dequantize_nvfp4": decode_float4,
}
"""The decoders of this file by the names of their operators."""
