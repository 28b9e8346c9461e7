"""Decoders of quantized activations: quantized by torchao on the fly, or by a PT2E quantizer per tensor.

torchao's chain is choose_qparams -> quantize -> dequantize. A PT2E quantizer writes quantize -> dequantize, with
numbers from a calibration, or with a scale that choose_qparams computes from the tensor.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torchao.quantization.quant_primitives  # noqa: F401  (registers the operators)
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import arguments, op_name, op_of
from et_cuda_passes.graph.pattern import Call, Pattern, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.decoders import DEQUANTIZE, dequantized_data

_QUANTIZERS = frozenset(
    {
        "torchao::quantize_affine",
        "quantized_decomposed::quantize_per_channel",
        "quantized_decomposed::quantize_per_tensor",
        "quantized_decomposed::quantize_per_tensor.tensor",
        "quantized_decomposed::quantize_per_tensor.tensor2",
        "quantized_decomposed::quantize_per_token",
    }
)


def is_quantize(node: Node) -> bool:
    """Whether ``node`` quantizes a tensor: an activation, since a weight is quantized before the export."""
    target = op_of(node)
    return isinstance(target, torch._ops.OpOverload) and target.name() in _QUANTIZERS


def quantizes_activations(program: ExportedProgram) -> bool:
    """Whether ``program`` quantizes an activation, in its subgraphs too."""
    graphs = (module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule))
    return any(is_quantize(node) for graph in graphs for node in graph.nodes)


def quantized_activation_of(reader: Node) -> str:
    """Describes ``reader`` for a report if an input of it is an activation quantized on the fly; else empty.

    Views may stand between the two.
    """
    for source in reader.all_input_nodes:
        while op_of(source) is torch.ops.aten.view.default:
            source = source.all_input_nodes[0]
        data = dequantized_data(source)
        if data is not None and is_quantize(data):
            return f"{op_name(reader.target)} ({reader.name}), whose activations are quantized on the fly"
    return ""


def qparams_source(pair: tuple[Any, Any], choose: torch._ops.OpOverload) -> Node:
    """The call of ``choose`` whose two results are ``pair``.

    Raises:
        Unmet: ``pair`` comes from elsewhere.
    """
    sources: list[Node] = []
    for index, part in enumerate(pair):
        if not isinstance(part, Node) or part.target is not operator.getitem or part.args[1] != index:
            raise Unmet(f"a scale or zero point that is {part!r}, not chosen from the activation")
        source = part.args[0]
        if not isinstance(source, Node) or op_of(source) is not choose:
            raise Unmet(f"a scale or zero point from {source}, not chosen from the activation")
        sources.append(source)
    if sources[0] is not sources[1]:
        raise Unmet("a scale and a zero point that were not chosen together")
    return sources[0]


# torchao: quantized on the fly ---------------------------------------------------------------------------------------

QUANTIZE = torch.ops.torchao.quantize_affine.default
CHOOSE_QPARAMS = torch.ops.torchao.choose_qparams_affine.default

_quantize: Callable[..., Call] = op(QUANTIZE)
_dequantize: Callable[..., Call] = op(DEQUANTIZE)


def dynamically_quantized(x: Pattern, name: str) -> Call:
    """``dequantize(quantize(x))`` as a pattern; :func:`decode_dynamic` checks the rest of the chain."""
    return _dequantize(_quantize(x, ..., shared=True), ..., name=name, shared=True)


@dataclass(frozen=True)
class DynamicActivation:
    """An activation quantized while the program runs, as its nodes describe it.

    Attributes:
        nodes: choose_qparams, its two getitems, quantize and dequantize.
        block_size: elements that share one scale, along each axis; [1, ..., 1, K] is per token.
        quant_min, quant_max: the range of the integers.
        mapping: "ASYMMETRIC" or "SYMMETRIC".
        eps: the least scale, or None.
        dtype: dtype of the integers.
    """

    nodes: tuple[Node, ...]
    block_size: tuple[Any, ...]
    quant_min: int
    quant_max: int
    mapping: str
    eps: float | None
    dtype: torch.dtype


def decode_dynamic(program: Program, node: Node) -> DynamicActivation:
    """Decode the dequantize ``node`` of an activation.

    Raises:
        Unmet: its scale and zero point are not chosen from the activation itself, or its parts contradict each other.
    """
    dequantized = arguments(node)
    quantized_node = dequantized["input"]
    if not isinstance(quantized_node, Node) or op_of(quantized_node) is not QUANTIZE:
        raise Unmet(f"{node.name}, which dequantizes something else than a quantized activation")
    quantized = arguments(quantized_node)
    pair = (dequantized["scale"], dequantized["zero_point"])
    if pair != (quantized["scale"], quantized["zero_point"]):
        raise Unmet(f"{node.name}, dequantized with another scale than it was quantized with")
    chosen = qparams_source(pair, CHOOSE_QPARAMS)
    choose = arguments(chosen)
    if choose["input"] is not quantized["input"]:
        raise Unmet(f"{node.name}, whose scale is chosen from another tensor")
    described = [
        (tuple(bound["block_size"]), bound[dtype_name], bound["quant_min"], bound["quant_max"])
        for bound, dtype_name in ((choose, "target_dtype"), (quantized, "output_dtype"), (dequantized, "input_dtype"))
    ]
    if described[0] != described[1] or described[0] != described[2]:
        raise Unmet(f"{node.name}, chosen, quantized and dequantized with different parameters")
    block_size, dtype, low, high = described[0]
    info = torch.iinfo(dtype)
    return DynamicActivation(
        nodes=(chosen, *pair, quantized_node, node),
        block_size=block_size,
        quant_min=info.min if low is None else int(low),
        quant_max=info.max if high is None else int(high),
        mapping=str(choose["mapping_type"]),
        eps=choose["eps"],
        dtype=dtype,
    )


# PT2E: quantized per tensor ------------------------------------------------------------------------------------------

_decomposed = torch.ops.quantized_decomposed
QUANTIZE_PER_TENSOR = _decomposed.quantize_per_tensor.default
_CHOOSE_PER_TENSOR = _decomposed.choose_qparams.tensor
_QUANTIZE_DYNAMIC = _decomposed.quantize_per_tensor.tensor

_quantize_static: Callable[..., Call] = op(QUANTIZE_PER_TENSOR)
_dequantize_static: Callable[..., Call] = op(_decomposed.dequantize_per_tensor.default)
_quantize_dynamic: Callable[..., Call] = op(_QUANTIZE_DYNAMIC)
_dequantize_dynamic: Callable[..., Call] = op(_decomposed.dequantize_per_tensor.tensor)


def statically_quantized(x: Pattern, name: str) -> Call:
    """``dequantize(quantize(x))`` with a scale from a calibration; :func:`static_qparams` checks the rest."""
    return _dequantize_static(_quantize_static(x, ..., shared=True), ..., name=name, shared=True)


def dynamically_quantized_per_tensor(x: Pattern, name: str) -> Call:
    """``dequantize(quantize(x))`` with one scale for the tensor, chosen while the program runs."""
    return _dequantize_dynamic(_quantize_dynamic(x, ..., shared=True), ..., name=name, shared=True)


def static_qparams(program: Program, node: Node) -> tuple[int, int, torch.dtype]:
    """The range and dtype of the activation that ``node`` dequantizes.

    Raises:
        Unmet: quantize and dequantize have different parameters, or the scale is chosen from another tensor.
    """
    back, there = list(arguments(node).values()), list(arguments(node.all_input_nodes[0]).values())
    # The first six arguments of both are the tensor, scale, zero point, the two ends of the range, and the dtype.
    if back[1:6] != there[1:6]:
        raise Unmet(f"{node.name}, dequantized with other parameters than it was quantized with")
    if op_of(node.all_input_nodes[0]) is _QUANTIZE_DYNAMIC:
        choose = qparams_source((there[1], there[2]), _CHOOSE_PER_TENSOR)
        if arguments(choose)["input"] is not there[0]:
            raise Unmet(f"{node.name}, whose scale is chosen from another tensor")
    return int(back[3]), int(back[4]), back[5]


def least_scale(program: Program, node: Node) -> float:
    """The least scale that is chosen for the activation that ``node`` dequantizes per tensor.

    Raises:
        Unmet: its scale and zero point are not chosen while the program runs.
    """
    given = list(arguments(node).values())
    return float(arguments(qparams_source((given[1], given[2]), _CHOOSE_PER_TENSOR))["eps"])
