"""Which of several overlapping matches are applied: an exact choice over the conflict graph, the same every time."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Protocol

import networkx as nx

# A component this large comes from a pattern that overlaps itself all along a chain; the exact search is exponential.
_EXACT_LIMIT = 24


class Claim(Protocol):
    """A match that wants its nodes for itself."""

    @property
    def rank(self) -> int:
        """Position of its pass: the earlier pass has the first choice."""

    @property
    def weight(self) -> int:
        """What applying it is worth among claims of one rank."""

    @property
    def wants(self) -> Sequence[Hashable]:
        """The nodes it needs alone."""


def resolve(claims: Sequence[Claim]) -> tuple[list[int], dict[int, int]]:
    """Choose among ``claims``.

    Two claims conflict when they want a common node. Passes choose in order of rank; within one rank each connected
    component of the conflict graph gets the conflict-free set of the greatest total weight (the first in graph order
    among equals).

    Returns:
        The chosen claims' indices, in order, and for each other claim the index of a chosen one that took its nodes.
    """
    owners: dict[Hashable, list[int]] = defaultdict(list)
    for index, claim in enumerate(claims):
        for node in claim.wants:
            owners[node].append(index)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(claims)))
    for sharing in owners.values():
        graph.add_edges_from((a, b) for a in sharing for b in sharing if a < b)
    chosen: set[int] = set()
    lost: dict[int, int] = {}
    for rank in sorted({claim.rank for claim in claims}):
        candidates = [i for i, claim in enumerate(claims) if claim.rank == rank and i not in lost]
        for component in nx.connected_components(graph.subgraph(candidates)):
            for winner in _best(graph.subgraph(component), claims):
                chosen.add(winner)
                for loser in graph[winner]:
                    lost.setdefault(loser, winner)
    return sorted(chosen), {loser: winner for loser, winner in lost.items() if loser not in chosen}


def _best(component: "nx.Graph[int]", claims: Sequence[Claim]) -> list[int]:
    """A conflict-free set of greatest weight; by weight, then order, where the component is too large to search."""
    nodes = sorted(component)
    if len(nodes) == 1:
        return nodes
    if len(nodes) <= _EXACT_LIMIT:
        # The heaviest conflict-free set is the heaviest clique of the complement. Below the weight one bit a node, the
        # first node's the highest, breaks ties in graph order.
        complement, last = nx.Graph(), len(nodes) - 1
        weights = ((claims[n].weight << len(nodes)) + (1 << (last - i)) for i, n in enumerate(nodes))
        complement.add_nodes_from((n, {"weight": weight}) for n, weight in zip(nodes, weights, strict=True))
        complement.add_edges_from((a, b) for a in nodes for b in nodes if a < b and not component.has_edge(a, b))
        return sorted(nx.max_weight_clique(complement, weight="weight")[0])
    picked: list[int] = []
    taken: set[int] = set()
    for node in sorted(nodes, key=lambda n: (-claims[n].weight, n)):
        if node not in taken:
            picked.append(node)
            taken.update(component[node])
    return sorted(picked)
