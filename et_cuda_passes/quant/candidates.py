"""Candidates: the operators that read a quantized weight, each of which needs an outcome in the report."""

import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from math import prod

import torch
from torch.fx import Node

from et_cuda_passes.graph.constants import tensor_bytes
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.graph.program import Program, constants_read
from et_cuda_passes.graph.subgraphs import Subgraphs
from et_cuda_passes.quant.activations import is_quantize
from et_cuda_passes.quant.decoders import decode, decode_product, dequantized_data, is_dequantize, is_product
from et_cuda_passes.quant.unsupported import (
    NARROW,
    PRODUCTS,
    SuggestedSchemes,
    converted_weight,
    is_wrapped,
    multiplied_weight,
    unsupported_reason,
    wrapped_reason,
)

aten = torch.ops.aten

# Operators that may stand between a weight and the operator that uses it: they move the weight and compute nothing.
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

# Operators that select one or several experts from a stack of weights.
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

# Operators whose operand is a weight, even if the program mutates it. Others may read a cache.
_WEIGHT_READERS = frozenset({*PRODUCTS, aten.embedding.default}) - {aten.matmul.default, aten.mm.default}

# Operators that read the size or the dtype of a weight, which is no use of its values.
_METADATA_OPS = frozenset({aten.sym_size.int, aten._assert_tensor_metadata.default})


def find_candidates(
    program: Program,
    among: Collection[Node] | None = None,
    schemes: SuggestedSchemes | None = None,
    wrapped: str = "",
) -> list[Candidate]:
    """The readers of every quantized weight of ``program``, in the order of execution, inside control flow too.

    Args:
        program: the program, unwrapped where that is possible.
        among: new nodes: only those of them that are candidates, and the candidates that read a weight among them. None
            for all candidates.
        schemes: the schemes of the target, for weights in a form that no rule matches.
        wrapped: why weights are still wrapped in tensor subclasses, if any are.
    """
    if among is not None and not any(_may_read_weight(program, node) for node in among):
        return []  # a walk of the whole graph after each rule would take longer than the rule
    found = [*_reachable(program, schemes or SuggestedSchemes(), wrapped), *_unreachable(program)]
    if among is not None:
        found = [each for each in found if each.node in among or any(weight in among for weight in each.weights)]
    return [_with_form(program, each) for each in found]


def _with_form(program: Program, candidate: Candidate) -> Candidate:
    """``candidate`` with the scheme, shape and bytes of its weights, as far as they are known."""
    if not candidate.weights:
        return candidate
    forms: dict[str, None] = {}
    shapes: list[tuple[int, ...]] = []
    total = 0
    for weight in candidate.weights:
        constants = list(dict.fromkeys([weight] if weight.op == "placeholder" else constants_read(program, weight)))
        size = tensor_bytes(map(program.constant, constants))
        operand = _operand(program, candidate.node, weight)
        shape = _shape(operand)
        try:
            if is_product(candidate.node):
                decoded = program.memoize(decode_product, candidate.node)
                shape, size = decoded.shape, tensor_bytes(map(program.constant, decoded.sources))
            else:
                decoded = program.memoize(decode, weight)
            forms[decoded.scheme], whole = None, decoded.shape
        except (Unmet, TypeError):  # a form that no decoder reads
            forms.update(dict.fromkeys(_dtypes(program, constants[:1])))
            whole = _shape(weight)
        # An operator may read one expert of a stack. Other operators only move a weight, and may transpose it.
        selected = bool(shape) and prod(shape) < prod(whole)
        total += size * prod(shape) // prod(whole) if selected else size
        shapes.append(shape if selected else whole)
    return replace(candidate, scheme=", ".join(forms), shape=shapes[0], weight_bytes=total)


def _operand(program: Program, node: Node, weight: Node) -> Node:
    """The operand of ``node`` that holds ``weight`` or a part of it."""
    for operand in node.all_input_nodes:
        source = program.resolve(operand)
        while source is not weight and forwards_weight(source) and source.all_input_nodes:
            source = program.resolve(source.all_input_nodes[0])
        if source is weight:
            return operand
    return weight


def _shape(node: Node) -> tuple[int, ...]:
    """The shape of a tensor; () if it depends on dynamic sizes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
        return ()
    return tuple(value.shape)


def _dtypes(program: Program, constants: Iterable[Node]) -> Iterator[str]:
    for node in constants:
        tensor = program.constant(node)
        if tensor is not None:
            yield str(tensor.dtype).removeprefix("torch.")


def _may_read_weight(program: Program, node: Node) -> bool:
    """Whether ``node`` dequantizes, or reads something dequantized, past operators that only move it."""
    return is_dequantize(node) or any(
        is_dequantize(source) or (forwards_weight(source) and _may_read_weight(program, source))
        for source in map(program.resolve, node.all_input_nodes)
    )


def _reachable(program: Program, schemes: SuggestedSchemes, wrapped: str) -> Iterator[Candidate]:
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
            # A loop's input has another value in each iteration. It may be a part of a weight.
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
            yield from _packed(program, node)
            yield from _converted(program, node, constant, converted, schemes)
            yield from _wrapped(program, node, whole, schemes, wrapped)
            continue
        if forwards_weight(node):
            weights[node] = read
        elif op_of(node) not in _METADATA_OPS:
            if op_of(node) not in _WEIGHT_READERS and all(_is_cache(program, weight) for weight in read):
                continue
            fqn = ", ".join(dict.fromkeys(names[weight] for weight in read))
            yield Candidate(node, tuple(read), fqn, subgraphs.path(node))


def _is_cache(program: Program, dequantize: Node) -> bool:
    """Whether ``dequantize`` reads a buffer that the program mutates, such as the keys of earlier tokens."""
    data = dequantized_data(dequantize)
    return data is not None and program.held(data) is not None and program.is_mutated(data)


def quantized_caches(program: Program) -> list[str]:
    """The names of buffers and inputs of narrow numbers that the program mutates, in graph order."""
    found = []
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node in program.mutated and isinstance(value, torch.Tensor) and value.dtype in NARROW and value.dim() > 1:
            found.append(program.fqn(node) or node.name)
    return found


def forwards_weight(node: Node) -> bool:
    """Whether ``node`` only moves a weight, or selects experts from a stack."""
    if op_of(node) in _MOVE_OPS:
        return True
    if op_of(node) not in _SELECT_OPS:
        return False
    if op_of(node) is operator.getitem:
        return True  # a part of a split
    value = node.all_input_nodes[0].meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= _STACK


def _read(node: Node, subgraphs: Subgraphs) -> list[Node]:
    """The inputs that ``node`` reads itself. A call of control flow only passes captured operands to its subgraphs."""
    captured = subgraphs.captured_operands(node)
    return [source for source in node.all_input_nodes if source not in captured]


def _packed(program: Program, node: Node) -> Iterator[Candidate]:
    """``node``, if it multiplies with a constant that is packed for it."""
    if not is_product(node):
        return
    try:
        weight = program.memoize(decode_product, node).data
    except Unmet:  # computed, or in another form: the rule that unpacks it says why
        weight = next(source for source in node.all_input_nodes[1:])
    fqn = program.fqn(weight)
    if fqn is not None:
        yield Candidate(node, (weight,), fqn, program.subgraphs.path(node))


def _converted(
    program: Program, node: Node, constant: set[Node], converted: dict[Node, Node], schemes: SuggestedSchemes
) -> Iterator[Candidate]:
    """``node``, if it multiplies by a narrow weight, or by one that the program itself converts.

    ``converted`` maps each node that holds a converted weight to its conversion.
    """
    narrow = multiplied_weight(program, node)
    if narrow is not None:
        why = unsupported_reason(program, narrow, "multiplied as it is", _elements(narrow), schemes)
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
        fqn = program.fqn(weight) or weight.name
        why = unsupported_reason(program, weight, "converted", _elements(operand), schemes)
        yield Candidate(node, (converted[operand],), fqn, program.subgraphs.path(node), why)


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _wrapped(
    program: Program, node: Node, whole: dict[Node, Node], schemes: SuggestedSchemes, why: str
) -> Iterator[Candidate]:
    """``node``, if it reads a weight that is still wrapped.

    ``whole`` maps each node that holds such a weight to its placeholder.
    """
    if node.op == "placeholder":
        if is_wrapped(program.held(node)):
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
    # No rule replaces a wrapped weight, so the candidate lists no weights.
    yield Candidate(node, (), fqn, program.subgraphs.path(node), wrapped_reason(program.held(first), why, schemes))


def consumers(weight: Node) -> Iterator[Node]:
    """The operators that use ``weight``, past those that only move it."""
    for user in weight.users:
        if forwards_weight(user):
            yield from consumers(user)
        else:
            yield user


def _is_constant(program: Program, node: Node, constant: set[Node]) -> bool:
    """Whether ``node`` has the same value in every run: a constant, or computed from constants alone."""
    if node.op == "placeholder":
        return program.held(node) is not None or program.subgraphs.captured_operand(node) in constant
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(source in constant for source in inputs)


def _name(program: Program, data: Node) -> str:
    while (found := program.fqn(data)) is None and data.all_input_nodes:
        data = data.all_input_nodes[0]
    return found or data.name


def _unreachable(program: Program) -> Iterator[Candidate]:
    """Weights dequantized in graphs that no rule reaches.

    Constant operands cannot be distinguished from others there, so every dequantize counts.
    """
    for graph in program.subgraphs.opaque_graphs():
        for node in graph.nodes:
            data = dequantized_data(node)
            # The graph computes the integers of a dynamically quantized activation. A weight's are passed in.
            if data is not None and not is_quantize(data):
                where = "it stands in a graph that is called from two places, or by an unknown operator"
                for user in node.users:
                    yield Candidate(user, (node,), data.name, program.subgraphs.path(user), unreachable_reason=where)
