"""Room for ``w.packed`` beside a ``w`` that is still read: no module holds both a tensor and something inside it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch.fx import Node

from et_cuda_passes.graph.ops import ACCESS, called

if TYPE_CHECKING:
    from et_cuda_passes.graph.program import Program


def make_room(program: "Program", added: Iterable[str]) -> None:
    """Give what is left of each ``w`` that has something inside it another name.

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
    # The readers have no users now, and then neither has the parameter.
    program.abandon(readers)
    program.sweep()
