"""``accuracy``: the error of each quantized layer, and a recipe that makes it smaller."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from et_cuda_passes.cli import documents
from et_cuda_passes.cli.console import (
    LoweringError,
    Steps,
    UsageError,
    check_output_file,
    handle_errors,
    list_files,
    one_line,
    print_json,
    write_files,
    write_reports,
)
from et_cuda_passes.cli.options import TARGETS, Debug, Json, ModelPath, RandomSeed, Trust, complete_targets, completes

# The functions below import what they need, so that --help does not import torch.
if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from et_cuda_passes.comparison import FloatWeights
    from et_cuda_passes.hf.suggestion import Suggestion


class AccuracyError(LoweringError):
    """A layer is less accurate than demanded, or a ratio is out of reach; exits with 1."""


def accuracy(
    model: ModelPath,
    float_model: Annotated[
        Path | None,
        typer.Option(
            "--float",
            metavar="FILE",
            help="The program before its quantization (.pt2), or its weights by FQN (.safetensors).",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help=f"Compare with the rewrite for one of {', '.join(TARGETS)}, or MODULE:NAME.",
            show_default=False,
            autocompletion=complete_targets,
        ),
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--inputs",
            metavar="SAFETENSORS",
            help="The inputs of one call, named 0, 1, ... in order; may be given several times.",
        ),
    ] = None,
    random_seed: RandomSeed = None,
    fail_below: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="Exit with 1 if the rewritten form of a layer has a lower ratio against the exported one.",
            show_default=False,
        ),
    ] = None,
    target_snr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Suggest layers to move to 8 bits, until the whole output has this ratio."),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="The most bytes of all weights that a suggestion may lead to."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="TOML", help="Write the suggestion to this file, for export.")
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            "--algorithm",
            help="How the export chooses 8-bit scales: hqq or affine.",
            autocompletion=completes("hqq", "affine"),
        ),
    ] = "hqq",
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report page.")] = None,
    model_explorer: Annotated[
        Path | None,
        typer.Option(
            "--model-explorer",
            metavar="FILE",
            help="Write the outcomes and ratios as node data for Model Explorer, which shows them on the graph of "
            "MODEL.",
        ),
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure the signal-to-noise ratio of each quantized layer of MODEL, in dB.

    With --float, the quantized layer is compared with the float one, on the inputs that the float layer has. With
    --target, the rewritten form is compared with the exported one, on the inputs that the exported one has. Without
    --inputs or --random-seed, the inputs are the example inputs that MODEL was exported with.

    With --target-snr or --max-bytes, a recipe of layers to move from 4 to 8 bits is written to --recipe: give it to
    export, with the same --qlinear as before.
    """
    with handle_errors(debug):
        suggests = target_snr is not None or max_bytes is not None
        files = {"--html": html, "--model-explorer": model_explorer, "--recipe": recipe}
        _check_options(float_model, target, fail_below, target_snr, suggests, algorithm, files, model)
        import et_cuda_passes as ecp
        from et_cuda_passes.cli.inputs import check_one_source, read_inputs

        check_one_source(next(iter(inputs or ()), None), random_seed)

        sets = [tuple(read_inputs(path)) for path in inputs] if inputs else None
        suggestion, unreached = None, None
        # A suggestion has three steps of its own.
        with Steps(2 + (float_model is not None) + 3 * suggests) as step:
            step(f"loading {model}")
            program = _load(model, target, trust)
            floats = None
            if float_model is not None:
                step(f"loading {float_model}")
                floats = _float_weights(float_model, trust)
            step("measuring the layers")
            try:
                result = ecp.accuracy(program, target, floats, sets, random_seed, progress=step.part)
            except ValueError as error:
                raise UsageError(_in_options(str(error))) from error
            if suggests:
                assert floats is not None
                try:
                    suggestion = ecp.suggest_recipe(
                        program,
                        floats,
                        target_snr,
                        max_bytes,
                        sets,
                        random_seed,
                        algorithm=algorithm,
                        progress=step,
                        part=step.part,
                    )
                except ValueError as error:
                    # The ratios are a result all the same.
                    unreached = AccuracyError(_in_options(str(error)))
        if as_json:
            print_json(documents.Accuracy(**result.to_dict(), suggestion=_suggestion(suggestion)))
        else:
            typer.echo(str(result))
            if suggestion:
                typer.echo(str(suggestion))
        reports = {result.report.target: result.report} if result.report else {}
        written = write_reports(reports, html, model_explorer, model.name)
        if suggestion and recipe and suggestion.moves:
            from et_cuda_passes.hf.suggestion import recipe_text

            write_files({recipe: recipe_text(suggestion.recipe, str(suggestion).partition("\n")[0])})
            written.append(recipe)
        elif suggestion and not as_json:
            typer.echo(f"no layer needs to be moved, so {recipe} is not written")
        if written and not as_json:
            list_files(written)
        if fail_below is not None and (failed := result.below(fail_below)):
            worst = min(failed, key=lambda layer: -math.inf if layer.rewritten_db is None else layer.rewritten_db)
            count = f"{len(failed)} layer{'s are' if len(failed) > 1 else ' is'}"
            raise AccuracyError(
                f"{count} below {fail_below:g} dB after the rewrite; the worst is {worst.layer} ({worst.node})"
            )
        if unreached:
            raise unreached


def _check_options(
    float_model: Path | None,
    target: str | None,
    fail_below: float | None,
    target_snr: float | None,
    suggests: bool,
    algorithm: str,
    files: Mapping[str, Path | None],
    model: Path,
) -> None:
    if target is None and float_model is None:
        raise UsageError("there is nothing to compare with: give --float, --target, or both")
    if target is None and (fail_below is not None or files["--html"] or files["--model-explorer"]):
        raise UsageError("--fail-below, --html and --model-explorer are about the rewrite for a target: give --target")
    for name, value in (("--fail-below", fail_below), ("--target-snr", target_snr)):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{name} {value}: give a number of dB")
    if suggests and float_model is None:
        raise UsageError("a suggestion compares with floating-point weights: give --float")
    if suggests != (files["--recipe"] is not None):
        raise UsageError(
            "--recipe is the file to which a suggestion is written: give it with --target-snr or --max-bytes"
        )
    if algorithm not in ("hqq", "affine"):
        raise UsageError(f"--algorithm {algorithm}: give hqq or affine")
    for option, path in files.items():
        if path is not None:
            check_output_file(path, option, model)


def _load(model: Path, target: str | None, trust: bool) -> "ExportedProgram":
    """The program in MODEL as it was exported."""
    import et_cuda_passes as ecp
    from et_cuda_passes.executorch.packed import load_model

    if target is None:
        return ecp.load(model, trust)
    try:
        ecp.get_target(target)
    except ValueError as error:
        raise UsageError(str(error)) from None
    loaded = load_model(model, target, trust)
    if loaded.report is not None or loaded.packed:
        raise UsageError(f"{model} is packed already: give the program as it was before, from torch.export.save")
    return loaded.program


def _float_weights(path: Path, trust: bool) -> "FloatWeights":
    """The program or the tensors in the file of ``--float``."""
    import et_cuda_passes as ecp

    if path.suffix != ".safetensors":
        return ecp.load(path, trust)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UsageError("a .safetensors file needs safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, OSError and others
        raise UsageError(f"--float {path} cannot be read as safetensors ({one_line(error)})") from error


def _in_options(text: str) -> str:
    """A message for Python in terms of the command line."""
    for name, option in (
        ("target_snr=", "--target-snr "),
        ("max_bytes=", "--max-bytes "),
        ("give inputs", "give --inputs"),
        ("inputs and seed", "--inputs and --random-seed"),
    ):
        text = text.replace(name, option)
    return text


def _suggestion(suggestion: "Suggestion | None") -> documents.Suggestion | None:
    from dataclasses import asdict

    from et_cuda_passes.graph.decibels import decibels_to_json

    if suggestion is None:
        return None
    values = {key: decibels_to_json(value) for key, value in asdict(suggestion).items()}
    moves = [{key: decibels_to_json(value) for key, value in move.items()} for move in values.pop("moves")]
    return documents.Suggestion([documents.Move(**move) for move in moves], **values)
