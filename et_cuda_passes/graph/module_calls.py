"""Signatures of modules that an export preserved. ``torch.export.unflatten`` finds their values by name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch.export.exported_program import ModuleCallEntry
from torch.fx import Graph, Node


def boundary_nodes(graph: Graph, calls: Sequence[ModuleCallEntry], names: Mapping[str, str]) -> set[Node]:
    """The nodes that are inputs or outputs of preserved modules. No rewrite may join nodes on both sides of one."""
    given = [value for call in calls if call.signature for value in (*call.signature.inputs, *call.signature.outputs)]
    named = {names.get(value.name, value.name) for value in given}
    return {node for node in graph.nodes if node.name in named}


def preserved_modules_of(node: Node, calls: Sequence[ModuleCallEntry]) -> tuple[str, ...]:
    """FQNs of the preserved modules that contain ``node``, outermost first.

    A value from outside such a module must be one of its inputs.
    """
    preserved = {call.fqn for call in calls if call.signature and call.fqn}
    stack = node.meta.get("nn_module_stack", {}).values()
    return tuple(fqn for fqn, _ in stack if preserved and fqn in preserved)


def rename_in_signatures(calls: list[ModuleCallEntry], names: Mapping[str, str]) -> list[ModuleCallEntry]:
    """The module calls with the present names of inputs and outputs; ``names`` maps former names to present ones."""

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
