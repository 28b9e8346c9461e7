"""Quantized weights in the form that OpenVINO keeps compressed: the arithmetic of the dequantization itself.

ExecuTorch's OpenVINO delegate (executorch 1.5.1) reads no operator that dequantizes a weight. OpenVINO recognizes
integers that are converted, shifted by zero points and multiplied by scales, and multiplies with the compressed weight.
Where it does not recognize them it computes the float weight once, when the program is compiled: the numbers are the
same. Two 4-bit integers a byte are unpacked by the operators that NNCF writes, for which the partitioner has a pattern.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Call
from et_cuda_passes.graph.rule import Failure, Rule, requirement
from et_cuda_passes.quant.decoders import dequantized, weight_of
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues, weight_values
from et_cuda_passes.rules.packing import int4_shift, int8_shift
from et_cuda_passes.rules.requirements import (
    backend_has_dtype,
    integers_are_in_range,
    stands_in_main_graph,
    stored_scales,
    weight_fits_4_bits,
    weight_fits_8_bits,
    weight_has_data,
)

aten = torch.ops.aten


@requirement("a weight [N, K]", hint="leave this layer unquantized")
def weight_is_a_matrix(m: Match) -> Failure | None:
    """The weight of a convolution has more axes."""
    shape = list(weight_of(m).shape)
    return None if len(shape) == 2 else Failure(f"a weight {shape}")


_LEAST_PART = 16
"""A group is divided into parts of at least this size, so that their scales take less memory than the integers."""


def native_group_size(weight: QuantizedWeight) -> int | None:
    """The group size with which OpenVINO computes the weight correctly, or None if no size is right.

    OpenVINO 2025.4 computes other numbers, without an error, for many group sizes that are no power of two, and for
    rows of an odd length with one scale each. A group is divided into parts with one scale, the largest power of two
    that divides it; the result is the same.
    """
    size = weight.group_size
    part = size & -size
    if size == weight.in_features and size % 2 == 0:
        return size
    return part if part > 1 and (part == size or part >= _LEAST_PART) else None


@requirement(
    "a group size that is a power of two from 2 on or a multiple of 16, or one scale for each row of an even length",
    hint="quantize with PerGroup(32)",
)
def openvino_has_group_size(m: Match) -> Failure | None:
    """OpenVINO computes other numbers for other groups."""
    weight = weight_of(m)
    has_one = len(weight.shape) != 2 or native_group_size(weight) is not None
    return None if has_one else Failure(weight.scheme)


@requirement("two rows or more", hint="leave this layer unquantized")
def weight_has_rows(m: Match) -> Failure | None:
    """OpenVINO 2025.4 does not compile a product with a compressed weight of one row."""
    rows = weight_of(m).out_features
    return None if rows > 1 else Failure(f"{rows} row")


@requirement("no minimum beside the zero points", stage="values", hint="quantize with torchao's IntxWeightOnlyConfig")
def weight_has_no_minimum(m: Match) -> Failure | None:
    """The form has one shift."""
    return None if weight_values(m.program, weight_of(m)).minimum is None else Failure("minimums")


@requirement("scales that are finite in the dtype of the weight", stage="values", hint="export the model in float32")
def scales_are_finite_in_output_dtype(m: Match) -> Failure | None:
    """The scales are stored in the dtype of the dequantized weight."""
    stored = stored_scales(m).to(m.val(m.weight).dtype)
    bad = int((~torch.isfinite(stored)).sum())
    return Failure(f"{bad} that are not") if bad else None


_WEIGHT = (
    weight_has_data,
    stands_in_main_graph,
    backend_has_dtype,
    weight_is_a_matrix,
    openvino_has_group_size,
    weight_has_rows,
    weight_has_no_minimum,
    integers_are_in_range,
    scales_are_finite_in_output_dtype,
)


def _groups(weight: QuantizedWeight) -> tuple[int, int, int]:
    """The shape of the integers in native groups: [N, K / size, size]."""
    size = native_group_size(weight)
    assert size is not None
    return weight.out_features, weight.in_features // size, size


def _for_groups(weight: QuantizedWeight, table: Tensor) -> Tensor:
    """A table [N, K / group] for native groups: [N, K / size, 1]."""
    times = weight.group_size // _groups(weight)[-1]
    return table.detach().repeat_interleave(times, dim=1).unsqueeze(-1)


def _shifted(weight: QuantizedWeight, values: WeightValues, shift: int, storage: torch.dtype) -> Tensor:
    """Zero points [N, K / size, 1] for integers that are stored ``shift`` higher.

    They have the dtype of the integers where all of them fit, and else float32.
    """
    if values.zero_point is None:
        points = torch.full((*_groups(weight)[:2], 1), float(shift))
    else:
        points = _for_groups(weight, values.zero_point).to(torch.float32) + shift
    limits = torch.iinfo(storage)
    whole = bool(((points == points.round()) & (points >= limits.min) & (points <= limits.max)).all())
    return points.to(storage if whole else torch.float32, memory_format=torch.contiguous_format)


def _computed(b: Builder, m: Match, integers: Node, shift: int, storage: torch.dtype, always: bool) -> Node:
    """(integers - zero points) * scales, in the dtype of the dequantized weight.

    ``integers`` are [N, K / size, size]. Zero points of 0 are left out unless ``always`` is set.
    """
    weight, dtype = weight_of(m), m.val(m.weight).dtype
    values = weight_values(b.program, weight)
    result = b.cast(integers, dtype)

    def zero_points() -> Tensor:
        return _shifted(weight, values, shift, storage)

    if always or bool(zero_points().any()):
        points = b.constant(f"{weight.fqn}.zero_point", weight, ("openvino_zero_point", shift, storage), zero_points)
        result = b.call(aten.sub.Tensor, result, b.cast(points, dtype))

    def scales() -> Tensor:
        return _for_groups(weight, values.scale).to(dtype, memory_format=torch.contiguous_format)

    scale = b.constant(f"{weight.fqn}.scale", weight, ("openvino_scale", dtype), scales)
    product = b.call(aten.mul.Tensor, result, scale)
    return b.call(aten.view_copy.default if b.program.is_edge else aten.reshape.default, product, list(weight.shape))


def _integers(b: Builder, weight: QuantizedWeight, shift: int) -> Tensor:
    """The integers [N, K], ``shift`` higher, as int16."""
    return weight_values(b.program, weight).data.to(torch.int16) + shift


@dataclass(frozen=True)
class DecompressInt4(Rule):
    """dequantize(int4 weight) -> (unpack(packed) - zero_points) * scales, which OpenVINO computes from 4 bits

    Any operator may read the weight.
    """

    requirements = (*_WEIGHT, weight_fits_4_bits)

    def pattern(self) -> Call:
        """A dequantized weight, with any readers."""
        return dequantized(..., name="weight")

    def summary(self, m: Match) -> str:
        """Scheme and form."""
        return f"{weight_of(m).scheme} -> two integers a byte, decompressed by OpenVINO"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the integers, and unpack them as NNCF does."""
        weight = weight_of(m)
        shift = int4_shift(weight)
        assert shift is not None
        fixed: int = shift

        def pack() -> Tensor:
            pairs = _integers(b, weight, fixed).to(torch.uint8).reshape(weight.out_features, -1, 2)
            return pairs[..., 0] | pairs[..., 1] << 4

        packed = b.constant(f"{weight.fqn}.packed", (weight.data,), ("openvino_int4", fixed, weight.integers_key), pack)
        low = b.call(aten.bitwise_and.Scalar, packed, 15)
        high = b.call(aten.bitwise_right_shift.Tensor_Scalar, packed, 4)
        unpacked = b.call(aten.stack.default, [low, high], -1)
        groups = list(_groups(weight))
        reshape = aten.view_copy.default if b.program.is_edge else aten.reshape.default
        return _computed(b, m, b.call(reshape, unpacked, groups), fixed, torch.uint8, always=True)


@dataclass(frozen=True)
class DecompressInt8(Rule):
    """dequantize(int8 weight) -> (integers - zero_points) * scales, which OpenVINO computes from 8 bits

    Any operator may read the weight.
    """

    requirements = (*_WEIGHT, weight_fits_8_bits)

    def pattern(self) -> Call:
        """A dequantized weight, with any readers."""
        return dequantized(..., name="weight")

    def summary(self, m: Match) -> str:
        """Scheme and form."""
        return f"{weight_of(m).scheme} -> one integer a byte, decompressed by OpenVINO"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same arithmetic in operators that OpenVINO has."""
        weight = weight_of(m)
        shift = int8_shift(weight)
        assert shift is not None
        fixed: int = shift

        def integers() -> Tensor:
            return _integers(b, weight, fixed).to(torch.int8).reshape(_groups(weight))

        layout = ("openvino_int8", fixed, weight.group_size, weight.integers_key)
        data = b.constant(f"{weight.fqn}.integers", (weight.data,), layout, integers)
        return _computed(b, m, data, fixed, torch.int8, always=False)
