"""What a rewrite owes to names: of constants that stand beside their parts, of tied weights, of preserved modules."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.export.exported_program import ModuleCallEntry
from torch.fx import Graph, Node

from et_cuda_passes.graph.constants import identity
from et_cuda_passes.graph.ops import ACCESS, called

if TYPE_CHECKING:
    from et_cuda_passes.graph.program import Program


def make_room(program: "Program", added: Iterable[str]) -> None:
    """Let ``w.packed`` stand beside a ``w`` that is still read: no module holds both a tensor and something inside it.

    A subclass parameter becomes its parts, under the names that ``run_decompositions`` would give them; a plain tensor
    becomes ``w.original``.
    """
    crowded = {name.rpartition(".")[0] for name in added}
    for node in [node for node in program.graph.nodes if node.op == "placeholder"]:
        target = program.target(node)
        if target is None or target not in crowded:
            continue
        whole = cast(torch.Tensor, program.constant(node))
        if type(whole) in (torch.Tensor, torch.nn.Parameter):
            program.rename_constant(node, f"{target}.original")
        else:
            _unwrap(program, node, target, whole)


def _unwrap(program: "Program", node: Node, target: str, whole: torch.Tensor) -> None:
    """Replace subclass parameter ``node`` by one plain parameter for each inner tensor that is still read."""
    attributes, _ = whole.__tensor_flatten__()  # type: ignore[attr-defined]
    parent, _, field = target.rpartition(".")
    stem = f"{parent}.parametrizations.{field}" if parent else f"parametrizations.{field}"
    parts: dict[str, Node] = {}
    readers = list(node.users)
    for reader in readers:
        if called(reader) is not ACCESS:
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
    program.abandon([*readers, node])
    program.sweep()


def forget_tied(program: "Program", dropped: Iterable[torch.Tensor]) -> None:
    """Drop the other names of dropped tensors: ``torch.export`` reads a tied weight under one of them and lists all."""
    gone = {identity(tensor) for tensor in dropped}
    for node in program.graph.find_nodes(op="placeholder"):
        held = program.constant(node)
        if held is not None and not node.users and identity(held) in gone:
            program.drop(node)
            program.graph.erase_node(node)


def at_boundaries(graph: Graph, calls: Sequence[ModuleCallEntry], names: Mapping[str, str]) -> set[Node]:
    """The nodes whose values a preserved module is given or returns: what stands on both its sides stays two nodes."""
    given = [value for call in calls if call.signature for value in (*call.signature.inputs, *call.signature.outputs)]
    named = {names.get(value.name, value.name) for value in given}
    return {node for node in graph.nodes if node.name in named}


def preserving(node: Node, calls: Sequence[ModuleCallEntry]) -> tuple[str, ...]:
    """The preserved modules that ``node`` stands in, outermost first: what it reads of elsewhere they must be given."""
    preserved = {call.fqn for call in calls if call.signature and call.fqn}
    stack = node.meta.get("nn_module_stack", {}).values()
    return tuple(fqn for fqn, _ in stack if preserved and fqn in preserved)


def renamed_calls(calls: list[ModuleCallEntry], names: Mapping[str, str]) -> list[ModuleCallEntry]:
    """The signatures of preserved modules, by the names that their values have now."""

    def renamed(argument: Any) -> Any:
        name = getattr(argument, "name", None)
        return dataclasses.replace(argument, name=names[name]) if isinstance(name, str) and name in names else argument

    result = []
    for call in calls:
        if call.signature is not None:
            inputs, outputs = ([renamed(a) for a in part] for part in (call.signature.inputs, call.signature.outputs))
            call = ModuleCallEntry(call.fqn, dataclasses.replace(call.signature, inputs=inputs, outputs=outputs))
        result.append(call)
    return result
