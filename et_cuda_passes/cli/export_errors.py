"""The errors of ``export``: in the options, in a step, and of single targets while others are written."""

import re
import shlex
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

import typer

from et_cuda_passes.cli.console import LoweringError, Steps, UsageError, one_line, shortage_of

if TYPE_CHECKING:
    from et_cuda_passes.hf.options import QuantizationOptions

# The other names of options are words of the language too.
_OPTION = re.compile(
    r"(?<![\w-])(?:q(?:linear|embedding)(?:_\w+)?|group_size_fallback|cast_to_bf16|xnnpack_weight_only)\b|\balgorithm(?==)"
)


@contextmanager
def option_errors() -> Iterator[None]:
    """Errors in the options, before any work."""
    try:
        yield
    except ValueError as error:
        raise UsageError(in_options(str(error))) from error
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error


@contextmanager
def step_errors(step: Steps, names: tuple[str, ...] | list[str]) -> Iterator[None]:
    """Turn an error of the current step into one line with the name of the step."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        found = _in_one_line(error, str(step.current), names)
        if found is error:
            raise
        raise found from error


def _in_one_line(error: Exception, step: str, names: Sequence[str]) -> Exception:
    """The error of a step in the terms of the command line; the error itself if it says enough."""
    from et_cuda_passes.graph import errors
    from et_cuda_passes.graph.report import ExpectationError
    from et_cuda_passes.hf.artifact import ExportError

    if isinstance(error, FileExistsError):
        return UsageError(str(error).replace("overwrite it (overwrite=True)", "give --overwrite"))
    if isinstance(error, OSError):
        shortage = shortage_of(error)
        # Programs are lowered into a temporary folder, and then written to the output folder.
        where = "" if step.startswith("writing") else f"; temporary files are in {gettempdir()}"
        return LoweringError(f"{step}: {shortage}{where}") if shortage else error
    if isinstance(error, (ExportError, errors.UsageError)):
        text = in_options(str(error))
        if "--dtype" in text and "--dtype float32" not in text and "xnnpack" in names:
            text += "; xnnpack computes in float32, so for both give --dtype float32 and --cast-to-bf16"
        return UsageError(text)
    if isinstance(error, ExpectationError):
        first = next((each for each in error.report.outcomes if each.status == "missed"), None)
        where = f"; {first.fqn}: {first.reasons[0]}" if first and first.reasons else ""
        return LoweringError(f"{step}: {str(error).splitlines()[0]}{where}")
    if shortage := shortage_of(error):
        return LoweringError(f"{step}: {shortage}")
    text = str(error).strip().partition("\n")[0] if isinstance(error, RuntimeError) else one_line(error)
    return LoweringError(f"{step}: {text} (--debug shows the traceback)")


def in_options(text: str) -> str:
    """A message for Python in terms of the command line, in one line."""
    first, *others = text.strip().splitlines()
    more = f" (and {len(others)} more)" if others else ""
    first = re.sub(r"(?:load the model with|convert it with) (.*torch\.)", r"give \1", first)
    first = re.sub(r"(?:dtype=torch\.|model\.to\(torch\.)(\w+)\)?", r"--dtype \1", first)
    first = first.replace("cast_to_bf16=True", "cast_to_bf16")
    return _OPTION.sub(lambda match: "--" + match[0].replace("_", "-"), first) + more


# Targets --------------------------------------------------------------------------------------------------------------


@dataclass
class Unwritten:
    """The targets for which nothing is written.

    Attributes:
        strict: whether one of them ends the export.
        debug: whether the traceback of an error is printed.
        refused: why a target cannot take the schemes or the model, by target.
        failed: the error of its rewrite or lowering, by target.
    """

    strict: bool
    debug: bool
    refused: dict[str, str]
    failed: dict[str, str] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        """One text for each of them: left out, or failed, and why."""
        refused = {name: f"left out: {text}" for name, text in self.refused.items()}
        return refused | {name: f"failed: {text}" for name, text in self.failed.items()}

    def refuse(self, name: str, reason: str) -> None:
        """Leave a target out.

        Raises:
            UsageError: the option --strict is given.
        """
        if self.strict:
            raise UsageError(f"--strict: {name}: {reason}")
        self.refused[name] = reason
        typer.echo(f"{name} is left out: {reason}", err=True)

    def fail(self, step: Steps, names: Sequence[str], name: str, error: Exception) -> None:
        """Record the error of a target's rewrite or lowering; the export goes on with the others."""
        if self.debug:
            traceback.print_exception(error)
        self.failed[name] = str(_in_one_line(error, str(step.current).removeprefix(f"{name}: "), names))
        typer.echo(f"{name} failed, and the export goes on without it: {self.failed[name]}", err=True)


def check_dtype(dtype: str | None, options: "QuantizationOptions") -> None:
    """Check the option --dtype."""
    import torch

    from et_cuda_passes.hf.options import dtype_problem

    known = ("float32", "bfloat16", "float16")
    if dtype is None:
        return
    if dtype not in known:
        raise UsageError(f"--dtype {dtype}: write one of {', '.join(known)}")
    if problem := dtype_problem(getattr(torch, dtype), options.targets, options.cast_to_bf16):
        raise UsageError(f"--dtype {dtype}: {in_options(problem)}")


def refused_targets_of(options: "QuantizationOptions", strict: bool) -> dict[str, str]:
    """The targets that are left out, each with the reason, after a line about each of them.

    Raises:
        UsageError: all are, or one is with ``--strict``.
    """
    from et_cuda_passes.executorch.lower import no_lowering
    from et_cuda_passes.hf.options import folded_targets, refused_targets
    from et_cuda_passes.targets import get_target

    refused = {name: text for name in options.targets if (text := no_lowering(get_target(name)))}
    refused = {name: in_options(text) for name, text in refused_targets(options).items()} | refused
    if len(refused) == len(options.targets):
        raise UsageError("; ".join(refused.values()))
    folded = {name: in_options(text) for name, text in folded_targets(options).items() if name not in refused}
    if strict and (problems := refused | folded):
        raise UsageError("--strict: " + "; ".join(f"{name}: {text}" for name, text in problems.items()))
    for name, text in refused.items():
        typer.echo(f"{name} is left out: {text}", err=True)
    for name, text in folded.items():
        typer.echo(f"{name}: {text}", err=True)
    return refused


def with_dynamic_sizes(names: list[str], unwritten: Unwritten) -> list[str]:
    """The targets that take dynamic sizes; the others are left out.

    Raises:
        UsageError: none does, or one does not and the option --strict is given.
    """
    from et_cuda_passes.targets import get_target

    without = [name for name in names if not get_target(name).dynamic_sizes]
    reason = (
        "it takes inputs of fixed sizes, and those of a model of text are dynamic: export it from Python, with "
        "EtConfig(dynamic=False)"
    )
    if without == names:
        raise UsageError(f"--target {','.join(names)}: {reason}")
    for name in without:
        unwritten.refuse(name, reason)
    return [name for name in names if name not in without]


def print_targets(finished: list[str], lacking: dict[str, str], unwritten: Unwritten) -> None:
    """Print a table of the targets: written, written packed, left out, or failed."""
    rows = [
        *((name, "written") for name in finished),
        *((name, f"written packed: lowering needs {text}") for name, text in lacking.items()),
        *unwritten.texts().items(),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        typer.echo(f"{name:<{width}}  {text}")


def problem_of(
    folder: Path, lacking: dict[str, str], unwritten: Unwritten, compile_specs: Mapping[str, str]
) -> str | None:
    """The error about targets that are not finished, left out, or failed; None without one."""
    texts = [f"{name} is left out: {text}" for name, text in unwritten.refused.items()]
    texts += [f"{name} failed: {text}" for name, text in unwritten.failed.items()]
    if lacking:
        texts.append(_unfinished(folder, lacking, compile_specs))
    return "; ".join(texts) or None


def spec_arguments(compile_specs: Mapping[str, str]) -> list[str]:
    """The options of a command that give compile specs."""
    return [part for key, value in compile_specs.items() for part in ("--compile-spec", f"{key}={value}")]


def _unfinished(folder: Path, lacking: dict[str, str], compile_specs: Mapping[str, str]) -> str:
    """The error about targets that this machine cannot finish, with the command that goes on."""
    texts = "; ".join(f"lowering to {name} needs {each}" for name, each in lacking.items())
    given = {"cuda": spec_arguments(compile_specs)}
    commands = (
        shlex.join(["et-cuda-passes", "lower", str(folder), "--target", name, *given.get(name, [])]) for name in lacking
    )
    return (
        f"{texts}. The packed programs are in {folder}; on a machine that has it, go on with: {' && '.join(commands)}"
    )
