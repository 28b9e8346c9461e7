"""``run``: runs a method of a CUDA-delegated .pte or a component of an export once, or measures its time."""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from et_cuda_passes.cli.console import RunError, Steps, UsageError, handle_errors, one_line
from et_cuda_passes.cli.exporting import is_export
from et_cuda_passes.cli.folder import ComponentName, load_component
from et_cuda_passes.cli.inputs import InputsPath, RandomSeed, check_one_source, random_tensor, read_inputs
from et_cuda_passes.delegate import DelegateError, Program
from et_cuda_passes.delegate.method import check_inputs
from et_cuda_passes.delegate.plan import Dynamism, Plan
from et_cuda_passes.executorch.packed import ModelError

_WARM_UPS = 5
_FEWEST, _SECONDS = 20, 2.0


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
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help="The target of an export; default: the first that runs here.", show_default=False
        ),
    ] = None,
    inputs: InputsPath = None,
    random_seed: RandomSeed = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Execute the compiled libraries in MODEL, which can do anything that you can."),
    ] = False,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Measure the time of the method; each run mutates its buffers.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="For a .pte: cuda, the default, cuda:1, ...; or cpu for a library that is compiled for cpu.",
            show_default=False,
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of an error.")] = False,
) -> None:
    """Run a method of MODEL, or a component of an export, and print a summary of each output.

    Without --inputs, the inputs are random: normally distributed floats, integers 0 and 1, sizes at their upper bounds.
    Those of an export are tokens, positions, masks and a cache that belong together.
    """
    with handle_errors(debug):
        check_one_source(inputs, random_seed)
        if is_export(model):
            if data or method or device:
                raise UsageError(
                    f"{model} is an export: --component and --target choose what runs; leave --data, --method and "
                    "--device out"
                )
            _run_component(model, component, target, inputs, random_seed, trust, benchmark)
            return
        if component or target:
            raise UsageError(f"--component and --target are for the folder of an export, and {model} is none")
        _run_method(model, data, method or "forward", inputs, random_seed, trust, benchmark, _device(device or "cuda"))


def _run_component(
    folder: Path,
    name: str | None,
    target: str | None,
    inputs: Path | None,
    seed: int | None,
    trust: bool,
    benchmark: bool,
) -> None:
    with Steps() as step:
        step(f"loading {folder}")
        name, runner, leaves = load_component(folder, name, target, inputs, seed, trust)
        step(f"running {name} for {runner.target}")
        try:
            outputs = tree_leaves(runner.run([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
            _wait(runner.device)
            if benchmark:
                step("timing")
                # The count of tokens in a cache would grow with each run.
                fresh = [isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in leaves]
                times = _timed(
                    lambda: runner.run(
                        [leaf.clone() if again else leaf for leaf, again in zip(leaves, fresh, strict=True)]
                    ),
                    runner.device,
                )
        except Exception as error:  # runtimes raise many kinds
            raise RunError(f"{name} of {folder} for {runner.target} does not run: {one_line(error)}") from error
    _print(outputs, name, times if benchmark else None)


def _run_method(
    model: Path,
    data: Path | None,
    method: str,
    inputs: Path | None,
    seed: int | None,
    trust: bool,
    benchmark: bool,
    device: torch.device,
) -> None:
    given = None if inputs is None else tuple(read_inputs(inputs))
    try:
        program = Program(model, data, device)
        plan = program.plan(method)
        arguments = _random(plan, seed or 0) if given is None else _with_constants(plan, given)
        check_inputs(plan, arguments, f"method {method!r}")
    except DelegateError as error:
        raise ModelError(str(error)) from error
    if not trust:
        raise UsageError(
            f"{model} contains a compiled library, and running it executes code of its author. It was not "
            "executed; give --trust if you trust the source of the file"
        )
    try:
        with Steps() as step:
            step(f"loading {method} of {model}")
            loaded = program.method(method)
            step("running")
            outputs = loaded(*arguments)
            _wait(program.device)
            if benchmark:
                step("timing")
                times = _timed(lambda: loaded(*arguments), program.device)
    except DelegateError as error:
        raise RunError(str(error)) from error
    _print(outputs, method, times if benchmark else None)


def _print(outputs: Iterable[Any], name: str, times: list[float] | None) -> None:
    for index, output in enumerate(outputs):
        typer.echo(f"output {index}: {_described(output)}")
    if times is not None:
        slow = statistics.quantiles(times, n=10)[-1]
        middle, least, most = (seconds * 1e6 for seconds in (statistics.median(times), min(times), slow))
        typer.echo(
            f"{name}: median {middle:.1f} us, fastest {least:.1f} us, 90 % under {most:.1f} us "
            f"({len(times)} runs to completion, after {_WARM_UPS} warm-up runs)"
        )


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise UsageError(f"--device {text}: unknown device; write cuda, cuda:1, ... or cpu") from None


def _random(plan: Plan, seed: int) -> tuple[Any, ...]:
    """Random values for the tensor inputs, and the constants that the method was exported with."""
    generator = torch.Generator().manual_seed(seed)
    values = [plan.values[index] for index in plan.inputs]
    if any(value.tensor is not None and value.tensor.dynamism == Dynamism.UNBOUND for value in values):
        raise UsageError("an input has no upper bound of its sizes: give it with --inputs")
    return tuple(
        value.constant if value.tensor is None else random_tensor(value.tensor.sizes, value.tensor.dtype, generator)
        for value in values
    )


def _with_constants(plan: Plan, given: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The inputs from a file, which has only tensors, with the constants of the method inserted between them."""
    values = [plan.values[index] for index in plan.inputs]
    if sum(value.tensor is not None for value in values) != len(given):
        return given
    tensors = iter(given)
    return tuple(value.constant if value.tensor is None else next(tensors) for value in values)


def _described(output: Any) -> str:
    if not isinstance(output, Tensor):
        return repr(output)
    text = f"{output.dtype} {list(output.shape)}"
    if not output.numel():
        return text
    values = output.double()
    finite = values.isfinite()
    odd = "" if finite.all() else f", {int((~finite).sum())} infinite or NaN"
    values = values[finite]
    return f"{text}, mean {values.mean():.6g}, largest {values.abs().max():.6g}{odd}" if values.numel() else text + odd


def _timed(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each run, from the call until the device is idle."""
    for _ in range(_WARM_UPS):
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _FEWEST or time.perf_counter() - began < _SECONDS:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
