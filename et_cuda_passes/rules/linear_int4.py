"""linear(x, dequantize(int4 weight), bias) -> int4_linear(x, packed, scale_and_zero, bias)

The weight is packed once, at compile time, for the target's int4 kernel. Nothing about the computation changes but the
rounding of scale and zero to the kernel's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_LINEARS, MMA_TILED
from et_cuda_passes.quant.affine import QuantizedWeight, weight_of
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.packed_linear import PackedLinear
from et_cuda_passes.rules.packing import pack_int4
from et_cuda_passes.rules.tilings_told import tilings_told


@dataclass(frozen=True)
class LinearInt4(PackedLinear):
    """linear(x, dequantize(int4 weight), bias) -> int4_linear(x, packed, scale_and_zero, bias)

    Attributes:
        kernel: name of one of the target's int4 kernels; None for its first.
        cast_to_bf16: where the kernel lacks the dtype of the activations, compute in bf16 and cast back, at bf16's
            precision. Off, such a linear is missed.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False

    def chosen_kernel(self, m: Match) -> Kernel:
        """The kernel that ``kernel`` names.

        Raises:
            ValueError: the target has no kernel of that name.
            Unmet: the target has no int4 kernel at all.
        """
        chosen: Kernel | None = m.target.kernel("int4_linear", self.kernel)
        if chosen is None:
            raise Unmet(f"target {m.target.name}, which has no int4 kernel")
        return chosen

    def compute_dtype(self, m: Match) -> torch.dtype | None:
        """The dtype that the kernel computes in, None where it has none for these activations."""
        dtype, kernel = m.val(m.x).dtype, self.chosen_kernel(m)
        if dtype in kernel.dtypes:
            return dtype
        return torch.bfloat16 if self.cast_to_bf16 and dtype.is_floating_point else None

    @requirement("a weight of at most 4 bits", hint="quantize with weight_dtype=torch.int4")
    def four_bits(self, m: Match) -> Answer:
        """The range fits 0..15 once shifted."""
        return answers.four_bits(weight_of(m))

    @requirement("a group size that one of the kernel's divides")
    def native_group(self, m: Match) -> Answer:
        """32, 64, 128 or 256, or a multiple, whose scales are repeated."""
        size, kernel = weight_of(m).group_size, self.chosen_kernel(m)
        # One that divides K too, if there is any.
        k = weight_of(m).in_features
        nearest = min(kernel.group_sizes, key=lambda native: (k % native != 0, abs(native - size), native))
        hint = f"the nearest that {kernel.name} has is {nearest}: quantize with PerGroup({nearest})"
        hint = "" if k % nearest else hint
        return kernel.native_group_size(size, k) is not None, f"group size {size}", hint

    @requirement("in_features that the kernel's tiles divide")
    def in_features(self, m: Match) -> Answer:
        """K a multiple of the kernel's ``in_multiple``; K is never padded."""
        return answers.whole_tiles(weight_of(m), self.chosen_kernel(m).in_multiple)

    @requirement("a place that the kernel is compiled in", hint="take the layer out of the control flow")
    def place(self, m: Match) -> Answer:
        """Some kernels are not compiled inside control flow."""
        return answers.compiled_there(m, self.chosen_kernel(m))

    @requirement("activations of a dtype that the kernel has")
    def activations(self, m: Match) -> Answer:
        """The kernel's own dtypes, or bf16 by option."""
        kernel, dtype = self.chosen_kernel(m), m.val(m.x).dtype
        hint = f"{kernel.name} has {answers.dtype_names(kernel.dtypes)}: export the model in one of these"
        if not self.cast_to_bf16 and answers.four_bits(weight_of(m))[0]:
            mine = f"{type(self).__name__}(cast_to_bf16=True)"
            hint += f", or opt into bf16 arithmetic with {mine} in place of the default's {self.name}"
        return self.compute_dtype(m) is not None, answers.dtype_names([dtype]), hint

    @requirement(
        "scales and zeros that are finite in the kernel's dtype", stage="values", hint="quantize the weight again"
    )
    def finite(self, m: Match) -> Answer:
        """A NaN or infinite scale would spread over the output unseen."""
        dtype = self.chosen_kernel(m).scale_dtype or self.compute_dtype(m)
        assert dtype is not None
        return answers.finite_pair(m, weight_of(m), dtype)

    def summary(self, m: Match) -> str:
        """Scheme, kernel and layout."""
        kernel = self.chosen_kernel(m)
        cast = "" if m.val(m.x).dtype in kernel.dtypes else ", computed in bf16"
        return f"{weight_of(m).scheme} -> {kernel.name} ({kernel.layout}{cast}){self.dropped(m)}"

    def explain(self, *ms: Match) -> str:
        """Which tilings the Triton kernel has for the weight, by the rows of x as far as they are known."""
        first, kernel, weight = ms[0], self.chosen_kernel(ms[0]), weight_of(ms[0])
        group_size = kernel.native_group_size(weight.group_size, weight.in_features)
        if INT4_LINEARS[kernel.layout] is not MMA_TILED or group_size is None:
            return ""
        n, k = sum(weight_of(m).out_features for m in ms), weight_of(first).in_features
        return tilings_told(first.val(first.x), n, k, group_size)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weight and call the kernel's operator."""
        return self.output(b, m, self.packed_linear(b, m, [weight_of(m)], self.kernel_bias(m)))

    def packed_linear(
        self, b: Builder, m: Match, weights: Sequence[QuantizedWeight], bias: Node | None, name: str = ""
    ) -> Node:
        """The kernel's operator, of ``m``'s x and the rows of ``weights``, which are packed as one."""
        kernel, x, given = self.chosen_kernel(m), self.input(b, m), m.val(m.x).dtype
        dtype = self.compute_dtype(m)
        assert dtype is not None
        packed, qparams = pack_int4(b, weights, kernel, kernel.scale_dtype or dtype, name)
        group_size = kernel.native_group_size(weights[0].group_size, weights[0].in_features)
        if dtype != given:
            x = b.cast(x, dtype)
            bias = None if bias is None else b.cast(bias, dtype)
        op = INT4_LINEARS[kernel.layout].op
        y = b.call(op, x, packed, qparams, bias, group_size, sum(weight.shape[0] for weight in weights))
        return y if dtype == given else b.cast(y, given)
