"""One outcome per candidate: undecided until a rule keeps or rewrites it, and missed if none does."""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from et_cuda_passes.graph.matcher import MatchResult
from et_cuda_passes.graph.operators import op_name, op_of
from et_cuda_passes.graph.report import Outcome, Reason, Report, Status, user_source_line


@dataclass(frozen=True)
class Candidate:
    """An operator that reads a dequantized weight.

    Attributes:
        node: the operator.
        weights: the dequantize nodes that it reads.
        fqn: the FQNs of their weights.
        name: the name of the operator in a report: its path, for a node in control flow; empty for the node's name.
        unreachable_reason: why no rule can act on the operator where it stands; empty for most.
    """

    node: Node
    weights: tuple[Node, ...]
    fqn: str
    name: str = ""
    unreachable_reason: str = ""

    @property
    def op(self) -> str:
        """The operator's short name."""
        return op_name(self.node.target) if self.node.op == "call_function" else self.node.op


class OutcomeTracker:
    """Records what rules do to the candidates of one rewrite, and writes the report in the end.

    A match decides the candidates that it owns, or the readers of the weight that it replaces.
    """

    def __init__(self, candidates: Iterable[Candidate], group_rules: Container[str] = ()) -> None:
        """``group_rules`` are the names of the rules whose reasons are left out where another rule gives reasons."""
        self._group_rules = group_rules
        self._candidates: dict[Node, Candidate] = {}
        self._outcomes: dict[Node, Outcome] = {}
        self._misses: dict[Node, list[Reason]] = defaultdict(list)
        self._readers: dict[Node, list[Node]] = defaultdict(list)
        self._replaced: dict[Node, set[Node]] = defaultdict(set)
        # For each root that a rule rewrote, and each node that a rule built: the candidates that it stands for.
        self._origins: dict[Node, tuple[Node, ...]] = {}
        self._moved: dict[Node, Node] = {}
        self._applied: dict[str, int] = {}
        self._rejected: dict[str, list[str]] = {}
        self._conflicts: list[str] = []
        self._enroll(candidates)

    def _enroll(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if candidate.node in self._candidates:
                continue
            self._candidates[candidate.node] = candidate
            for weight in candidate.weights:
                self._readers[weight].append(candidate.node)

    # Questions -------------------------------------------------------------------------------------------------------

    def is_undecided(self, node: Node) -> bool:
        """Whether ``node`` is a candidate without an outcome."""
        return node in self._candidates and node not in self._outcomes

    def _decided_by(self, match: MatchResult) -> list[Node]:
        """The undecided candidates that ``match`` decides."""
        owned = [node for node in match.owned if self.is_undecided(node)]
        return owned or [node for node in self._readers.get(match.root, ()) if self.is_undecided(node)]

    def all_readers_decided(self, match: MatchResult) -> bool:
        """Whether ``match`` replaces a weight whose readers all have an outcome."""
        readers = self._readers.get(match.root, ())
        return bool(readers) and not any(self.is_undecided(node) for node in readers)

    def benefit(self, match: MatchResult) -> int:
        """A number to compare overlapping matches by: first the candidates that a match decides, then its nodes."""
        return len(self._decided_by(match)) * 1000 + len(match.owned)

    # What a rule found or did ----------------------------------------------------------------------------------------

    def add_miss(self, node: Node, reason: Reason) -> None:
        """Record why a rule does not match at candidate ``node``."""
        self._misses[node].append(reason)

    def add_failures(self, match: MatchResult, reasons: Sequence[Reason]) -> None:
        """Record requirements that do not hold: for the candidates that ``match`` decides, or as a rejected match."""
        for node in self._decided_by(match):
            self._misses[node].extend(reasons)
        if match.root not in self._readers and self._candidates.keys().isdisjoint(match.owned):
            for reason in reasons:
                if reason.rule is not None:
                    self._rejected.setdefault(reason.rule, []).append(f"{match.root.name}: {reason}")

    def add_conflict(self, rule: str, match: MatchResult, winner: Node) -> None:
        """Record that a match of ``rule`` lost nodes to another match of it, whose root is ``winner``."""
        self._conflicts.append(f"{rule} at {match.root.name} gave way to {rule} at {winner.name}")
        for node in self._decided_by(match):
            self._misses[node].append(Reason(rule, "conflict", "its nodes for itself", f"{rule} at {winner.name}"))

    def add_kept_conflict(self, rule: str, match: MatchResult, kept: Node) -> None:
        """Record that a match of ``rule`` contains ``kept``, which an earlier rule keeps as it is."""
        for node in self._decided_by(match):
            reason = Reason(rule, "conflict", "nodes that no earlier rule keeps as they are", kept.name)
            self._misses[node].append(reason)

    def set_kept(self, rule: str, match: MatchResult, note: str, summary: str, explanation: str) -> None:
        """Record that ``rule`` keeps ``match`` as it is."""
        self._write("kept", rule, match, note, summary, explanation)

    def set_rewritten(self, rule: str, match: MatchResult, note: str, summary: str, explanation: str) -> None:
        """Record that ``rule`` rewrites ``match``.

        Where the match owns nodes that earlier rules built, the outcomes that these rules wrote get the summary and
        the explanation too.
        """
        earlier = [origin for node in match.owned for origin in self._origins.get(node, ())]
        self._origins[match.root] = tuple(dict.fromkeys([*earlier, *self._decided_by(match)]))
        for node in dict.fromkeys(earlier):
            if node in self._outcomes:
                self._append_summary(node, summary, explanation)
        self._write("rewritten", rule, match, note, summary, explanation)

    def _append_summary(self, node: Node, summary: str, explanation: str) -> None:
        """Add what a later rule says to the outcome of ``node``, once."""
        outcome = self._outcomes[node]
        if summary and not f", {outcome.detail}".endswith(f", {summary}"):
            outcome = replace(outcome, detail=f"{outcome.detail}, {summary}" if outcome.detail else summary)
        self._outcomes[node] = replace(outcome, explanation=explanation or outcome.explanation)

    def _write(self, status: Status, rule: str, match: MatchResult, note: str, summary: str, explanation: str) -> None:
        self._applied[rule] = self._applied.get(rule, 0) + 1
        reasons = [Reason(rule, "note", "", note)] if note else []
        for node in self._decided_by(match):
            # A reader of several weights has its outcome when the last of them is replaced.
            self._replaced[node].add(match.root)
            if node in match.owned or self._replaced[node].issuperset(self._candidates[node].weights):
                self._outcomes[node] = self._outcome(node, status, rule, reasons, summary, explanation)

    def _outcome(
        self,
        node: Node,
        status: Status,
        rule: str | None,
        reasons: list[Reason],
        summary: str = "",
        explanation: str = "",
    ) -> Outcome:
        candidate = self._candidates[node]
        name, source = candidate.name or node.name, user_source_line(node)
        return Outcome(name, candidate.op, candidate.fqn, rule, status, reasons, source, summary, explanation)

    # Changes of the graph --------------------------------------------------------------------------------------------

    def track_created(self, created: Mapping[Node, Sequence[Node]]) -> None:
        """Record the nodes that a rewrite built, each with the roots that it stands for.

        Where one of them is the operator of a candidate again, and reads the same dequantized weight, the candidate has
        moved there and becomes undecided.
        """
        for node, roots in created.items():
            self._origins[node] = tuple(dict.fromkeys(origin for root in roots for origin in self._origins[root]))
            for origin in self._origins[node]:
                same = op_of(node) is op_of(origin)
                if same and not set(node.all_input_nodes).isdisjoint(self._candidates[origin].weights):
                    self._moved[origin] = node

    def apply_moves(self) -> None:
        """Give the candidates that have moved their new nodes; called when a rule has rewritten all its matches."""
        if not self._moved:
            return
        for node in self._moved:
            self._outcomes.pop(node, None)
        moved = [
            replace(candidate, node=self._moved.get(node, node), name=candidate.name or node.name)
            for node, candidate in self._candidates.items()
        ]
        for table in (self._misses, self._replaced):
            for old, new in self._moved.items():
                if old in table:
                    table[new] = table.pop(old)  # type: ignore[assignment]
        self._moved.clear()
        self._candidates.clear()
        self._readers.clear()
        self._enroll(moved)

    def remap_after_pass(self, candidates: Iterable[Candidate], name: str) -> None:
        """Find the candidates again in the graph that pass ``name`` left, whose candidates are ``candidates``.

        A candidate that no longer reads a dequantized weight counts as rewritten by the pass.
        """
        now = list(candidates)
        here = {candidate.node for candidate in now}
        copies: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
        for candidate in reversed(now):
            if candidate.node not in self._candidates:
                copies[candidate.fqn, candidate.op].append(candidate)
        known = list(self._candidates.values())
        self._candidates.clear()
        for candidate in known:
            node, places = candidate.node, copies[candidate.fqn, candidate.op]
            decided = node in self._outcomes
            if node not in here and places and not (decided and self._outcomes[node].status == "rewritten"):
                # The same operator in a copy of the graph: the tables keep what they hold of it.
                candidate = places.pop()
                for table in (self._outcomes, self._misses):
                    if node in table:
                        table[candidate.node] = table.pop(node)  # type: ignore[assignment]
            self._candidates[candidate.node] = candidate
            if node not in here and candidate.node is node and not decided:
                note = Reason(name, "note", "", f"no longer reads a dequantized weight after pass {name}")
                self._outcomes[node] = self._outcome(node, "rewritten", name, [note])
                self._applied[name] = self._applied.get(name, 0) + 1
        known = list(self._candidates.values())
        self._candidates.clear()
        self._readers.clear()
        self._enroll(known)
        self._enroll(now)

    # The report ------------------------------------------------------------------------------------------------------

    def created_candidates(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The ``candidates`` that rules created: they read a quantized weight, and have no outcome of their own."""
        return [each for each in candidates if each.node not in self._candidates and each.weights]

    def report(self, target: str, passes: Sequence[str], bytes_before: int = 0, bytes_after: int = 0) -> Report:
        """The report on all candidates, in graph order, without warnings; an undecided candidate is missed."""
        return Report(
            target,
            list(passes),
            [self._outcomes.get(node) or self._missed(node, target) for node in self._candidates],
            conflicts=self._conflicts,
            applied=self._applied,
            rejected=self._rejected,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
        )

    def _missed(self, node: Node, target: str) -> Outcome:
        candidate = self._candidates[node]
        reasons = list(dict.fromkeys(self._misses[node]))
        reasons = [reason for reason in reasons if reason.rule not in self._group_rules] or reasons
        if candidate.unreachable_reason:
            reasons = [Reason(None, "none", "", candidate.unreachable_reason)]
        elif not reasons:
            found = f"no pass for target {target} rewrites {candidate.op}"
            reasons = [Reason(None, "none", "", found, "add a rule for it, or leave the weight unquantized")]
        return self._outcome(node, "missed", None, reasons)
