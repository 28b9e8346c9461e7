"""The choice among the matches of one rule that overlap, and the groups that a :class:`GroupRule` rewrites together."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import GroupRule, call_hook


@dataclass(frozen=True)
class Claim:
    """A match that meets all requirements, or several that are rewritten together, in graph order.

    ``benefit`` is larger for a claim that decides more candidates, or covers more nodes.
    """

    matches: tuple[Match, ...]
    benefit: int

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes that the claim owns: no other claim can have them."""
        return [node for m in self.matches for node in m.match.owned]

    @property
    def root(self) -> Node:
        """The root of the first match."""
        return self.matches[0].root


def group_claims(
    rule: GroupRule, claims: Sequence[Claim], order: Mapping[Node, int]
) -> tuple[list[Claim], list[tuple[Match, Reason]]]:
    """Join the claims of matches that ``rule`` rewrites together.

    Args:
        rule: the rule of all claims.
        claims: claims of one match each, in graph order.
        order: the position of every node.

    Returns:
        The joint claims, and the matches that cannot be part of one, with the reason.
    """
    groups: dict[tuple[Graph, tuple[str, ...], Hashable], list[Claim]] = defaultdict(list)
    failed: list[tuple[Match, Reason]] = []
    for claim in claims:
        (m,) = claim.matches
        # The inputs of a preserved module are those of its signature; a value from another such module is not one.
        group = groups[m.root.graph, m.program.preserved_modules_of(m.root), _group_key(rule, m)]
        first = group[0].root if group else m.root
        inputs = {name: node for name in m.captures if isinstance(node := m.match.bindings.get(name), Node)}
        late = [n for name, n in inputs.items() if order[n] > order[first] and name not in rule.shared_captures]
        late += [n for n in inputs.values() if n in m.program.mutated]
        if late:
            wanted = f"inputs that are computed before {first.name} and never mutated"
            failed.append((m, Reason(rule.name, "match", wanted, late[0].name)))
        else:
            group.append(claim)
    joint: list[Claim] = []
    size = rule.max_group_size or len(claims) or 1
    for part in (group[at : at + size] for group in groups.values() for at in range(0, len(group), size)):
        ms = tuple(claim.matches[0] for claim in part)
        if len(ms) > 1:
            joint.append(Claim(ms, sum(claim.benefit for claim in part)))
        else:
            failed.append((ms[0], Reason(rule.name, "match", "another match to rewrite together with", "none")))
    return joint, failed


def _group_key(rule: GroupRule, m: Match) -> Hashable:
    def key() -> Hashable:
        found = rule.group_key(m)
        hash(found)
        return found

    return call_hook(rule, "group_key", m.root, m.program, key)


def select_claims(claims: Sequence[Claim]) -> tuple[list[int], dict[int, int]]:
    """Choose claims that share no node: those with the largest benefit first, in graph order among equals.

    Returns:
        The indices of the chosen claims, in order, and for each other claim the index of a chosen one that owns one of
        its nodes.
    """
    owner: dict[Node, int] = {}
    lost: dict[int, int] = {}
    for index in sorted(range(len(claims)), key=lambda index: (-claims[index].benefit, index)):
        nodes = claims[index].nodes
        winner = next((owner[node] for node in nodes if node in owner), None)
        if winner is not None:
            lost[index] = winner
        else:
            owner.update(dict.fromkeys(nodes, index))
    return sorted(set(owner.values())), lost
