"""Quantized weights that ExecuTorch's MLX delegate repacks for MLX's affine kernels are kept for it.

Source: ``executorch/backends/mlx/patterns.py`` and ``builder/op_helpers.py`` of executorch 1.5.1, read and not run: the
package for Linux is built without files that the backend needs.
"""

from dataclasses import dataclass

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Pattern, op
from et_cuda_passes.graph.rule import Failure, Keep, Notes, requirement
from et_cuda_passes.quant.decoders import DEQUANTIZE, weight_of
from et_cuda_passes.rules.requirements import (
    backend_has_dtype,
    dtype_names,
    each_row_has_its_scales,
    integers_are_in_range,
    scales_are_finite,
    stands_in_main_graph,
    storage_is_int8,
    stored_scales,
    weight_has_data,
    zero_points_are_a_tensor,
)
from et_cuda_passes.rules.values import nonfinite

_BITS = (2, 4, 5, 6, 8)
_GROUP_MULTIPLE = 16
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


@dataclass(frozen=True)
class KeepMlxWeight(Keep):
    """dequantize(weight of 2, 4, 5, 6 or 8 bits) -> itself, which MLX computes with its affine kernels

    A linear becomes quantized_matmul, an embedding a gather, and any other reader gets the dequantized weight.
    """

    requirements = (
        weight_has_data,
        stands_in_main_graph,
        backend_has_dtype,
        storage_is_int8,
        zero_points_are_a_tensor,
        each_row_has_its_scales,
        group_is_a_multiple_of_16,
        range_is_signed_and_whole,
        row_fills_words,
        scales_have_the_dtype_of_the_weight,
        integers_are_in_range,
        scales_are_finite(lambda m: nonfinite(stored_scales(m))),
    )

    def pattern(self) -> Pattern:
        """A dequantized weight, with any readers."""
        return op(DEQUANTIZE)(..., name="weight")

    def summary(self, m: Match) -> str:
        """Scheme and form."""
        return f"{weight_of(m).scheme} for MLX's affine kernels"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept, and that it was not run."""
        return Notes("MLX has its own kernels for it, as its source says; this was not run")
