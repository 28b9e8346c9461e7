"""The signatures of the modules that an export preserved, by which ``torch.export.unflatten`` finds their values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch.export.exported_program import ModuleCallEntry
from torch.fx import Graph, Node


def boundary_nodes(graph: Graph, calls: Sequence[ModuleCallEntry], names: Mapping[str, str]) -> set[Node]:
    """The nodes whose values a preserved module is given or returns: what stands on both its sides stays two nodes."""
    given = [value for call in calls if call.signature for value in (*call.signature.inputs, *call.signature.outputs)]
    named = {names.get(value.name, value.name) for value in given}
    return {node for node in graph.nodes if node.name in named}


def preserved_modules_of(node: Node, calls: Sequence[ModuleCallEntry]) -> tuple[str, ...]:
    """The preserved modules that ``node`` stands in, outermost first: what it reads of elsewhere they must be given."""
    preserved = {call.fqn for call in calls if call.signature and call.fqn}
    stack = node.meta.get("nn_module_stack", {}).values()
    return tuple(fqn for fqn, _ in stack if preserved and fqn in preserved)


def rename_in_signatures(calls: list[ModuleCallEntry], names: Mapping[str, str]) -> list[ModuleCallEntry]:
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
