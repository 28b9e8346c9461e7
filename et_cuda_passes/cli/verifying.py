"""``verify``: compares a program lowered for a target, or an export, with the original in eager."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import et_cuda_passes as ecp
from et_cuda_passes.cli.compare import compare
from et_cuda_passes.cli.console import LoweringError, RunError, Steps, UsageError, one_line, print_json, start_runtime
from et_cuda_passes.cli.documents import Verify
from et_cuda_passes.cli.exporting import is_export
from et_cuda_passes.cli.folder import Folder
from et_cuda_passes.cli.inputs import check_one_source, random_tensor, read_inputs
from et_cuda_passes.cli.verifying_export import Verification
from et_cuda_passes.executorch.lower import lower, lowering_steps, missing_requirement
from et_cuda_passes.executorch.packed import load_model
from et_cuda_passes.executorch.run import EXECUTABLE, execute
from et_cuda_passes.hf.artifact import ExportError
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.quant.activations import quantizes_activations
from et_cuda_passes.targets import get_target
from et_cuda_passes.unfinished import TemporaryFolder

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def verify_model(
    model: Path,
    target: str | None,
    component: str | None,
    original: str | None,
    gguf: Path | None,
    tolerance: float | None,
    inputs: Path | None,
    random_seed: int | None,
    trust: bool,
    as_json: bool,
) -> None:
    """The command ``verify``: its options are described there."""
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"--tolerance {tolerance}: a relative error is 0 or more")
    check_one_source(inputs, random_seed)
    if is_export(model):
        with _refused_checkpoint():
            checkpoint = None if original is None else Checkpoint.find(original, gguf)
        if gguf is not None and original is None:
            raise UsageError("--gguf has the weights of --model: give both")
        folder = Folder.read(model, "verifying an export")
        Verification(folder, component, target, checkpoint, tolerance, inputs, random_seed or 0, trust, as_json).run()
        return
    if component or original or gguf:
        raise UsageError(f"--component, --model and --gguf are for the folder of an export, and {model} is none")
    if target is None:
        raise UsageError(f"--target is missing: give one of {', '.join(EXECUTABLE)}")
    _check_target(target)
    _verify_program(model, target, tolerance, inputs, random_seed, trust, as_json)


@contextmanager
def _refused_checkpoint() -> Iterator[None]:
    try:
        yield
    except ExportError as error:
        raise UsageError(f"--model: {error}") from error


def _verify_program(
    model: Path,
    target: str,
    tolerance: float | None,
    inputs: Path | None,
    random_seed: int | None,
    trust: bool,
    as_json: bool,
) -> None:
    given = None if inputs is None else read_inputs(inputs)
    if lacking := missing_requirement(target):
        raise RunError(f"verifying for {target} needs {lacking}; {model} was not lowered")
    with Steps(4 + lowering_steps(target, 1)) as step:
        step(f"loading {model}")
        loaded = load_model(model, target, trust)
        program = loaded.program
        args, kwargs = _arguments(program, given, random_seed)
        step("running the original in eager")
        wanted = _eager(program, args, kwargs)
        report = loaded.report
        if report is None:
            step(f"rewriting for {target}")
            program, report = ecp.rewrite(program, target, progress=step.part)
        with TemporaryFolder() as folder:
            try:
                files = lower(program, target, folder, "model", step)
            except Exception as error:
                raise LoweringError(f"{model} could not be lowered for {target}: {one_line(error)}") from error
            step("running it lowered")
            if get_target(target).lowering == "xnnpack":
                start_runtime()
            try:
                got = execute(get_target(target).lowering, files, args, kwargs)
            except Exception as error:
                raise RunError(f"{model} lowered for {target} does not run: {one_line(error)}") from error
    if loaded.packed and not as_json:
        typer.echo("MODEL is packed already: the lowered program is compared with the packed one")
    if len(got) != len(wanted):
        raise RunError(f"{model} lowered for {target} has {len(got)} outputs, the original has {len(wanted)}")
    # A difference in the last bit can move a quantized activation by a whole step.
    # OpenVINO computes in bfloat16 on a CPU that has instructions for it.
    quantized = quantizes_activations(program) or get_target(target).lowering == "openvino"
    pairs = enumerate(zip(got, wanted, strict=True))
    compared = [compare(index, mine, theirs, tolerance, quantized) for index, (mine, theirs) in pairs]
    relative, largest = (max((getattr(one, name) for one in compared), default=0.0) for name in ("relative", "largest"))
    summary = f"largest relative error {relative:.2e}, largest error {largest:.2e}"
    wrong = sum(not comparison.holds for comparison in compared)
    if wrong:
        verdict = f"{model} lowered for {target}: {wrong} of {len(compared)} outputs are wrong, {summary}"
    else:
        verdict = f"{model} lowered for {target} agrees with the original; {summary}"
    if as_json:
        holds = not wrong if compared else None
        print_json(Verify(str(model), holds, verdict, [comparison.entry(target) for comparison in compared]))
    else:
        for comparison in compared:
            typer.echo(str(comparison))
    if wrong:
        raise RunError(verdict)
    if not as_json:
        typer.echo(f"verdict: {verdict}")


def _check_target(target: str) -> None:
    try:
        chosen = get_target(target)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if chosen.partitioner is not None or chosen.lowering not in EXECUTABLE:
        raise UsageError(f"programs for {target} do not run from Python: verify supports {', '.join(EXECUTABLE)}")


def _arguments(program: ExportedProgram, given: list[Tensor] | None, seed: int | None) -> Arguments:
    """The arguments for the program: its example inputs, with their tensors replaced by ``given`` or random ones."""
    example = program.example_inputs
    if example is None:
        if given is None:
            raise UsageError("MODEL was saved without example inputs: give --inputs")
        return tuple(given), {}
    leaves, tree = tree_flatten(example)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if given is None:
        if seed is None:
            return _call(example)
        generator = torch.Generator().manual_seed(seed)
        given = [_random_like(tensor, generator) for tensor in tensors]
    if len(given) != len(tensors):
        raise UsageError(f"MODEL has {len(tensors)} tensor inputs, --inputs has {len(given)}")
    for index, (tensor, wanted) in enumerate(zip(given, tensors, strict=True)):
        if tensor.dtype != wanted.dtype or tensor.dim() != wanted.dim():
            raise UsageError(
                f"--inputs: input {index} is {tensor.dtype} {list(tensor.shape)}, MODEL was exported with "
                f"{wanted.dtype} {list(wanted.shape)}"
            )
    others = iter(given)
    replaced = [next(others) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return _call(tree_unflatten(replaced, tree))


def _call(example: Any) -> Arguments:
    args, kwargs = example
    return tuple(args), dict(kwargs)


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    whole = not tensor.dtype.is_floating_point and tensor.numel() > 0
    low, high = (int(tensor.min()), int(tensor.max())) if whole else (0, 1)
    return random_tensor(tuple(tensor.shape), tensor.dtype, generator, low, high)


def _eager(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    try:
        with torch.no_grad():
            outputs = tree_leaves(program.module()(*args, **kwargs))
    except Exception as error:  # guards of the exported program raise many kinds of errors
        raise UsageError(f"the original program does not run with these inputs: {one_line(error)}") from error
    return [output.clone() if isinstance(output, Tensor) else output for output in outputs]
