"""The last stage: dead code goes, views and names are repaired, and the program is put together and verified."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.aliasing import alias_source, has_effect
from et_cuda_passes.graph.constants import tensor_identity
from et_cuda_passes.graph.errors import RuleError
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.program import Program

aten = torch.ops.aten


def finish_program(program: Program) -> ExportedProgram:
    """The changed program, checked: signature in step with the graph, graph lint, the dialect's own verifier."""
    repair_strides(program)
    drop_unused_aliases(program, program.dropped)
    separate_colliding_names(program, program.added)
    return program.to_exported()


def eliminate_dead_nodes(program: Program, stays: Callable[[Node], bool] = lambda node: False) -> None:
    """Erase the abandoned nodes of ``program``, and then their inputs, as long as nothing reads them.

    Nodes of which ``stays`` is true are not erased: candidates that have no outcome yet.

    A node with an effect (:func:`~et_cuda_passes.graph.aliasing.has_effect`) stays, whether its result is read or not,
    unless a rule replaced it: then the replacement has that effect. Linear in what is removed.
    """
    subgraphs = program.subgraphs
    work = [*subgraphs.flush(), *program.abandoned]
    gone: set[Node] = set()
    while work := work or subgraphs.flush():
        node = work.pop()
        if node in gone or node.users or stays(node):
            continue
        if subgraphs.is_input(node):
            subgraphs.mark_unused(node)
            continue
        if node in program.boundary_nodes and program.replacement_of(node) is node:
            continue  # a preserved module's signature names it
        if node.op == "placeholder":
            if program.fqn_key(node) is None or program.is_mutated_buffer(node):
                continue
            program.remove_constant(node)
        elif node.op != "call_function" or (
            program.replacement_of(node) is node and has_effect(node, subgraphs.bodies)
        ):
            continue
        gone.add(node)
        work.extend(node.all_input_nodes)
        node.graph.erase_node(node)
        program.transfer_name(node)
    program.abandoned.clear()


def separate_colliding_names(program: Program, added: Iterable[str]) -> None:
    """Let ``w.packed`` stand beside a ``w`` that is still read: no module holds both a tensor and something inside it.

    A subclass parameter becomes its parts, under the names that ``run_decompositions`` would give them; a plain tensor
    becomes ``w.original``.
    """
    crowded = {name.rpartition(".")[0] for name in added}
    for node in [node for node in program.graph.nodes if node.op == "placeholder"]:
        target = program.fqn_key(node)
        if target is None or target not in crowded:
            continue
        whole = cast(torch.Tensor, program.constant(node))
        if type(whole) in (torch.Tensor, torch.nn.Parameter):
            program.rename_constant(node, f"{target}.original")
        else:
            _split_subclass_parameter(program, node, target, whole)


def _split_subclass_parameter(program: Program, node: Node, target: str, whole: torch.Tensor) -> None:
    """Replace subclass parameter ``node`` by one plain parameter for each inner tensor that is still read."""
    attributes, _ = whole.__tensor_flatten__()  # type: ignore[attr-defined]
    parent, _, field = target.rpartition(".")
    stem = f"{parent}.parametrizations.{field}" if parent else f"parametrizations.{field}"
    parts: dict[str, Node] = {}
    readers = list(node.users)
    for reader in readers:
        if op_of(reader) is not ACCESS_SUBCLASS_TENSOR:
            raise ValueError(
                f"{target} is read whole by {reader.name} and packed for another reader: unwrap the weight first, "
                "with ep.run_decompositions({})"
            )
        attribute = cast(str, reader.args[1])
        if attribute not in parts:
            name = f"{stem}.original{attributes.index(attribute)}"
            parts[attribute] = program.insert_parameter(name, getattr(whole, attribute), before=node)
        reader.replace_all_uses_with(parts[attribute])
    # The readers have no users now, and then neither has the parameter; a tied one may have had none before.
    program.mark_dead([*readers, node])
    eliminate_dead_nodes(program)


def drop_unused_aliases(program: Program, dropped: Iterable[torch.Tensor]) -> None:
    """Drop the other names of dropped tensors: ``torch.export`` reads a tied weight under one of them and lists all."""
    gone = {tensor_identity(tensor) for tensor in dropped}
    for node in program.graph.find_nodes(op="placeholder"):
        held = program.constant(node)
        if held is not None and not node.users and tensor_identity(held) in gone:
            program.remove_constant(node)
            program.graph.erase_node(node)


def repair_strides(program: Program) -> None:
    """Let strides that a replacement changed change nothing else.

    A replacement may lie in memory in another order than the value that it replaced. Values behind it are updated.
    Where more than strides would change, a copy in the former order is inserted:

    - behind a value that the program mutates, under any alias: ``contiguous`` and ``reshape`` are a view or a copy by
      the strides of their input, and a mutation would reach another memory;
    - before an operator that reads strides, draws random numbers in the order of its input, or is control flow;
    - before a ``view`` that cannot be a view any more. A decomposed ``reshape`` is a ``view`` where the strides at
      export allowed that.

    A program in edge form has no views and no mutations.

    Raises:
        RuleError: a value that is mutated cannot be copied into its former order.
    """
    former: dict[Node, Any] = {}
    for old, new in program.replaced.items():
        # Of a chain of replacements the first value counts.
        former[new] = former.get(old, old.meta.get("val"))
    former = {new: value for new, value in former.items() if program.replacement_of(new) is new}
    if program.is_edge or not any(_differ(value, new.meta.get("val")) for new, value in former.items()):
        return
    program.refresh()
    stale: set[Node] = set()
    for node in list(program.subgraphs.nodes()):
        before = former.get(node, node.meta.get("val"))
        if not stale.isdisjoint(node.all_input_nodes):
            if _reads_strides(node, program):
                for source in stale.intersection(node.all_input_nodes):
                    node.replace_input_with(source, _in_order(program, source, former[source], before=node))
                continue
            _update_value(program, node)
        after = node.meta.get("val")
        if not _differ(before, after):
            continue
        if node in program.mutated and alias_source(node) is None:
            copied = _in_order(program, node, before, before=node.next)
            if _differ(before, copied.meta["val"]):
                raise RuleError(
                    f"{node.name} lies in memory in another order than the value that it replaced, which the program "
                    "mutates; the rule must build it with the same strides"
                )
            node.replace_all_uses_with(copied, delete_user_cb=partial(_is_none_of, set(_chain(copied, node))))
        else:
            former.setdefault(node, before)
            stale.add(node)


_STRIDES = {
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
    aten.sym_stride.default,
    aten.sym_stride.int,
    aten.stride.int,
}
_EXACT = {
    getattr(torch.Tag, name)
    for name in ("nondeterministic_seeded", "needs_exact_strides", "needs_fixed_stride_order")
    if hasattr(torch.Tag, name)
}


def _reads_strides(node: Node, program: Program) -> bool:
    """Whether the result of ``node`` depends on the order of its inputs in memory."""
    if node.op == "output":
        return node.graph is not program.graph  # the result of a body
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return node.target in _STRIDES or not _EXACT.isdisjoint(getattr(node.target, "tags", ()))


def _in_order(program: Program, source: Node, like: Any, before: Node) -> Node:
    """A copy of ``source``, inserted before ``before``, with the order of ``like`` in memory."""
    assert isinstance(like, torch.Tensor)
    order = sorted(range(like.dim()), key=lambda dim: -_hint(like.stride(dim)))
    back = [order.index(dim) for dim in range(like.dim())]

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        with before.graph.inserting_before(before):
            node = before.graph.call_function(target, args, kwargs)
        node.meta = {key: value for key, value in source.meta.items() if key != "val"}
        node.meta["val"] = _value(program, node)
        return node

    permuted = call(aten.permute.default, source, order)
    return call(aten.permute.default, call(aten.clone.default, permuted, memory_format=torch.contiguous_format), back)


def _chain(last: Node, first: Node) -> Iterator[Node]:
    """The nodes from ``last`` back to ``first``, without that, where each has one input."""
    while last is not first:
        yield last
        (last,) = last.all_input_nodes


def _is_none_of(nodes: set[Node], node: Node) -> bool:
    return node not in nodes


def _hint(size: Any) -> int:
    """A number to order strides by: of a dynamic one its value at export."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _update_value(program: Program, node: Node) -> None:
    """Compute the value of ``node`` again; a ``view`` that cannot be made gets a contiguous copy of its input."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
        return
    after = _value(program, node)
    if after is None and node.target in (aten.view.default, aten._unsafe_view.default):
        source = cast(Node, node.args[0])
        with node.graph.inserting_before(node):
            copied = node.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        copied.meta = {key: value for key, value in node.meta.items() if key != "val"}
        copied.meta["val"] = _value(program, copied)
        node.update_arg(0, copied)
        after = _value(program, node)
    if after is not None:
        node.meta["val"] = after


def _value(program: Program, node: Node) -> Any:
    """What ``node`` gives, computed again; None where it cannot be."""
    if any("val" not in source.meta for source in node.all_input_nodes):
        return None  # a pass of the caller's made it and did not say
    shapes = program.fake_mode.shape_env
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    known = None if shapes is None else len(shapes.guards)
    try:
        with program.fake_mode, enable_python_dispatcher(), torch.no_grad():
            if shapes is None:
                return node.target(*args, **kwargs)  # type: ignore[operator]
            with shapes.suppress_guards():
                return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError):
        return None
    finally:
        assert shapes is None or len(shapes.guards) == known


def _differ(before: object, after: object) -> bool:
    """Whether two tensors, or tensors at the same place in two lists, lie in memory in different orders."""
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return any(map(_differ, before, after))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dim() != after.dim():
        return False
    pairs = zip(before.stride(), after.stride(), before.shape, strict=True)
    return any(_number(a) != _number(b) for a, b, size in pairs if not isinstance(size, int) or size > 1)


def _number(size: Any) -> Any:
    """A stride to compare without a guard: a number, or the expression of one that is dynamic."""
    return size if isinstance(size, int) else size.node.expr
