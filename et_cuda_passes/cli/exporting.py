"""``export``: a model on disk becomes programs for every target, in one folder."""

import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from et_cuda_passes.cli.console import (
    LoweringError,
    Steps,
    UsageError,
    check_writable,
    handle_errors,
    list_files,
    print_json,
)
from et_cuda_passes.cli.documents import Export, Lower, QuantizationData, ReportData, files_of
from et_cuda_passes.cli.export_errors import (
    Unwritten,
    check_dtype,
    in_options,
    option_errors,
    print_targets,
    problem_of,
    refused_targets_of,
    step_errors,
    with_dynamic_sizes,
)
from et_cuda_passes.cli.options import (
    EMBEDDING_SCHEMES,
    SCHEMES,
    Cache,
    CacheLimit,
    CompileSpecs,
    Debug,
    Gpu,
    Json,
    Stream,
    TargetNames,
    completes,
)
from et_cuda_passes.hf.report import QuantizationReport
from et_cuda_passes.unfinished import PREFIX

if TYPE_CHECKING:
    from et_cuda_passes.hf.checkpoint import Checkpoint

_SCHEME = "4w, 8w, 8da4w, 8da8w, '8da4w,8da8w', fpa4w, or one with a target, as cuda:4w."
_LINEAR, _EMBEDDING = completes(*SCHEMES), completes(*EMBEDDING_SCHEMES)
_MANIFEST = "export.json"
_SHORTEST = 8


def _option(name: str, **options: Any) -> Any:
    """An option with the spelling with dashes and the one with underscores."""
    return typer.Option(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), show_default=False, **options)


Text = str | None


def export(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A folder with config.json, a .safetensors or .gguf file, or a Hub name."),
    ],
    target: TargetNames,
    output_dir: Annotated[Path, _option("output-dir", help="The folder for the export; created if missing.")],
    gguf: Annotated[Path | None, typer.Option("--gguf", help="A GGUF file with the weights of --model.")] = None,
    keep_gguf: Annotated[
        bool, _option("keep-gguf", help="Keep the blocks Q4_K, Q5_K and Q6_K of the GGUF file; expand the others.")
    ] = False,
    task: Annotated[
        Text,
        typer.Option("--task", help="As transformers names it: text-generation, fill-mask, ...; default: the model's."),
    ] = None,
    qlinear: Annotated[
        Text, _option("qlinear", help=f"The scheme of the linears and experts: {_SCHEME}", autocompletion=_LINEAR)
    ] = None,
    qlinear_group_size: Annotated[int, _option("qlinear-group-size", help="Default 32; 0 is one scale per row.")] = 32,
    qlinear_packing_format: Annotated[
        Text, _option("qlinear-packing-format", help="auto, tile_packed_to_4d, mma_tiled, mps, ...: the kernel.")
    ] = None,
    qembedding: Annotated[
        Text, _option("qembedding", help="The scheme of the embeddings: 4w or 8w.", autocompletion=_EMBEDDING)
    ] = None,
    qembedding_group_size: Annotated[int, _option("qembedding-group-size", help="Default 0, one scale per row.")] = 0,
    qlinear_encoder: Annotated[
        Text, _option("qlinear-encoder", help="The same for the encoders of a model.", autocompletion=_LINEAR)
    ] = None,
    qlinear_group_size_encoder: Annotated[int, _option("qlinear-group-size-encoder")] = 32,
    qlinear_packing_format_encoder: Annotated[Text, _option("qlinear-packing-format-encoder")] = None,
    qembedding_encoder: Annotated[Text, _option("qembedding-encoder", autocompletion=_EMBEDDING)] = None,
    qembedding_group_size_encoder: Annotated[int, _option("qembedding-group-size-encoder")] = 0,
    algorithm: Annotated[
        str,
        typer.Option(
            "--algorithm", help="How scales are chosen: hqq or affine.", autocompletion=completes("hqq", "affine")
        ),
    ] = "hqq",
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A TOML file with other schemes for some layers.")
    ] = None,
    group_size_fallback: Annotated[
        str,
        _option(
            "group-size-fallback",
            help="For in_features that the group does not divide: adjust, skip, error.",
            autocompletion=completes("adjust", "skip", "error"),
        ),
    ] = "adjust",
    max_length: Annotated[
        int | None,
        _option(
            "max-length",
            min=_SHORTEST,
            help="The largest number of tokens, prompt and answer together; default: the model's, at most 2048.",
        ),
    ] = None,
    dtype: Annotated[
        Text,
        typer.Option(
            "--dtype",
            help="float32, bfloat16 or float16; default: the checkpoint's.",
            show_default=False,
            autocompletion=completes("float32", "bfloat16", "float16"),
        ),
    ] = None,
    gpu: Gpu = None,
    stream: Stream = None,
    cache: Cache = None,
    cache_limit: CacheLimit = None,
    compile_spec: CompileSpecs = None,
    cast_to_bf16: Annotated[
        bool,
        _option("cast-to-bf16", help="cuda and cpu compute a float32 model's quantized layers in bf16; the rest not."),
    ] = False,
    xnnpack_weight_only: Annotated[
        str,
        _option(
            "xnnpack-weight-only",
            help="4w on xnnpack: fold (default, exact float weights), or dynamic-activation (4-bit kernels, which "
            "quantize activations to 8 bits).",
            autocompletion=completes("fold", "dynamic-activation"),
        ),
    ] = "fold",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse the export if one of several targets cannot take the schemes as they are; if a lowering "
            "fails, write nothing.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export in the output folder.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a model of transformers: quantize it, trace it once, and write what each target runs.

    cuda, metal: .pte and .ptd; cpu: an AOTInductor .pt2; the others: .pte. A target that cannot take the schemes, or
    whose lowering fails, is left out, and the exit code is then 1.
    """
    options: dict[str, Any] = {
        "target": target,
        "qlinear": qlinear,
        "qlinear_group_size": qlinear_group_size,
        "qlinear_packing_format": qlinear_packing_format,
        "qembedding": qembedding,
        "qembedding_group_size": qembedding_group_size,
        "qlinear_encoder": qlinear_encoder,
        "qlinear_group_size_encoder": qlinear_group_size_encoder,
        "qlinear_packing_format_encoder": qlinear_packing_format_encoder,
        "qembedding_encoder": qembedding_encoder,
        "qembedding_group_size_encoder": qembedding_group_size_encoder,
        "algorithm": algorithm,
        "recipe": recipe,
        "group_size_fallback": group_size_fallback,
        "cast_to_bf16": cast_to_bf16,
        "xnnpack_weight_only": xnnpack_weight_only,
    }
    with handle_errors(debug):
        # These import torch, which --help does not need.
        from torch import bfloat16

        from et_cuda_passes.executorch.lower import missing_requirement
        from et_cuda_passes.hf.checkpoint import Checkpoint, check_extra
        from et_cuda_passes.hf.options import QuantizationOptions, check_schemes, check_weight_only
        from et_cuda_passes.hf.support import takes_dtype
        from et_cuda_passes.targets import get_target
        from et_cuda_passes.targets.gpu import check_gpu

        with option_errors():
            check_extra("export")
            quantization = QuantizationOptions(**options)
            unwritten = Unwritten(strict, debug, refused_targets_of(quantization, strict))
            if unwritten.refused:
                options["target"] = ",".join(name for name in quantization.targets if name not in unwritten.refused)
                quantization = QuantizationOptions(**options)
            check_schemes(quantization)
            if gpu is not None:
                check_gpu(gpu, get_target("cuda" if "cuda" in quantization.targets else quantization.targets[0]))
            check_weight_only(xnnpack_weight_only, quantization.targets)
            specs = compile_specs_of(compile_spec or [], quantization.targets)
            if stream is not None and len(quantization.targets) > 1:
                raise UsageError("--stream: give one --target at a time; the traced program is given up for it")
            if stream is not None:
                check_writable(stream, "--stream")
            packed_cache = cache_of(cache, cache_limit)
            _check_output(output_dir, overwrite, model)
            check_dtype(dtype, quantization)
            checkpoint = Checkpoint.find(model, gguf)
            if keep_gguf and checkpoint.gguf is None:
                raise UsageError("--keep-gguf keeps the blocks of a GGUF file: give one with --gguf FILE")
        if dtype is None and checkpoint.gguf is not None and checkpoint.gguf.is_quantized:
            # Blocks have no dtype. The kernels of cuda compute in 16 bits, and some backends not in bfloat16.
            dtype = "bfloat16" if all(takes_dtype(name, bfloat16) for name in quantization.targets) else "float32"
        with Steps() as step:
            options |= {"gpu": gpu, "compile_specs": specs}
            options |= {"stream": None if stream is None else str(stream), "cache": packed_cache}
            before = checkpoint.state()
            exported, loaded = _export(step, checkpoint, task, dtype, keep_gguf, max_length, options, unwritten)
            try:
                # ``verify`` loads the model again.
                exported.report = {**exported.report, "model": {"task": task, "keep_gguf": keep_gguf}}
                step(f"writing {output_dir}")
                with step_errors(step, quantization.targets):
                    checkpoint.check_unchanged(before)
                    exported.save_pretrained(output_dir, overwrite=overwrite, processor=loaded.processor)
            finally:
                exported.discard()
        written = list(exported.report["targets"])
        lacking = {name: each for name in written if (each := missing_requirement(name, gpu))}
        problem = problem_of(output_dir, lacking, unwritten, specs)
        files = _files(exported, output_dir)
        if as_json:
            reports = {
                name: {part: ReportData(each) for part, each in parts.items()}
                for name, parts in exported.report["targets"].items()
            }
            quantized = [QuantizationData(each) for each in exported.report["quantization"]]
            print_json(
                Export(
                    str(output_dir),
                    reports,
                    quantized,
                    loaded.kept,
                    files_of(files),
                    lacking,
                    unwritten.refused,
                    unwritten.failed,
                    problem,
                )
            )
        else:
            _print_kept(loaded.kept)
            _print_report(exported.report)
            list_files(files)
            finished = [name for name in written if name not in lacking]
            if unwritten.refused or unwritten.failed:
                print_targets(finished, lacking, unwritten)
            generates = {"prefill", "decode"} == set(exported.components) and loaded.processor is not None
            _print_next(output_dir, finished, model, gguf, generates)
        if problem:
            raise LoweringError(problem)


def _export(
    step: Steps,
    checkpoint: "Checkpoint",
    task: str | None,
    dtype: str | None,
    keep_gguf: bool,
    max_length: int | None,
    options: dict[str, Any],
    unwritten: Unwritten,
) -> tuple[Any, Any]:
    """The export, and the model.

    ``unwritten`` gets the targets that cannot take the model, and those whose rewrite or lowering fails.
    """
    step(f"loading {checkpoint}")
    # These import transformers, which takes seconds.
    from et_cuda_passes.hf import EtConfig, EtExporter
    from et_cuda_passes.hf.loading import generation_config, load, quiet

    names = [name.strip() for name in options["target"].split(",")]
    with step_errors(step, names), quiet():
        loaded = load(checkpoint, task, dtype, keep_gguf, max_length)
        dynamic = "input_ids" in loaded.inputs
        if dynamic:
            names = with_dynamic_sizes(names, unwritten)
            options["target"] = ",".join(names)
        config = EtConfig(**options, dynamic=dynamic, max_length=loaded.text_length if dynamic else None)
        # Writing is one more step.
        failed = None if unwritten.strict else partial(unwritten.fail, step, names)
        exporter = EtExporter(step, lambda count: step.expect(count + 1), step.part, failed)
        if loaded.generates:
            static = generation_config(loaded.model, loaded.max_length)
            exported = exporter.export_for_generation(loaded.model, loaded.inputs, config, generation_config=static)
        else:
            exported = exporter.export(loaded.model, loaded.inputs, config)
    return exported, loaded


def is_export(path: Path) -> bool:
    """Whether a path is the folder of an export."""
    return path.is_dir() and (path / _MANIFEST).is_file()


def compile_specs_of(texts: list[str], targets: Iterable[str]) -> dict[str, str]:
    """The compile specs of ``--compile-spec``, which concern target cuda."""
    from et_cuda_passes.executorch.compile_specs import parse_compile_specs
    from et_cuda_passes.graph.errors import UsageError as WrongUse

    if texts and "cuda" not in (names := list(targets)):
        raise UsageError(f"--compile-spec is an option of cuda, and the target is {', '.join(names)}: leave it out")
    try:
        return parse_compile_specs(texts)
    except WrongUse as error:
        raise UsageError(f"--compile-spec: {error}") from None


def cache_of(place: str | None, gigabytes: float | None) -> Any:
    """The cache of ``--cache`` with the limit of ``--cache-limit``."""
    if place is None:
        if gigabytes is not None:
            raise UsageError("--cache-limit limits the folder of --cache: give that too")
        return None
    from et_cuda_passes.packed_cache import PackedCache

    try:
        return PackedCache(place, None if gigabytes is None else gigabytes * 1e9)
    except OSError as error:
        raise UsageError(f"--cache: {error.strerror or error}") from None
    except (ImportError, ValueError) as error:
        raise UsageError(f"--cache: {error}") from None


def finish(folder: Path, target: str, as_json: bool = False, compile_spec: Sequence[str] = ()) -> None:
    """Lower what the machine that wrote an export saved packed for a target."""
    from et_cuda_passes.executorch.lower import missing_requirement
    from et_cuda_passes.hf.checkpoint import check_extra

    with option_errors():
        check_extra("finishing an export")
    specs = compile_specs_of(list(compile_spec), [target])
    if lacking := missing_requirement(target):
        raise LoweringError(f"lowering to {target} needs {lacking}: go on with {folder} on a machine that has it")
    with Steps() as step:
        step(f"reading {folder}")
        from et_cuda_passes.hf.finish import finish_export

        with step_errors(step, (target,)):
            files = finish_export(folder, step, target, specs)
    if as_json:
        print_json(Lower(target, None, files_of(files)))
    elif files:
        list_files(files)
    else:
        typer.echo(f"{folder} has nothing to finish for {target}")


def _check_output(folder: Path, overwrite: bool, model: str) -> None:
    check_writable(folder)
    if not folder.is_dir():
        return
    if Path(model).exists() and folder.resolve() in (Path(model).resolve(), Path(model).resolve().parent):
        raise UsageError(f"--output-dir {folder} is the folder of the model itself: name another")
    if overwrite:
        return
    if (folder / _MANIFEST).exists():
        raise UsageError(f"{folder} has an export already: name another folder, or give --overwrite")
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith(PREFIX))
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UsageError(
            f"{folder} has other files ({shown}): name another folder, or give --overwrite, which replaces files "
            "of the same names"
        )


# Results --------------------------------------------------------------------------------------------------------------


def _print_kept(kept: dict[str, str]) -> None:
    if not kept:
        return
    typer.echo(
        f"kept the blocks of {sum(not reason for reason in kept.values())} of {len(kept)} weights of the GGUF file"
    )
    reasons: dict[str, list[str]] = {}
    for fqn, reason in kept.items():
        if reason:
            reasons.setdefault(reason, []).append(fqn)
    for reason, fqns in reasons.items():
        typer.echo(f"  expanded  {len(fqns):>5} x {fqns[0]}{', ...' if len(fqns) > 1 else ''}: {reason}")


def _print_report(report: Any) -> None:
    from et_cuda_passes.executorch.packed import read_report

    for quantization in report["quantization"]:
        found = QuantizationReport.from_dict(quantization)
        found.warnings = list(map(in_options, found.warnings))
        typer.echo(str(found))
    for parts in report["targets"].values():
        texts: dict[str, list[str]] = {}
        for name, each in parts.items():
            texts.setdefault(str(read_report(each)), []).append(name)
        for text, names in texts.items():
            typer.echo(f"{', '.join(names)} for {text}")


def _print_next(folder: Path, finished: list[str], model: str, gguf: Path | None, generates: bool) -> None:
    """Print the commands that check and run an export."""
    if not finished:
        return
    # The compiled programs of this export are the user's own.
    trusted = ["--target", "xnnpack"] if finished == ["xnnpack"] else ["--trust"]
    check = ["et-cuda-passes", "verify", str(folder), *trusted, "--model", model]
    typer.echo(f"check: {shlex.join(check if gguf is None else [*check, '--gguf', str(gguf)])}")
    if generates:
        following = ["et-cuda-passes", "generate", str(folder), *trusted, "--prompt", "Hello"]
        typer.echo(f"next: {shlex.join(following)}")


def _files(exported: Any, folder: Path) -> list[Path]:
    programs = dict.fromkeys(
        folder / file.name
        for component in exported.components.values()
        for build in component.program.builds.values()
        for file in build.files
    )
    others = sorted(path for path in folder.iterdir() if path.is_file() and path not in programs)
    return [*programs, *others]
