"""The JSON documents that commands print with ``--json``, one class for each command.

schemas.json is written from these classes by docs/generate.py. A document gets a new version when a key is renamed,
removed, or changes its meaning; a new key does not change the version.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NewType

ReportData = NewType("ReportData", dict[str, Any])
"""``et_cuda_passes.Report.to_dict()``"""
QuantizationData = NewType("QuantizationData", dict[str, Any])
"""``et_cuda_passes.QuantizationReport.to_dict()``"""


@dataclass
class Document:
    """A document: its key ``schema`` has its name and version."""

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @classmethod
    def schema(cls) -> str:
        """The value of the key ``schema``, such as "et-cuda-passes.explain/1"."""
        return f"et-cuda-passes.{cls.name}/{cls.version}"

    def to_json(self) -> str:
        """The document as JSON text."""
        return json.dumps({"schema": self.schema(), **asdict(self)}, indent=2, allow_nan=False)


def finite(value: float) -> float | None:
    """A number as JSON has it: None for an infinity or NaN."""
    return value if math.isfinite(value) else None


@dataclass
class File:
    """A file that a command wrote.

    Attributes:
        path: as given to the command, or below the output folder.
        bytes: its size.
    """

    path: str
    bytes: int


def files_of(paths: Iterable[Path]) -> list[File]:
    """The files at ``paths``, with their sizes."""
    return [File(str(path), path.stat().st_size) for path in paths]


@dataclass
class Explain(Document):
    """The outcome of every quantized weight, by target.

    Attributes:
        packed: the number of weights that MODEL has packed already, by layout.
        reports: the report of each target.
    """

    name: ClassVar[str] = "explain"
    packed: dict[str, int]
    reports: dict[str, ReportData]


@dataclass
class Requirement:
    """A requirement of a rule.

    Attributes:
        wanted: what must hold.
        hint: what to change where it does not; empty if that depends on what is found.
        stage: "metadata" or "values": what the requirement reads.
    """

    wanted: str
    hint: str
    stage: Literal["metadata", "values"]


@dataclass
class Pass:
    """A pass in the list of a target.

    Attributes:
        name: as in ``--expect`` and in reports.
        rewrite: "before -> after".
        requires: the requirements.
        options: the options of the rule with their defaults.
        package: the package that brought it, with its version; null for a rule of et_cuda_passes.
    """

    name: str
    rewrite: str
    requires: list[Requirement]
    options: dict[str, Any]
    package: str | None = None


@dataclass
class TargetPasses:
    """A target.

    Attributes:
        summary: the backend and its kernels in a few words.
        passes: in their order.
        package: the package that brought it, with its version; null for a target of et_cuda_passes.
    """

    summary: str
    passes: list[Pass]
    package: str | None = None


@dataclass
class Rules(Document):
    """The passes of each target.

    Attributes:
        targets: by name.
    """

    name: ClassVar[str] = "rules"
    targets: dict[str, TargetPasses]


@dataclass
class Failed:
    """A requirement that does not hold at a place.

    Attributes:
        requirement: its name; empty for a reason that is no requirement's.
        wanted: what must hold.
        found: what stands there instead.
        hint: what to change; empty if that is not known.
    """

    requirement: str
    wanted: str
    found: str
    hint: str


@dataclass
class Place:
    """A place at which a rule tried its pattern.

    Attributes:
        node: the node at which the attempt starts.
        op: its operator.
        source: the user's line, "file:line: code".
        matches: whether the pattern fits and all requirements hold.
        progress: the number of calls of the pattern that fit.
        nodes: the nodes that fit.
        stopped: where the pattern does not fit; null if it fits.
        failed: the requirements that do not hold, if the pattern fits.
        tree: the lines of the pattern as a tree, with a mark at each part.
    """

    node: str
    op: str
    source: str
    matches: bool
    progress: int
    nodes: list[str]
    stopped: Failed | None
    failed: list[Failed]
    tree: list[str]


@dataclass
class MatchDocument(Document):
    """How far the pattern of a rule fits.

    Attributes:
        rule: its name.
        target: the target.
        tried: the number of places at which the pattern was tried.
        matched: those at which it fits and all requirements hold.
        places: the nearest.
    """

    name: ClassVar[str] = "match"
    rule: str
    target: str
    tried: int
    matched: int
    places: list[Place]


@dataclass
class NewRule(Document):
    """The files of a new rule.

    Attributes:
        rule: its name.
        target: the target whose list it joins.
        files: the files that were written.
    """

    name: ClassVar[str] = "new-rule"
    rule: str
    target: str
    files: list[File]


Decibels = float | str | None
"""A ratio in dB, or "exact", "no signal" or "not finite"; null where not measured."""


@dataclass
class LayerRatios:
    """The signal-to-quantization-noise ratios of one layer's output.

    Attributes:
        layer: FQN of the weight.
        node: the operator that reads it.
        quantized_db: quantized against float.
        rewritten_db: rewritten against as exported.
        op: short name of the operator.
        at: the node at which exported and rewritten program were compared.
        limit_db: the smallest ratio by rounding alone.
        why: why a ratio is missing; empty if none is.
        beyond_rounding: whether the rewrite changes the output more than rounding does.
    """

    layer: str
    node: str
    quantized_db: Decibels
    rewritten_db: Decibels
    op: str
    at: str
    limit_db: Decibels
    why: str
    beyond_rounding: bool


@dataclass
class OutputRatios:
    """The ratios of one output of the program, with the error of all layers.

    Attributes:
        name: of the output.
        quantized_db: quantized against float.
        rewritten_db: rewritten against as exported.
    """

    name: str
    quantized_db: Decibels
    rewritten_db: Decibels


@dataclass
class Move:
    """A layer that gets 8 bits.

    Attributes:
        layer: FQN of the module.
        scheme: its new scheme.
        alone_db: the ratio of the whole output if this layer alone is quantized with 4 bits.
        more_bytes: how much larger its weight becomes.
    """

    layer: str
    scheme: str
    alone_db: Decibels
    more_bytes: int


@dataclass
class Suggestion:
    """The layers to move to 8 bits.

    Attributes:
        moves: in the order in which they were chosen.
        before_db: the ratio of the whole output without the moves.
        predicted_db: the ratio with them.
        bytes_before: the bytes of all weights, packed.
        bytes_after: the same with the moves.
    """

    moves: list[Move]
    before_db: Decibels
    predicted_db: Decibels
    bytes_before: int
    bytes_after: int


@dataclass
class Accuracy(Document):
    """The accuracy of each layer.

    Attributes:
        target: the target of the rewrite; empty without one.
        input_sets: how many calls were measured.
        layers: the worst first.
        outputs: the floating-point outputs, in order.
        notes: remarks on the whole.
        suggestion: with ``--target-snr`` or ``--max-bytes``; null without them, or if the ratio or the bytes are out of
            reach.
    """

    name: ClassVar[str] = "accuracy"
    target: str
    input_sets: int
    layers: list[LayerRatios]
    outputs: list[OutputRatios]
    notes: list[str]
    suggestion: Suggestion | None = None


@dataclass
class Lower(Document):
    """The files of a lowering.

    Attributes:
        target: its name.
        report: the outcomes; null if an export was finished, whose report.json has them.
        files: the files that were written.
        cpu_capability: the instruction set of the hosts that run the program; null if it runs on any.
        error: why there is no lowered program, or a count is not the expected one; null if all is well.
    """

    name: ClassVar[str] = "lower"
    target: str
    report: ReportData | None
    files: list[File]
    cpu_capability: str | None = None
    error: str | None = None


@dataclass
class Export(Document):
    """The result of an export.

    Attributes:
        folder: the output folder.
        reports: the report of each component, by target and component.
        quantization: the report of each quantization.
        gguf_blocks: for each weight of a GGUF file with ``--keep-gguf`` why its blocks were expanded; empty if they
            were kept.
        files: the files that were written.
        unfinished: what this machine lacks for a target, by target. The packed programs are in the folder.
        left_out: why a target cannot take the schemes or the model, by target. Nothing is written for it.
        failed: the error of its rewrite or lowering, by target. Nothing is written for it.
        error: all three as text, with the command that goes on; null if all targets are finished.
    """

    name: ClassVar[str] = "export"
    folder: str
    reports: dict[str, dict[str, ReportData]]
    quantization: list[QuantizationData]
    gguf_blocks: dict[str, str]
    files: list[File]
    unfinished: dict[str, str]
    left_out: dict[str, str]
    failed: dict[str, str]
    error: str | None = None


@dataclass
class JobResult:
    """The result of a job.

    Attributes:
        job: its name.
        command: the command as a shell runs it, in parts.
        folder: the output folder of the command.
        log: the file with the progress and the errors of the command.
        status: "written" now, "up to date" from an earlier run, "failed", or "not run".
        seconds: the time of the run that wrote the files, or failed.
        bytes: the size of the files; null without files.
        rewritten: quantized weights that were rewritten, over all targets and components; null if there is no report.
        kept: those that were kept, likewise.
        missed: those that were missed, likewise.
        error: why the job failed; null if it did not.
    """

    job: str
    command: list[str]
    folder: str
    log: str
    status: Literal["written", "up to date", "failed", "not run"]
    seconds: float
    bytes: int | None = None
    rewritten: int | None = None
    kept: int | None = None
    missed: int | None = None
    error: str | None = None


@dataclass
class Matrix(Document):
    """The results of all jobs.

    Attributes:
        output: the folder of the file's key ``output``.
        jobs: in the order of the file.
    """

    name: ClassVar[str] = "matrix"
    output: str
    jobs: list[JobResult]


@dataclass
class Difference:
    """The text of another model.

    Attributes:
        model: its name.
        text: its text.
        position: the first token that differs, from 0; null if all tokens are the same.
    """

    model: str
    text: str
    position: int | None


@dataclass
class Generate(Document):
    """A generated text.

    Attributes:
        text: without the prompt.
        tokens: the number of tokens.
        first_token_seconds: time from the prompt to the first token.
        other_tokens_seconds: time of the other tokens.
        compared: the text of the model of ``--compare``.
    """

    name: ClassVar[str] = "generate"
    text: str
    tokens: int
    first_token_seconds: float
    other_tokens_seconds: float
    compared: Difference | None = None


@dataclass
class Output:
    """An output of a run.

    Attributes:
        dtype: of a tensor; null for another value.
        shape: of a tensor; null for another value.
        mean: of the finite elements; null if no element is finite.
        largest: the largest absolute value of the finite elements; null if no element is finite.
        not_finite: the number of infinities and NaNs.
        value: another value as text; null for a tensor.
    """

    dtype: str | None
    shape: list[int] | None
    mean: float | None
    largest: float | None
    not_finite: int
    value: str | None = None


@dataclass
class Times:
    """The times of ``--benchmark`` in seconds.

    Attributes:
        median: of all runs.
        fastest: of all runs.
        percentile_90: 90 % of the runs are faster.
        runs: the number of runs.
        warm_ups: the number of runs before, which are not measured.
    """

    median: float
    fastest: float
    percentile_90: float
    runs: int
    warm_ups: int


@dataclass
class Run(Document):
    """The result of a run.

    Attributes:
        ran: the method of a .pte, or the component of an export.
        target: the target of the component; null for a .pte.
        outputs: in their order.
        times: of ``--benchmark``.
    """

    name: ClassVar[str] = "run"
    ran: str
    target: str | None
    outputs: list[Output]
    times: Times | None = None


@dataclass
class Compared:
    """An output that was compared.

    Attributes:
        component: of an export; null for a program.
        target: the target that ran.
        case: the inputs; null for a program.
        output: the output with its dtype and shape.
        relative: |result - original| / |original| in the 2-norm; null if it is not finite.
        largest: the largest difference of an element; null if it is not finite.
        tolerance: the upper limit of ``relative``.
        problem: a difference that no tolerance allows, or empty.
        holds: whether the output is right.
    """

    component: str | None
    target: str
    case: str | None
    output: str
    relative: float | None
    largest: float | None
    tolerance: float
    problem: str
    holds: bool


@dataclass
class Verify(Document):
    """The comparison of a lowered program, or of an export, with the original.

    Attributes:
        model: as given to the command.
        holds: whether every output is right; null if nothing was compared.
        verdict: the result in a sentence.
        outputs: one entry for each comparison.
        not_executed: the reason by target.
    """

    name: ClassVar[str] = "verify"
    model: str
    holds: bool | None
    verdict: str
    outputs: list[Compared] = field(default_factory=list)
    not_executed: dict[str, str] = field(default_factory=dict)


@dataclass
class Check:
    """A check of the installation.

    Attributes:
        group: "versions", "hooks", "operators", "machine" or "targets".
        subject: what is checked.
        status: "ok"; "note" if it is not needed, or is not tested; "wrong" if something must be done.
        found: what was found.
        fix: what to do; empty if nothing has to be done.
    """

    group: str
    subject: str
    status: Literal["ok", "note", "wrong"]
    found: str
    fix: str = ""


@dataclass
class Doctor(Document):
    """The checks of the installation.

    Attributes:
        ok: whether no check is "wrong".
        seconds: the time of all checks.
        checks: in their order.
    """

    name: ClassVar[str] = "doctor"
    ok: bool
    seconds: float
    checks: list[Check]


DOCUMENTS: tuple[type[Document], ...] = (
    Accuracy, Doctor, Explain, Export, Generate, Lower, MatchDocument, Matrix, NewRule, Rules, Run,
    Verify,
)  # fmt: skip
"""All documents, by name."""
