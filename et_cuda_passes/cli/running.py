"""``run``: runs a method of a CUDA-delegated .pte or a component of an export once, or measures its time."""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from et_cuda_passes.cli.console import RunError, Steps, UsageError, one_line, print_json
from et_cuda_passes.cli.documents import Output, Run, Times, finite
from et_cuda_passes.cli.exporting import is_export
from et_cuda_passes.cli.folder import load_component
from et_cuda_passes.cli.inputs import check_one_source, random_tensor, read_inputs
from et_cuda_passes.delegate import DelegateError, Program
from et_cuda_passes.delegate.method import check_inputs
from et_cuda_passes.delegate.plan import Dynamism, Plan
from et_cuda_passes.executorch.packed import ModelError

_WARM_UPS = 5
_FEWEST, _SECONDS = 20, 2.0


def run_model(
    model: Path,
    data: Path | None,
    method: str | None,
    component: str | None,
    target: str | None,
    inputs: Path | None,
    random_seed: int | None,
    trust: bool,
    benchmark: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """The command ``run``: its options are described there."""
    check_one_source(inputs, random_seed)
    if is_export(model):
        if data or method or device:
            raise UsageError(
                f"{model} is an export: --component and --target choose what runs; leave --data, --method and "
                "--device out"
            )
        _print(_run_component(model, component, target, inputs, random_seed, trust, benchmark), as_json)
        return
    if component or target:
        raise UsageError(f"--component and --target are for the folder of an export, and {model} is none")
    chosen = _device(device or "cuda")
    _print(_run_method(model, data, method or "forward", inputs, random_seed, trust, benchmark, chosen), as_json)


def _run_component(
    folder: Path,
    name: str | None,
    target: str | None,
    inputs: Path | None,
    seed: int | None,
    trust: bool,
    benchmark: bool,
) -> Run:
    times = None
    with Steps(3 if benchmark else 2) as step:
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
    return Run(name, runner.target, [_described(output) for output in outputs], times)


def _run_method(
    model: Path,
    data: Path | None,
    method: str,
    inputs: Path | None,
    seed: int | None,
    trust: bool,
    benchmark: bool,
    device: torch.device,
) -> Run:
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
    times = None
    try:
        with Steps(3 if benchmark else 2) as step:
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
    return Run(method, None, [_described(output) for output in outputs], times)


def _print(run: Run, as_json: bool) -> None:
    if as_json:
        print_json(run)
        return
    for index, output in enumerate(run.outputs):
        typer.echo(f"output {index}: {_text(output)}")
    if (times := run.times) is not None:
        middle, least, most = (seconds * 1e6 for seconds in (times.median, times.fastest, times.percentile_90))
        typer.echo(
            f"{run.ran}: median {middle:.1f} us, fastest {least:.1f} us, 90 % under {most:.1f} us "
            f"({times.runs} runs to completion, after {times.warm_ups} warm-up runs)"
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


def _described(output: Any) -> Output:
    if not isinstance(output, Tensor):
        return Output(None, None, None, None, 0, repr(output))
    values = output.double()
    finite_ones = values[values.isfinite()]
    mean, largest = (finite_ones.mean(), finite_ones.abs().max()) if finite_ones.numel() else (math.nan, math.nan)
    not_finite = values.numel() - finite_ones.numel()
    return Output(str(output.dtype), list(output.shape), finite(float(mean)), finite(float(largest)), not_finite)


def _text(output: Output) -> str:
    if output.value is not None:
        return output.value
    text = f"{output.dtype} {output.shape}"
    if output.mean is not None:
        text += f", mean {output.mean:.6g}, largest {output.largest:.6g}"
    return text + (f", {output.not_finite} infinite or NaN" if output.not_finite else "")


def _timed(call: Callable[[], object], device: torch.device) -> Times:
    """The times of runs, each from the call until the device is idle."""
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
    slow = statistics.quantiles(times, n=10)[-1]
    return Times(statistics.median(times), min(times), slow, len(times), _WARM_UPS)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
