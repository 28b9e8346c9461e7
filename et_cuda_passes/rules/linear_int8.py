"""linear(x, dequantize(weight of at most 8 bits), bias) -> int8_linear(x, packed, scale, zero, bias)

The integers stay as they are, a byte each. Nothing about the computation changes but the rounding of the scales to the
kernel's dtype. It also takes a weight of fewer bits that no narrower kernel of the target takes: its integers are int8
ones as well.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT8_LINEAR
from et_cuda_passes.quant.affine import weight_of, weight_values
from et_cuda_passes.quant.forms import needs_python_kernel
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.packed_linear import PackedLinear
from et_cuda_passes.rules.packing import int8_shift, is_symmetric, pack_int8
from et_cuda_passes.rules.tilings_told import tilings_told


@dataclass(frozen=True)
class LinearInt8(PackedLinear):
    """linear(x, dequantize(weight of at most 8 bits), bias) -> int8_linear(x, packed, scale, zero, bias)

    Attributes:
        kernel: name of one of the target's int8 kernels; None for its first.
    """

    # What int4 kernels take is half the size there.
    after: ClassVar[tuple[str, ...]] = ("linear_int4",)

    kernel: str | None = None

    def chosen_kernel(self, m: Match) -> Kernel:
        """The kernel that ``kernel`` names; by default plain operators for what the target would not compile as it is.

        Raises:
            ValueError: the target has no kernel of that name.
            Unmet: the target has no int8 kernel at all.
        """
        plain: Kernel | None = m.target.kernel("int8_plain")
        if plain is not None and self.kernel is None and needs_python_kernel(m.weight):
            return plain
        chosen: Kernel | None = m.target.kernel("int8_linear", self.kernel)
        if chosen is None:
            raise Unmet(f"target {m.target.name}, which has no int8 kernel")
        return chosen

    @requirement("a target with an int8 kernel")
    def has_kernel(self, m: Match) -> Answer:
        """Metal has none; what its int4 kernel takes is the nearest."""
        try:
            self.chosen_kernel(m)
        except Unmet as unmet:
            k, narrower = weight_of(m).in_features, m.target.kernels.get("int4_linear", ())
            whole = any(k % kernel.in_multiple == 0 for kernel in narrower)
            advised = f"quantize with {m.target.advised.eight_bits}"
            return False, str(unmet), advised if whole else "leave this layer unquantized"
        return True, ""

    @requirement("a weight of at most 8 bits", hint="quantize with weight_dtype=torch.int8")
    def eight_bits(self, m: Match) -> Answer:
        """The range fits -128..127 once shifted."""
        weight = weight_of(m)
        return int8_shift(weight) is not None, f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}"

    @requirement("a group size that the kernel has")
    def native_group(self, m: Match) -> Answer:
        """One scale a row, or groups that one of the kernel's divides."""
        weight, kernel = weight_of(m), self.chosen_kernel(m)
        size, k = weight.group_size, weight.in_features
        if kernel.group_sizes:
            has = f"{kernel.name} has {', '.join(map(str, kernel.group_sizes))} and their multiples"
            # One that divides K too, if there is any.
            nearest = min(kernel.group_sizes, key=lambda native: (k % native != 0, abs(native - size), native))
            hint = has if k % nearest else f"{has}: quantize with PerGroup({nearest})"
        else:
            hint = f"{kernel.name} has one scale a row: quantize with PerAxis(0)"
            hint += ", or in groups with torch.int4" if weight.bits > 4 else ""
        return kernel.native_group_size(size, weight.in_features) is not None, f"group size {size}", hint

    @requirement("in_features that the kernel's tiles divide")
    def in_features(self, m: Match) -> Answer:
        """K a multiple of the kernel's ``in_multiple``; K is never padded."""
        return answers.whole_tiles(weight_of(m), self.chosen_kernel(m).in_multiple)

    @requirement("activations of a dtype that the kernel has")
    def activations(self, m: Match) -> Answer:
        """The kernel's own dtypes."""
        kernel, dtype = self.chosen_kernel(m), m.val(m.x).dtype
        hint = f"{kernel.name} has {answers.dtype_names(kernel.dtypes)}: export the model in one of these"
        return dtype in kernel.dtypes, answers.dtype_names([dtype]), hint

    @requirement("zero points that are all 0", stage="values")
    def zeros(self, m: Match) -> Answer:
        """Only a kernel that adds zeros takes others."""
        weight, kernel = weight_of(m), self.chosen_kernel(m)
        hint = f"{kernel.name} is symmetric: quantize with mapping_type=MappingType.SYMMETRIC"
        return kernel.zeros or is_symmetric(weight_values(m.program, weight), weight), "others", hint

    @requirement(
        "scales and zeros that are finite in the kernel's dtype", stage="values", hint="quantize the weight again"
    )
    def finite(self, m: Match) -> Answer:
        """A NaN or infinite scale would spread over the output unseen."""
        parts = weight_values(m.program, weight_of(m))
        dtype = self.chosen_kernel(m).scale_dtype or m.val(m.x).dtype
        return answers.finite((parts.scale.to(dtype), parts.zero_point, parts.minimum))

    def summary(self, m: Match) -> str:
        """Scheme and kernel."""
        return f"{weight_of(m).scheme} -> {self.chosen_kernel(m).name}{self.dropped(m)}"

    def explain(self, *ms: Match) -> str:
        """Which tilings the Triton kernel has for the weight, by the rows of x as far as they are known."""
        m, kernel = ms[0], self.chosen_kernel(ms[0])
        weight = weight_of(m)
        group_size = kernel.native_group_size(weight.group_size, weight.in_features)
        if kernel.name != "triton" or group_size is None:
            return ""
        return tilings_told(m.val(m.x), weight.out_features, weight.in_features, group_size, bits=8)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Take the integers and call the operator."""
        weight, kernel, x = weight_of(m), self.chosen_kernel(m), self.input(b, m)
        group_size = kernel.native_group_size(weight.group_size, weight.in_features)
        assert group_size is not None
        packed, scale, zero = pack_int8(b, weight, group_size, kernel.scale_dtype or m.val(m.x).dtype)
        return self.output(b, m, b.call(INT8_LINEAR, x, packed, scale, zero, self.kernel_bias(m), group_size))
