"""The command line: lower a saved program for a target, report the outcomes for a target, list the rules, run.

Exit codes: 0 success, 1 the lowering or a run failed or an expectation is unmet, 2 bad usage. The result of a command
goes to stdout, progress and errors go to stderr.
"""

import json
import re
import shlex
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import et_cuda_passes as ecp
from et_cuda_passes._versions import require_version
from et_cuda_passes.cli.app import App, Imports, NoPlugins, StrictPlugins, common_options
from et_cuda_passes.cli.console import (
    LoweringError,
    Steps,
    UsageError,
    check_writable,
    handle_errors,
    handle_errors_without_torch,
    list_files,
    one_line,
)
from et_cuda_passes.cli.exporting import export, finish, is_export
from et_cuda_passes.cli.generating import generate
from et_cuda_passes.cli.listing import all_rules, as_text
from et_cuda_passes.cli.matching import match
from et_cuda_passes.cli.new_rule import new_rule
from et_cuda_passes.cli.options import (
    TARGETS,
    ComponentName,
    Debug,
    Device,
    ExecutableTarget,
    Gpu,
    InputsPath,
    Json,
    ModelPath,
    RandomSeed,
    TargetName,
    TargetOfExport,
    Trust,
)

# The functions below import what they need, so that --help does not import torch.
if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from et_cuda_passes.executorch.lower import Progress
    from et_cuda_passes.executorch.packed import Model

require_version("typer")
require_version("rich")

app = App(
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
    with handle_errors_without_torch():
        about = all_rules()
        typer.echo(json.dumps(about, indent=2) if as_json else as_text(about))


app.command()(export)
app.command()(generate)
app.command()(match)
app.command()(new_rule)


@app.command()
def run(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .pte lowered for cuda, or the folder of an export.")
    ],
    data: Annotated[
        Path | None, typer.Option(metavar="PTD", help="Its .ptd; by default the .ptd beside it.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="The method of a .pte; default: forward.", show_default=False)
    ] = None,
    component: ComponentName = None,
    target: TargetOfExport = None,
    inputs: InputsPath = None,
    random_seed: RandomSeed = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Execute the compiled libraries in MODEL, which can do anything that you can."),
    ] = False,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Measure the time of the method; each run mutates its buffers.")
    ] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Run a method of MODEL, or a component of an export, and print a summary of each output.

    Without --inputs, the inputs are random: normally distributed floats, integers 0 and 1, sizes at their upper bounds.
    Those of an export are tokens, positions, masks and a cache that belong together.
    """
    with handle_errors(debug):
        from et_cuda_passes.cli.running import run_model

        run_model(model, data, method, component, target, inputs, random_seed, trust, benchmark, device)


@app.command()
def verify(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A .pt2 from torch.export.save, a packed one, or the folder of an export."
        ),
    ],
    target: ExecutableTarget = None,
    component: ComponentName = None,
    original: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model that was exported, as --model of export.", show_default=False),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="A GGUF file with the weights of --model.", show_default=False)
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Largest relative error of an output. The default depends on its dtype: 2^-5 for bfloat16, 2^-8 for "
            "float16, 2^-13 for float32, at least 2^-6 with 8-bit activations; integers must be equal.",
            show_default=False,
        ),
    ] = None,
    inputs: InputsPath = None,
    random_seed: RandomSeed = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Read MODEL as torch.export.load does, which may run code from it; or execute the compiled libraries "
            "of an export.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Lower MODEL for a target, run it, and compare it with the original program in eager; writes no file.

    Without --inputs or --random-seed, the inputs are the example inputs that MODEL was exported with. Random inputs
    have the same shapes; integers stay in their range.

    The folder of an export is not lowered again. Its files are checked, and its components run on random inputs of the
    shortest length, the longest, and one between. With --model, the outputs are compared with those of that model in
    eager with the same quantized weights, computed in float32. Without it, those of the targets are compared with each
    other.
    """
    with handle_errors(debug):
        from et_cuda_passes.cli.verifying import verify_model

        verify_model(model, target, component, original, gguf, tolerance, inputs, random_seed, trust)


def _print_versions(wanted: bool) -> None:
    if wanted:
        typer.echo(
            ", ".join(f"{name} {_version(name)}" for name in ("et-cuda-passes", "torch", "torchao", "executorch"))
        )
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    imported_packages: Imports = None,
    no_plugins: NoPlugins = False,
    strict_plugins: StrictPlugins = False,
    versions: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """The options before a command."""
    context.with_resource(common_options(imported_packages, no_plugins, strict_plugins))


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
