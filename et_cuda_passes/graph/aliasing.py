"""Aliases, mutations and other effects: which values change while a program runs, and which calls must stay."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from et_cuda_passes.graph.operators import arguments, schema_of

aten = torch.ops.aten

_CHANGES_NO_VALUE = aten.detach_.default
"""Its schema says that it mutates. ``torch.export`` puts one after every ``torch.tensor([...])`` of a model."""

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
"""They return their input, or a view of it, if there is nothing to compute. Their schemas do not say so.

A script called every operator of torch 2.13, and compared the memory of the results with that of the first argument.
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
"""Each of their results is a view of the one tensor, or of the tensor at the same index of a list. Their schemas do not
say so."""

_RUNNING_STATISTICS: dict[Any, str] = {
    aten.batch_norm: "training",
    aten.instance_norm: "use_input_stats",
    aten.native_batch_norm: "training",
    aten.cudnn_batch_norm: "training",
    aten.miopen_batch_norm: "training",
    aten._batch_norm_impl_index: "training",
}
"""They mutate ``running_mean`` and ``running_var`` if the argument named here is true. Their schemas do not say so."""


def storage_ptrs(held: torch.Tensor | None) -> set[int]:
    """The addresses of a constant's memory: of each inner tensor of a subclass, and none for a tensor without data."""
    if held is None:
        return set()
    if is_traceable_wrapper_subclass(held):
        return {address for name in held.__tensor_flatten__()[0] for address in storage_ptrs(getattr(held, name))}
    if type(held) not in (torch.Tensor, torch.nn.Parameter) or held.device.type == "meta":
        return set()
    return {held.untyped_storage().data_ptr()}


def all_mutated_nodes(
    nodes: Sequence[Node],
    mutated: Iterable[Node],
    constant: Callable[[Node], torch.Tensor | None],
    views: Mapping[Node, Node],
) -> set[Node]:
    """Every node of a program whose value changes while the program runs.

    Args:
        nodes: all nodes of the program.
        mutated: placeholders of the buffers that the program updates by its signature.
        constant: returns the tensor of a placeholder, None for an input.
        views: the node whose memory an input or result of a subgraph may share (:class:`~.subgraphs.Subgraphs`).
    """
    mutated = list(mutated)
    found = mutated_nodes(nodes, mutated, views)
    memory = {node: storage_ptrs(constant(node)) for node in nodes if node.op == "placeholder"}
    # Constants with several names may share memory: a mutation under one name changes all of them.
    changed = {address for node, addresses in memory.items() if node in found for address in addresses}
    if not changed:
        return found
    return mutated_nodes(nodes, [*mutated, *(n for n, held in memory.items() if not changed.isdisjoint(held))], views)


def mutated_nodes(
    nodes: Sequence[Node], constants: Iterable[Node] = (), views: Mapping[Node, Node] = MappingProxyType({})
) -> set[Node]:
    """Every node whose memory is mutated: mutated operands, ``constants``, and all aliases of either."""
    group: dict[Node, Node] = {}

    def find(node: Node) -> Node:
        while (parent := group.get(node, node)) is not node:
            group[node] = node = group.get(parent, parent)
        return node

    for node in nodes:
        outer = views.get(node)
        for source in (*alias_sources(node), *([] if outer is None else [outer])):
            group[find(node)] = find(source)
    mutated = {find(node) for node in constants}
    mutated.update(find(operand) for node in nodes for operand in mutated_operands(node))
    return {node for node in nodes if find(node) in mutated} if mutated else set()


def mutated_operands(node: Node) -> list[Node]:
    """The operands that the call ``node`` mutates; empty for a call of a subgraph."""
    schema = schema_of(node) if node.op == "call_function" else None
    if schema is None or node.target is _CHANGES_NO_VALUE:
        return []
    names = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    given = arguments(node)
    statistics = _RUNNING_STATISTICS.get(getattr(node.target, "overloadpacket", None))
    if statistics is not None and given.get(statistics) is not False:
        names += ["running_mean", "running_var"]
    return [operand for name in names for operand in _nodes_in(given.get(name))]


def has_effect(node: Node, bodies: Mapping[Node, Sequence[Graph]]) -> bool:
    """Whether the call ``node`` does more than return its results. If so, it stays even if nothing reads the results.

    These effects count:

    - a mutation of an operand. ``detach_`` does not count: it changes no value;
    - a call of an operator without results: it has no other purpose;
    - whatever ``torch.fx.Node.is_impure`` reports: assertions, constraints of symbolic sizes, profiler records,
      operators registered as effectful, and random numbers, since each draw changes those that follow;
    - control flow with such a call in a subgraph;
    - any other higher-order operator whose subgraphs are unknown.

    Args:
        node: a node of any kind; only a call has an effect.
        bodies: the subgraphs that each higher-order call runs.
    """
    if node.op != "call_function" or node.target is _CHANGES_NO_VALUE:
        return False
    schema = schema_of(node)
    if node.is_impure() or mutated_operands(node) or (schema is not None and not schema.returns):
        return True
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    graphs = bodies.get(node, ())
    return not graphs or any(has_effect(inner, bodies) for graph in graphs for inner in graph.nodes)


def alias_root(node: Node, views: Mapping[Node, Node] = MappingProxyType({})) -> Node:
    """The node that owns the memory of ``node``: the source of its views, or ``node`` itself.

    ``views`` is that of :func:`all_mutated_nodes`. An operator of another library may have several sources; then the
    first one counts.
    """
    while (source := views.get(node) or alias_source(node)) is not None:
        node = source
    return node


def alias_source(node: Node) -> Node | None:
    """The node that ``node`` is a view of, the first one of several; None if it is not a view."""
    return next(iter(alias_sources(node)), None)


def alias_sources(node: Node) -> list[Node]:
    """The operands whose memory the result of ``node`` shares or may share."""
    if node.op != "call_function":
        return []
    if getattr(node.target, "overloadpacket", None) in _MAYBE_THEIR_INPUT:
        # einsum permutes a single operand, and multiplies several.
        operands = _nodes_in(node.args[0] if node.target is not aten.einsum.default else node.args[1])
        return operands if len(operands) == 1 else []
    if node.target is not operator.getitem:
        return _aliased_operands(node, 0)
    call, index = cast(Node, node.args[0]), node.args[1]
    if getattr(call.target, "overloadpacket", None) in _VIEWS_OF_THEIR_INPUTS:
        first = call.args[0]
        return _nodes_in(first[cast(int, index)] if isinstance(first, (list, tuple)) else first)
    if isinstance(call.target, torch._ops.OpOverload):
        return _aliased_operands(call, cast(int, index))
    return [call]


def _aliased_operands(call: Node, index: int) -> list[Node]:
    """The operands that result ``index`` of ``call`` may be a view of, by the schema of the operator."""
    if not isinstance(call.target, torch._ops.OpOverload):
        return []
    schema = call.target._schema
    if len(schema.returns) == 1:
        index = 0  # a list of tensors is one result
    result = schema.returns[index].alias_info if index < len(schema.returns) else None
    if result is None:
        return []
    given = arguments(call)
    return [
        operand
        for argument in schema.arguments
        if argument.alias_info is not None and _overlap(argument.alias_info, result)
        for operand in _nodes_in(given.get(argument.name))
    ]


def _overlap(argument: Any, result: Any) -> bool:
    """Whether two alias sets of a schema share a member. The sets of lists, ``(a -> *)``, overlap with every set."""
    names = {*argument.before_set, *argument.after_set}
    return "*" in names or not result.before_set or not names.isdisjoint(result.before_set)


def _nodes_in(value: object) -> list[Node]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, Node)]
