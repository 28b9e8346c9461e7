"""A copy of a program's graph that can be changed, and the nodes of one copy found again in another."""

import copy
from collections.abc import Iterable

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node


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


def counterparts(nodes: Iterable[Node], graph: Graph) -> set[Node]:
    """What ``nodes`` of an earlier copy are in ``graph``, by name and target; those that are gone are left out."""
    here = {(node.name, node.target): node for node in graph.nodes}
    return {here[key] for node in nodes if (key := (node.name, node.target)) in here}
