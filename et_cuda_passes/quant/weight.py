"""A quantized weight as its dequantize node describes it, independent of the operator, and its tensors."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from et_cuda_passes.graph.constants import Decoded
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import op_name, op_of
from et_cuda_passes.graph.program import Program


@dataclass(frozen=True)
class WeightValues:
    """The tensors of rows of a :class:`QuantizedWeight` [N, K]: ``(data - zero_point) * scale - minimum``.

    ``scale``, ``zero_point`` and ``minimum`` are [N, K / group]; the last two are None if they are zero. Blocks of
    GGUF's types with minimums have the third. ``load`` returns the integers [N, K], and unpacks them if they are stored
    packed.
    """

    load: Callable[[], Tensor]
    scale: Tensor
    zero_point: Tensor | None
    minimum: Tensor | None = None

    @property
    def data(self) -> Tensor:
        """The integers [N, K]."""
        return self.load()


ALL_ROWS = slice(None)
RowReader = Callable[[slice], WeightValues]
"""The values of a run of rows, which begins and ends inside of the weight. It holds the tensors, not the program."""


@dataclass(frozen=True)
class QuantizedWeight(Decoded):
    """A quantized weight as its dequantize node describes it; metadata only.

    Attributes:
        fqn: the weight's FQN.
        data: node of the quantized integers, as they are stored.
        scale: node of the scales, one a block; None if they are stored with the integers or are ``constant_qparams``.
        zero_point: node of the zero points, as many as scales; None if all are zero.
        shape: (N, K) for a linear's weight: out_features, in_features; (N, K, 1, ...) for a convolution's.
        block_size: elements that share one scale, along each axis.
        quant_min, quant_max: the range of the integers, both ends included.
        storage_dtype: dtype of ``data``.
        scale_dtype: dtype of the scales.
        output_dtype: dtype of the dequantized weight.
        constant_qparams: the scale and the zero point of the whole weight if the graph holds them as numbers.
        loader: returns the reader of a weight that is not stored as one integer an element; None for
            :func:`read_plain`.
        encoding: names the form that ``loader`` reads; empty without a loader.
        expert: the index of this expert, if ``data`` holds the weights of several experts; None for all of ``data``.
        others: nodes of further constants that ``loader`` reads.
        numbers: the type of the elements if they are floating-point numbers, such as ``float8_e4m3fn``; empty for
            integers.
        packed_for: the layout or the operator that the weight is packed for in the program; empty for most.
    """

    fqn: str
    data: Node
    scale: Node | None
    zero_point: Node | None
    shape: tuple[int, ...]
    block_size: tuple[int, ...]
    quant_min: int
    quant_max: int
    storage_dtype: torch.dtype
    scale_dtype: torch.dtype
    output_dtype: torch.dtype
    constant_qparams: tuple[float, int] | None = None
    loader: "Callable[[Program, QuantizedWeight], RowReader] | None" = None
    encoding: str = ""
    expert: int | None = None
    others: tuple[Node, ...] = ()
    numbers: str = ""
    packed_for: str = ""

    @property
    def bits(self) -> int:
        """Bits that hold the range: 4 for -8..7 and for 0..15, 3 for -4..3."""
        return max(1, (self.quant_max - self.quant_min).bit_length())

    @property
    def sources(self) -> tuple[Node, ...]:
        """The constants that the weight is computed from."""
        parts = (self.data, self.scale, self.zero_point, *self.others)
        return tuple(part for part in parts if part is not None)

    @property
    def integers_key(self) -> Hashable:
        """Everything beside ``data`` that determines the integers [N, K]; a part of the key of a packed constant."""
        return self.shape, self.encoding, self.expert

    @property
    def values_key(self) -> Hashable:
        """Everything beside :attr:`sources` that determines the tensors, as :meth:`.Builder.constant` needs it."""
        present = (self.scale is not None, self.zero_point is not None, len(self.others))
        return self.integers_key, self.block_size, self.constant_qparams, present

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """K of a matrix, or of a convolution whose kernel size is 1."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def group_size(self) -> int:
        """Elements along K that share a scale. Rows may share scales too: :func:`weight_values` repeats them.

        Raises:
            Unmet: the weight is neither a matrix nor that of a convolution whose kernel size is 1.
        """
        matrix = len(self.shape) >= 2 and len(self.block_size) == len(self.shape)
        if not matrix or any(size != 1 for size in self.shape[2:]):
            raise Unmet(f"a weight of shape {list(self.shape)} in blocks of {list(self.block_size)}")
        return self.block_size[1]

    @property
    def scheme(self) -> str:
        """The scheme in a few words: ``int4 group 32``, ``int8 per-axis``, ``float8_e4m3fn per-tensor``."""
        return f"{self._blocks} packed for {self.packed_for}" if self.packed_for else self._blocks

    @property
    def _blocks(self) -> str:
        kind = self.numbers or f"int{self.bits}"
        if self.block_size[:1] == (1,) and self.block_size[1:] == self.shape[1:]:
            return f"{kind} per-axis"
        if self.block_size == self.shape:
            return f"{kind} per-tensor"
        if len(self.block_size) > 1 and (self.block_size[0], *self.block_size[2:]) == (1, *self.shape[2:]):
            return f"{kind} group {self.block_size[1]}"
        return f"{kind} blocks of {' x '.join(map(str, self.block_size))}"


def constant(program: Program, value: Any, what: str) -> tuple[Node, Tensor]:
    """The node and the tensor of an argument that must be a constant which the program never mutates.

    Raises:
        Unmet: the argument is no such constant; the text says what was found.
    """
    if not isinstance(value, Node):
        raise Unmet(f"{what} is {value!r}, not a tensor")
    tensor = program.constant(value)
    if tensor is None:
        producer = op_name(op_of(value)) if op_of(value) is not None else value.op
        raise Unmet(
            f"{what} comes from {producer} ({value.name}), not straight from a parameter or buffer: compute it before "
            "the export, and hold the result in a buffer"
        )
    if program.is_mutated(value):
        raise Unmet(
            f"{value.name}, which the program mutates while it runs; a packed weight would keep the old values: read a "
            "copy that is never mutated, or leave this layer unquantized"
        )
    return value, tensor


def optional_constant(program: Program, value: Any, what: str) -> tuple[Node | None, Tensor | None]:
    """:func:`constant`, or two None for an argument that is None."""
    return (None, None) if value is None else constant(program, value, what)


def integer_range(low: Any, high: Any, storage: torch.dtype) -> tuple[int, int]:
    """The range that a dequantize states, or else the range of the integers' dtype.

    Raises:
        Unmet: the storage holds no integers, or the range is empty.
    """
    try:
        info = torch.iinfo(storage)
    except TypeError:
        raise Unmet(f"quantized data of dtype {storage}") from None
    lowest = info.min if low is None else int(low)
    highest = info.max if high is None else int(high)
    if not lowest < highest:
        raise Unmet(f"a quantized range of {lowest}..{highest}")
    return lowest, highest


def check_blocks(weight: QuantizedWeight, scale: Tensor | None, zero_point: Tensor | None) -> None:
    """Check that blocks divide the weight, and that each block has a scale and a zero point.

    Raises:
        Unmet: the parts contradict each other.
    """
    if len(weight.block_size) != len(weight.shape):
        raise Unmet(f"blocks of {list(weight.block_size)} for a weight of shape {list(weight.shape)}")
    blocks = 1
    for size, block in zip(weight.shape, weight.block_size, strict=True):
        if block <= 0:
            raise Unmet(f"a block size of {block}")
        if size % block:
            raise Unmet(f"an axis of {size}, which blocks of {block} do not divide")
        blocks *= size // block
    for name, part in (("scales", scale), ("zero points", zero_point)):
        if part is not None and part.numel() != blocks:
            raise Unmet(f"{part.numel()} {name} for {blocks} blocks")


def per_row(weight: QuantizedWeight, part: Tensor, rows: slice = ALL_ROWS) -> Tensor:
    """One value a block, as [rows, K / group], repeated for the rows that share it."""
    together = weight.block_size[0]
    table = part.detach().reshape(weight.shape[0] // together, -1)
    if together == 1:
        return table[rows]
    first, last, _ = rows.indices(weight.shape[0])
    return table[torch.arange(first, last, device=table.device) // together]


def read_plain(program: Program, weight: QuantizedWeight) -> RowReader:
    """The reader of a weight with one integer an element, [N, K] or [N, K, 1, ...]; the integers are a view."""
    data = program.constant(weight.data)
    assert data is not None
    integers = data.detach().reshape(weight.shape[:2])
    numbers = weight.constant_qparams
    scales = None if weight.scale is None else program.constant(weight.scale)
    points = None if weight.zero_point is None else program.constant(weight.zero_point)

    def read(rows: slice) -> WeightValues:
        some = integers[rows]
        if numbers is not None:
            scale, zero_point = (torch.full((some.shape[0], 1), value) for value in numbers)
            return WeightValues(lambda: some, scale, zero_point)
        assert scales is not None
        zero_points = None if points is None else per_row(weight, points, rows)
        return WeightValues(lambda: some, per_row(weight, scales, rows), zero_points)

    return read


def has_data(program: Program, weight: QuantizedWeight) -> bool:
    """Whether the weight's tensors hold values: they are neither on the meta device nor fake."""
    tensors = [program.constant(node) for node in weight.sources]
    return all(t is not None and t.device.type != "meta" and not isinstance(t, FakeTensor) for t in tensors)


def weight_rows(program: Program, weight: QuantizedWeight) -> RowReader:
    """The reader of a matrix weight, or of a convolution whose kernel size is 1.

    Raises:
        Unmet: the weight is neither.
    """
    weight.group_size  # noqa: B018  (raises for other shapes)
    return (weight.loader or read_plain)(program, weight)


def weight_values(program: Program, weight: QuantizedWeight) -> WeightValues:
    """The tensors of the whole weight, of which :func:`weight_rows` reads rows.

    Raises:
        Unmet: as :func:`weight_rows`.
    """
    return weight_rows(program, weight)(ALL_ROWS)
