"""What the rules share that keep a linear or convolution of a PT2E quantizer for XNNPACK.

The delegate has integer kernels for the pattern. Each require is a way in which executorch 1.5.1 was seen to give
another result than the graph's without an error, or to fail late without naming the layer.
"""

from dataclasses import dataclass

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import weight_of
from et_cuda_passes.quant.static import static_qparams
from et_cuda_passes.rules.keep_for_xnnpack import KeepForXnnpack


@dataclass(frozen=True)
class KeepDecomposed(KeepForXnnpack):
    """linear(dequantize(quantize(x)), dequantize(int8 weight), bias) -> itself"""

    @requirement("activations in int8, -128..127", hint="quantize with executorch's XNNPACKQuantizer")
    def int8_activations(self, m: Match) -> Answer:
        """What the delegate computes with."""
        low, high, dtype = m.memoize(static_qparams, "activation")
        found = f"{str(dtype).removeprefix('torch.')}, {low}..{high}"
        return (low, high, dtype) == (-128, 127, torch.int8), found

    @requirement("a weight in int8 and activations in float32", hint="quantize with executorch's XNNPACKQuantizer")
    def dtypes(self, m: Match) -> Answer:
        """The dtypes of the delegate's kernels."""
        weight, x = weight_of(m), m.val(m.x).dtype
        good = weight.storage_dtype is torch.int8 and weight.output_dtype is torch.float32 and x is torch.float32
        return good, f"{weight.storage_dtype} dequantized to {weight.output_dtype}, activations {x}"

    @requirement("zero points that are all 0", stage="values", hint="quantize the weight symmetrically")
    def symmetric(self, m: Match) -> Answer:
        """The delegate ignores those of a scale for each channel, and fails to load with one for the tensor."""
        weight = weight_of(m)
        if weight.constant_qparams is not None:
            return weight.constant_qparams[1] == 0, str(weight.constant_qparams[1])
        points = None if weight.zero_point is None else m.program.constant(weight.zero_point)
        count = 0 if points is None else int((points != 0).sum())
        return count == 0, f"{count} that are not"

    @requirement("scales that are positive, finite and normal", stage="values", hint="quantize the weight again")
    def scales(self, m: Match) -> Answer:
        """The delegate refuses others, without naming the layer, when the method is loaded."""
        weight = weight_of(m)
        held = None if weight.scale is None else m.program.constant(weight.scale)
        scale = (
            torch.tensor(weight.constant_qparams[0] if weight.constant_qparams else 1.0)
            if held is None
            else held.float()
        )
        good = torch.isfinite(scale) & (scale >= torch.finfo(torch.float32).smallest_normal)
        return bool(good.all()), f"{int((~good).sum())} that are not"
