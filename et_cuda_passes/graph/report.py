"""The fate of every candidate: outcomes with reasons, counts, and the report as text, dict and JSON."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch.fx import Node

Status = Literal["rewritten", "kept", "missed"]
STATUSES: tuple[Status, ...] = ("rewritten", "kept", "missed")

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')
_PLUMBING = re.compile(r"[/\\](torch|torchao|executorch)[/\\]")


def user_source_line(node: Node) -> str:
    """``file:line: code`` of the user's line that made ``node``; empty where the export recorded none.

    Frames inside torch, torchao and executorch are passed over, unless there is no other; code that torch generated is
    no line of anybody's, and is called differently in every run.
    """
    found = _FRAME.finditer(node.meta.get("stack_trace") or "")
    frames = [frame for frame in found if not frame["file"].startswith("<eval_with_key>")]
    own = [frame for frame in frames if not _PLUMBING.search(frame["file"])] or frames
    if not own:
        return ""
    frame = own[-1]
    return f"{frame['file']}:{frame['line']}: {frame['code'].strip()}"


@dataclass(frozen=True)
class Reason:
    """Why a rule did not take a place, or a remark on why it did.

    ``stage`` is where it was decided: "match" (the graph's form), "metadata" and "values" (a require), "conflict"
    (another match took the nodes), "note" (a remark on a rewrite or keep), "none" (no rule takes this operator).
    """

    rule: str | None
    stage: str
    wanted: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        if self.stage == "note":
            return self.found
        text = f"{self.rule} wanted {self.wanted}, found {self.found}" if self.rule else self.found
        return f"{text}; {self.hint}" if self.hint else text


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate, an operator that reads a dequantized weight.

    ``node`` is its name, in control flow the path to it; ``fqn`` is the weight's FQN, ``source`` the user's own line
    ("file:line: code"), ``detail`` what was made of it, and ``explanation`` what else the rule has to say of this one
    place; the text of a report leaves that out.
    """

    node: str
    op: str
    fqn: str
    rule: str | None
    status: Status
    reasons: list[Reason] = field(default_factory=list)
    source: str = ""
    detail: str = ""
    explanation: str = ""


@dataclass
class Report:
    """The outcomes of one rewrite, in graph order.

    ``passes`` are the names in the order in which they ran, ``applied`` how often each rule acted, ``conflicts`` the
    matches that lost to another, ``warnings`` what the user probably did not intend, ``rejected`` for each rule the
    matches without a candidate in them whose requires did not hold (an attention, say), and the byte counts are those
    of all constants before and after.
    """

    target: str
    passes: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    applied: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def counts(self) -> dict[str, int]:
        """How many candidates ended in each status, and how often each rule acted: what ``expect=`` compares with."""
        by_status = Counter(outcome.status for outcome in self.outcomes)
        return {status: by_status[status] for status in STATUSES} | self.applied

    @staticmethod
    def merge(reports: Iterable["Report"]) -> "Report":
        """One report of several methods: outcomes in order, counts and bytes added up."""
        parts = list(reports)
        if len(parts) == 1:
            return parts[0]
        names = dict.fromkeys(rule for part in parts for rule in part.rejected)
        applied: Counter[str] = Counter()
        for part in parts:
            applied.update(part.applied)
        return Report(
            target=parts[0].target if parts else "",
            passes=parts[0].passes if parts else [],
            outcomes=[outcome for part in parts for outcome in part.outcomes],
            conflicts=[conflict for part in parts for conflict in part.conflicts],
            warnings=[warning for part in parts for warning in part.warnings],
            applied=dict(applied),
            rejected={rule: [text for part in parts for text in part.rejected.get(rule, ())] for rule in names},
            bytes_before=sum(part.bytes_before for part in parts),
            bytes_after=sum(part.bytes_after for part in parts),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, stable in order."""
        return {
            "target": self.target,
            "passes": self.passes,
            "counts": self.counts(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "conflicts": self.conflicts,
            "rejected": self.rejected,
            "warnings": self.warnings,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """One look: what happened how often and to what, what was made of that, then every miss with its reasons."""
        total = len(self.outcomes)
        if not total and not self.applied:
            none = f"{self.target}: no candidates, the program holds no quantized weight that an operator reads"
            return "\n".join([none, *(f"  warning   {warning}" for warning in self.warnings)])
        tally = ", ".join(f"{self.counts()[status]} {status}" for status in STATUSES)
        lines = [
            f"{self.target}: {total} candidate{'s' if total != 1 else ''}: {tally}; "
            f"constants {_size(self.bytes_before)} -> {_size(self.bytes_after)}"
        ]
        groups: Counter[tuple[str, ...]] = Counter()
        example: dict[tuple[str, ...], str] = {}
        for outcome in self.outcomes:
            if outcome.status != "missed":
                key: tuple[str, ...] = (outcome.status, outcome.rule or "", outcome.detail, _notes(outcome))
                groups[key] += 1
                example.setdefault(key, outcome.fqn)
        for group, count in groups.items():
            did, rule, detail, notes = group
            lines.append(f"  {did:<9} {count:>5} x {rule}  {detail}  ({example[group]}{', ...' if count > 1 else ''})")
            lines += [f"            {notes}"] if notes else []
        rules = {outcome.rule for outcome in self.outcomes}
        then = [f"{count} x {rule}" for rule, count in self.applied.items() if rule not in rules]
        lines += [f"  {'then':<9} {', '.join(then)}"] if then else []
        lines += self._missed()
        lines += [f"  conflict  {conflict}" for conflict in self.conflicts]
        lines += [f"  warning   {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _missed(self) -> list[str]:
        """The misses, those of one operator with like reasons together, each with the text of the first of them."""
        groups: dict[tuple[str, ...], list[Outcome]] = {}
        for outcome in self.outcomes:
            if outcome.status == "missed":
                # The numbers at the end of nodes' names differ from layer to layer.
                alike = (re.sub(r"(?<=[a-z])_\d+\b", "", str(reason)) for reason in outcome.reasons)
                groups.setdefault((outcome.op, *alike), []).append(outcome)
        lines = []
        for outcomes in groups.values():
            first = outcomes[0]
            others = f", {outcomes[1].fqn}" + (", ..." if len(outcomes) > 2 else "") if len(outcomes) > 1 else ""
            lines.append(f"  missed    {len(outcomes):>5} x {first.op}  ({first.fqn}{others})")
            lines += [f"            {reason}" for reason in first.reasons]
            lines += [f"            at {first.source}"] if first.source else []
        return lines


def _notes(outcome: Outcome) -> str:
    return "; ".join(str(reason) for reason in outcome.reasons if reason.stage == "note")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"


class ExpectationError(Exception):
    """A build demanded other counts than it got; ``report`` says what happened to each candidate."""

    def __init__(self, expect: Mapping[str, int], report: Report) -> None:
        counts = report.counts()
        wrong = {name: want for name, want in expect.items() if counts.get(name, 0) != want}
        text = "; ".join(f"{name}: expected {want}, got {counts.get(name, 0)}" for name, want in wrong.items())
        # What is no candidate has no line in the report.
        rejected = [f"  rejected   {each}" for name in wrong for each in report.rejected.get(name, ())]
        super().__init__("\n".join([text, str(report), *rejected]))
        self.report = report
