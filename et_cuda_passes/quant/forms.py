"""The operators that dequantize, each with the function that reads its arguments.

torchao's own is always there. The others are registered by what makes them, a PT2E quantizer or ExecuTorch's export of
checkpoints: a program can hold one only where that was imported, so they are looked up when somebody asks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchao.quantization.quant_primitives  # noqa: F401  (registers the operator)
from torch.fx import Node

from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant import decomposed_form, exportable_form, torchao_form
from et_cuda_passes.quant.weight import QuantizedWeight

DEQUANTIZE = torch.ops.torchao.dequantize_affine.default


Decode = Callable[[Program, Node], QuantizedWeight]

_FORMS: Mapping[str, Decode] = {
    "torchao::dequantize_affine": torchao_form.decode,
    "quantized_decomposed::dequantize_per_channel": decomposed_form.decode_per_channel,
    "quantized_decomposed::dequantize_per_channel_group": decomposed_form.decode_per_channel_group,
    "quantized_decomposed::dequantize_per_tensor": decomposed_form.decode_per_tensor,
    "quantized_decomposed::dequantize_per_tensor.tensor": decomposed_form.decode_per_tensor,
    "quantized_decomposed::dequantize_per_tensor.tensor2": decomposed_form.decode_per_tensor,
    "torchao::dequantize_int4_tensor": exportable_form.decode_int4_tensor,
    "torchao::dequantize_gguf": exportable_form.decode_gguf,
}


_UNCOMPILED = frozenset({"torchao::dequantize_int4_tensor", "torchao::dequantize_gguf"})


def decoder_for(target: Any) -> Decode | None:
    """What reads a call of the operator ``target``; None for one that does not dequantize."""
    # Torch's registry holds one operator under a qualified name.
    return _FORMS.get(target.name()) if isinstance(target, torch._ops.OpOverload) else None


def is_dequantize(node: Node) -> bool:
    """Whether ``node`` dequantizes something, in ATen or edge form."""
    return decoder_for(op_of(node)) is not None


def needs_python_kernel(node: Node) -> bool:
    """Whether ``node`` dequantizes by an operator that AOTInductor can only call, which no library of its own has."""
    target = op_of(node)
    return isinstance(target, torch._ops.OpOverload) and target.name() in _UNCOMPILED


def dequantized_data(node: Node) -> Node | None:
    """The integers that dequantize ``node`` reads; None for any other node, or where they are no tensor."""
    if not is_dequantize(node):
        return None
    data = next(iter(arguments(node).values()), None)
    return data if isinstance(data, Node) else None


def dequantize_ops() -> list[torch._ops.OpOverload]:
    """Every dequantize operator that is registered now, torchao's own first."""
    found = []
    for name in _FORMS:
        namespace, _, rest = name.partition("::")
        operator, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.append(getattr(packet, overload or "default"))
    return found
