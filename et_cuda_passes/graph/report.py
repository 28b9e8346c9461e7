"""The report: an outcome per candidate with reasons, counts, and the report as text, dict and JSON."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch.fx import Node

from et_cuda_passes.graph.decibels import decibels_to_json
from et_cuda_passes.graph.drawing import Drawing, drawing_text
from et_cuda_passes.graph.names import without_numbers

Status = Literal["rewritten", "kept", "missed"]
STATUSES: tuple[Status, ...] = ("rewritten", "kept", "missed")

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')
_PLUMBING = re.compile(r"[/\\](torch|torchao|executorch)[/\\]")


def user_source_line(node: Node) -> str:
    """``file:line: code`` of the user's line that ``node`` comes from; empty if the export recorded none.

    Frames inside torch, torchao and executorch count only if there is no other frame. Code that torch generated never
    counts: its name differs in every run.
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
    """Why a rule did not rewrite a place, or a note on why it did.

    Attributes:
        rule: the rule; None if no rule matches the operator.
        stage: "match" (the pattern does not fit), "metadata" or "values" (a requirement of that stage does not hold),
            "conflict" (another match has the nodes), "note" (a note on a rewrite or keep) or "none" (no rule matches
            the operator).
        wanted: what must hold; empty for a note.
        found: what was found instead, or the note.
        hint: what to change; empty if nothing can be said.
        requirement: the name of the requirement that does not hold.
    """

    rule: str | None
    stage: str
    wanted: str
    found: str
    hint: str = ""
    requirement: str = ""

    def __str__(self) -> str:
        if self.stage == "note":
            return self.found
        text = f"{self.rule} wanted {self.wanted}, found {self.found}" if self.rule else self.found
        return f"{text}; {self.hint}" if self.hint else text


@dataclass(frozen=True)
class Outcome:
    """The outcome of one candidate, an operator that reads a dequantized weight.

    Attributes:
        node: its name; in control flow its path.
        op: the short name of the operator.
        fqn: the FQN of its weight; several are joined by ", ".
        rule: the rule that rewrote or kept it, None if it is missed.
        status: one of :data:`STATUSES`.
        reasons: why it is missed, or notes.
        source: the user's line, "file:line: code".
        detail: the summaries of the rules that rewrote it.
        explanation: a longer text of the rule, which the text of a report leaves out.
        scheme: how the weight is quantized, "int4 group 32".
        shape: of the weight.
        kernel: the kernel that computes the operator; empty if no rule names one.
        layout: the layout of the packed weight; empty if the kernel reads the weight as it was.
        bytes_before: bytes of the weight as it was exported, with scales and zero points.
        bytes_after: the same after the rewrite. A constant of several operators counts in proportion.
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
    scheme: str = ""
    shape: list[int] = field(default_factory=list)
    kernel: str = ""
    layout: str = ""
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(frozen=True)
class LayerAccuracy:
    """Signal-to-quantization-noise ratios of one quantized layer's output, in dB; None where not measured.

    Attributes:
        layer: FQN of the weight, as in Outcome.
        node: the node of the candidate, as in Outcome.
        quantized_db: quantized against float.
        rewritten_db: rewritten against as exported.
        limit_db: the smallest ``rewritten_db`` by rounding alone; None where the rewrite was not measured.
    """

    layer: str
    node: str
    quantized_db: float | None
    rewritten_db: float | None
    limit_db: float | None = None


@dataclass(frozen=True)
class OutputAccuracy:
    """The ratios of one output of the program, in dB, with the error of all layers; None where not measured.

    Attributes:
        name: of the output.
        quantized_db: quantized against float.
        rewritten_db: rewritten against as exported.
    """

    name: str
    quantized_db: float | None
    rewritten_db: float | None


@dataclass
class Report:
    """The outcomes of one rewrite, in graph order.

    Attributes:
        target: the name of the target.
        passes: the names of the passes, in the order in which they ran.
        outcomes: one per candidate.
        conflicts: matches of a rule that lost nodes to another match of that rule.
        warnings: what the user probably did not intend.
        applied: how often each rule acted.
        rejected: for each rule, texts with the other places at which it did not act and the reason: candidates that
            another rule rewrote or kept, and operators that are no candidates, such as an attention.
        bytes_before: bytes of all constants before the rewrite.
        bytes_after: bytes of all constants after the rewrite.
        notes: remarks on the program as a whole.
        drawings: the operators before and after each distinct rewrite.
        accuracy: of each layer that was measured.
        output_accuracy: of each floating-point output of the program, if it was measured.
        tilings: where the tilings of the kernels come from, if no note says it.
        packages: for each pass that another package brought, the package and its version: "my-rules 0.1.0".
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
    notes: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    accuracy: tuple[LayerAccuracy, ...] = ()
    output_accuracy: tuple[OutputAccuracy, ...] = ()
    tilings: str = ""
    packages: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """The number of candidates by status, and how often each rule acted. ``expect=`` compares with these."""
        by_status = Counter(outcome.status for outcome in self.outcomes)
        return {status: by_status[status] for status in STATUSES} | self.applied

    @staticmethod
    def merge(reports: Iterable["Report"]) -> "Report":
        """One report of several methods: their outcomes in order, counts and bytes added up."""
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
            notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
            drawings=[drawing for part in parts for drawing in part.drawings],
            accuracy=tuple(layer for part in parts for layer in part.accuracy),
            output_accuracy=tuple(output for part in parts for output in part.output_accuracy),
            tilings=next((part.tilings for part in parts if part.tilings), ""),
            packages={name: origin for part in parts for name, origin in part.packages.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, in a fixed order."""
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
            "notes": self.notes,
            "drawings": [asdict(drawing) for drawing in self.drawings],
            "accuracy": list(map(_decibels, self.accuracy)),
            "output_accuracy": list(map(_decibels, self.output_accuracy)),
            "tilings": self.tilings,
            "packages": self.packages,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, title: str = "") -> str:
        """The report as one HTML file, which needs no network: see :func:`.report_page.render`."""
        # A rewrite does without the libraries of the page.
        from et_cuda_passes.graph.report_page import render

        return render({self.target: self.to_dict()}, title)

    def drawn(self) -> str:
        """The drawings as text."""
        return "\n\n".join(map(drawing_text, self.drawings))

    def __str__(self) -> str:
        """A short text: the counts, the rules with their numbers of rewrites, and every miss with its reasons."""
        total = len(self.outcomes)
        if not total and not self.applied:
            none = f"{self.target}: no candidates, the program holds no quantized weight that an operator reads"
            return "\n".join([none, *self._remarks()])
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
        lines += self._remarks()
        return "\n".join(lines)

    def _remarks(self) -> list[str]:
        """The packages of plugins, the notes and the warnings."""
        packages: dict[str, list[str]] = {}
        for name, origin in self.packages.items():
            packages.setdefault(origin, []).append(name)
        notes = [f"  package   {origin}: {', '.join(names)}" for origin, names in packages.items()]
        notes += [f"  note      {note}" for note in self.notes]
        return notes + [f"  warning   {warning}" for warning in self.warnings]

    def _missed(self) -> list[str]:
        """The misses. Those with the same operator and similar reasons share the text of the first."""
        groups: dict[tuple[str, ...], list[Outcome]] = {}
        for outcome in self.outcomes:
            if outcome.status == "missed":
                alike = (without_numbers(str(reason)) for reason in outcome.reasons)
                groups.setdefault((outcome.op, *alike), []).append(outcome)
        lines = []
        for outcomes in groups.values():
            first = outcomes[0]
            others = f", {outcomes[1].fqn}" + (", ..." if len(outcomes) > 2 else "") if len(outcomes) > 1 else ""
            lines.append(f"  missed    {len(outcomes):>5} x {first.op}  ({first.fqn}{others})")
            lines += [f"            {reason}" for reason in first.reasons]
            lines += [f"            at {first.source}"] if first.source else []
        return lines


def _decibels(measured: LayerAccuracy | OutputAccuracy) -> dict[str, Any]:
    return {key: decibels_to_json(value) for key, value in asdict(measured).items()}


def _notes(outcome: Outcome) -> str:
    return "; ".join(str(reason) for reason in outcome.reasons if reason.stage == "note")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"


class ExpectationError(Exception):
    """The counts are not those expected; ``report`` has the outcomes."""

    def __init__(self, expect: Mapping[str, int], report: Report) -> None:
        counts = report.counts()
        wrong = {name: want for name, want in expect.items() if counts.get(name, 0) != want}
        text = "; ".join(f"{name}: expected {want}, got {counts.get(name, 0)}" for name, want in wrong.items())
        # The report's text has the reasons of missed candidates only.
        rejected = [f"  rejected   {each}" for name in wrong for each in _rejections(report, name)]
        super().__init__("\n".join([text, str(report), *rejected]))
        self.report = report


def _rejections(report: Report, name: str) -> list[str]:
    """Why the rule ``name`` did not act, where the text of the report does not say it."""
    texts = report.rejected.get(name, [])
    told = texts or name not in report.passes or report.applied.get(name)
    if told or any(reason.rule == name for outcome in report.outcomes for reason in outcome.reasons):
        return texts
    earlier = report.passes[: report.passes.index(name)]
    acted = ", ".join(f"{report.applied[rule]} x {rule}" for rule in earlier if report.applied.get(rule))
    found = f"{name}: no operator of the program fits the outermost call of its pattern"
    return [f"{found}; before it acted {acted}" if acted else found]
