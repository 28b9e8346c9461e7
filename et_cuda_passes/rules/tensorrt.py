"""Quantized weights that torch-tensorrt reads are kept for it.

Predicted, not run: versions after 2.14 are expected to read ``dequantize_affine`` of symmetric weights, int4 in
groups and int8 per axis. Their user guide says that TensorRT rejects zero points, and that int4 is compiled with
``immutable_weights=True``. 2.14 itself reads the forms of NVIDIA's ModelOpt.
"""

from dataclasses import dataclass

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Pattern, op
from et_cuda_passes.graph.rule import Failure, Keep, Notes, requirement
from et_cuda_passes.quant.decoders import DEQUANTIZE, weight_of
from et_cuda_passes.rules.requirements import (
    backend_has_dtype,
    each_row_has_its_scales,
    integers_are_in_range,
    scales_are_finite,
    stands_in_main_graph,
    storage_is_int8,
    stored_scales,
    weight_has_data,
    zero_points_are_all_zero,
)
from et_cuda_passes.rules.values import nonfinite


@requirement(
    "int4 in groups, or int8 with one scale per row", hint="quantize with weight_dtype=torch.int4, PerGroup(32)"
)
def scheme_is_int4_group_or_int8_axis(m: Match) -> Failure | None:
    """The two schemes of TensorRT's weight-only quantization."""
    weight = weight_of(m)
    per_axis = weight.group_size == weight.in_features
    found = (weight.quant_min, weight.quant_max, per_axis)
    return None if found in ((-8, 7, False), (-128, 127, True)) else Failure(weight.scheme)


@dataclass(frozen=True)
class KeepTensorrtWeight(Keep):
    """dequantize(symmetric int4 or int8 weight) -> itself, which torch-tensorrt converts to a DequantizeLinear layer"""

    requirements = (
        weight_has_data,
        stands_in_main_graph,
        backend_has_dtype,
        storage_is_int8,
        each_row_has_its_scales,
        scheme_is_int4_group_or_int8_axis,
        zero_points_are_all_zero,
        integers_are_in_range,
        scales_are_finite(lambda m: nonfinite(stored_scales(m))),
    )

    def pattern(self) -> Pattern:
        """A dequantized weight, with any readers."""
        return op(DEQUANTIZE)(..., name="weight")

    def summary(self, m: Match) -> str:
        """Scheme and layer."""
        return f"{weight_of(m).scheme} for DequantizeLinear"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept, and that it was not run."""
        return Notes(
            "torch-tensorrt after 2.14 is expected to read it, compiled with immutable_weights=True; this was "
            "predicted and not run"
        )
