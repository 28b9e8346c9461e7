"""The last stage: dead code goes, views and names are repaired, and the program is put together and verified."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.aliasing import has_effect
from et_cuda_passes.graph.constants import tensor_identity
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.program import Program

aten = torch.ops.aten


def finish_program(program: Program) -> ExportedProgram:
    """The changed program, checked: signature in step with the graph, graph lint, the dialect's own verifier."""
    repair_views(program, program.replaced)
    drop_unused_aliases(program, program.dropped)
    separate_colliding_names(program, program.added)
    return program.to_exported()


def eliminate_dead_nodes(program: Program) -> None:
    """Erase the abandoned nodes of ``program``, and then their inputs, as long as nothing reads them.

    A node with an effect (:func:`~et_cuda_passes.graph.aliasing.has_effect`) stays, whether its result is read or not,
    unless a rule replaced it: then the replacement has that effect. Linear in what is removed.
    """
    subgraphs = program.subgraphs
    work = [*subgraphs.flush(), *program.abandoned]
    gone: set[Node] = set()
    while work := work or subgraphs.flush():
        node = work.pop()
        if node in gone or node.users:
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


def repair_views(program: Program, replaced: Mapping[Node, Node]) -> None:
    """Bring the values behind replacements up to date, and copy what a ``view`` behind them could not be made of.

    A decomposed ``reshape`` is a ``view`` where the strides at export allowed that.

    Args:
        program: to be changed; one in edge form has no views.
        replaced: each node that was replaced with what it was replaced by, in the order in which that was done.
    """
    stale: set[Node] = set()
    for old, new in replaced.items():
        if old in stale or _differ(old.meta.get("val"), new.meta.get("val")):
            stale.add(new)
    if not stale or program.is_edge:
        return
    for node in list(program.subgraphs.nodes()):
        if node.op != "call_function" or stale.isdisjoint(node.all_input_nodes):
            continue
        before = node.meta.get("val")
        if not isinstance(before, torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        after = _value(program, node)
        if after is None and node.target is aten.view.default:
            source = node.args[0]
            assert isinstance(source, Node)
            with node.graph.inserting_before(node):
                copied = node.graph.call_function(
                    aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
                )
            copied.meta = {key: value for key, value in node.meta.items() if key != "val"}
            copied.meta["val"] = _value(program, copied)
            node.update_arg(0, copied)
            after = _value(program, node)
        if after is not None and _differ(before, after):
            node.meta["val"] = after
            stale.add(node)


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
    """Whether two tensors, or what else a node gives, lie in memory in different orders."""
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dim() != after.dim():
        return False
    pairs = zip(before.stride(), after.stride(), before.shape, strict=True)
    return any(_number(a) != _number(b) for a, b, size in pairs if not isinstance(size, int) or size > 1)


def _number(size: Any) -> Any:
    """A stride to compare without a guard: a number, or the expression of one that is dynamic."""
    return size if isinstance(size, int) else size.node.expr
