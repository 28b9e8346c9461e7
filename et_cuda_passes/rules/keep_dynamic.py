"""What the two rules that keep a dynamically quantized linear for XNNPACK have in common.

The delegate knows the pattern that torchao exports for ``Int8DynamicActivationIntxWeightConfig`` and computes it
itself: per token, asymmetric, in -128..127, whatever the graph says. Each require below is a way in which executorch
1.5.1 was seen to give another result than the graph's without an error, or to fail late without naming the layer.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch.fx import Node

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import DEQUANTIZE, QuantizedWeight, weight_of, weight_values
from et_cuda_passes.quant.dynamic import decode_dynamic, dynamically_quantized
from et_cuda_passes.quant.forms import is_dequantize
from et_cuda_passes.rules import answers
from et_cuda_passes.rules.keep_for_xnnpack import KeepForXnnpack

_LINEAR = torch.ops.aten.linear.default
_dequantize = op(DEQUANTIZE)

# torchao's default, the least positive step of float32; larger ones are ignored by the delegate.
_LARGEST_EPS = 1.2e-7


@dataclass(frozen=True)
class KeepDynamic(KeepForXnnpack):
    """linear(dequantize(quantize(x)), dequantize(weight), bias) -> itself"""

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear as written, both its inputs dequantized; a decomposed one the delegate takes for a float one."""
        return op(_LINEAR)(
            dynamically_quantized(x, name="activation"), _dequantize(..., name="weight", shared=True), bias
        )

    @abstractmethod
    def scale_problem(self, weight: QuantizedWeight) -> str:
        """What the delegate cannot read of the scales' dtype and the groups; empty for nothing."""

    @requirement(
        "activations quantized per token, asymmetric, in -128..127",
        hint="the delegate ignores what the graph says and computes this: use Int8DynamicActivationIntxWeightConfig",
    )
    def per_token(self, m: Match) -> Answer:
        """Exactly what the delegate computes."""
        a = m.memoize(decode_dynamic, "activation")
        token = all(size == 1 for size in a.block_size[:-1]) and a.block_size[-1] == m.val(m.weight).shape[-1]
        range_ = (a.mapping, a.dtype, a.quant_min, a.quant_max) == ("ASYMMETRIC", torch.int8, -128, 127)
        found = f"{a.mapping}, {a.quant_min}..{a.quant_max}, blocks of {list(a.block_size)}, eps {a.eps}"
        return token and range_ and (a.eps is None or a.eps <= _LARGEST_EPS), found

    @requirement("activations that only such linears read quantized", hint="give other readers the activation itself")
    def no_other_reader(self, m: Match) -> Answer:
        """The delegate swallows the quantization whole."""
        a = m.memoize(decode_dynamic, "activation")
        inside = {*a.nodes}
        for node in a.nodes[:-1]:
            others = [user for user in node.users if user not in inside]
            if others:
                return False, f"{others[0].name}, which reads {node.name} too"
        for reader in m.activation.users:
            weight = reader.args[1] if op_of(reader) is _LINEAR and reader.args[0] is m.activation else None
            if not isinstance(weight, Node) or not is_dequantize(weight):
                return False, f"{reader.name}, which reads the dequantized activation too"
        return True, ""

    @requirement("activations of two dimensions or more", hint="unsqueeze the input")
    def rank(self, m: Match) -> Answer:
        """The delegate fails on a vector."""
        return m.val(m.x).dim() >= 2, f"{m.val(m.x).dim()} dimension"

    @requirement("activations in float32 or float16", hint="export in float32")
    def dtype(self, m: Match) -> Answer:
        """The delegate's kernels have no others; that of 8 bits does not load with bf16."""
        dtype = m.val(m.x).dtype
        return dtype in (torch.float32, torch.float16), str(dtype).removeprefix("torch.")

    @requirement("activations, bias and result of one dtype")
    def one_dtype(self, m: Match) -> Answer:
        """As they are but under autocast, whose conversions the lowering writes between what the delegate looks for."""
        return answers.one_dtype(m, m.x, *([] if m.bias is None else [m.bias]))

    @requirement("no bias, or a constant one")
    def constant_bias(self, m: Match) -> Answer:
        """A computed bias keeps the partitioner from taking the linear."""
        return m.bias is None or m.program.constant(m.bias) is not None, f"{m.bias}, which the program computes"

    @requirement("int8 storage, a zero point, groups and scales as the delegate reads them")
    def storage(self, m: Match) -> Answer:
        """Group sizes and dtypes of the delegate's kernel."""
        weight = weight_of(m)
        if weight.storage_dtype is not torch.int8:
            return False, f"{weight.storage_dtype} storage"
        if weight.zero_point is None:
            return False, "no zero point tensor"
        if weight.block_size[0] != 1:
            return False, f"one scale for {weight.block_size[0]} rows"
        problem = self.scale_problem(weight)
        return not problem, problem

    @requirement("one scale and zero point for these integers", hint="clone the integers for the second scale")
    def one_scale(self, m: Match) -> Answer:
        """The delegate knows a weight by its integers alone."""
        weight = weight_of(m)
        for other in weight.data.users:
            if is_dequantize(other):
                bound = arguments(other)
                if (bound.get("scale"), bound.get("zero_point")) != (weight.scale, weight.zero_point):
                    return False, f"{other.name}, which scales the same integers otherwise"
        return True, ""

    @requirement(
        "integers and scales that own their memory",
        stage="values",
        hint="the delegate serializes the whole storage: .clone() the weight before the export",
    )
    def own_memory(self, m: Match) -> Answer:
        """A view into a larger tensor would be serialized from the start of that tensor."""
        for part in weight_of(m).sources[:2]:
            tensor = m.program.constant(part)
            assert tensor is not None
            size = tensor.numel() * tensor.element_size()
            if tensor.storage_offset() != 0 or tensor.untyped_storage().nbytes() != size:
                return False, f"{part.name}, a view into a larger tensor"
        return True, ""

    @requirement("zero points that are all 0", stage="values", hint="quantize with a symmetric mapping type")
    def symmetric(self, m: Match) -> Answer:
        """The delegate ignores zero points."""
        points = weight_values(m.program, weight_of(m)).zero_point
        count = 0 if points is None else int((points != 0).sum())
        return count == 0, f"{count} that are not"

    @requirement("scales that are positive, finite and normal", stage="values", hint="quantize the weight again")
    def scales(self, m: Match) -> Answer:
        """The delegate refuses others, without naming the layer, when the method is loaded."""
        scale = weight_values(m.program, weight_of(m)).scale.float()
        good = torch.isfinite(scale) & (scale >= torch.finfo(torch.float32).smallest_normal)
        return bool(good.all()), f"{int((~good).sum())} that are not"

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit dynamic activation, {weight_of(m).scheme}"
