"""Activations that XNNPACK's delegate quantizes while the program runs: one quantization for several, or a new one."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node, map_arg

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Notes, Rule, requirement
from et_cuda_passes.quant.activations import CHOOSE_QPARAMS, QUANTIZE, decode_dynamic
from et_cuda_passes.quant.decoders import DEQUANTIZE, is_dequantize, weight_of
from et_cuda_passes.rules.requirements import same_dtype, weight_has_data
from et_cuda_passes.rules.xnnpack import (
    INT4_KERNEL,
    LINEAR,
    activation_has_two_dimensions,
    activation_is_fp32_or_fp16,
    bias_is_constant,
    is_outside_control_flow,
)


@requirement("an activation that was quantized in the same way before")
def quantized_before(m: Match) -> Failure | None:
    """The first of several equal quantizations stays."""
    return None if _first_quantization(m) is not m.root else Failure(f"{m.root.name}, the first")


def _first_quantization(m: Match) -> Node:
    """The first node in the graph that dequantizes the same activation, quantized in the same way."""

    def described(node: Node) -> tuple[Any, ...]:
        a = decode_dynamic(m.program, node)
        return (a.block_size, a.quant_min, a.quant_max, a.mapping, a.eps, a.dtype, *_arguments_without_nodes(a.nodes))

    wanted, order = described(m.root), m.program.order
    readers = (node for quantize in m.x.users if op_of(quantize) is QUANTIZE for node in quantize.users)
    here = (node for node in readers if op_of(node) is DEQUANTIZE and node.graph is m.root.graph)
    return cast(Node, min((node for node in here if described(node) == wanted), key=order.__getitem__))


def _arguments_without_nodes(nodes: tuple[Node, ...]) -> Iterator[Any]:
    """The arguments of all ``nodes`` except for nodes, as text."""
    for node in nodes:
        yield from (repr(map_arg(each, lambda _: None)) for each in (node.args, node.kwargs))


@dataclass(frozen=True)
class ShareActivation(Rule):
    """dequantize(quantize(x)), where x is quantized in the same way before -> the result of the first

    torchao quantizes the activations of each linear by themselves. The linears of a query, a key and a value then read
    one quantized activation, and the delegate quantizes it once.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (quantized_before,)

    def pattern(self, x: Capture) -> Pattern:
        """A quantized activation. A pattern matches no mutated ``x`` inside a call that is read later."""
        return op(DEQUANTIZE)(op(QUANTIZE)(x, ..., shared=True), ..., name="activation")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The earlier activation."""
        return _first_quantization(m)


@requirement("activations that are not quantized yet")
def activation_is_not_quantized(m: Match) -> Failure | None:
    """The rule would quantize them a second time."""
    return Failure(f"{m.x.name}, a dequantized activation") if is_dequantize(m.x) else None


@dataclass(frozen=True)
class QuantizeActivation(Rule):
    """linear(x, dequantize(int4 weight), bias) -> linear(dequantize(quantize(x)), dequantize(int4 weight), bias)

    The delegate has 4-bit kernels only for activations that it quantizes to 8 bits while the program runs. THE NUMBERS
    CHANGE: they become those of ``Int8DynamicActivationIntxWeightConfig`` for the same weight. The rule is therefore in
    no list by default, and stands before ``ShareActivation`` in a list of the caller's.
    """

    requirements = (
        weight_has_data,
        is_outside_control_flow,
        activation_is_not_quantized,
        activation_has_two_dimensions,
        activation_is_fp32_or_fp16,
        same_dtype("x", "bias"),
        bias_is_constant,
        *INT4_KERNEL,
    )

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear with a quantized weight."""
        return op(LINEAR)(x, op(DEQUANTIZE)(..., name="weight", shared=True), bias)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit dynamic activation, {weight_of(m).scheme}"

    def notes(self, *ms: Match) -> Notes:
        """The change of the numbers."""
        return Notes("activations are quantized to 8 bits, which the quantized model does not do")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same linear of a quantized activation, in the form that torchao exports."""
        value = m.val(m.x)
        block = [1] * (value.dim() - 1) + [value.shape[-1]]
        scheme = (torch.int8, -128, 127)
        chosen = b.call(CHOOSE_QPARAMS, m.x, "ASYMMETRIC", block, *scheme, None, None, torch.int8)
        pair = [b.call(operator.getitem, chosen, index) for index in (0, 1)]
        quantized = b.call(QUANTIZE, m.x, block, *pair, *scheme)
        activation = b.call(DEQUANTIZE, quantized, block, *pair, *scheme, output_dtype=value.dtype)
        return b.call(LINEAR, activation, m.weight, *([] if m.bias is None else [m.bias]))
