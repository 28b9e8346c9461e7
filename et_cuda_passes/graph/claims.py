"""The places that rules claim in one stage, and which of them a joint rule takes together."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from et_cuda_passes.graph.asking import asked
from et_cuda_passes.graph.context import MatchContext
from et_cuda_passes.graph.ledger import Ledger
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import JointRule, Rule


@dataclass(frozen=True)
class Claim:
    """A match whose requires all hold, or several that a joint rule takes together, in graph order."""

    rule: Rule
    ms: tuple[MatchContext, ...]
    rank: int
    weight: int

    @property
    def wants(self) -> Sequence[Node]:
        """The nodes that the claim takes for itself."""
        return [node for m in self.ms for node in (*m.match.owned, *taken(self.rule, m))]

    @property
    def root(self) -> Node:
        """Where the first match stands."""
        return self.ms[0].root


def taken(rule: Rule, m: MatchContext) -> Sequence[Node]:
    """The nodes outside of match ``m`` that ``rule`` needs alone."""
    return asked(rule, "takes", m.root, m.program, lambda: rule.takes(m))


def joined(rule: JointRule, claims: Sequence[Claim], order: Mapping[Node, int], ledger: Ledger) -> list[Claim]:
    """The claims of a joint rule, those taken together as one; a match that nothing goes with is missed."""
    most = rule.most or len(claims) or 1
    groups: dict[tuple[Graph, tuple[str, ...], Hashable], list[Claim]] = defaultdict(list)
    found: list[Claim] = []
    for claim in claims:
        (m,) = claim.ms
        # A preserved module is given what its signature says, and nothing that is made in another.
        group = groups[m.root.graph, m.program.preserving(m.root), _key(rule, m)]
        first = group[0].root if group else m.root
        inputs = {name: node for name in m.captures if isinstance(node := m.match.bindings.get(name), Node)}
        late = [n for name, n in inputs.items() if order[n] > order[first] and name not in rule.common]
        late += [n for n in inputs.values() if n in m.program.written]
        if late:
            wanted = "inputs that stand where the first of them is computed, and that nothing writes in place"
            ledger.unmet(m.match, [Reason(rule.name, "match", wanted, late[0].name)])
        else:
            group.append(claim)
    parts = (group[at : at + most] for group in groups.values() for at in range(0, len(group), most))
    for group in parts:
        if len(group) > 1:
            ms = tuple(claim.ms[0] for claim in group)
            found.append(Claim(rule, ms, group[0].rank, sum(claim.weight for claim in group)))
        for claim in group if len(group) == 1 else ():
            ledger.unmet(claim.ms[0].match, [Reason(rule.name, "match", rule.partner, "none")])
    return found


def _key(rule: JointRule, m: MatchContext) -> Hashable:
    def key() -> Hashable:
        found = rule.key(m)
        hash(found)
        return found

    return asked(rule, "key", m.root, m.program, key)
