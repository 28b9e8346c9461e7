"""Aliases, mutations and other effects: which values change while a program runs, and which calls must stay."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch.fx import Graph, Node

from et_cuda_passes.graph.operators import arguments, schema_of

aten = torch.ops.aten

_CHANGES_NO_VALUE = aten.detach_.default
"""In place by its schema. A ``torch.tensor([...])`` in a model is exported with one behind it."""

_MAYBE_THEIR_INPUT = frozenset(
    {
        aten.dropout,
        aten.feature_dropout,
        aten.alpha_dropout,
        aten.feature_alpha_dropout,
        aten.einsum,
        aten.chain_matmul,
        aten.type_as,
        aten.sum_to_size,
        aten.atleast_1d,
        aten.atleast_2d,
        aten.atleast_3d,
        aten._unsafe_view,
        aten.conj_physical,
        aten.data,
        aten.dequantize,
        aten.lift,
        aten.to_dense,
    }
)
"""They return their input, or a view of it, where there is nothing to compute, and their schemas do not say so.

Found by calling every operator of torch 2.13 and comparing the memory of its results with that of its first argument.
"""

_VIEWS_OF_THEIR_INPUTS = frozenset(
    {
        aten.broadcast_tensors,
        aten.meshgrid,
        aten.unsafe_chunk,
        aten.unsafe_split,
        aten.unsafe_split_with_sizes,
        aten.atleast_1d,
        aten.atleast_2d,
        aten.atleast_3d,
    }
)
"""Each of their results is a view: of the one tensor, or of the tensor at its place in a list. Their schemas do not say
so."""


def storage_ptr(held: torch.Tensor | None) -> int | None:
    """The address of a constant's memory; None for what has none that could be shared."""
    if held is None or type(held) not in (torch.Tensor, torch.nn.Parameter) or held.device.type == "meta":
        return None
    return held.untyped_storage().data_ptr()


def all_mutated_nodes(
    nodes: Sequence[Node],
    mutated: Iterable[Node],
    constant: Callable[[Node], torch.Tensor | None],
    views: Mapping[Node, Node],
) -> set[Node]:
    """Every node of a program whose value changes while it runs.

    Args:
        nodes: all of them.
        mutated: placeholders of buffers that the program's signature says it updates.
        constant: the tensor that a placeholder holds, None for an input.
        views: what a branch's inputs and results may lie in the memory of (:class:`~.subgraphs.Subgraphs`).
    """
    mutated = list(mutated)
    written = mutated_nodes(nodes, mutated, views)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    # Constants under several names may lie in one memory, which is then written under all of them.
    memory = {storage_ptr(constant(node)) for node in placeholders if node in written} - {None}
    if not memory:
        return written
    return mutated_nodes(
        nodes, mutated + [node for node in placeholders if storage_ptr(constant(node)) in memory], views
    )


def mutated_nodes(
    nodes: Sequence[Node], constants: Iterable[Node] = (), views: Mapping[Node, Node] = MappingProxyType({})
) -> set[Node]:
    """Every node whose memory is written in place: what some node writes, ``constants``, and every view of either."""
    written = {alias_root(node, views) for node in constants}
    for node in nodes:
        written.update(alias_root(operand, views) for operand in mutated_operands(node))
    return {node for node in nodes if alias_root(node, views) in written} if written else set()


def mutated_operands(node: Node) -> list[Node]:
    """The operands that the call ``node`` mutates by its schema; empty for a graph's call of another graph."""
    schema = schema_of(node) if node.op == "call_function" else None
    if schema is None or node.target is _CHANGES_NO_VALUE:
        return []
    found = []
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = arguments(node).get(argument.name)
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in items if isinstance(item, Node)]
    return found


def has_effect(node: Node, bodies: Mapping[Node, Sequence[Graph]]) -> bool:
    """Whether the call ``node`` does more than return its results, so that it stays even if nothing reads those.

    These effects count:

    - a mutation of an operand, by the operator's schema. ``detach_`` is none: it changes no value;
    - an operator without results, which can only be called for its effect;
    - what ``torch.fx.Node.is_impure`` names: assertions, constraints of symbolic sizes, profiler records, operators
      registered as effectful, and random numbers, since each draw changes those that follow;
    - control flow with such a call in one of its bodies;
    - any other higher-order operator of which no body is known.

    Args:
        node: a node of any kind; only a call has an effect.
        bodies: the graphs that each higher-order call runs.
    """
    if node.op != "call_function" or node.target is _CHANGES_NO_VALUE:
        return False
    schema = schema_of(node)
    if node.is_impure() or (schema is not None and (schema.is_mutable or not schema.returns)):
        return True
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    graphs = bodies.get(node, ())
    return not graphs or any(has_effect(inner, bodies) for graph in graphs for inner in graph.nodes)


def alias_root(node: Node, views: Mapping[Node, Node] = MappingProxyType({})) -> Node:
    """The node whose memory ``node`` is a view of, itself if of none; ``views`` as for :func:`all_mutated_nodes`."""
    while (source := views.get(node) or alias_source(node)) is not None:
        node = source
    return node


def alias_source(node: Node) -> Node | None:
    """The node that ``node`` is a view of, or None."""
    if node.op == "call_function" and getattr(node.target, "overloadpacket", None) in _MAYBE_THEIR_INPUT:
        # One operand of einsum is permuted; several are multiplied.
        first = node.args[0] if node.target is not aten.einsum.default else node.args[1]
        operands = first if isinstance(first, (list, tuple)) else [first]
        return operands[0] if len(operands) == 1 and isinstance(operands[0], Node) else None
    if node.target is operator.getitem:
        # One of the results of a call; where they are views (split, unbind), it is one. An operator whose arguments
        # alias nothing (topk, sort) makes each of them anew.
        call = cast(Node, node.args[0])
        if getattr(call.target, "overloadpacket", None) in _VIEWS_OF_THEIR_INPUTS:
            first = call.args[0]
            source = first[cast(int, node.args[1])] if isinstance(first, (list, tuple)) else first
            return source if isinstance(source, Node) else None
        if isinstance(call.target, torch._ops.OpOverload):
            aliases = any(argument.alias_info is not None for argument in call.target._schema.arguments)
            return call if aliases else None
        return call
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    for argument in node.target._schema.arguments:
        if argument.alias_info is not None:
            value = arguments(node).get(argument.name)
            return value if isinstance(value, Node) else None
    return None
