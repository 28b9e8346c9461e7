"""The command line: lower a saved program for a target, report the outcomes for a target, list the rules, run.

Exit codes: 0 success, 1 the command failed or its answer is no (an expectation is unmet, an output is wrong, the
installation lacks something), 2 bad usage. The result of a command goes to stdout, progress and errors go to stderr.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import et_cuda_passes as ecp
from et_cuda_passes._versions import require_version
from et_cuda_passes.cli.accuracy import accuracy
from et_cuda_passes.cli.app import App, Imports, NoPlugins, StrictPlugins, common_options
from et_cuda_passes.cli.console import (
    LoweringError,
    Steps,
    UsageError,
    check_output_file,
    check_writable,
    handle_errors,
    handle_errors_without_torch,
    list_files,
    one_line,
    print_json,
    write_reports,
)
from et_cuda_passes.cli.diagnosing import doctor
from et_cuda_passes.cli.documents import Explain, Lower, ReportData, files_of
from et_cuda_passes.cli.export_errors import spec_arguments
from et_cuda_passes.cli.exporting import cache_of, compile_specs_of, export, finish, is_export
from et_cuda_passes.cli.generating import generate
from et_cuda_passes.cli.listing import all_rules, as_text, rules_document
from et_cuda_passes.cli.matching import match
from et_cuda_passes.cli.matrix import MatrixCommand, matrix
from et_cuda_passes.cli.new_rule import new_rule
from et_cuda_passes.cli.options import (
    TARGETS,
    Cache,
    CacheLimit,
    CompileSpecs,
    ComponentName,
    Debug,
    Device,
    ExecutableTarget,
    Gpu,
    InputsPath,
    Json,
    ModelPath,
    RandomSeed,
    Stream,
    TargetName,
    TargetNames,
    TargetOfExport,
    Trust,
    complete_expectations,
)

# The functions below import what they need, so that --help does not import torch.
if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from et_cuda_passes.executorch.packed import Model

require_version("typer")
require_version("rich")

app = App(
    help="Rewrite a generically quantized exported program for an ExecuTorch backend, and lower it.",
    no_args_is_help=True,
    # An error is one line, not a box, and a traceback has Python's form.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Stage(StrEnum):
    """The stages after which ``lower`` can stop."""

    rewrite = "rewrite"


@app.command(
    epilog="Exits with 1 if the program cannot be lowered on this machine, or a count of --expect is another one."
)
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
        typer.Option(
            metavar="NAME=COUNT",
            help="Fail unless a rule or status has this count (linear_int4=211).",
            autocompletion=complete_expectations,
        ),
    ] = None,
    as_json: Json = False,
    gpu: Gpu = None,
    stream: Stream = None,
    cache: Cache = None,
    cache_limit: CacheLimit = None,
    compile_spec: CompileSpecs = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Rewrite MODEL for a target, and write the files that it runs and report.json.

    cuda, metal: .pte and .ptd; xnnpack: .pte; cpu: an AOTInductor .pt2. The folder of an export that another machine
    could not finish gets what it lacks.
    """
    with handle_errors(debug):
        import torch

        from et_cuda_passes.executorch.lower import atomic_output, lowering_steps, missing_requirement, no_lowering
        from et_cuda_passes.executorch.lower import lower as lower_program
        from et_cuda_passes.executorch.packed import check_unchanged, file_state, load_model, save_packed
        from et_cuda_passes.rewrite import check_expectations
        from et_cuda_passes.targets.compatibility import is_host_specific, packed_layouts
        from et_cuda_passes.targets.gpu import gpu_named_in

        chosen = _check_target(target, gpu)
        if is_export(model):
            if output_dir not in (Path(), model) or stop_after or expect or gpu or stream:
                raise UsageError(
                    f"{model} is an export, which is finished in its folder: give --target and --compile-spec alone"
                )
            finish(model, target, as_json, compile_spec or [])
            return
        if not stop_after and (problem := no_lowering(chosen)):
            raise UsageError(f"{problem}; or write the packed program with --stop-after rewrite")
        specs = compile_specs_of(compile_spec or [], [chosen.name])
        if specs and stop_after:
            raise UsageError(
                "--compile-spec is an option of the lowering, which --stop-after rewrite leaves out: give it to the "
                "command that lowers the packed program"
            )
        if stream is not None:
            check_writable(stream, "--stream")
        packing = {"stream": stream, "cache": cache_of(cache, cache_limit)}
        demanded = _expectations(expect or [], target)
        check_writable(output_dir)
        names = "|".join(map(re.escape, (*TARGETS, chosen.name)))
        stem = re.sub(rf"\.({names})\.packed$", "", model.stem) + f".{chosen.name}"
        packed = output_dir / f"{stem}.packed.pt2"
        steps = Steps(2 + (1 if stop_after else lowering_steps(chosen, 1)))
        with steps as step:
            step(f"loading {model}")
            before = file_state(model)
            given = load_model(model, target, trust, mapped=stream is not None)
            if stop_after and packed.resolve() == model.resolve():
                raise UsageError(
                    f"the output {packed} would replace {model}; it is packed already, or give another --output-dir"
                )
            program, report = _rewritten(given, target, gpu, step, packing)
            if stream is not None:
                check_unchanged(model, before, replaced=True)

            def write_report(folder: Path) -> None:
                (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
                (folder / "report.html").write_text(report.to_html(model.name), encoding="utf-8")

            with atomic_output(output_dir) as staging:
                write_report(staging)
        files = [output_dir / "report.json", output_dir / "report.html"]

        def print_result(error: str | None = None) -> None:
            if as_json:
                capability = torch.backends.cpu.get_cpu_capability() if host_specific else None
                print_json(Lower(target, ReportData(report.to_dict()), files_of(files), capability, error))

        host_specific = is_host_specific(packed_layouts(program))
        if not as_json:
            typer.echo(report_text(given, report))
        try:
            check_expectations(demanded, report)
        except ecp.ExpectationError as error:
            problem = f"{str(error).splitlines()[0]}; nothing was lowered"
            print_result(problem)
            raise LoweringError(problem) from error

        lacking = None if stop_after else missing_requirement(target, gpu_named_in(program))
        with steps as step:
            if not stop_after and not lacking:
                try:
                    with atomic_output(output_dir) as staging:
                        written = lower_program(program, target, staging, stem, step, specs)
                        # Again: two runs can write to one folder, which then has the files of one of them.
                        write_report(staging)
                    files += [output_dir / path.name for path in written]
                except Exception as error:
                    problem = f"{model} could not be lowered for {target}: {one_line(error)}"
                    print_result(problem)
                    raise LoweringError(f"{problem} (--debug shows the traceback)") from error
            elif lacking and given.packed and gpu is None:
                packed = model
            else:
                step(f"saving {packed}")
                with atomic_output(output_dir) as staging:
                    save_packed(program, report, staging / packed.name)
                    write_report(staging)
                files.append(packed)
        if not as_json:
            list_files(files)
        if host_specific and not as_json:
            typer.echo(
                f"packed for {torch.backends.cpu.get_cpu_capability()}: runs on hosts of this instruction set only"
            )
        if lacking:
            command = ["et-cuda-passes", "lower", str(packed), "--target", target, "--output-dir", str(output_dir)]
            command += spec_arguments(specs)
            problem = (
                f"lowering to {target} needs {lacking}. The packed program is {packed}; on a machine that has it, "
                f"continue with: {shlex.join(command)}"
            )
            print_result(problem)
            raise LoweringError(problem)
        print_result()


@app.command()
def explain(
    model: ModelPath,
    target: TargetNames,
    as_json: Json = False,
    drawings: Annotated[
        bool, typer.Option("--drawings", help="Draw the operators before and after each distinct rewrite, as text.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report as a page, which needs no network."),
    ] = None,
    model_explorer: Annotated[
        Path | None,
        typer.Option(
            "--model-explorer",
            metavar="FILE",
            help="Write the outcomes as node data for Model Explorer, which shows them on the graph of MODEL; with "
            "several targets one file for each, as in FILE.cuda.json.",
        ),
    ] = None,
    gpu: Gpu = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Print the outcome of every quantized weight of MODEL, for one target or for several."""
    with handle_errors(debug):
        from et_cuda_passes.executorch.packed import load_model

        names = _target_names(target, gpu)
        for path, option in ((html, "--html"), (model_explorer, "--model-explorer")):
            if path is not None:
                check_output_file(path, option, model)
        reports, texts = {}, []
        packed: dict[str, int] = {}
        with Steps(2 * len(names)) as step:
            for name in names:
                step(f"loading {model}")
                given = load_model(model, name, trust)
                packed |= given.packed
                _, reports[name] = _rewritten(given, name, gpu if _has_gpu(name) else None, step)
                texts.append(report_text(given, reports[name]))
                texts += [reports[name].drawn()] if drawings and reports[name].drawings else []
        if as_json:
            print_json(Explain(packed, {name: ReportData(report.to_dict()) for name, report in reports.items()}))
        else:
            typer.echo("\n\n".join(texts) if len(names) > 1 or drawings else texts[0])
        written = write_reports(reports, html, model_explorer, model.name)
        if written and not as_json:
            list_files(written)


@app.command()
def rules(as_json: Json = False) -> None:
    """List the passes of each target in order, and the rewrite, requirements and options of every rule."""
    with handle_errors_without_torch():
        about = all_rules()
        if as_json:
            print_json(rules_document(about))
        else:
            typer.echo(as_text(about))


app.command(
    epilog="Exits with 1 if a layer is below --fail-below, or a suggestion does not reach its ratio within its bytes."
)(accuracy)
app.command(epilog="Exits with 1 if the export fails, or a target cannot be finished on this machine.")(export)
app.command(epilog="Exits with 1 if the export does not run.")(generate)
app.command()(match)
app.command(cls=MatrixCommand, epilog="Exits with 1 if a job fails.")(matrix)
app.command()(new_rule)
app.command(epilog="Exits with 1 if something is wrong.")(doctor)


@app.command(epilog="Exits with 1 if MODEL does not run.")
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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a method of MODEL, or a component of an export, and print a summary of each output.

    Without --inputs, the inputs are random: normally distributed floats, integers 0 and 1, sizes at their upper bounds.
    Those of an export are tokens, positions, masks and a cache that belong together.
    """
    with handle_errors(debug):
        from et_cuda_passes.cli.running import run_model

        run_model(model, data, method, component, target, inputs, random_seed, trust, benchmark, device, as_json)


@app.command(epilog="Exits with 1 if an output is wrong, a file is damaged, or MODEL cannot be lowered or run.")
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
    as_json: Json = False,
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

        verify_model(model, target, component, original, gguf, tolerance, inputs, random_seed, trust, as_json)


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
    given: "Model", target: str, gpu: str | None, step: Steps, packing: Mapping[str, Any] = MappingProxyType({})
) -> tuple["ExportedProgram", "ecp.Report"]:
    """The program for ``target``, and the report of its rewrite, now or at the time of packing.

    ``packing`` are options of :func:`et_cuda_passes.rewrite`.
    """
    if given.report is not None and gpu is None:
        return given.program, given.report
    step(f"rewriting for {target}")
    if given.report is None:
        return ecp.rewrite(given.program, target, gpu=gpu, progress=step.part, **packing)
    program, report = ecp.rewrite(given.program, target, passes=[], gpu=gpu)
    # Explanations describe the tilings for the GPU that was named before.
    outcomes = [replace(outcome, explanation="") for outcome in given.report.outcomes]
    return program, replace(given.report, outcomes=outcomes, notes=report.notes, tilings=report.tilings)


def report_text(given: "Model", report: "ecp.Report") -> str:
    """The report as text, after the layouts that MODEL has already."""
    if not given.packed:
        return str(report)
    layouts = ", ".join(f"{count} x {layout}" for layout, count in given.packed.items())
    return f"MODEL is packed already: {layouts}\n{report}"


def _target_names(text: str, gpu: str | None) -> list[str]:
    """The targets of ``explain``. A GPU concerns those that have one."""
    names = [name.strip() for name in text.split(",")]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--target {text} has {twice} twice; name each target once")
    for name in names:
        _check_target(name, gpu if len(names) == 1 or _has_gpu(name) else None)
    if gpu is not None and not any(map(_has_gpu, names)):
        _check_target(names[0], gpu)
    return names


def _has_gpu(target: str) -> bool:
    return _check_target(target, None).gpu is not None


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"
