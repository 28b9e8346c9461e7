"""Decoders of packed integers.

- ``torchao.dequantize_int4_tensor`` and ``torchao.dequantize_gguf``, which ``executorch.extension.llm.export.int4`` and
  ``.gguf`` register. The GGUF blocks are those of llama.cpp's ``ggml-common.h`` (``block_q4_K``, ``block_q5_K``,
  ``block_q6_K``), 256 weights each.
- Products with a packed weight, and the operators of this package that dequantize their weights:
  ``aten._weight_int4pack_mm``, which torchao's ``Int4TilePackedTo4dTensor`` calls, and ``int4_plain_mm`` and
  ``int8_plain_mm`` of ``executorch.backends.cuda.quantize_op_dispatch``. Each scale and zero point of ``int4_plain_mm``
  is a code of 8 bits times a step, which several groups share.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.program import Program
from et_cuda_passes.layouts import tile_packed_to_4d
from et_cuda_passes.layouts.layout import ZERO_OFFSET
from et_cuda_passes.quant.weight import QuantizedWeight, RowReader, WeightValues, check_blocks, constant

_BLOCK = 256
"""Weights of a block."""
_GGUF = {"q4_k": (144, 32, 0, 15), "q5_k": (176, 32, 0, 31), "q6_k": (210, 16, -32, 31)}
"""Bytes of a block, number of weights that share a scale, and the range of the integers."""


def decode_int4_tensor(program: Program, node: Node) -> QuantizedWeight:
    """A weight with two integers to a byte [N, K / 2], and scales and zero points [K / group, N].

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
    """
    dtype = _output_dtype(arguments(node)["output_dtype"])
    return _grouped(
        program, node, "zero_point", 2, 0, 15, output_dtype=dtype, loader=_read_int4_tensor, encoding="int4_tensor"
    )


def _grouped(
    program: Program, node: Node, zero_name: str, in_a_byte: int, low: int, high: int, **others: Any
) -> QuantizedWeight:
    """A weight in groups along K, whose integers, scales, zero points and group size are arguments of ``node``.

    Args:
        program: has the constants.
        node: with the arguments ``qdata``, ``scale`` and ``group_size``.
        zero_name: name of the argument with the zero points.
        in_a_byte: number of integers in an element of ``qdata``.
        low: smallest integer.
        high: largest integer.
        others: further fields of the weight.
    """
    bound = arguments(node)
    data, integers = constant(program, bound["qdata"], "the quantized data")
    scale, scales = constant(program, bound["scale"], "the scale")
    zero_point, points = constant(program, bound[zero_name], "the zero point")
    weight = QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=scale,
        zero_point=zero_point,
        shape=(integers.shape[0], integers.shape[1] * in_a_byte),
        block_size=(1, int(bound["group_size"])),
        quant_min=low,
        quant_max=high,
        storage_dtype=integers.dtype,
        scale_dtype=scales.dtype,
        **others,
    )
    check_blocks(weight, scales, points)
    return weight


def _read_int4_tensor(program: Program, weight: QuantizedWeight) -> RowReader:
    tensors = [program.constant(node) for node in weight.sources]
    packed, scale, zero_point = (tensor.detach() for tensor in tensors if tensor is not None)

    def read(rows: slice) -> WeightValues:
        data = packed[rows].view(torch.uint8)

        def load() -> Tensor:
            return _two_a_byte(data)

        return WeightValues(load, scale.t()[rows], zero_point.t()[rows])

    return read


def _two_a_byte(data: Tensor) -> Tensor:
    """[N, K / 2] -> [N, K], the low nibble first."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def decode_int4_tiles(program: Program, node: Node) -> QuantizedWeight:
    """A weight in the layout ``tile_packed_to_4d``, with the scale and the zero of each group in one tensor.

    ``node`` is the product or the dequantize. K includes the columns that torchao pads to a multiple of 1024; the
    dequantize may leave them out.

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
    """
    bound = arguments(node)
    data, packed = constant(program, bound.get("packed", bound.get("mat2")), "the packed weight")
    qparams = bound.get("scale_and_zero", bound.get("qScaleAndZeros"))
    scale, pairs = constant(program, qparams, "the tensor of scales and zeros")
    group = int(bound["group_size"] if "group_size" in bound else bound["qGroupSize"])
    if packed.dim() != 4 or pairs.dim() != 3 or packed.shape[2] != 32 or packed.dtype is not torch.int32:
        raise Unmet(f"a packed weight {packed.dtype} {list(packed.shape)} with scales {list(pairs.shape)}")
    if packed.device.type == "mps":
        raise Unmet("a weight that is packed for MPS, in another layout")
    rows, columns = packed.shape[0] * 8, packed.shape[1] * packed.shape[3] * 32
    k = int(bound.get("in_features", columns))
    if tuple(pairs.shape) != (columns // group, rows, 2) or k > columns:
        raise Unmet(f"scales and zeros {list(pairs.shape)} for a weight [{rows}, {columns}] in groups of {group}")
    weight = QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=scale,
        zero_point=None,
        shape=(rows, k),
        block_size=(1, group),
        quant_min=0,
        quant_max=15,
        storage_dtype=packed.dtype,
        scale_dtype=pairs.dtype,
        output_dtype=pairs.dtype,
        loader=_read_int4_tiles,
        encoding="int4_tiles",
        packed_for="_weight_int4pack_mm",
    )
    check_blocks(weight, pairs[: k // group, :, 0], None)
    return weight


def _read_int4_tiles(program: Program, weight: QuantizedWeight) -> RowReader:
    tensors = [program.constant(node) for node in weight.sources]
    packed, pairs = (tensor.detach() for tensor in tensors if tensor is not None)
    n, k = weight.shape

    def read(rows: slice) -> WeightValues:
        first, last, _ = rows.indices(n)
        some = pairs[: k // weight.group_size, first:last]
        scale, zero = (some[..., index].t() for index in range(2))

        def load() -> Tensor:
            begin = first // 8
            return tile_packed_to_4d.unpack(packed[begin : -(-last // 8)])[first - 8 * begin : last - 8 * begin, :k]

        # (q - 8) * scale + zero
        points = torch.full(scale.shape, ZERO_OFFSET, dtype=torch.int8, device=scale.device)
        return WeightValues(load, scale, points, -zero if bool(zero.any()) else None)

    return read


def decode_int4_nested(program: Program, node: Node) -> QuantizedWeight:
    """A weight with two integers a byte [N, K / 2], and scales and zero points that are codes times a step.

    ``node`` is the product or the dequantize.

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
    """
    bound = arguments(node)
    data, packed = constant(program, bound["qdata"], "the quantized data")
    zero = bound.get("zero_point", bound.get("zero"))
    given = {"scale": bound["scale"], "scale step": bound["scale_step"]}
    given |= {"zero point": zero, "zero point step": bound["zero_point_step"]}
    parts = {name: constant(program, value, f"the {name}") for name, value in given.items()}
    scale, steps, points, point_steps = (tensor for _, tensor in parts.values())
    weight = QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=parts["scale"][0],
        zero_point=None,
        shape=(packed.shape[0], packed.shape[1] * 2),
        block_size=(1, int(bound["group_size"])),
        quant_min=0,
        quant_max=15,
        storage_dtype=packed.dtype,
        scale_dtype=torch.float32,
        output_dtype=bound.get("output_dtype", node.meta["val"].dtype),
        loader=_read_int4_nested,
        encoding="int4_nested",
        packed_for="int4_plain_mm",
        others=tuple(part for part, _ in list(parts.values())[1:]),
    )
    check_blocks(weight, scale, points)
    if steps.shape != point_steps.shape or scale.shape[1] % steps.shape[1]:
        raise Unmet(f"steps {list(steps.shape)} and {list(point_steps.shape)} for scales {list(scale.shape)}")
    return weight


def _read_int4_nested(program: Program, weight: QuantizedWeight) -> RowReader:
    tensors = [program.constant(node) for node in weight.sources]
    packed, scale, step, points, point_step = (tensor.detach() for tensor in tensors if tensor is not None)

    def product(codes: Tensor, steps: Tensor) -> Tensor:
        return codes.float() * steps.float().repeat_interleave(codes.shape[1] // steps.shape[1], dim=1)

    def read(rows: slice) -> WeightValues:
        data = packed[rows].view(torch.uint8)
        return WeightValues(
            lambda: _two_a_byte(data), product(scale[rows], step[rows]), product(points[rows], point_step[rows])
        )

    return read


def decode_gguf(program: Program, node: Node) -> QuantizedWeight:
    """A weight in GGUF blocks, uint8 [N, bytes of a row]; the blocks contain scales and minimums.

    Raises:
        Unmet: ``node`` reads a value that is not a constant, or blocks of another kind.
    """
    bound = arguments(node)
    data, raw = constant(program, bound["weight"], "the quantized data")
    kind = bound["ggml_type"]
    if kind not in _GGUF:
        raise Unmet(f"GGUF blocks of type {kind}")
    size, group, low, high = _GGUF[kind]
    if raw.shape[1] % size:
        raise Unmet(f"rows of {raw.shape[1]} bytes, which {kind} blocks of {size} do not divide")

    def reader(program: Program, weight: QuantizedWeight) -> RowReader:
        return _read_gguf(program, weight, kind)

    return QuantizedWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=None,
        zero_point=None,
        shape=(raw.shape[0], raw.shape[1] // size * _BLOCK),
        block_size=(1, group),
        quant_min=low,
        quant_max=high,
        storage_dtype=raw.dtype,
        scale_dtype=torch.float32,
        output_dtype=_output_dtype(bound["output_dtype"]),
        loader=reader,
        encoding=kind,
    )


def _read_gguf(program: Program, weight: QuantizedWeight, kind: str) -> RowReader:
    raw = program.constant(weight.data)
    assert raw is not None
    data = raw.detach()

    def read(rows: slice) -> WeightValues:
        some = data[rows]
        blocks, n = some.reshape(-1, _GGUF[kind][0]), some.shape[0]
        if kind == "q6_k":
            scale = _half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()
            return WeightValues(lambda: _six_bits(blocks).view(n, -1), scale.view(n, -1), None)
        scale, minimum = _scales_and_minimums(blocks[:, 4:16])
        scale, minimum = scale * _half(blocks[:, :2]), minimum * _half(blocks[:, 2:4])
        load = _four_bits if kind == "q4_k" else _five_bits
        return WeightValues(lambda: load(blocks).view(n, -1), scale.view(n, -1), None, minimum.view(n, -1))

    return read


def _half(columns: Tensor) -> Tensor:
    """Two bytes of each block as fp16, in fp32 [blocks, 1]; a product with an 8-bit integer is exact."""
    return columns.contiguous().view(torch.float16).float()


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minimums from 12 bytes.

    The top two bits of the last four scales and minimums are in the top bits of the first four.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=1)
    minimum = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=1)
    return scale.float(), minimum.float()


def _nibbles(data: Tensor) -> Tensor:
    """[blocks, 4, 2, 32] from 128 bytes a block: 32 low nibbles, then the 32 high nibbles of the same bytes."""
    runs = data.reshape(-1, 4, 32)
    return torch.stack((runs & 15, runs >> 4), dim=2)


def _four_bits(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 16:])


def _five_bits(blocks: Tensor) -> Tensor:
    """The fifth bit of weight l of run j is bit j of byte l."""
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    fifth = (blocks[:, None, 16:48] >> shifts) & 1
    return _nibbles(blocks[:, 48:]).reshape(-1, 8, 32) | fifth << 4


def _six_bits(blocks: Tensor) -> Tensor:
    """Two halves of 128 integers: 64 low nibbles, 64 high nibbles, the upper two bits of each in 32 bytes; minus 32."""
    low = blocks[:, :128].reshape(-1, 2, 64)
    four = torch.stack((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    two = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    return (four | two << 4).to(torch.int8) - 32


def _output_dtype(dtype: object) -> torch.dtype:
    # The schema's default is bfloat16, which the schema spells as a number.
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def decode_int8_product(program: Program, node: Node) -> QuantizedWeight:
    """The weight of ``int8_plain_mm``: int8 [N, K], with scales and zero points [N, K / group].

    Raises:
        Unmet: ``node`` reads values that are not constants, or its arguments contradict each other.
    """
    dtype = node.meta["val"].dtype
    return _grouped(program, node, "zero", 1, -128, 127, output_dtype=dtype, packed_for="int8_plain_mm")


PRODUCT_DECODERS: dict[str, Callable[[Program, Node], QuantizedWeight]] = {
    "aten::_weight_int4pack_mm": decode_int4_tiles,
    "executorch_cuda::int4_plain_mm": decode_int4_nested,
    "executorch_cuda::int8_plain_mm": decode_int8_product,
}
"""The decoders of products with a packed weight, by the names of the operators."""
