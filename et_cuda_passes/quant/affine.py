"""The one decoder of dequantized weights: every operator and argument form becomes a frozen :class:`QuantizedWeight`.

Each operator computes ``(input - zero_point) * scale`` in blocks; :mod:`et_cuda_passes.quant.forms` lists them.
"""

from dataclasses import replace
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import AnyOf, Call, any_of, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.experts import decode_expert, selected_expert
from et_cuda_passes.quant.forms import DEQUANTIZE, decoder_for, dequantize_ops
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues, load_plain

__all__ = [
    "DEQUANTIZE",
    "QuantizedWeight",
    "WeightValues",
    "decode",
    "dequantized",
    "dequantized_matrix",
    "has_data",
    "weight_of",
    "weight_values",
]


def dequantized(*args: Any, **kwargs: Any) -> Call:
    """``dequantize(..., name="weight", shared=True)``: the call pattern of a dequantized weight, in every form."""
    return replace(op(*dequantize_ops())(*args, **kwargs), label="a dequantized weight")


def dequantized_matrix(name: str = "weight") -> AnyOf:
    """A dequantized matrix [N, K]: a weight, or one of the experts of a stack [E, N, K]."""
    return any_of(dequantized(..., name=name, shared=True), selected_expert(dequantized(..., shared=True), name))


def weight_of(m: Match, name: str = "weight") -> QuantizedWeight:
    """The decoded weight of the node that the pattern calls ``name``, decoded once for each node.

    Raises:
        Unmet: the node's arguments describe no weight that could be packed; the text says what stands there.
    """
    return m.memoize(decode, name)


def decode(program: Program, node: Node) -> QuantizedWeight:
    """Decode ``node``, a dequantize in ATen or edge form or what picks one expert of it.

    Constants may be plain or inside a tensor subclass.

    Raises:
        Unmet: it reads something else than constants, or its arguments contradict each other.
    """
    decoder = decoder_for(op_of(node)) or decode_expert
    return decoder(program, node)


def has_data(program: Program, weight: QuantizedWeight) -> bool:
    """Whether the weight's tensors hold values: neither on the meta device nor fake."""
    tensors = [program.constant(node) for node in weight.sources]
    return all(t is not None and t.device.type != "meta" and not isinstance(t, FakeTensor) for t in tensors)


def weight_values(program: Program, weight: QuantizedWeight) -> WeightValues:
    """The tensors of a matrix weight, or of a convolution's of kernel size 1.

    Raises:
        Unmet: it is neither.
    """
    weight.group_size  # noqa: B018  (asks whether it is)
    return (weight.loader or load_plain)(program, weight)
