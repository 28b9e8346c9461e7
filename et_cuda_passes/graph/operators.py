"""Operator identity: which overload a node calls; edge and ATen forms of one operator are equated here alone."""

from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

ACCESS_SUBCLASS_TENSOR = torch.ops.export.access_subclass_inner_tensor.default
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


def require_overload(target: Target) -> Target:
    """``target``, if a graph that torch.export made can call it.

    Raises:
        TypeError: it is a packet of overloads, a name, or a Python function that such a graph has no calls of.
    """
    if isinstance(target, torch._ops.OpOverloadPacket):
        name = str(target)
        overloads = " or ".join(f"{name}.{overload}" for overload in target.overloads()[:2])
        raise TypeError(f"{name} has several overloads, of which a graph calls one: write {overloads}")
    is_overload = isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) or hasattr(target, "_op")
    of_numbers = getattr(target, "__module__", "") in ("_operator", "math")
    if not is_overload and not of_numbers and not getattr(target, "__name__", "").startswith("sym_"):
        raise TypeError(f"{target!r} is no operator of an exported graph: write its overload, as aten.linear.default")
    return target


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


def op_of(node: Node) -> Target | None:
    """The canonical operator that ``node`` calls; None for a placeholder, an output or a get_attr."""
    return canonical(node.target) if node.op == "call_function" else None


def to_edge(target: torch._ops.OpOverload) -> Target:
    """``target`` as ExecuTorch's edge dialect holds it; asked for a program of that dialect, so ExecuTorch is there."""
    from importlib import import_module

    edge = import_module("executorch.exir.dialects._ops").ops.edge
    namespace, _, name = target._schema.name.partition("::")
    return getattr(getattr(getattr(edge, namespace), name), target._overloadname)


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
    for name, (position, argument) in zip(argument_names(node), enumerate(schema.arguments), strict=True):
        if position < len(node.args):
            bound[name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[name] = argument.default_value
    return bound


def argument_names(node: Node) -> list[str]:
    """The names of a call's arguments, those of the canonical operator where the two forms differ in them."""
    schema = schema_of(node)
    return [] if schema is None else schema_argument_names(schema, op_of(node))


def schema_argument_names(schema: torch.FunctionSchema, canonically: Target = None) -> list[str]:
    """The names of a schema's arguments; of an operator that is ``canonically`` another, as they are called there."""
    names = [argument.name for argument in schema.arguments]
    return ["size" if name == "shape" and canonically is aten.view.default else name for name in names]
