"""``rewrite``: an exported program, rewritten for a target, and the report."""

import gc
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from et_cuda_passes.graph.constants import ConstantCache, constant_bytes
from et_cuda_passes.graph.driver import RuleTrace, apply_passes, gc_disabled, record_weight_bytes
from et_cuda_passes.graph.finish import finish_program
from et_cuda_passes.graph.outcomes import OutcomeTracker
from et_cuda_passes.graph.passes import Pass, group_rules, nearest_names, parse
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import STATUSES, ExpectationError, Report
from et_cuda_passes.mapped import MappedFiles, trim_heap
from et_cuda_passes.ops.registry import OPERATORS
from et_cuda_passes.quant.candidates import find_candidates, quantized_caches
from et_cuda_passes.quant.unsupported import decomposed_weights
from et_cuda_passes.rules.restore import normalised
from et_cuda_passes.targets import RENAMED_PASSES, default_passes, get_target, known_passes
from et_cuda_passes.targets.compatibility import packed_warnings
from et_cuda_passes.targets.gpu import check_gpu, described_gpu, gpu_named_in, gpu_notes, name_gpu, unnamed_gpu_text
from et_cuda_passes.targets.joining import origin_of
from et_cuda_passes.targets.target import Target
from et_cuda_passes.threads import single_threaded_operators

if TYPE_CHECKING:
    from et_cuda_passes.packed_cache import PackedCache

TRACE = "ETCP_TRACE"
"""The environment variable that is 1 for a line on stderr for each rule: what it tried, matched and rewrote."""


def rewrite(
    exported_program: ExportedProgram,
    target: str | Target,
    passes: Iterable[Any] | None = None,
    expect: Mapping[str, int] | None = None,
    *,
    pool: ConstantCache | None = None,
    gpu: str | None = None,
    stream: str | Path | None = None,
    cache: "str | Path | PackedCache | None" = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ExportedProgram, Report]:
    """Rewrite the quantized weights of an exported program for ``target``.

    Args:
        exported_program: from ``torch.export.export``, decomposed or not, or in edge form; it is not changed, except
            with ``stream``.
        target: one of :func:`targets`, or a :class:`Target`.
        passes: rules, ExecuTorch ``ExportedProgramPassBase`` passes and callables on a ``GraphModule``, in order;
            None for ``default_passes(target)``.
        expect: the counts that must result, by rule name ("linear_int4") or status ("rewritten", "kept", "missed").
        pool: packed constants that the methods of one model share: a :class:`ConstantCache` that has ``stream``,
            ``cache`` and ``device`` itself.
        gpu: for target "cuda", the GPU whose tilings the kernels get: "sm_80", "sm_86", "sm_89", "sm_90", "sm_100" or
            "sm_120", or with a number of multiprocessors, "sm_90:114". None keeps what the program names; if it names
            none, the tilings are those of the GPU that is present when the program is lowered.
        stream: a folder for the packed constants, which then lie in mapped files instead of memory. **This gives up
            ``exported_program``**: the constants that the result does not have are removed from it, and each is freed
            as soon as it is packed, unless something else holds it, such as the model. The files have no names and
            vanish with the result. None keeps the constants in memory, and the program as it is.
        cache: a folder or an fsspec URL with the packed constants of earlier runs, or a :class:`PackedCache`. Constants
            that are there are not packed again, and others are added. The report says how many were.
        device: packs 4-bit weights on this device ("cuda"); the constants are on the device of the weights all the
            same. None packs where the weights are.
        progress: called after each candidate that gets an outcome, with the number of those that have one and of all.

    Returns:
        The rewritten program, and the report, with one outcome for every operator that reads a quantized weight.

    Raises:
        ValueError: the target or the GPU is unknown, two passes have the same name, ``before`` and ``after`` of the
            passes contain an unknown name or form a cycle, ``expect`` contains an unknown name or a negative count, or
            ``pool`` is given beside ``stream``, ``cache`` or ``device``.
        TypeError: ``exported_program``, ``passes`` or ``expect`` is not of a type that is accepted.
        ExpectationError: the counts are not those expected.
        OSError: ``stream`` or ``cache`` cannot be written, for example because the disk is full.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise TypeError(
            f"rewrite needs a torch.export.ExportedProgram, not {type(exported_program).__name__}; "
            "export the model with torch.export.export(model, args) first"
        )
    chosen = get_target(target)
    entries = parse_passes(default_passes(chosen) if passes is None else passes)
    check_expected(expect, [entry.name for entry in entries])
    check_gpu(gpu, chosen)
    gpu = gpu or gpu_named_in(exported_program)
    if pool is None:
        pool = constant_pool(stream, cache, device)
    elif (stream, cache, device) != (None, None, None):
        raise ValueError("stream, cache and device belong to the pool that is given: make it with constant_pool(...)")
    if pool.stream is not None:
        pool.files = MappedFiles()
    packed_before, loaded_before = pool.packed, pool.loaded
    damaged_before = pool.storage.damaged if pool.storage is not None else 0
    described = None if chosen.gpu is None else described_gpu(gpu)
    chosen = replace(chosen, gpu=described or chosen.gpu)

    # 1. Normalise: weights that are still wrapped in tensor subclasses are unwrapped.
    before, still_wrapped = normalised(exported_program)
    find = partial(find_candidates, schemes=chosen.advised, wrapped=still_wrapped)
    with gc_disabled():
        # 2. Copy: only the copy is changed.
        program = Program(before, pool)
        # 3. Find candidates: the operators that read a quantized weight.
        tracker = OutcomeTracker(find(program), group_rules(entries), progress)
        caches = quantized_caches(program)
    # 4. Apply the pass list.
    trace: list[RuleTrace] = []
    with single_threaded_operators():
        program = apply_passes(program, entries, chosen, tracker, find, OPERATORS, trace)
    if os.environ.get(TRACE) == "1":
        sys.stderr.writelines(f"{chosen.name}: {each}\n" for each in trace)
    record_weight_bytes(program, tracker)
    # 5. Report: what was found. With ``stream`` the program is given up after this.
    report = _report(tracker, chosen, entries, before)
    if pool.stream is not None:
        if before is not exported_program:
            program.release(exported_program)
        # torch.export leaves cycles of functions that hold the model, and with it each source.
        gc.collect()
        trim_heap()
    with gc_disabled():
        # 6. Finish: compute the packed constants, repair strides and names, verify.
        result = finish_program(program)
        if gpu:
            name_gpu(result, gpu)
    report.bytes_after = constant_bytes(result)
    report.notes = gpu_notes(result, described) if described else []
    if caches:
        report.notes.append(f"left as they are: caches of quantized numbers that the program mutates ({_some(caches)})")
    if pool.storage is not None:
        packed, loaded = pool.packed - packed_before, pool.loaded - loaded_before
        from et_cuda_passes.packed_cache import counts_note

        damaged = pool.storage.damaged - damaged_before
        report.notes.append(counts_note(packed, loaded, damaged, pool.storage.place))
    report.tilings = unnamed_gpu_text(result) if chosen.gpu is not None and described is None else ""
    check_expectations(expect, report)
    return result, report


def _some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def constant_pool(
    stream: str | Path | None = None,
    cache: "str | Path | PackedCache | None" = None,
    device: str | torch.device | None = None,
) -> ConstantCache:
    """The packed constants of the methods of one model, with the options of :func:`rewrite`.

    Raises:
        ValueError, ImportError, OSError: as :class:`PackedCache`; or ``stream`` is no folder.
    """
    if cache is not None:
        from et_cuda_passes.packed_cache import PackedCache

        cache = cache if isinstance(cache, PackedCache) else PackedCache(cache)
    if stream is not None:
        stream = Path(stream)
        try:
            stream.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = "is a file" if stream.is_file() else f"cannot be created: {error.strerror}"
            raise OSError(error.errno, f"the folder {stream} of stream {text}; name another folder") from error
    return ConstantCache(stream, cache, None if device is None else torch.device(device))


def _report(
    tracker: OutcomeTracker,
    target: Target,
    entries: Sequence[Pass],
    before: ExportedProgram,
) -> Report:
    """The outcomes, and warnings about quantized weights that have no outcome.

    Args:
        tracker: the outcomes.
        target: the target of the rewrite.
        entries: the passes that ran.
        before: the program as the passes got it.
    """
    names = [entry.name for entry in entries]
    report = tracker.report(target.name, names, constant_bytes(before), 0)
    report.packages = {entry.name: origin for entry in entries if (origin := origin_of(entry.value))}
    reported = {fqn for outcome in report.outcomes for fqn in outcome.fqn.split(", ")}
    decomposed = [fqn for fqn in decomposed_weights(before, known_passes()) if fqn not in reported]
    if decomposed:
        report.warnings.append(
            f"the program converts {len(decomposed)} integer matrices itself ({decomposed[0]}, ...): their dequantize "
            "was decomposed; rewrite before run_decompositions(), or decompose with run_decompositions({})"
        )
    nothing_else = not (report.outcomes or any(report.applied.values()) or decomposed)
    report.warnings += packed_warnings(before, target, nothing_else)
    if not target.dynamic_sizes and (dynamic := dynamic_size(before)):
        report.warnings.append(
            f"{dynamic}, which the lowering to {target.name} refuses: export the model with fixed sizes "
            "(EtConfig(dynamic=False), or no dynamic_shapes for torch.export)"
        )
    return report


def dynamic_size(exported: ExportedProgram) -> str:
    """A text about the first input that has a dynamic size; empty if all sizes are fixed."""
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
            return f"{node.name} has a dynamic size, {list(value.shape)}"
    return ""


def parse_passes(passes: Iterable[Any]) -> list[Pass]:
    """Check a pass list and put it into its order: see :func:`et_cuda_passes.graph.passes.parse`.

    ``before`` and ``after`` of a pass may contain the name of a default rule of any target, so that a pass works with
    several targets, and in a list without that rule.
    """
    return parse(passes, _is_program_pass, known_passes(), RENAMED_PASSES)


def _is_program_pass(value: Any) -> bool:
    """Whether ``value`` is an ExecuTorch ``ExportedProgramPassBase``; none exists before ExecuTorch is imported."""
    module = sys.modules.get("executorch.exir.pass_base")
    base = getattr(module, "ExportedProgramPassBase", None)
    return base is not None and isinstance(value, base)


def check_expected(expect: object, passes: Iterable[str] | None = None) -> None:
    """Check that ``expect`` maps names to counts, and that the names are those of ``passes`` or statuses.

    Raises:
        TypeError: ``expect`` is not a mapping of texts to integers.
        ValueError: a count is negative, or a name is neither a pass nor a status.
    """
    if expect is None:
        return
    known = None if passes is None else [*STATUSES, *passes]
    if not isinstance(expect, Mapping):
        raise TypeError(f"expect must map names to counts, as {{'missed': 0}} does; got a {type(expect).__name__}")
    for name, count in expect.items():
        if not isinstance(name, str) or not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"expect must map names to counts, as {{'missed': 0}} does; got {name!r}: {count!r}")
        if count < 0:
            raise ValueError(f"expect has the count {count} for {name!r}; a count is 0 or more")
        if known is not None and name not in known:
            nearest = nearest_names(name, known, RENAMED_PASSES)
            raise ValueError(f"expect contains {name!r}, which is no pass of the list and no status; {nearest}")


def check_expectations(expect: Mapping[str, int] | None, report: Report) -> None:
    """Compare the expected counts with those of a report.

    Raises:
        TypeError, ValueError: see :func:`check_expected`.
        ExpectationError: a count differs.
    """
    check_expected(expect, report.passes)
    counts = report.counts()
    if expect and any(counts.get(name, 0) != count for name, count in expect.items()):
        raise ExpectationError(expect, report)
