"""Which operators a report must account for: every one that reads a quantized weight."""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.subgraphs import Subgraphs
from et_cuda_passes.quant.advised import SuggestedSchemes
from et_cuda_passes.quant.converted import PRODUCTS, converted_weight, multiplied_weight, unsupported_reason
from et_cuda_passes.quant.dynamic import is_quantize
from et_cuda_passes.quant.forms import dequantized_data, is_dequantize
from et_cuda_passes.quant.unwrapping import is_wrapped, wrapped_reason

aten = torch.ops.aten

# A weight may pass through these on its way to the operator that uses it: they move it, and compute nothing.
_MOVE_OPS = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.expand.default,
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
    }
)

# Experts' weights are stacked, and one or some of them are picked.
_SELECT_OPS = frozenset(
    {
        aten.select.int,
        aten.slice.Tensor,
        aten.unbind.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.index.Tensor,
        aten.index_select.default,
        operator.getitem,
    }
)
_STACK = 3
"""Dimensions of a stack of matrices."""

# What these ask of a weight, its size or its dtype, is no use of it.
_METADATA_OPS = frozenset({aten.sym_size.int, aten._assert_tensor_metadata.default})


def find_candidates(program: Program, advised: SuggestedSchemes | None = None, wrapped: str = "") -> list[Candidate]:
    """The readers of every quantized weight of ``program``, in the order of execution, inside control flow too.

    Args:
        program: the program, unwrapped where that is possible.
        advised: what the target takes, for weights in a form that no rule knows.
        wrapped: why weights are still wrapped in tensor subclasses, if any are.
    """
    return [*_reachable(program, advised or SuggestedSchemes(), wrapped), *_unreachable(program)]


def _reachable(program: Program, advised: SuggestedSchemes, wrapped: str) -> Iterator[Candidate]:
    subgraphs = program.subgraphs
    constant: set[Node] = set()
    weights: dict[Node, dict[Node, None]] = {}
    names: dict[Node, str] = {}
    converted: dict[Node, Node] = {}
    whole: dict[Node, Node] = {}
    for node in subgraphs.nodes():
        outer = subgraphs.captured_operand(node)
        if outer is not None and outer in weights:
            weights[node] = weights[outer]
        for found in (converted, whole):
            if outer is not None and outer in found:
                found[node] = found[outer]
        if _is_constant(program, node, constant):
            constant.add(node)
        if is_dequantize(node):
            data = dequantized_data(node)
            # What a loop hands in, another value in each run, may be a part of a weight.
            if data is not None and (
                data in constant or (subgraphs.is_input(data) and not subgraphs.captured_operand(data))
            ):
                weights[node] = {node: None}
                names[node] = _name(program, data)
            continue
        read: dict[Node, None] = {}
        for source in _read(node, subgraphs):
            read.update(weights.get(source, {}))
        if not read:
            yield from _converted(program, node, constant, converted, advised)
            yield from _wrapped(program, node, whole, advised, wrapped)
            continue
        if forwards_weight(node):
            weights[node] = read
        elif op_of(node) not in _METADATA_OPS:
            fqn = ", ".join(dict.fromkeys(names[weight] for weight in read))
            yield Candidate(node, tuple(read), fqn, subgraphs.path(node))


def forwards_weight(node: Node) -> bool:
    """Whether ``node`` only hands a weight on, or some experts of a stack of them."""
    if op_of(node) in _MOVE_OPS:
        return True
    if op_of(node) not in _SELECT_OPS:
        return False
    if op_of(node) is operator.getitem:
        return True  # of a split
    value = node.all_input_nodes[0].meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= _STACK


def _read(node: Node, subgraphs: Subgraphs) -> list[Node]:
    """What ``node`` reads itself: a call of control flow only hands on what its subgraphs read."""
    handed = subgraphs.captured_operands(node)
    return [source for source in node.all_input_nodes if source not in handed]


def _converted(
    program: Program, node: Node, constant: set[Node], converted: dict[Node, Node], advised: SuggestedSchemes
) -> Iterator[Candidate]:
    """``node``, if it multiplies by a narrow weight, or one that the program itself converts.

    ``converted`` holds where those stand.
    """
    narrow = multiplied_weight(program, node)
    if narrow is not None:
        why = unsupported_reason(program, narrow, "multiplied as it is", _elements(narrow), advised)
        yield Candidate(node, (narrow,), program.fqn(narrow) or narrow.name, program.subgraphs.path(node), why)
        return
    if converted_weight(program, node) is not None:
        converted[node] = node
        return
    operand = next((source for source in node.all_input_nodes if source in converted), None)
    if operand is None:
        return
    if node in constant:
        converted[node] = converted[operand]
    elif op_of(node) in PRODUCTS:
        weight = converted_weight(program, converted[operand])
        assert weight is not None
        fqn, why = (
            program.fqn(weight) or weight.name,
            unsupported_reason(program, weight, "converted", _elements(operand), advised),
        )
        yield Candidate(node, (converted[operand],), fqn, program.subgraphs.path(node), why)


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _wrapped(
    program: Program, node: Node, whole: dict[Node, Node], advised: SuggestedSchemes, why: str
) -> Iterator[Candidate]:
    """``node``, if it reads a weight that is still wrapped; ``whole`` holds where those stand."""
    if node.op == "placeholder":
        if is_wrapped(program.constant(node)):
            whole[node] = node
        return
    sources = dict.fromkeys(whole[source] for source in _read(node, program.subgraphs) if source in whole)
    if not sources or op_of(node) is ACCESS_SUBCLASS_TENSOR or op_of(node) in _METADATA_OPS:
        return
    first = next(iter(sources))
    if forwards_weight(node):
        whole[node] = first
        return
    fqn = ", ".join(program.fqn(source) or source.name for source in sources)
    # Not among its weights: no rule replaces it.
    yield Candidate(node, (), fqn, program.subgraphs.path(node), wrapped_reason(program.constant(first), why, advised))


def consumers(weight: Node) -> Iterator[Node]:
    """The operators that use ``weight``, past those that only move it."""
    for user in weight.users:
        if forwards_weight(user):
            yield from consumers(user)
        else:
            yield user


def _is_constant(program: Program, node: Node, constant: set[Node]) -> bool:
    """Whether ``node`` has one value in every run: a parameter, buffer or constant, or computed from such alone."""
    if node.op == "placeholder":
        return program.constant(node) is not None or program.subgraphs.captured_operand(node) in constant
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(source in constant for source in inputs)


def _name(program: Program, data: Node) -> str:
    while (found := program.fqn(data)) is None and data.all_input_nodes:
        data = data.all_input_nodes[0]
    return found or data.name


def _unreachable(program: Program) -> Iterator[Candidate]:
    """Weights dequantized in graphs that no rule reaches. Whether an operand is constant is not known: report all."""
    for graph in program.subgraphs.opaque_graphs():
        for node in graph.nodes:
            data = dequantized_data(node)
            # The integers of a dynamically quantized activation are computed in the graph; a weight's are passed in.
            if data is not None and not is_quantize(data):
                where = "it stands in a graph that is called from two places, or by an operator that is not known"
                for user in node.users:
                    yield Candidate(user, (node,), data.name, program.subgraphs.path(user), unreachable_reason=where)
