"""The packed kernels in a given tiling, and their compilation in parallel processes."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from et_cuda_passes.kernels import linear_launch
from et_cuda_passes.kernels.buckets import stream_k_schedule
from et_cuda_passes.kernels.device import gpu_of
from et_cuda_passes.kernels.linear_launch import Epilogue, launch_int4
from et_cuda_passes.kernels.tiling import Tiling
from et_cuda_passes.layouts import mma_tiled


class Job(NamedTuple):
    """A kernel to compile: a tiling for weights of ``bits`` [N, K] in groups of ``group``, and ``m`` rows of x."""

    tiling: Tiling
    bits: int
    n: int
    k: int
    group: int
    m: int


def run(tiling: Tiling, x: Tensor, packed: Tensor, qparams: Tensor, group: int) -> Tensor:
    """One call of the weight's kernel in this tiling: y [M, N] of x [M, K]."""
    gpu = gpu_of(x.device)
    processors = gpu.processors
    y = x.new_empty(x.shape[0], packed.shape[0])
    most = tiling.waves * processors * tiling.tile_m * tiling.block_n
    parts = x.new_empty(most, dtype=torch.float32) if most else None
    last = (y, parts, group, tiling, 1, gpu.wgmma, processors)
    if packed.dtype is torch.int8:
        linear_launch.launch_int8(x, x.shape[0], packed, qparams, None, None, *last)
    else:
        launch_int4(x, x.shape[0], packed, qparams, Epilogue(), *last)
    return y


def compile_one(job: Job) -> bool:
    """Whether a kernel compiles and fits this GPU; its machine code then lies in Triton's cache.

    The grid is 0 programs, so that nothing runs, and the weight and the result need no memory.
    """
    tiling, bits, n, k, group, m = job
    gpu = gpu_of(torch.device("cuda"))

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(1, device="cuda", dtype=dtype).expand(shape)

    x = torch.empty(m, k, device="cuda", dtype=torch.bfloat16)
    parts = torch.empty(1, device="cuda", dtype=torch.float32) if tiling.waves else None
    last = (empty(m, n), parts, group, tiling, 0, gpu.wgmma, gpu.processors)
    try:
        if bits == 8:
            linear_launch.launch_int8(x, m, empty(n, k, dtype=torch.int8), empty(n, k // group), None, None, *last)
        else:
            words = empty(n, mma_tiled.padded(k) // 8, dtype=torch.int32)
            launch_int4(x, m, words, empty(1, n, mma_tiled.scale_row(k, group)), Epilogue(), *last)
    except Exception:  # ptxas, shared memory or registers: the kernel does not compile or fit
        return False
    return True


def distinct(jobs: Iterable[Job], processors: int) -> list[Job]:
    """One job for each distinct kernel: Triton specialises on integers that are 1 and on multiples of 16."""
    found: dict[tuple[object, ...], Job] = {}
    for job in jobs:
        tiling, bits, n, k, group, m = job
        integers = [
            (value == 1, value % 16 == 0) for value in (m, n, k // 32, k // min(k & -k, linear_launch.INT8_MAX_UNIT))
        ]
        even = k % (tiling.block_k * tiling.segments) == 0
        cut = stream_k_schedule(tiling, m, n, mma_tiled.padded(k) if bits == 4 else k, processors).slots
        pairs = (k == group, k // group % 2, k & -k) if bits == 8 else ()
        found.setdefault((tiling, bits, group, *integers, even, cut, pairs), job)
    return list(found.values())


def compile_all(jobs: Sequence[Job], processes: int | None = None) -> None:
    """Fill Triton's cache with these kernels; ``processes`` as for :func:`side_by_side`.

    A kernel that a crashed compiler did not compile is compiled at its first call.
    """
    try:
        side_by_side(compile_one, jobs, processes)
    except BrokenProcessPool as error:
        print(f"not all kernels were compiled side by side: {error}", flush=True)


def side_by_side(work: Callable[[Any], Any], jobs: Sequence[Any], processes: int | None = None) -> None:
    """Call ``work`` for each job, in ``processes`` processes; by default one for each processor, 16 at most.

    Raises:
        Exception: any exception of ``work``.
    """
    processes = processes or min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for _ in track(pool.map(work, jobs, chunksize=4), "compiling", len(jobs)):
            pass
