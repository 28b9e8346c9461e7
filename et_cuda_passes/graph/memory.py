"""Which values change while a program runs: written in place, under whatever name and through whatever view."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch.fx import Node

from et_cuda_passes.graph.ops import arguments

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
    }
)
"""They return what they are given, or a view of it, where there is nothing to do, and their schemas do not say so."""


def memory_of(held: torch.Tensor | None) -> int | None:
    """The address of a constant's memory; None for what has none that could be shared."""
    if held is None or type(held) not in (torch.Tensor, torch.nn.Parameter) or held.device.type == "meta":
        return None
    return held.untyped_storage().data_ptr()


def written_in(
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
        views: what a branch's inputs and results may lie in the memory of (:class:`~.branches.Branches`).
    """
    mutated = list(mutated)
    written = written_nodes(nodes, mutated, views)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    # Constants under several names may lie in one memory, which is then written under all of them.
    memory = {memory_of(constant(node)) for node in placeholders if node in written} - {None}
    if not memory:
        return written
    return written_nodes(nodes, mutated + [node for node in placeholders if memory_of(constant(node)) in memory], views)


def written_nodes(
    nodes: Sequence[Node], constants: Iterable[Node] = (), views: Mapping[Node, Node] = MappingProxyType({})
) -> set[Node]:
    """Every node whose memory is written in place: what some node writes, ``constants``, and every view of either."""
    written = {_base(node, views) for node in constants}
    for node in nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target is _CHANGES_NO_VALUE:
            continue
        for argument in target._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = arguments(node).get(argument.name)
            items = value if isinstance(value, (list, tuple)) else [value]
            written.update(_base(item, views) for item in items if isinstance(item, Node))
    return {node for node in nodes if _base(node, views) in written} if written else set()


def _base(node: Node, views: Mapping[Node, Node]) -> Node:
    """The node whose memory ``node`` is a view of, itself if of none."""
    while (source := views.get(node) or viewed(node)) is not None:
        node = source
    return node


def viewed(node: Node) -> Node | None:
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
