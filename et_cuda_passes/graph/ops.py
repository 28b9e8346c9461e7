"""Operator identity: which overload a node calls; edge and ATen forms of one operator are equated here alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

ACCESS = torch.ops.export.access_subclass_inner_tensor.default
"""Reads one inner tensor of a tensor-subclass parameter; ``torch.export`` puts it where the parameter is used."""

Target = Any
"""What ``node.target`` of a call_function node may hold: an ``OpOverload``, an edge overload or a Python function."""

# ExecuTorch's edge dialect has no views: each becomes its copying twin. To a pattern the two are the same operator.
_VIEW_OF_COPY: dict[Target, Target] = {
    aten.view_copy.default: aten.view.default,
    aten.t_copy.default: aten.t.default,
    aten.transpose_copy.int: aten.transpose.int,
    aten.permute_copy.default: aten.permute.default,
    aten.unsqueeze_copy.default: aten.unsqueeze.default,
    aten.squeeze_copy.dim: aten.squeeze.dim,
    aten.squeeze_copy.dims: aten.squeeze.dims,
    aten.expand_copy.default: aten.expand.default,
    aten.alias_copy.default: aten.alias.default,
    aten.detach_copy.default: aten.detach.default,
    aten.slice_copy.Tensor: aten.slice.Tensor,
    aten.select_copy.int: aten.select.int,
    aten._unsafe_view.default: aten.view.default,
    aten.reshape.default: aten.view.default,
}


def canonical(target: Target) -> Target:
    """The one object that stands for ``target`` in patterns.

    An edge overload becomes the ATen overload it wraps; ``view_copy``, ``_unsafe_view`` and ``reshape`` become
    ``view``, and so on for the other copying twins. Anything else stands for itself.
    """
    if not isinstance(target, torch._ops.OpOverload):
        # An edge overload holds its ATen overload in `_op`; a duck test, so that this room needs no ExecuTorch.
        inner = getattr(target, "_op", None)
        if isinstance(inner, torch._ops.OpOverload):
            target = inner
    return _VIEW_OF_COPY.get(target, target)


def called(node: Node) -> Target | None:
    """The canonical operator that ``node`` calls; None for a placeholder, an output or a get_attr."""
    return canonical(node.target) if node.op == "call_function" else None


def op_name(target: Target) -> str:
    """A short printable name, for messages only: ``aten.linear``, ``torchao.dequantize_affine``, ``getitem``."""
    target = canonical(target)
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"{namespace}.{name}"
    return str(getattr(target, "__name__", target))


def schema_of(node: Node) -> torch.FunctionSchema | None:
    """The schema of the ATen or custom overload that ``node`` calls, in edge form too; None for a Python function."""
    target: Target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        target = getattr(target, "_op", None)
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by schema name, defaults filled in; by position (``"0"``, ``"1"``) without a schema."""
    schema = schema_of(node)
    if schema is None:
        return {str(i): arg for i, arg in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def written_nodes(nodes: Iterable[Node]) -> set[Node]:
    """Every node whose memory some node writes in place, and every node that those are views of."""
    written: set[Node] = set()
    for node in nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        for argument in target._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = arguments(node).get(argument.name)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                while isinstance(item, Node) and item not in written:
                    written.add(item)
                    item = _viewed(item)
    return written


def _viewed(node: Node) -> Node | None:
    """The node that ``node`` is a view of, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    for argument in node.target._schema.arguments:
        if argument.alias_info is not None:
            value = arguments(node).get(argument.name)
            return value if isinstance(value, Node) else None
    return None
