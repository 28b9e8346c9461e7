"""An activation that a PT2E quantizer quantizes: per tensor, with numbers from calibration or from the tensor."""

from collections.abc import Callable

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Call, Pattern, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.dynamic import qparams_source

_decomposed = torch.ops.quantized_decomposed
QUANTIZE_PER_TENSOR = _decomposed.quantize_per_tensor.default
_CHOOSE = _decomposed.choose_qparams.tensor
_QUANTIZE_DYNAMIC = _decomposed.quantize_per_tensor.tensor

_quantize: Callable[..., Call] = op(QUANTIZE_PER_TENSOR)
_dequantize: Callable[..., Call] = op(_decomposed.dequantize_per_tensor.default)
_quantize_dynamic: Callable[..., Call] = op(_QUANTIZE_DYNAMIC)
_dequantize_dynamic: Callable[..., Call] = op(_decomposed.dequantize_per_tensor.tensor)


def statically_quantized(x: Pattern, name: str) -> Call:
    """``dequantize(quantize(x))`` with a scale from calibration; :func:`static_qparams` looks at the rest."""
    return _dequantize(_quantize(x, ..., shared=True), ..., name=name, shared=True)


def dynamically_quantized_per_tensor(x: Pattern, name: str) -> Call:
    """``dequantize(quantize(x))`` with one scale for the tensor, chosen while the program runs."""
    return _dequantize_dynamic(_quantize_dynamic(x, ..., shared=True), ..., name=name, shared=True)


def static_qparams(program: Program, node: Node) -> tuple[int, int, torch.dtype]:
    """The range and dtype of the activation that ``node`` dequantizes.

    Raises:
        Unmet: it is dequantized otherwise than it was quantized, or its scale is chosen from another tensor.
    """
    back, there = list(arguments(node).values()), list(arguments(node.all_input_nodes[0]).values())
    # Both take the tensor, scale, zero point, the two ends of the range and the dtype; the second an output dtype too.
    if back[1:6] != there[1:6]:
        raise Unmet(f"{node.name}, dequantized with other parameters than it was quantized with")
    if op_of(node.all_input_nodes[0]) is _QUANTIZE_DYNAMIC:
        choose = qparams_source((there[1], there[2]), _CHOOSE)
        if arguments(choose)["input"] is not there[0]:
            raise Unmet(f"{node.name}, whose scale is chosen from another tensor")
    return int(back[3]), int(back[4]), back[5]
