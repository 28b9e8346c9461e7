"""Quantized weights that ExecuTorch's MLX delegate repacks for MLX's affine kernels are kept for it.

Source: ``executorch/backends/mlx/patterns.py`` and ``builder/op_helpers.py`` of executorch 1.5.1, read and not run: the
package for Linux is built without files that the backend needs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import Call, Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Failure, Keep, Notes, requirement
from et_cuda_passes.quant.decoders import DEQUANTIZE, weight_of
from et_cuda_passes.rules.requirements import (
    backend_has_dtype,
    dtype_names,
    each_row_has_its_scales,
    integers_are_in_range,
    range_is_given,
    scales_are_finite,
    stands_in_main_graph,
    storage_is_int8,
    stored_scales,
    weight_has_data,
    zero_points_are_a_tensor,
)
from et_cuda_passes.rules.restore import registered_op
from et_cuda_passes.rules.values import nonfinite

aten = torch.ops.aten

_BITS = (2, 4, 5, 6, 8)
_GROUP_MULTIPLE = 16
_MATMUL, _MATMUL_GROUP_MULTIPLE = "quantized_matmul", 32
_KERNELS: dict[Any, str] = {aten.linear.default: _MATMUL, aten.embedding.default: "gather"}
_NOTE = Notes("MLX has its own kernels for it, as its source says; this was not run")
_ROUNDED = (
    ". It stores the zero of each group in bfloat16, which is off by up to one step of the integers: a symmetric "
    "mapping type, float16 and float32 have no such error"
)
_WORD = 32
"""Bits of the words that the integers of a row are packed into."""


@requirement(
    "the whole signed range of 2, 4, 5, 6 or 8 bits", hint="quantize with weight_dtype=torch.int4 or torch.int8"
)
def range_is_signed_and_whole(m: Match) -> Failure | None:
    """The delegate counts bits from the length of the range, and adds half of it to integers of any range."""
    weight = weight_of(m)
    if any((weight.quant_min, weight.quant_max) == (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in _BITS):
        return None
    return Failure(f"{weight.quant_min}..{weight.quant_max}")


@requirement(f"a group size that {_GROUP_MULTIPLE} divides", hint="quantize with PerGroup(32)")
def group_is_a_multiple_of_16(m: Match) -> Failure | None:
    """MLX has groups of 16, 32, 64 and 128; larger ones are divided into these."""
    size = weight_of(m).group_size
    return None if size % _GROUP_MULTIPLE == 0 else Failure(f"group size {size}")


@requirement("rows that fill whole words of 32 bits", hint="quantize with weight_dtype=torch.int4 or torch.int8")
def row_fills_words(m: Match) -> Failure | None:
    """The lowering fails otherwise."""
    weight = weight_of(m)
    size = weight.in_features * weight.bits
    return None if size % _WORD == 0 else Failure(f"{weight.in_features} x {weight.bits} bits")


@requirement("scales of the dtype of the weight", hint="leave out weight_scale_dtype")
def scales_have_the_dtype_of_the_weight(m: Match) -> Failure | None:
    """The kernel multiplies activations by scales of their own dtype."""
    weight = weight_of(m)
    if weight.scale_dtype is weight.output_dtype:
        return None
    return Failure(f"{dtype_names([weight.scale_dtype])} for {dtype_names([weight.output_dtype])}")


@requirement("zero points that no weight with other scales reads", hint="give each weight zero points of its own")
def zero_points_are_of_one_weight(m: Match) -> Failure | None:
    """The delegate stores zero points multiplied by scales, under the name of the zero points, once."""
    weight = weight_of(m)
    readers = () if weight.zero_point is None else weight.zero_point.users
    others = [reader.name for reader in readers if weight.scale not in reader.all_input_nodes]
    return Failure(f"{others[0]}, which reads them too") if others else None


def _kernel(m: Match) -> str:
    """The kernel that reads the weight quantized; empty if MLX has no such kernel for its readers."""
    readers = [op_of(reader) for reader in m.weight.users]
    name = _KERNELS.get(readers[0], "") if len(readers) == 1 else ""
    small = weight_of(m).group_size % _MATMUL_GROUP_MULTIPLE != 0
    return "" if small and name == _MATMUL and op_of(m.weight) is DEQUANTIZE else name


def _rounds_zeros(m: Match) -> bool:
    """Whether the zeros ``-scale * (zero_point + 128)``, which the delegate stores in bf16, need more than 8 bits."""
    weight = weight_of(m)
    points = None if weight.zero_point is None else m.program.constant(weight.zero_point)
    return weight.bits == 8 and weight.scale_dtype is torch.bfloat16 and points is not None and bool(points.any())


@dataclass(frozen=True)
class KeepMlxWeight(Keep):
    """dequantize(weight of 2, 4, 5, 6 or 8 bits) -> itself, which MLX computes with its affine kernels

    A linear that alone reads the weight becomes quantized_matmul if 32 divides the groups, and such an embedding a
    gather. Any other reader gets the dequantized weight.
    """

    requirements = (
        weight_has_data,
        stands_in_main_graph,
        backend_has_dtype,
        storage_is_int8,
        zero_points_are_a_tensor,
        each_row_has_its_scales,
        group_is_a_multiple_of_16,
        range_is_given,
        range_is_signed_and_whole,
        row_fills_words,
        scales_have_the_dtype_of_the_weight,
        zero_points_are_of_one_weight,
        integers_are_in_range,
        scales_are_finite(lambda m: nonfinite(stored_scales(m))),
    )

    def pattern(self) -> Pattern:
        """A dequantized weight, with any readers."""
        return op(DEQUANTIZE)(..., name="weight")

    def summary(self, m: Match) -> str:
        """Scheme and form."""
        return f"{weight_of(m).scheme} for MLX's {_kernel(m) or 'dequantize, in every call'}"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept, that it was not run, and what is rounded."""
        rounded = _ROUNDED if _rounds_zeros(ms[0]) else ""
        if _kernel(ms[0]):
            return _NOTE._replace(note=_NOTE.note + rounded)
        return Notes(
            f"MLX dequantizes the weight in every call, as its source says; this was not run. Its {_MATMUL} is for a "
            f"linear that alone reads its weight, in groups that {_MATMUL_GROUP_MULTIPLE} divides{rounded}"
        )


@requirement("a weight with one reader", hint="dequantize it once for each reader")
def weight_has_one_reader(m: Match) -> Failure | None:
    """The delegate has no handler for these operators alone."""
    readers = [reader.name for reader in m.weight.users]
    return None if len(readers) == 1 else Failure(", ".join(readers))


@requirement(
    "mxfp8 in float8_e4m3fn and blocks of 32, or nvfp4, or int4 in groups that 32 divides",
    hint="quantize with ExportableMXConfig(), or with groups of 32",
)
def form_has_a_kernel(m: Match) -> Failure | None:
    """MLX has kernels for these."""
    weight, operator = weight_of(m), op_of(m.weight)
    if operator is registered_op("torchao", "dequantize_nvfp4"):
        return None
    fits = weight.group_size % _MATMUL_GROUP_MULTIPLE == 0
    if operator is registered_op("torchao", "dequantize_mx"):
        fits = weight.numbers == "float8_e4m3fn" and weight.group_size == _MATMUL_GROUP_MULTIPLE
    return None if fits else Failure(weight.scheme)


@dataclass(frozen=True)
class KeepMlxForm(Keep):
    """linear(x, dequantize(mxfp8, nvfp4 or packed int4 weight), bias) -> itself, which MLX computes in this form

    ``executorch.extension.llm.export`` registers the operators that dequantize. A linear becomes quantized_matmul, an
    embedding a gather.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (
        weight_has_data,
        stands_in_main_graph,
        backend_has_dtype,
        weight_has_one_reader,
        form_has_a_kernel,
        scales_are_finite(lambda m: nonfinite(stored_scales(m))),
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear or an embedding. The operators are those that are registered now, which may be none."""
        found = (registered_op("torchao", f"dequantize_{kind}") for kind in ("mx", "nvfp4", "int4_tensor"))
        operators = tuple(each for each in found if each is not None)
        weight = Call(operators, name="weight", open=True, shared=True, label="a dequantize")
        return any_of(op(aten.linear.default)(x, weight, bias), op(aten.embedding.default)(weight, x, ...))

    def summary(self, m: Match) -> str:
        """Scheme and form."""
        return f"{weight_of(m).scheme} for MLX's {_kernel(m)}"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept, and that it was not run."""
        return _NOTE
