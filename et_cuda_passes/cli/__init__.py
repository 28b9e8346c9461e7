"""The command line: lower a saved program for a target, report the outcomes for a target, list the rules, run.

Exit codes: 0 success, 1 the lowering or a run failed or an expectation is unmet, 2 bad usage. The result of a command
goes to stdout, progress and errors go to stderr.
"""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import et_cuda_passes as ecp
from et_cuda_passes._versions import require_version
from et_cuda_passes.cli.console import (
    TARGETS,
    LoweringError,
    Steps,
    UsageError,
    check_writable,
    handle_errors,
    list_files,
    one_line,
    quiet_import,
)
from et_cuda_passes.cli.exporting import export, finish, is_export
from et_cuda_passes.cli.generating import generate
from et_cuda_passes.kernels.gpus import GPUS

# The functions below import what they need, so that --help does not import torch.
if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from et_cuda_passes.executorch.lower import Progress
    from et_cuda_passes.executorch.packed import Model

require_version("typer")
require_version("rich")

_LATER = {
    "run": ("running", "Run a method of MODEL and print a summary of each output."),
    "verify": (
        "verifying",
        "Lower MODEL for a target, run it, and compare it with the original program in eager; writes no file.",
    ),
}
"""Commands whose modules import torch: the module, and the first line of the help."""


class _Commands(TyperGroup):
    """The commands; those in :data:`_LATER` are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands, in the order of the help."""
        return [*super().list_commands(ctx), *_LATER]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command as it is listed in the help."""
        if cmd_name not in _LATER:
            return super().get_command(ctx, cmd_name)
        return TyperCommand(cmd_name, help=_LATER[cmd_name][1], rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command as it is called, and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in _LATER:
            with quiet_import("--debug" in rest):
                module = import_module(f"et_cuda_passes.cli.{_LATER[name][0]}")
            alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            alone.command(name)(getattr(module, name))
            command = typer.main.get_command(alone)
        return name, command, rest


app = typer.Typer(
    cls=_Commands,
    help="Rewrite a generically quantized exported program for an ExecuTorch backend, and lower it.",
    no_args_is_help=True,
    add_completion=False,
    # An error is one line, not a box, and a traceback has Python's form.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Stage(StrEnum):
    """The stages after which ``lower`` can stop."""

    rewrite = "rewrite"


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A .pt2 from torch.export.save, or a packed one.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help=f"One of {', '.join(TARGETS)}, or MODULE:NAME.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of an error.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Read MODEL as torch.export.load does, which may run code from it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", help=f"For cuda, the GPU that will run it: {', '.join(GPUS)}, or as in sm_90:114."),
]


@app.command()
def lower(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A .pt2 from torch.export.save, a packed one, or the folder of an unfinished export."
        ),
    ],
    target: TargetName,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="The folder of the files; created if missing.")
    ] = Path(),
    stop_after: Annotated[
        Stage | None, typer.Option(help="Write the packed program, for lowering on another machine.")
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COUNT", help="Fail unless a rule or status has this count (linear_int4=211)."),
    ] = None,
    gpu: Gpu = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Rewrite MODEL for a target, and write the files that it runs and report.json.

    cuda, metal: .pte and .ptd; xnnpack: .pte; cpu: an AOTInductor .pt2. The folder of an export that another machine
    could not finish gets what it lacks.
    """
    with handle_errors(debug):
        import torch

        from et_cuda_passes.executorch.lower import atomic_output, missing_requirement, no_lowering
        from et_cuda_passes.executorch.lower import lower as lower_program
        from et_cuda_passes.executorch.packed import load_model, save_packed
        from et_cuda_passes.rewrite import check_expectations
        from et_cuda_passes.targets.compatibility import is_host_specific, packed_layouts
        from et_cuda_passes.targets.gpu import gpu_named_in

        chosen = _check_target(target, gpu)
        if is_export(model):
            if output_dir not in (Path(), model) or stop_after or expect or gpu:
                raise UsageError(f"{model} is an export, which is finished in its folder: give --target alone")
            finish(model, target)
            return
        if not stop_after and (problem := no_lowering(chosen)):
            raise UsageError(f"{problem}; or write the packed program with --stop-after rewrite")
        demanded = _expectations(expect or [], target)
        check_writable(output_dir)
        names = "|".join(map(re.escape, (*TARGETS, chosen.name)))
        stem = re.sub(rf"\.({names})\.packed$", "", model.stem) + f".{chosen.name}"
        packed = output_dir / f"{stem}.packed.pt2"
        with Steps() as step:
            step(f"loading {model}")
            given = load_model(model, target, trust)
            if stop_after and packed.resolve() == model.resolve():
                raise UsageError(
                    f"the output {packed} would replace {model}; it is packed already, or give another --output-dir"
                )
            program, report = _rewritten(given, target, gpu, step)
            with atomic_output(output_dir) as staging:
                (staging / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        files = [output_dir / "report.json"]
        print_report(given, report)
        try:
            check_expectations(demanded, report)
        except ecp.ExpectationError as error:
            raise LoweringError(f"{str(error).splitlines()[0]}; nothing was lowered") from error

        lacking = None if stop_after else missing_requirement(target, gpu_named_in(program))
        with Steps() as step:
            if not stop_after and not lacking:
                try:
                    files += lower_program(program, target, output_dir, stem, step)
                except Exception as error:
                    raise LoweringError(
                        f"{model} could not be lowered for {target}: {one_line(error)} (--debug shows the traceback)"
                    ) from error
            elif lacking and given.packed and gpu is None:
                packed = model
            else:
                step(f"saving {packed}")
                with atomic_output(output_dir) as staging:
                    save_packed(program, report, staging / packed.name)
                files.append(packed)
        list_files(files)
        if is_host_specific(packed_layouts(program)):
            typer.echo(
                f"packed for {torch.backends.cpu.get_cpu_capability()}: runs on hosts of this instruction set only"
            )
        if lacking:
            command = ["et-cuda-passes", "lower", str(packed), "--target", target, "--output-dir", str(output_dir)]
            raise LoweringError(
                f"lowering to {target} needs {lacking}. The packed program is {packed}; on a machine that has it, "
                f"continue with: {shlex.join(command)}"
            )


@app.command()
def explain(
    model: ModelPath,
    target: TargetName,
    as_json: Json = False,
    gpu: Gpu = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Print the outcome of every quantized weight of MODEL for a target; writes no file."""
    with handle_errors(debug):
        from et_cuda_passes.executorch.packed import load_model

        _check_target(target, gpu)
        with Steps() as step:
            step(f"loading {model}")
            given = load_model(model, target, trust)
            _, report = _rewritten(given, target, gpu, step)
        if as_json:
            typer.echo(report.to_json())
        else:
            print_report(given, report)


@app.command()
def rules(as_json: Json = False) -> None:
    """List the passes of each target in order, and the rewrite, requirements and options of every rule."""
    # `make docs` writes this file from the code. The rules themselves import torch.
    text = (Path(__file__).parent / "rules.json").read_text(encoding="utf-8")
    if as_json:
        typer.echo(text, nl=False)
        return
    about = json.loads(text)
    listed = {name: each["passes"] for name, each in about.items()}
    lines = []
    for name, passes in listed.items():
        lines += [f"{name}: {about[name]['summary']}", f"  passes: {', '.join(entry['name'] for entry in passes)}"]
    for entry in {entry["name"]: entry for passes in listed.values() for entry in passes}.values():
        lines += ["", entry["name"], f"  {entry['rewrite']}"]
        for need in entry["requires"]:
            hint = f"; {need['hint']}" if need["hint"] else ""
            lines.append(f"  requires {need['wanted']}{hint}")
        lines += [f"  option {name} = {default}" for name, default in entry["options"].items()]
    typer.echo("\n".join(lines))


app.command()(export)
app.command()(generate)


def _print_versions(wanted: bool) -> None:
    if wanted:
        typer.echo(
            ", ".join(f"{name} {_version(name)}" for name in ("et-cuda-passes", "torch", "torchao", "executorch"))
        )
        raise typer.Exit


def _import(packages: Sequence[str]) -> None:
    """Import the packages of ``--import``."""
    for package in packages:
        try:
            with quiet_import(False):
                import_module(package)
        except Exception as error:  # the import of another package raises anything
            raise typer.BadParameter(
                f"{package} cannot be imported ({one_line(error)}); install it, or put its folder on PYTHONPATH"
            ) from error


@app.callback()
def _options(
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="PACKAGE", help="Import a package first, which registers operators of its own."
        ),
    ] = None,
    versions: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """The options before a command."""
    _import(packages or ())


def main() -> None:
    """The entry point of ``et-cuda-passes``."""
    app(prog_name="et-cuda-passes")


def _check_target(target: str, gpu: str | None) -> "ecp.Target":
    from et_cuda_passes.targets.gpu import check_gpu

    try:
        chosen = ecp.get_target(target)
        check_gpu(gpu, chosen)
        return chosen
    except ValueError as error:
        raise UsageError(str(error)) from None


def _expectations(texts: list[str], target: str) -> dict[str, int]:
    """The counts of ``--expect``. Their names are checked before a slow step begins."""
    from et_cuda_passes.rewrite import check_expected

    demanded: dict[str, int] = {}
    for text in texts:
        parts = re.fullmatch(r"(\w+)=(\d+)", text)
        if parts is None:
            raise UsageError(f"--expect {text}: write NAME=COUNT, such as linear_int4=211 or missed=0")
        if parts[1] in demanded:
            raise UsageError(f"--expect {text}: {parts[1]} has a count already; give each name one")
        demanded[parts[1]] = int(parts[2])
    try:
        check_expected(demanded, [entry.name for entry in ecp.default_passes(target)])
    except ValueError as error:
        raise UsageError(f"--expect: {error}") from None
    return demanded


def _rewritten(
    given: "Model", target: str, gpu: str | None, progress: "Progress"
) -> tuple["ExportedProgram", "ecp.Report"]:
    """The program for ``target``, and the report of its rewrite, now or at the time of packing."""
    if given.report is not None and gpu is None:
        return given.program, given.report
    progress(f"rewriting for {target}")
    if given.report is None:
        return ecp.rewrite(given.program, target, gpu=gpu)
    program, report = ecp.rewrite(given.program, target, passes=[], gpu=gpu)
    # Explanations describe the tilings for the GPU that was named before.
    outcomes = [replace(outcome, explanation="") for outcome in given.report.outcomes]
    return program, replace(given.report, outcomes=outcomes, notes=report.notes)


def print_report(given: "Model", report: "ecp.Report") -> None:
    """Print the report, after the layouts that MODEL has already."""
    if given.packed:
        layouts = ", ".join(f"{count} x {layout}" for layout, count in given.packed.items())
        typer.echo(f"MODEL is packed already: {layouts}")
    typer.echo(str(report))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"
