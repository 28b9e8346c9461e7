"""A copy of a program's graph that can be changed, and the nodes of one copy found again in another."""

import copy
from collections.abc import Iterable

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from et_cuda_passes.graph.branches import Branches
from et_cuda_passes.graph.ops import Target

Places = set[tuple[str, Target]]
"""Where nodes stand, and what they call."""


def copied(exported: ExportedProgram) -> tuple[torch.nn.Module, Graph]:
    """The submodules that control flow calls, and the graph; tensors stay shared, only structure is copied."""
    tensors = {id(tensor): tensor for tensor in (*exported.state_dict.values(), *exported.constants.values())}
    root = torch.nn.Module()
    for name, child in exported.graph_module.named_children():
        root.add_module(name, copy.deepcopy(child, tensors))
    graph = Graph()
    ours: dict[Node, Node] = {}
    graph.output(graph.graph_copy(exported.graph, ours)).meta.update(exported.graph.output_node().meta)
    for old, new in ours.items():
        # The copy renames what looks like a Python builtin, `input` say; the signature goes by the old names.
        new.name = old.name
    return root, graph


def places(nodes: Iterable[Node], branches: Branches) -> Places:
    """By what ``nodes`` can be found again in another copy of their program: where they stand and what they call."""
    return {(branches.path(node), node.target) for node in nodes}


def counterparts(wanted: Places, branches: Branches) -> set[Node]:
    """The nodes at the places ``wanted`` in another copy; those that are gone are left out."""
    return {node for node in branches.nodes() if (branches.path(node), node.target) in wanted} if wanted else set()
