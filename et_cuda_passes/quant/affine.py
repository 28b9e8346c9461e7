"""The one decoder of ``torchao.dequantize_affine``: every argument form becomes a frozen :class:`AffineWeight`.

The operator computes ``(input - zero_point) * scale`` in blocks of ``block_size``
(``torchao.quantization.quant_primitives.dequantize_affine``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchao.quantization.quant_primitives  # noqa: F401  (registers the operator)
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from et_cuda_passes.graph.context import MatchContext
from et_cuda_passes.graph.ops import arguments, called, op_name
from et_cuda_passes.graph.pattern import Call, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Unmet

DEQUANTIZE = torch.ops.torchao.dequantize_affine.default

dequantize: Callable[..., Call] = op(DEQUANTIZE)
"""``dequantize(..., name="weight", shared=True)``: the call pattern of a dequantized weight."""


@dataclass(frozen=True)
class AffineWeight:
    """A quantized weight as its dequantize node describes it; metadata only.

    Attributes:
        fqn: the weight's FQN.
        data: node of the quantized integers, [N, K].
        scale: node of the scales, N * K / group_size elements.
        zero_point: node of the zero points, as many as scales, or None where all are zero.
        shape: (N, K) for a linear's weight: out_features, in_features.
        block_size: elements that share one scale, along each axis.
        quant_min, quant_max: the range of the integers, both ends included.
        storage_dtype: dtype of ``data``.
        scale_dtype: dtype of ``scale``.
        output_dtype: dtype of the dequantized weight.
    """

    fqn: str
    data: Node
    scale: Node
    zero_point: Node | None
    shape: tuple[int, ...]
    block_size: tuple[int, ...]
    quant_min: int
    quant_max: int
    storage_dtype: torch.dtype
    scale_dtype: torch.dtype
    output_dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Bits that hold the range: 4 for -8..7 and for 0..15, 3 for -4..3."""
        return max(1, (self.quant_max - self.quant_min).bit_length())

    @property
    def sources(self) -> tuple[Node, ...]:
        """The constants that the weight is computed from."""
        parts = (self.data, self.scale, self.zero_point)
        return tuple(part for part in parts if part is not None)

    @property
    def group_size(self) -> int:
        """Elements along K that share a scale, each row having its own.

        Raises:
            Unmet: the blocks span rows, or the weight is no matrix.
        """
        if len(self.shape) != 2 or len(self.block_size) != 2:
            raise Unmet(f"a weight of shape {list(self.shape)} in blocks of {list(self.block_size)}")
        if self.block_size[0] != 1:
            raise Unmet(f"blocks of {self.block_size[0]} x {self.block_size[1]}")
        return self.block_size[1]

    @property
    def scheme(self) -> str:
        """The scheme in a few words: ``int4 group 32``, ``int8 per-axis``."""
        if len(self.shape) == 2 and tuple(self.block_size) == (1, self.shape[1]):
            return f"int{self.bits} per-axis"
        if len(self.block_size) == 2 and self.block_size[0] == 1:
            return f"int{self.bits} group {self.block_size[1]}"
        return f"int{self.bits} blocks of {' x '.join(map(str, self.block_size))}"


@dataclass(frozen=True)
class AffineValues:
    """The tensors of an :class:`AffineWeight`: integers ``data`` [N, K], ``scale``, ``zero_point`` [N, K / group]."""

    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


def affine(m: MatchContext, name: str = "weight") -> AffineWeight:
    """The decoded weight of the dequantize node that the pattern calls ``name``, decoded once for each node.

    Raises:
        Unmet: the node's arguments describe no weight that could be packed; the text says what stands there.
    """
    return m.derive(decode, name)


def decode(program: Program, node: Node) -> AffineWeight:
    """Decode dequantize ``node``, in ATen or edge form, with plain or tensor-subclass constants.

    Raises:
        Unmet: it reads something else than constants, or its arguments contradict each other.
    """
    bound = arguments(node)
    data = _constant(program, bound["input"], "the quantized data")
    scale = _constant(program, bound["scale"], "the scale")
    zero_point = None
    if bound["zero_point"] is not None:
        zero_point = _constant(program, bound["zero_point"], "the zero point")
    storage, scales = program.constant(data), program.constant(scale)
    assert storage is not None and scales is not None
    for constant in (data, scale, zero_point):
        if constant is not None and program.is_written(constant):
            raise Unmet(f"{constant.name}, which the program writes while it runs")
    lowest, highest = _range(bound, storage.dtype)
    weight = AffineWeight(
        fqn=program.fqn(data) or data.name,
        data=data,
        scale=scale,
        zero_point=zero_point,
        shape=tuple(storage.shape),
        block_size=tuple(int(size) for size in bound["block_size"]),
        quant_min=lowest,
        quant_max=highest,
        storage_dtype=storage.dtype,
        scale_dtype=scales.dtype,
        # Left out, it is the schema's default: float32, which the schema spells as a number.
        output_dtype=output if isinstance(output := bound["output_dtype"], torch.dtype) else torch.float32,
    )
    _check_blocks(weight, scales, None if zero_point is None else program.constant(zero_point))
    return weight


def _constant(program: Program, value: Any, what: str) -> Node:
    if not isinstance(value, Node):
        raise Unmet(f"{what} is {value!r}, not a tensor")
    if program.constant(value) is None:
        made = op_name(called(value)) if called(value) is not None else value.op
        raise Unmet(f"{what} comes from {made} ({value.name}), not straight from a parameter or buffer")
    return value


def _range(bound: dict[str, Any], storage: torch.dtype) -> tuple[int, int]:
    lowest, highest = bound.get("quant_min"), bound.get("quant_max")
    try:
        info = torch.iinfo(storage)
    except TypeError:
        raise Unmet(f"quantized data of dtype {storage}") from None
    low = info.min if lowest is None else int(lowest)
    high = info.max if highest is None else int(highest)
    if not low < high:
        raise Unmet(f"a quantized range of {low}..{high}")
    return low, high


def _check_blocks(weight: AffineWeight, scale: torch.Tensor, zero_point: torch.Tensor | None) -> None:
    if len(weight.block_size) != len(weight.shape):
        raise Unmet(f"blocks of {list(weight.block_size)} for a weight of shape {list(weight.shape)}")
    for size, block in zip(weight.shape, weight.block_size, strict=True):
        if block <= 0:
            raise Unmet(f"a block size of {block}")
        if size % block:
            raise Unmet(f"an axis of {size}, which blocks of {block} do not divide")
    blocks = 1
    for size, block in zip(weight.shape, weight.block_size, strict=True):
        blocks *= size // block
    for name, part in (("scales", scale), ("zero points", zero_point)):
        if part is not None and part.numel() != blocks:
            raise Unmet(f"{part.numel()} {name} for {blocks} blocks")


def has_data(program: Program, weight: AffineWeight) -> bool:
    """Whether the weight's tensors hold values: neither on the meta device nor fake."""
    tensors = [program.constant(node) for node in weight.sources]
    return all(t is not None and t.device.type != "meta" and not isinstance(t, FakeTensor) for t in tensors)


def values(program: Program, weight: AffineWeight) -> AffineValues:
    """The tensors of a matrix weight whose blocks lie along K; views, nothing is copied."""
    data, scale = program.constant(weight.data), program.constant(weight.scale)
    assert data is not None and scale is not None
    zero_point = None if weight.zero_point is None else program.constant(weight.zero_point)
    rows = weight.shape[0]
    return AffineValues(
        data.detach(),
        scale.detach().reshape(rows, -1),
        None if zero_point is None else zero_point.detach().reshape(rows, -1),
    )
