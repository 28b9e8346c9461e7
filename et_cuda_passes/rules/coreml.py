"""Quantized weights that ExecuTorch's Core ML delegate compresses are kept for it.

Source: ``dequantize_affine`` in ``executorch/backends/apple/coreml/compiler/torch_ops.py`` of executorch 1.5.1, and
``_construct_constexpr_dequant_op`` of coremltools 9.0, which build a ``constexpr_blockwise_shift_scale`` of the weight.
"""

from dataclasses import dataclass

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Pattern, op
from et_cuda_passes.graph.rule import Failure, Keep, Notes, requirement
from et_cuda_passes.quant.decoders import DEQUANTIZE, weight_of
from et_cuda_passes.quant.weight import weight_values
from et_cuda_passes.rules.requirements import (
    backend_has_dtype,
    dtype_names,
    each_row_has_its_scales,
    integers_are_in_range,
    range_is_given,
    scales_fit,
    stands_in_main_graph,
    weight_has_data,
)

_INT4, _INT8 = (-8, 7), (-128, 127)


@requirement("a range of -8..7 or -128..127", hint="quantize with weight_dtype=torch.int4 or torch.int8")
def range_is_int4_or_int8(m: Match) -> Failure | None:
    """The lowering fails for any other."""
    weight = weight_of(m)
    if (weight.quant_min, weight.quant_max) in (_INT4, _INT8):
        return None
    return Failure(f"{weight.quant_min}..{weight.quant_max}")


@requirement("integers that are stored as int8 or int32", hint="quantize with torchao's IntxWeightOnlyConfig")
def storage_is_int8_or_int32(m: Match) -> Failure | None:
    """The lowering fails for any other."""
    dtype = weight_of(m).storage_dtype
    return None if dtype in (torch.int8, torch.int32) else Failure(f"{dtype_names([dtype])} storage")


@requirement("scales in float32 or float16", hint="quantize with weight_scale_dtype=torch.float32")
def scales_are_fp32_or_fp16(m: Match) -> Failure | None:
    """The lowering fails for any other."""
    dtype = weight_of(m).scale_dtype
    return None if dtype in (torch.float32, torch.float16) else Failure(dtype_names([dtype]))


@requirement("zero points that are integers of the stored width", stage="values", hint="quantize with a symmetric type")
def zero_points_fit_the_integers(m: Match) -> Failure | None:
    """coremltools stores zero points as int4 where all integers fit in 4 bits, and then fails on a larger one."""
    values = weight_values(m.program, weight_of(m))
    if values.zero_point is None or not bool(values.zero_point.any()):
        return None
    if values.zero_point.is_floating_point():
        return Failure(f"{dtype_names([values.zero_point.dtype])} zero points")
    low, high = (int(end) for end in torch.aminmax(values.data))
    limits = _INT4 if _INT4[0] <= low and high <= _INT4[1] else _INT8
    first, last = (int(end) for end in torch.aminmax(values.zero_point))
    if limits[0] <= first and last <= limits[1]:
        return None
    return Failure(f"zero points {first}..{last} for integers {low}..{high}")


@dataclass(frozen=True)
class KeepCoremlWeight(Keep):
    """dequantize(int4 or int8 weight) -> itself, which Core ML stores as constexpr_blockwise_shift_scale

    Any operator may read the weight. Core ML computes in float16, unless the compile specs say otherwise.
    """

    requirements = (
        weight_has_data,
        stands_in_main_graph,
        backend_has_dtype,
        storage_is_int8_or_int32,
        each_row_has_its_scales,
        range_is_given,
        range_is_int4_or_int8,
        scales_are_fp32_or_fp16,
        integers_are_in_range,
        zero_points_fit_the_integers,
        scales_fit(torch.float16, "in which Core ML stores them"),
    )

    def pattern(self) -> Pattern:
        """A dequantized weight, with any readers."""
        return op(DEQUANTIZE)(..., name="weight")

    def summary(self, m: Match) -> str:
        """Scheme and operator."""
        return f"{weight_of(m).scheme} for constexpr_blockwise_shift_scale"

    def notes(self, *ms: Match) -> Notes:
        """Why it is kept."""
        return Notes("Core ML stores the weight compressed, from iOS 18 and macOS 15 on")
