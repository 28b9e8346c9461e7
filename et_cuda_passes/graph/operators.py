"""Identity of operators: the overload that a node calls. Only this file equates edge and ATen forms of an operator."""

from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

ACCESS_SUBCLASS_TENSOR = torch.ops.export.access_subclass_inner_tensor.default
"""Reads an inner tensor of a tensor-subclass parameter; ``torch.export`` inserts it where the parameter is used."""

Target = Any
"""The type of ``node.target`` of a call_function node: an ``OpOverload``, an edge overload or a Python function."""

# ExecuTorch's edge dialect replaces each view operator by one that copies. Patterns do not distinguish the two.
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


def require_overload(target: Target) -> Target:
    """``target``, if a graph from torch.export can call it.

    Raises:
        TypeError: it is a packet of overloads, a name, or a Python function that such a graph never calls.
    """
    if isinstance(target, torch._ops.OpOverloadPacket):
        name = str(target)
        overloads = " or ".join(f"{name}.{overload}" for overload in target.overloads()[:2])
        raise TypeError(f"{name} has several overloads; write the one that the graph calls: {overloads}")
    is_overload = isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) or hasattr(target, "_op")
    of_numbers = getattr(target, "__module__", "") in ("_operator", "math")
    if not is_overload and not of_numbers and not getattr(target, "__name__", "").startswith("sym_"):
        raise TypeError(
            f"{target!r} is not an operator of an exported graph; write an overload, such as aten.linear.default"
        )
    return target


def canonical(target: Target) -> Target:
    """The operator that represents ``target`` in patterns.

    An edge overload becomes the ATen overload that it wraps. ``view_copy``, ``_unsafe_view`` and ``reshape`` become
    ``view``, and every other operator that copies becomes the view operator. Anything else represents itself.
    """
    if not isinstance(target, torch._ops.OpOverload):
        # An edge overload has its ATen overload in `_op`. Testing for the attribute needs no import of ExecuTorch.
        inner = getattr(target, "_op", None)
        if isinstance(inner, torch._ops.OpOverload):
            target = inner
    return _VIEW_OF_COPY.get(target, target)


def op_of(node: Node) -> Target | None:
    """The canonical operator that ``node`` calls; None if it is not a call."""
    return canonical(node.target) if node.op == "call_function" else None


def functional_of(node: Node) -> Target | None:
    """The operator of which ``node`` calls the in-place form, as ``aten.relu`` for ``aten.relu_``; else None."""
    target = op_of(node)
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None)
    return None if overload is None else canonical(overload)


def to_edge(target: torch._ops.OpOverload) -> Target:
    """The edge overload of ``target``. Only a program in edge form needs it, so ExecuTorch is installed."""
    from importlib import import_module

    edge = import_module("executorch.exir.dialects._ops").ops.edge
    namespace, _, name = target._schema.name.partition("::")
    return getattr(getattr(getattr(edge, namespace), name), target._overloadname)


def op_name(target: Target) -> str:
    """A short name for messages, never for comparisons: ``aten.linear``, ``torchao.dequantize_affine``, ``getitem``."""
    target = canonical(target)
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"{namespace}.{name}"
    return str(getattr(target, "__name__", target))


def schema_of(node: Node) -> torch.FunctionSchema | None:
    """The schema of the overload that ``node`` calls, in edge form too; None for a Python function."""
    target: Target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        target = getattr(target, "_op", None)
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by schema name, with defaults; by position (``"0"``, ``"1"``) without a schema."""
    schema = schema_of(node)
    if schema is None:
        return {str(i): arg for i, arg in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for name, (position, argument) in zip(argument_names(node), enumerate(schema.arguments), strict=True):
        if position < len(node.args):
            bound[name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[name] = argument.default_value
    return bound


def argument_names(node: Node) -> list[str]:
    """The names of a call's arguments, as the canonical operator has them."""
    schema = schema_of(node)
    return [] if schema is None else schema_argument_names(schema, op_of(node))


def schema_argument_names(schema: torch.FunctionSchema, canonically: Target = None) -> list[str]:
    """The names of a schema's arguments, as the operator ``canonically`` has them."""
    names = [argument.name for argument in schema.arguments]
    return ["size" if name == "shape" and canonically is aten.view.default else name for name in names]
