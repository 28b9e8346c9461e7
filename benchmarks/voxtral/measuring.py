"""Measures an artifact: errors, latencies, time by class of kernels, memory."""

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.voxtral.clock import latency, machine
from benchmarks.voxtral.dimensions import Dimensions
from benchmarks.voxtral.kernels import profiled
from benchmarks.voxtral.reference import Inputs, Method, decode
from et_cuda_passes.delegate import Program

PROFILED = {"audio_encoder": 5, "prefill": 5, "decode": 20}
"""The profiled cases, and their number of calls."""
_CACHE = (".keys", ".values")


def compare(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """The error of ``got`` against ``wanted``; rows are all dimensions but the last.

    Returns:
        ``relative_error``, |got - wanted| / |wanted|; ``same``, the number of ``rows`` whose largest element has the
        same index; and ``shortfall``, for other rows the largest relative difference of the two elements in ``wanted``.
    """
    got, wanted = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (got, wanted))
    best, chosen = wanted.argmax(-1, keepdim=True), got.argmax(-1, keepdim=True)
    largest = wanted.gather(1, best)
    short = (largest - wanted.gather(1, chosen)) / largest.abs()
    return {
        "relative_error": float((got - wanted).norm() / wanted.norm()),
        "rows": len(wanted),
        "same": int((best == chosen).sum()),
        "shortfall": float(short.max()),
    }


def correctness(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
    """:func:`compare` by case, all decoded tokens as one."""
    decoded = [decode(step) for step in range(steps)]
    found = {name: compare(outputs[name], wanted[name]) for name in wanted if name not in decoded}
    together = (torch.cat([given[name] for name in decoded], dim=1) for given in (outputs, wanted))
    return {**found, "decode": compare(*together)}


def measure(load: Callable[[str], Method], reference: Path, dimensions: Dimensions, device: str) -> dict[str, Any]:
    """Load the methods with ``load`` and run every case of the reference.

    Args:
        load: returns a method by its name.
        reference: the file of :func:`~benchmarks.voxtral.reference.refer`.
        dimensions: sizes of the networks.
        device: "cuda", or "cpu" for a test.
    """
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    methods: dict[str, Method] = {}
    load_s: dict[str, float] = {}
    for name in dimensions.linears:
        start = time.perf_counter()
        methods[name] = load(name)
        if on_gpu:
            torch.cuda.synchronize()
        load_s[name] = time.perf_counter() - start
    state = torch.load(reference, weights_only=True)
    inputs = Inputs(**{name: tensor.to(device) for name, tensor in state["inputs"].items()})
    cases = inputs.cases(methods, dimensions)
    with torch.no_grad():
        # The order matters: decoded tokens read the cache of prefill and of earlier tokens.
        outputs = {name: case() for name, case in cases.items()}
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        print("ran every case", flush=True)
        wanted = {name: tensor.to(device) for name, tensor in state["outputs"].items()}
        correct = correctness(outputs, wanted, dimensions.steps)
        print(correct, flush=True)
        del outputs, wanted
        timed = {name: latency(case, device) for name, case in cases.items() if "+" not in name}
        print(timed, flush=True)
        profiled(cases["decode"], 1, device)  # the start of the profiler
        profiles = {name: profiled(cases[name], calls, device) for name, calls in PROFILED.items()}
    return {
        "load_s": load_s,
        "gpu_peak_bytes": peak,
        "correct": correct,
        "latency": timed,
        "profile": profiles,
        "weight_bytes": {name: weight_bytes(method) for name, method in methods.items()},
    }


def weight_bytes(method: Method) -> int:
    """Bytes of a loaded method's weights, without its KV cache."""
    held: Mapping[str, Tensor] = getattr(method, "weights", {})
    return sum(tensor.nbytes for name, tensor in held.items() if not name.endswith(_CACHE))


def measure_artifact(folder: Path, reference: Path, dimensions: Dimensions) -> dict[str, Any]:
    """:func:`measure` ``folder``/model.pte, and the machine beside it."""
    start = time.perf_counter()
    torch.cuda.init()
    program: list[Program] = []

    def load(name: str) -> Method:
        if not program:
            program.append(Program(folder / "model.pte"))
        return program[0].method(name)

    found = measure(load, reference, dimensions, "cuda")
    program.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return {**found, "machine": machine(), "seconds": {"measure": time.perf_counter() - start}}
