"""The packed kernels in a tiling that is named, and many of them compiled in processes side by side."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from et_cuda_passes.kernels import int8_launch
from et_cuda_passes.kernels.int4_launch import Epilogue, launch
from et_cuda_passes.kernels.launching import gpu_of
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
    """One call in this tiling, of the kernel that takes such a weight: y [M, N] of x [M, K]."""
    gpu, processors = gpu_of(x.device)
    y = x.new_empty(x.shape[0], packed.shape[0])
    most = tiling.waves * processors * tiling.block_m * tiling.block_n
    parts = x.new_empty(most, dtype=torch.float32) if most else None
    last = (y, parts, group, tiling, 1, gpu.wgmma, processors)
    if packed.dtype is torch.int8:
        int8_launch.launch(x, x.shape[0], packed, qparams, None, None, *last)
    else:
        launch(x, x.shape[0], packed, qparams, Epilogue(), *last)
    return y


def compile_one(job: Job) -> bool:
    """Whether a kernel compiles and starts; its machine code then lies in Triton's cache."""
    tiling, bits, n, k, group, m = job
    x = torch.zeros(m, k, device="cuda", dtype=torch.bfloat16)
    if bits == 8:
        packed = torch.zeros(n, k, device="cuda", dtype=torch.int8)
        qparams = torch.zeros(n, k // group, device="cuda", dtype=torch.bfloat16)
    else:
        packed = torch.zeros(n, mma_tiled.padded(k) // 8, device="cuda", dtype=torch.int32)
        qparams = torch.zeros(1, n, mma_tiled.scale_row(k, group), device="cuda", dtype=torch.bfloat16)
    try:
        run(tiling, x, packed, qparams, group)
        torch.cuda.synchronize()
    except Exception:  # ptxas, shared memory, registers: all of them mean the same here
        return False
    return True


def compile_all(jobs: Sequence[Job], processes: int | None = None) -> None:
    """Fill Triton's cache with these kernels; ``processes`` as for :func:`side_by_side`."""
    side_by_side(compile_one, jobs, processes)


def side_by_side(work: Callable[[Any], Any], jobs: Sequence[Any], processes: int | None = None) -> None:
    """Call ``work`` for each job, in ``processes`` processes; by default one for each processor, 16 at most.

    Raises:
        What ``work`` raises.
    """
    processes = processes or min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for _ in track(pool.map(work, jobs), "compiling", len(jobs)):
            pass
