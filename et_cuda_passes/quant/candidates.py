"""Which operators a report must account for: every one that reads a dequantized weight."""

from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

from et_cuda_passes.graph.ledger import Candidate
from et_cuda_passes.graph.ops import called
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.converted import PRODUCTS, advice, converted_weight
from et_cuda_passes.quant.dynamic import is_quantize
from et_cuda_passes.quant.forms import dequantized_data, is_dequantize

aten = torch.ops.aten

# A weight may pass through these on its way to the operator that uses it: they move it, and compute nothing.
_CARRIERS = frozenset(
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


def find_candidates(program: Program) -> list[Candidate]:
    """The readers of every dequantized weight of ``program``, in graph order, inside branches too."""
    return [*_in_graph(program), *_in_branches(program.branches())]


def _in_graph(program: Program) -> Iterator[Candidate]:
    constant: set[Node] = set()
    weights: dict[Node, dict[Node, None]] = {}
    names: dict[Node, str] = {}
    converted: dict[Node, Node] = {}
    for node in program.graph.nodes:
        if _is_constant(program, node, constant):
            constant.add(node)
        if is_dequantize(node):
            data = dequantized_data(node)
            if data is not None and data in constant:
                weights[node] = {node: None}
                names[node] = _name(program, data)
            continue
        read: dict[Node, None] = {}
        for source in node.all_input_nodes:
            read.update(weights.get(source, {}))
        if not read:
            yield from _converted(program, node, constant, converted)
            continue
        if called(node) in _CARRIERS:
            weights[node] = read
        else:
            fqn = ", ".join(dict.fromkeys(names[weight] for weight in read))
            yield Candidate(node, tuple(read), fqn)


def _converted(program: Program, node: Node, constant: set[Node], converted: dict[Node, Node]) -> Iterator[Candidate]:
    """``node``, if it multiplies by a weight that the program itself converts; ``converted`` holds where they stand."""
    if converted_weight(program, node) is not None:
        converted[node] = node
        return
    sources = [converted[source] for source in node.all_input_nodes if source in converted]
    if sources and node in constant:
        converted[node] = sources[0]
    elif sources and called(node) in PRODUCTS:
        weight = converted_weight(program, sources[0])
        assert weight is not None
        fqn = program.fqn(weight) or weight.name
        yield Candidate(node, (sources[0],), fqn, beyond_reach=advice(program, weight))


def readers(weight: Node) -> Iterator[Node]:
    """The operators that use ``weight``, past those that only move it."""
    for user in weight.users:
        if called(user) in _CARRIERS:
            yield from readers(user)
        else:
            yield user


def _is_constant(program: Program, node: Node, constant: set[Node]) -> bool:
    """Whether ``node`` has one value in every run: a parameter, buffer or constant, or computed from such alone."""
    if node.op == "placeholder":
        return program.constant(node) is not None
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(source in constant for source in inputs)


def _name(program: Program, data: Node) -> str:
    while (found := program.fqn(data)) is None and data.all_input_nodes:
        data = data.all_input_nodes[0]
    return found or data.name


def _in_branches(branches: Iterable[GraphModule]) -> Iterator[Candidate]:
    """Weights dequantized inside control flow. Whether an operand is constant is not known there: report all."""
    for branch in branches:
        for node in branch.graph.nodes:
            data = dequantized_data(node)
            # The integers of a dynamically quantized activation are computed in the branch; a weight's are passed in.
            if data is not None and not is_quantize(data):
                where = "it stands in a branch of control flow, whose weights are not rewritten yet"
                for user in node.users:
                    yield Candidate(user, (node,), data.name, beyond_reach=where)
        yield from _in_branches(child for child in branch.children() if isinstance(child, GraphModule))
