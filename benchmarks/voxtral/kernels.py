"""The time of a call by classes of kernels, from torch.profiler."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CLASSES: dict[str, str] = {
    "copies": r"^(Memcpy|Memset)",
    "attention": r"sdpa|attention|flash|fmha",
    # Kernels of Inductor for torchao's dequantize_affine.
    "dequantize": r"^triton_(poi|per|red|mix)_fused_\w*mul_(\w+_)?sub_|dequant",
    # A GEMM that dequantizes its operand is a GEMM.
    "matmul": r"tinygemm|int4|gemm|gemv|matmul|^triton_tem_|cutlass|cublas|nvjet|xmma|_mm_|convolution",
    "KV cache": r"index_copy|index_put|scatter|(?<!to)_copy__",
    "pointwise": r"^triton_(poi|per|red|mix)_|elementwise|layer_norm|reduce_kernel|softmax",
}
"""Classes in order: a kernel belongs to the first class whose pattern is in its name."""
OTHER = "other"


def classify(name: str) -> str:
    """The class of a kernel."""
    return next((label for label, pattern in CLASSES.items() if re.search(pattern, name)), OTHER)


def summarize(kernels: Iterable[tuple[str, float]], calls: int) -> dict[str, Any]:
    """Names and microseconds of the kernels of ``calls`` calls -> milliseconds and launches of one call by class."""
    spent: defaultdict[str, float] = defaultdict(float)
    times: Counter[str] = Counter()
    for name, microseconds in kernels:
        spent[name] += microseconds / 1e3 / calls
        times[name] += 1
    classes: defaultdict[str, float] = defaultdict(float)
    launches: defaultdict[str, float] = defaultdict(float)
    for name, milliseconds in spent.items():
        classes[classify(name)] += milliseconds
        launches[classify(name)] += times[name] / calls
    top = sorted(spent, key=spent.__getitem__, reverse=True)[:15]
    return {
        "kernels": sum(times.values()) / calls,
        "busy_ms": sum(spent.values()),
        "classes_ms": dict(classes),
        "classes_launches": dict(launches),
        "top": [{"name": name[:160], "ms": spent[name], "launches": times[name] / calls} for name in top],
    }


def profiled(call: Callable[[], object], calls: int, device: str) -> dict[str, Any]:
    """:func:`summarize` of ``calls`` calls on ``device``, "cuda" or (for tests: operators, not kernels) "cpu"."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    found = [
        (event.name, event.time_range.elapsed_us())
        for event in trace.events() or []
        if event.device_type.name.lower() == device and not getattr(event, "is_user_annotation", False)
    ]
    return summarize(found, calls)
