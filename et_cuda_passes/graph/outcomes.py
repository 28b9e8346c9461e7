"""Who did what to which candidate: open until one outcome is written, never two, never none."""

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

    ``weights`` are the dequantize nodes that it reads, ``fqn`` their weights' names. ``name`` is the node's in reports:
    its own, or its path in control flow. ``unreachable_reason`` says why no rule can act on it where it stands; empty
    for most.
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
    """The candidates of one run and their outcomes, written into a report in graph order by :meth:`finalize`."""

    def __init__(self, report: Report, candidates: Iterable[Candidate], quiet_rules: Container[str] = ()) -> None:
        """``quiet_rules`` are the rules whose reasons for a miss are left out."""
        self.report = report
        self._quiet_rules = quiet_rules
        self._candidates: dict[Node, Candidate] = {}
        self._outcomes: dict[Node, Outcome] = {}
        self._misses: dict[Node, list[Reason]] = defaultdict(list)
        self._readers: dict[Node, list[Node]] = defaultdict(list)
        self._replaced: dict[Node, set[Node]] = defaultdict(set)
        # The candidates that stand behind a root that a rule rewrote, and behind each node that it built.
        self._origins: dict[Node, tuple[Node, ...]] = {}
        self._moved: dict[Node, Node] = {}
        self._enroll(candidates)

    def _enroll(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if candidate.node in self._candidates:
                continue
            self._candidates[candidate.node] = candidate
            for weight in candidate.weights:
                self._readers[weight].append(candidate.node)

    def is_undecided(self, node: Node) -> bool:
        """Whether ``node`` is a candidate without an outcome."""
        return node in self._candidates and node not in self._outcomes

    def _decided_by(self, match: MatchResult) -> list[Node]:
        """The open candidates that ``match`` decides: those it owns, or the readers of a weight that it replaces."""
        owned = [node for node in match.owned if self.is_undecided(node)]
        return owned or [node for node in self._readers.get(match.root, ()) if self.is_undecided(node)]

    def all_readers_decided(self, match: MatchResult) -> bool:
        """Whether ``match`` replaces a weight whose every reader already has an outcome."""
        readers = self._readers.get(match.root, ())
        return bool(readers) and not any(self.is_undecided(node) for node in readers)

    def benefit(self, match: MatchResult) -> int:
        """Weight in the conflict graph: candidates covered first, then nodes."""
        return len(self._decided_by(match)) * 1000 + len(match.owned)

    def add_miss(self, node: Node, reason: Reason) -> None:
        """Note why a rule did not take ``node``."""
        if reason.rule not in self._quiet_rules:
            self._misses[node].append(reason)

    def add_failures(self, match: MatchResult, reasons: Sequence[Reason]) -> None:
        """Note the requires that did not hold for every candidate that the match would have decided."""
        for node in self._decided_by(match):
            for reason in reasons:
                self.add_miss(node, reason)
        if match.root not in self._readers and self._candidates.keys().isdisjoint(match.owned):
            for reason in reasons:
                if reason.rule is not None and reason.rule not in self._quiet_rules:
                    self.report.rejected.setdefault(reason.rule, []).append(f"{match.root.name}: {reason}")

    def add_conflict(self, rule: str, match: MatchResult, winner: str, at: Node) -> None:
        """Note a match whose nodes went to another."""
        self.report.conflicts.append(f"{rule} at {match.root.name} gave way to {winner} at {at.name}")
        for node in self._decided_by(match):
            self._misses[node].append(Reason(rule, "conflict", "its nodes for itself", f"{winner} at {at.name}"))

    def set_kept(self, rule: str, match: MatchResult, note: str, *details: str) -> None:
        """A rule keeps its match as it is; ``details`` are an outcome's detail and explanation."""
        self._write("kept", rule, match, note, *details)

    def set_rewritten(self, rule: str, match: MatchResult, taken: Sequence[Node], note: str, *details: str) -> None:
        """A rule rewrites its match, and ``taken`` with it; ``details`` as for :meth:`set_kept`.

        Where earlier rules made these nodes of other candidates, the outcomes of those say it as well.
        """
        earlier = [origin for node in (*match.owned, *taken) for origin in self._origins.get(node, ())]
        self._origins[match.root] = tuple(dict.fromkeys([*earlier, *self._decided_by(match)]))
        for node in dict.fromkeys(earlier):
            if node in self._outcomes:
                self._append_summary(node, *details)
        self._write("rewritten", rule, match, note, *details)

    def track_created(self, created: Mapping[Node, Sequence[Node]]) -> None:
        """A rewrite built ``created``, each node for the roots given with it, whose candidates it comes from.

        A candidate whose operator, of one of its weights, is among them has moved there, and is open again.
        """
        for node, roots in created.items():
            self._origins[node] = tuple(dict.fromkeys(origin for root in roots for origin in self._origins[root]))
            for origin in self._origins[node]:
                same = op_of(node) is op_of(origin)
                if same and not set(node.all_input_nodes).isdisjoint(self._candidates[origin].weights):
                    self._moved[origin] = node

    def apply_moves(self) -> None:
        """Let candidates stand where the rewrites of a stage have moved them."""
        if not self._moved:
            return
        for node in self._moved:
            self._outcomes.pop(node, None)
        known = [
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
        self._enroll(known)

    def _append_summary(self, node: Node, detail: str = "", explanation: str = "") -> None:
        """Say of a candidate with an outcome what a later rule made of it, once."""
        outcome = self._outcomes[node]
        if detail and not f", {outcome.detail}".endswith(f", {detail}"):
            outcome = replace(outcome, detail=f"{outcome.detail}, {detail}" if outcome.detail else detail)
        self._outcomes[node] = replace(outcome, explanation=explanation or outcome.explanation)

    def _write(self, status: Status, rule: str, match: MatchResult, note: str, *details: str) -> None:
        self.report.applied[rule] = self.report.applied.get(rule, 0) + 1
        reasons = [Reason(rule, "note", "", note)] if note else []
        for node in self._decided_by(match):
            # A match that replaces one weight of several settles its reader when it is the last of them.
            self._replaced[node].add(match.root)
            if node in match.owned or self._replaced[node].issuperset(self._candidates[node].weights):
                self._outcomes[node] = self._outcome(node, status, rule, reasons, *details)

    def _outcome(self, node: Node, status: Status, rule: str | None, reasons: list[Reason], *details: str) -> Outcome:
        candidate = self._candidates[node]
        name = candidate.name or node.name
        return Outcome(name, candidate.op, candidate.fqn, rule, status, reasons, user_source_line(node), *details)

    def remap_after_pass(self, candidates: Iterable[Candidate], name: str) -> None:
        """After pass ``name`` changed the graph: each candidate's new node, and what the pass itself took care of."""
        now = list(candidates)
        here = {candidate.node for candidate in now}
        moved: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
        for candidate in reversed(now):
            if candidate.node not in self._candidates:
                moved[candidate.fqn, candidate.op].append(candidate)
        known = list(self._candidates.values())
        self._candidates.clear()
        for candidate in known:
            node, places = candidate.node, moved[candidate.fqn, candidate.op]
            settled = node in self._outcomes
            if node not in here and places and not (settled and self._outcomes[node].status == "rewritten"):
                # The same operator in a copied graph: what is known of it stays known.
                candidate = places.pop()
                for table in (self._outcomes, self._misses):
                    if node in table:
                        table[candidate.node] = table.pop(node)  # type: ignore[assignment]
            self._candidates[candidate.node] = candidate
            if node not in here and candidate.node is node and not settled:
                note = Reason(name, "note", "", f"no longer reads a dequantized weight after pass {name}")
                self._outcomes[node] = self._outcome(node, "rewritten", name, [note])
                self.report.applied[name] = self.report.applied.get(name, 0) + 1
        known = list(self._candidates.values())
        self._candidates.clear()
        self._readers.clear()
        self._enroll(known)
        self._enroll(now)

    def warn_unrewritten(self, candidates: Iterable[Candidate]) -> None:
        """Warn of what rules made that reads a dequantized weight still, of those there are in the end."""
        for candidate in candidates:
            if candidate.node not in self._candidates and candidate.weights:
                self.report.warnings.append(
                    f"{candidate.op} {candidate.name or candidate.node.name} still reads the quantized weight "
                    f"{candidate.fqn}: a rule built it, and no later pass took it"
                )

    def finalize(self) -> None:
        """Write the outcomes; what nobody took is missed, with every reason that was given."""
        for node, candidate in self._candidates.items():
            if node not in self._outcomes:
                reasons = list(dict.fromkeys(self._misses[node]))
                if candidate.unreachable_reason:
                    reasons = [Reason(None, "none", "", candidate.unreachable_reason)]
                elif not reasons:
                    found = f"no pass for target {self.report.target} takes {candidate.op}"
                    reasons = [
                        Reason(None, "none", "", found, "add a rule that takes it, or leave the weight unquantized")
                    ]
                self._outcomes[node] = self._outcome(node, "missed", None, reasons)
            self.report.outcomes.append(self._outcomes[node])
