"""``rewrite``: a target's pass list over an exported program, the input untouched."""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch.export import ExportedProgram

from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.driver import apply_passes
from et_cuda_passes.graph.report import STATUSES, ExpectationError, Report
from et_cuda_passes.quant.candidates import find_candidates
from et_cuda_passes.quant.decomposed import decomposed_weights
from et_cuda_passes.quant.unwrapping import unwrapped
from et_cuda_passes.targets import default_passes, get_target
from et_cuda_passes.targets.compatibility import packed_warnings
from et_cuda_passes.targets.target import Target


def is_program_pass(value: Any) -> bool:
    """Whether ``value`` is an ExecuTorch ``ExportedProgramPassBase``; none exists before ExecuTorch is imported."""
    module = sys.modules.get("executorch.exir.pass_base")
    base = getattr(module, "ExportedProgramPassBase", None)
    return base is not None and isinstance(value, base)


def rewrite(
    exported_program: ExportedProgram,
    target: str | Target,
    passes: Iterable[Any] | None = None,
    expect: Mapping[str, int] | None = None,
    *,
    pool: ConstantCache | None = None,
) -> tuple[ExportedProgram, Report]:
    """Rewrite the quantized weights of an exported program for ``target``.

    Args:
        exported_program: from ``torch.export.export``, decomposed or not, or in edge form; it is not changed.
        target: one of :func:`targets`, or a :class:`Target`.
        passes: rules, ExecuTorch ``ExportedProgramPassBase`` passes and callables on a ``GraphModule``, in order;
            None for ``default_passes(target)``.
        expect: demanded counts, by rule name ("linear_int4") or status ("rewritten", "kept", "missed").
        pool: packed constants to share between the methods of one model.

    Returns:
        The rewritten program, and the report of what became of every reader of a quantized weight.

    Raises:
        ValueError: the target is unknown, two passes have one name, their constraints form a cycle, or ``expect``
            names what is neither a pass nor a status or asks for a negative count.
        TypeError: ``exported_program`` is none, ``passes`` holds something else than is accepted, or ``expect`` is no
            mapping of names to counts.
        ExpectationError: the counts are not those expected.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise TypeError(
            f"rewrite takes a torch.export.ExportedProgram, not {type(exported_program).__name__}; "
            "export the model with torch.export.export(model, args) first"
        )
    check_expected(expect)
    chosen = get_target(target)
    listed = default_passes(chosen) if passes is None else passes
    exported_program, still_wrapped = unwrapped(exported_program)
    find = partial(find_candidates, advised=chosen.advised, wrapped=still_wrapped)
    program, report = apply_passes(exported_program, listed, chosen, find, is_program_pass, pool)
    told = {fqn for outcome in report.outcomes for fqn in outcome.fqn.split(", ")}
    lost = [fqn for fqn in decomposed_weights(exported_program) if fqn not in told]
    if lost:
        report.warnings.append(
            f"the program converts {len(lost)} integer matrices itself ({lost[0]}, ...): their dequantize was "
            "decomposed; rewrite before run_decompositions(), or decompose with run_decompositions({})"
        )
    nothing_else = not (report.outcomes or any(report.applied.values()) or lost)
    report.warnings += packed_warnings(exported_program, chosen, nothing_else)
    check_expectations(expect, report)
    return program, report


def check_expected(expect: object, passes: Iterable[str] | None = None) -> None:
    """Look that ``expect`` maps names to counts, and that the names are those of ``passes`` or statuses.

    Raises:
        TypeError: it is no mapping, or holds something else than text and numbers.
        ValueError: a count is negative, or a name is neither a pass nor a status.
    """
    if expect is None:
        return
    known = None if passes is None else [*STATUSES, *passes]
    if not isinstance(expect, Mapping):
        raise TypeError(f"expect maps names to counts, {{'missed': 0}}; it is no {type(expect).__name__}")
    for name, count in expect.items():
        if not isinstance(name, str) or not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"expect maps names to counts, {{'missed': 0}}; {name!r}: {count!r} is no name and number")
        if count < 0:
            raise ValueError(f"expect asks {name!r} for the count {count}; it is 0 or more")
        if known is not None and name not in known:
            raise ValueError(f"expect names {name!r}; known here are {', '.join(known)}")


def check_expectations(expect: Mapping[str, int] | None, report: Report) -> None:
    """Compare demanded counts with a report's.

    Raises:
        TypeError, ValueError: see :func:`check_expected`.
        ExpectationError: a count differs.
    """
    check_expected(expect, report.passes)
    counts = report.counts()
    if expect and any(counts.get(name, 0) != count for name, count in expect.items()):
        raise ExpectationError(expect, report)
