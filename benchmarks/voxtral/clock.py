"""Measures the time of a call, and the limits of the machine."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.limit import Limit

LEAST, MOST, SECONDS = 10, 60, 1.5
"""Minimum and maximum number of calls, and seconds after which only the minimum is measured."""


class Laps:
    """Seconds between calls, by name; each is printed, with the time since the first, as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        """End the lap called ``name``."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        print(f"{now - self._began:7.1f} s  {name}: {self.seconds[name]:.1f} s", flush=True)
        self._last = now


def latency(call: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds from a call until the device is idle, after a warm-up: median, extremes, and number of calls."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < MOST and (len(times) < LEAST or time.perf_counter() - began < SECONDS):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "calls": len(times)}


def machine() -> dict[str, float | str]:
    """The GPU's name, bytes a second that a copy reads and writes, and operations a second of cuBLAS in bf16."""
    limit = Limit.measured()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": limit.bandwidth,
        "bf16_flops_per_s": limit.rate,
    }
