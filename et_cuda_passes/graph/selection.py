"""The places that rules claim in one stage, and which of them are applied, the same every time."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch.fx import Graph, Node

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.outcomes import OutcomeTracker
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import GroupRule, Rule, call_hook

# A component this large comes from a pattern that overlaps itself all along a chain; the exact search is exponential.
_EXACT_LIMIT = 24


@dataclass(frozen=True)
class Claim:
    """A match whose requires all hold, or several that a joint rule takes together, in graph order."""

    rule: Rule
    matches: tuple[Match, ...]
    priority: int
    benefit: int

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes that the claim takes for itself."""
        return [node for m in self.matches for node in (*m.match.owned, *taken(self.rule, m))]

    @property
    def root(self) -> Node:
        """Where the first match stands."""
        return self.matches[0].root


def taken(rule: Rule, m: Match) -> Sequence[Node]:
    """The nodes outside of match ``m`` that ``rule`` needs alone."""
    return call_hook(rule, "takes", m.root, m.program, lambda: rule.takes(m))


def group_matches(
    rule: GroupRule, claims: Sequence[Claim], order: Mapping[Node, int], tracker: OutcomeTracker
) -> list[Claim]:
    """The claims of a joint rule, those taken together as one; a match that nothing goes with is missed."""
    most = rule.max_group_size or len(claims) or 1
    groups: dict[tuple[Graph, tuple[str, ...], Hashable], list[Claim]] = defaultdict(list)
    found: list[Claim] = []
    for claim in claims:
        (m,) = claim.matches
        # A preserved module is given what its signature says, and nothing that is made in another.
        group = groups[m.root.graph, m.program.preserved_modules_of(m.root), _key(rule, m)]
        first = group[0].root if group else m.root
        inputs = {name: node for name in m.captures if isinstance(node := m.match.bindings.get(name), Node)}
        late = [n for name, n in inputs.items() if order[n] > order[first] and name not in rule.shared_captures]
        late += [n for n in inputs.values() if n in m.program.mutated]
        if late:
            wanted = "inputs that stand where the first of them is computed, and that nothing writes in place"
            tracker.add_failures(m.match, [Reason(rule.name, "match", wanted, late[0].name)])
        else:
            group.append(claim)
    parts = (group[at : at + most] for group in groups.values() for at in range(0, len(group), most))
    for group in parts:
        if len(group) > 1:
            ms = tuple(claim.matches[0] for claim in group)
            found.append(Claim(rule, ms, group[0].priority, sum(claim.benefit for claim in group)))
        for claim in group if len(group) == 1 else ():
            tracker.add_failures(claim.matches[0].match, [Reason(rule.name, "match", rule.partner, "none")])
    return found


def _key(rule: GroupRule, m: Match) -> Hashable:
    def key() -> Hashable:
        found = rule.group_key(m)
        hash(found)
        return found

    return call_hook(rule, "group_key", m.root, m.program, key)


def select_matches(claims: Sequence[Claim]) -> tuple[list[int], dict[int, int]]:
    """Choose among ``claims``.

    Two claims conflict when they want a common node. Passes choose in order of rank; within one rank each connected
    component of the conflict graph gets the conflict-free set of the greatest total weight (the first in graph order
    among equals).

    Returns:
        The chosen claims' indices, in order, and for each other claim the index of a chosen one that took its nodes.
    """
    owners: dict[Hashable, list[int]] = defaultdict(list)
    for index, claim in enumerate(claims):
        for node in claim.nodes:
            owners[node].append(index)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(claims)))
    for sharing in owners.values():
        graph.add_edges_from((a, b) for a in sharing for b in sharing if a < b)
    chosen: set[int] = set()
    lost: dict[int, int] = {}
    for rank in sorted({claim.priority for claim in claims}):
        candidates = [i for i, claim in enumerate(claims) if claim.priority == rank and i not in lost]
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
        weights = ((claims[n].benefit << len(nodes)) + (1 << (last - i)) for i, n in enumerate(nodes))
        complement.add_nodes_from((n, {"weight": weight}) for n, weight in zip(nodes, weights, strict=True))
        complement.add_edges_from((a, b) for a in nodes for b in nodes if a < b and not component.has_edge(a, b))
        return sorted(nx.max_weight_clique(complement, weight="weight")[0])
    picked: list[int] = []
    taken: set[int] = set()
    for node in sorted(nodes, key=lambda n: (-claims[n].benefit, n)):
        if node not in taken:
            picked.append(node)
            taken.update(component[node])
    return sorted(picked)
