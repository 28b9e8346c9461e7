"""One outcome per candidate: undecided until a rule keeps or rewrites it, and missed if none does."""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from et_cuda_passes.graph.drawing import DrawingRecorder
from et_cuda_passes.graph.matcher import MatchResult
from et_cuda_passes.graph.names import without_numbers
from et_cuda_passes.graph.operators import Target, op_name, op_of
from et_cuda_passes.graph.report import Outcome, Reason, Report, Status, user_source_line

_SHOWN = 3
"""The number of places with the same reason that a report names."""


@dataclass(frozen=True)
class Candidate:
    """An operator that reads a dequantized weight.

    Attributes:
        node: the operator.
        weights: the dequantize nodes that it reads.
        fqn: the FQNs of their weights.
        name: the name of the operator in a report: its path, for a node in control flow; empty for the node's name.
        unreachable_reason: why no rule can act on the operator where it stands; empty for most.
        scheme: how the weights are quantized.
        shape: of the weight; of the first of several.
        weight_bytes: bytes of the weights, with scales and zero points.
    """

    node: Node
    weights: tuple[Node, ...]
    fqn: str
    name: str = ""
    unreachable_reason: str = ""
    scheme: str = ""
    shape: tuple[int, ...] = ()
    weight_bytes: int = 0

    @property
    def op(self) -> str:
        """The operator's short name."""
        return op_name(self.node.target) if self.node.op == "call_function" else self.node.op


@dataclass(frozen=True)
class Texts:
    """The texts of a rule about a match: its summary, and the fields of its notes."""

    summary: str = ""
    note: str = ""
    explanation: str = ""
    kernel: str = ""
    layout: str = ""


class OutcomeTracker:
    """Records what rules do to the candidates of one rewrite, and writes the report in the end.

    A match decides the candidates that it owns, or the readers of the weight that it replaces.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate],
        group_rules: Container[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Start without outcomes.

        Args:
            candidates: in graph order.
            group_rules: the names of the rules whose reasons are left out where another rule gives reasons.
            progress: called after each outcome with the number of outcomes and of candidates.
        """
        self._group_rules = group_rules
        self._progress = progress
        self._candidates: dict[Node, Candidate] = {}
        self._outcomes: dict[Node, Outcome] = {}
        self._misses: dict[Node, list[Reason]] = defaultdict(list)
        self._readers: dict[Node, list[Node]] = defaultdict(list)
        self._replaced: dict[Node, set[Node]] = defaultdict(set)
        # For each root that a rule rewrote, and each node that a rule built: the candidates that it stands for.
        self._origins: dict[Node, tuple[Node, ...]] = {}
        # For each candidate that a rule built, or that reads a weight that a rule built: the rule.
        self._rebuilt_by: dict[Node, str] = {}
        self._applied: dict[str, int] = {}
        # For each rule: similar reasons share an entry, which has the first of them and all places.
        self._rejected: dict[str, dict[str, tuple[Reason, list[str]]]] = defaultdict(dict)
        self._conflicts: list[str] = []
        self._bytes_after: dict[Node, int] = {}
        self.drawings = DrawingRecorder()
        """The operators before and after each rewrite."""
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

    def undecided(self, ops: Container[Target]) -> list[Node]:
        """The candidates without an outcome that call one of ``ops``, in graph order."""
        return [node for node in self._candidates if node not in self._outcomes and op_of(node) in ops]

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

    def unmet(self, match: MatchResult) -> tuple[Reason, ...]:
        """The unmet requirements of an earlier rule whose pattern fits at the first candidate that ``match`` decides.

        If there are several such rules, the reasons are those of the rule with the fewest, or of the first of these.
        """
        by_rule: dict[str | None, list[Reason]] = defaultdict(list)
        for node in self._decided_by(match)[:1]:
            for reason in dict.fromkeys(self._misses.get(node, ())):
                if reason.stage in ("metadata", "values"):
                    by_rule[reason.rule].append(reason)
        fewest: list[Reason] = min(by_rule.values(), key=lambda reasons: len(reasons), default=[])
        return tuple(fewest)

    # What a rule found or did ----------------------------------------------------------------------------------------

    def add_miss(self, node: Node, reason: Reason) -> None:
        """Record why a rule does not match at candidate ``node``."""
        self._misses[node].append(reason)

    def add_failures(self, match: MatchResult, reasons: Sequence[Reason]) -> None:
        """Record why a rule does not act on ``match``: for the candidates that it decides, or as rejected."""
        nodes = self._decided_by(match)
        for node in nodes:
            self._misses[node].extend(reasons)
        if not nodes:
            for reason in reasons:
                self.add_rejected(match.root.name, reason)

    def add_rejected(self, place: str, reason: Reason) -> None:
        """Record why a rule does not act at ``place``, where no candidate is undecided."""
        if reason.rule is not None and reason.stage != "note":
            similar = self._rejected[reason.rule].setdefault(without_numbers(str(reason)), (reason, []))
            similar[1].append(place)

    def add_conflict(self, rule: str, match: MatchResult, winner: Node) -> None:
        """Record that a match of ``rule`` lost nodes to another match of it, whose root is ``winner``."""
        self._conflicts.append(f"{rule} at {match.root.name} gave way to {rule} at {winner.name}")
        for node in self._decided_by(match):
            self._misses[node].append(Reason(rule, "conflict", "its nodes for itself", f"{rule} at {winner.name}"))

    def add_kept_conflict(self, rule: str, match: MatchResult, kept: Node) -> None:
        """Record that a match of ``rule`` contains ``kept``, which an earlier rule keeps as it is."""
        wanted = "nodes that no earlier rule keeps as they are"
        self.add_failures(match, [Reason(rule, "conflict", wanted, kept.name)])

    def add_decided(self, rule: str, match: MatchResult) -> None:
        """Record that a match of ``rule`` replaces a weight whose readers all have an outcome."""
        readers = self._readers[match.root]
        found = ", ".join(f"{self._outcomes[node].rule} at {self._outcomes[node].node}" for node in readers)
        self.add_failures(match, [Reason(rule, "conflict", "a weight that no earlier rule replaced or kept", found)])

    def set_kept(self, rule: str, match: MatchResult, texts: Texts) -> None:
        """Record that ``rule`` keeps ``match`` as it is."""
        self._write("kept", rule, match, texts)

    def set_rewritten(self, rule: str, match: MatchResult, texts: Texts) -> None:
        """Record that ``rule`` rewrites ``match``.

        Where the match owns nodes that earlier rules built, the outcomes that these rules wrote get the texts too,
        except the note.
        """
        earlier = [origin for node in match.owned for origin in self._origins.get(node, ())]
        self._origins[match.root] = tuple(dict.fromkeys([*earlier, *self._decided_by(match)]))
        for node in dict.fromkeys(earlier):
            if node in self._outcomes:
                self._append_summary(node, texts)
        self._write("rewritten", rule, match, texts)

    def _append_summary(self, node: Node, texts: Texts) -> None:
        """Add what a later rule says to the outcome of ``node``, once."""
        outcome, summary = self._outcomes[node], texts.summary
        if summary and not f", {outcome.detail}".endswith(f", {summary}"):
            outcome = replace(outcome, detail=f"{outcome.detail}, {summary}" if outcome.detail else summary)
        self._outcomes[node] = replace(
            outcome,
            explanation=texts.explanation or outcome.explanation,
            kernel=texts.kernel or outcome.kernel,
            layout=texts.layout or outcome.layout,
        )

    def _write(self, status: Status, rule: str, match: MatchResult, texts: Texts) -> None:
        self._applied[rule] = self._applied.get(rule, 0) + 1
        reasons = [Reason(rule, "note", "", texts.note)] if texts.note else []
        for node in self._decided_by(match):
            # A reader of several weights has its outcome when the last of them is replaced.
            self._replaced[node].add(match.root)
            if node in match.owned or self._replaced[node].issuperset(self._candidates[node].weights):
                self._outcomes[node] = self._outcome(node, status, rule, reasons, texts)
        if self._progress is not None:
            self._progress(len(self._outcomes), len(self._candidates))

    def _outcome(
        self, node: Node, status: Status, rule: str | None, reasons: list[Reason], texts: Texts | None = None
    ) -> Outcome:
        candidate, texts = self._candidates[node], texts or Texts()
        return Outcome(
            node=candidate.name or node.name,
            op=candidate.op,
            fqn=candidate.fqn,
            rule=rule,
            status=status,
            reasons=reasons,
            source=user_source_line(node),
            detail=texts.summary,
            explanation=texts.explanation,
            scheme=candidate.scheme,
            shape=list(candidate.shape),
            kernel=texts.kernel,
            layout=texts.layout,
            bytes_before=candidate.weight_bytes,
            bytes_after=candidate.weight_bytes,
        )

    def stand_ins(self) -> Iterator[tuple[Node, tuple[Candidate, ...]]]:
        """Each node that may read the weight of a candidate now, with the candidates that it stands for.

        Nodes that are no longer in the graph are among them.
        """
        for node, candidate in self._candidates.items():
            yield node, (candidate,)
        for node, origins in self._origins.items():
            if node not in self._candidates:
                yield node, tuple(self._candidates[each] for each in origins if each in self._candidates)

    def set_bytes_after(self, sizes: Mapping[Node, int]) -> None:
        """Record the bytes of the packed weights, by candidate."""
        self._bytes_after.update(sizes)

    # Changes of the graph --------------------------------------------------------------------------------------------

    def track_created(self, created: Mapping[Node, Sequence[Node]]) -> None:
        """Record the nodes that a rewrite built, each with the roots that it stands for."""
        for node, roots in created.items():
            self._origins[node] = tuple(dict.fromkeys(origin for root in roots for origin in self._origins[root]))

    def follow_created(self, rule: str, candidates: Iterable[Candidate]) -> None:
        """Make the ``candidates`` undecided that ``rule`` built, or whose weight it built.

        A candidate that the rule rewrote moves to the node that stands for it and still reads a quantized weight. A
        node that stands for no candidate becomes a new one.
        """
        moved: dict[Node, Candidate] = {}
        added: list[Candidate] = []
        for found in candidates:
            origins = (found.node, *self._origins.get(found.node, ()))
            origin = next((each for each in origins if each in self._candidates and each not in moved), None)
            if origin is None:
                added.append(found)
            else:
                known = self._candidates[origin]
                moved[origin] = replace(
                    found,
                    fqn=known.fqn,
                    name=known.name or origin.name,
                    scheme=known.scheme,
                    shape=known.shape,
                    weight_bytes=known.weight_bytes,
                )
        if not moved and not added:
            return
        for old, new in moved.items():
            self._outcomes.pop(old, None)
            self._replaced.pop(old, None)
            self._misses[new.node] = self._misses.pop(old, [])
        for candidate in (*moved.values(), *added):
            self._rebuilt_by[candidate.node] = rule
            self._origins.pop(candidate.node, None)
        listed = [moved.get(node, candidate) for node, candidate in self._candidates.items()]
        self._candidates.clear()
        self._readers.clear()
        self._enroll([*listed, *added])

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
                for table in (self._outcomes, self._misses, self._rebuilt_by):
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

    def report(self, target: str, passes: Sequence[str], bytes_before: int = 0, bytes_after: int = 0) -> Report:
        """The report on all candidates, in graph order, without warnings; an undecided candidate is missed."""
        outcomes = []
        for node, candidate in self._candidates.items():
            outcome = self._outcomes.get(node) or self._missed(node, target)
            told = outcome.reasons if outcome.status == "missed" else []
            for reason in dict.fromkeys(self._misses.get(node, ())):
                if reason not in told:
                    self.add_rejected(candidate.name or node.name, reason)
            outcomes.append(replace(outcome, bytes_after=self._bytes_after.get(node, outcome.bytes_after)))
        return Report(
            target,
            list(passes),
            outcomes,
            conflicts=self._conflicts,
            applied=self._applied,
            rejected={rule: self._rejections(rule) for rule in passes if rule in self._rejected},
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            drawings=self.drawings.drawings(),
        )

    def _rejections(self, rule: str) -> list[str]:
        """A text for each reason: the first places, and the reason."""
        texts = []
        for reason, places in self._rejected[rule].values():
            more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
            texts.append(f"{', '.join(places[:_SHOWN])}{more}: {reason}")
        return texts

    def _missed(self, node: Node, target: str) -> Outcome:
        candidate, rule = self._candidates[node], self._rebuilt_by.get(node)
        reasons = list(dict.fromkeys(self._misses[node]))
        reasons = [reason for reason in reasons if reason.rule not in self._group_rules] or reasons
        if candidate.unreachable_reason:
            reasons = [Reason(None, "none", "", candidate.unreachable_reason)]
        elif not reasons:
            later = f"pass after {rule}" if rule else f"pass for target {target}"
            found = f"no {later} rewrites {candidate.op}"
            reasons = [Reason(None, "none", "", found, "add a rule for it, or leave the weight unquantized")]
        if rule:
            text = f"{rule} built this {candidate.op}, which still reads a quantized weight"
            reasons.insert(0, Reason(rule, "note", "", text))
        return self._outcome(node, "missed", None, reasons)
