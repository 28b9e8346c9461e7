"""The speed and the memory of packing weights: `python -m benchmarks.packing`.

Every line is measured in a separate process with one thread: weights a second of the thread's own time (the best of
several runs), and the peak memory of the process above input and output. MB are 10^6 bytes of int8 weights, the form
that quantization writes. The memory column is read from /proc and needs Linux.

**Of a copy** is the rate over that of ``torch.Tensor.clone`` of the same weights. Both write to fresh memory, as a
rewrite does: all results stay alive, so that no run gets the memory of an earlier one. They are measured in turns. The
system clears a page before it is written first, and that costs more than the copy itself.
"""

import argparse
import multiprocessing
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from et_cuda_passes.layouts import cpu, embedding_table, metal, mma_tiled, mps, tile_packed_to_4d

Convert = Callable[[torch.Tensor], torch.Tensor]

PACK: dict[str, Convert] = {
    "mma_tiled": partial(mma_tiled.pack, offset=8),
    "tile_packed_to_4d, I = 8": partial(tile_packed_to_4d.pack, inner_k_tiles=8, offset=8),
    "tile_packed_to_4d, I = 4": partial(tile_packed_to_4d.pack, inner_k_tiles=4, offset=8),
    "tile_packed_to_4d, I = 2": partial(tile_packed_to_4d.pack, inner_k_tiles=2, offset=8),
    "mps, I = 8": partial(mps.pack, inner_k_tiles=8, offset=8),
    "metal": partial(metal.pack, offset=8),
    "cpu": partial(cpu.pack, offset=8),
    "embedding_table, 4 bits": partial(embedding_table.pack, bits=4, offset=8),
    "embedding_table, 8 bits": partial(embedding_table.pack, bits=8, offset=128),
}
UNPACK: dict[str, Convert] = {
    "mma_tiled": partial(mma_tiled.pack, offset=8),
    "tile_packed_to_4d, I = 8": tile_packed_to_4d.unpack,
    "mps, I = 8": mps.unpack,
    "metal": metal.unpack,
    "cpu": cpu.unpack,
}
_KEPT = 2e9
"""Bytes of results that stay alive. Beyond, the memory goes back to the system: it is that of large tensors."""
SIZES = ((576, 1536), (3072, 3072), (8192, 3072), (16384, 8192))


def cpu_all_at_once(q: torch.Tensor) -> torch.Tensor:
    """The CPU layout without chunks: the operator gets the whole weight as int32."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32) + 8, 8)
    return packed


def measure(
    pack: Convert, unpack: Convert | None, n: int, k: int, repeats: int | None = None
) -> tuple[float, float, float]:
    """Weights a second, peak bytes above input and output, and the rate over that of a copy.

    Those of `unpack`, or of `pack` if `unpack` is None.

    Runs in a fresh process, so `pack` and `unpack` must be importable functions or partials of such.
    """
    # Fresh processes are forks of a process that only imported this module.
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["benchmarks.packing"])
    with ProcessPoolExecutor(1, mp_context=clean) as pool:
        return pool.submit(_measure_here, pack, unpack, n, k, repeats or max(5, 2**27 // (n * k))).result()


def _measure_here(pack: Convert, unpack: Convert | None, n: int, k: int, repeats: int) -> tuple[float, float, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = pack if unpack is None else unpack
    small = torch.randint(-8, 8, (64, 256), dtype=torch.int8)
    run(small if unpack is None else pack(small))  # one-time work of a process does not count

    weights = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    given = weights if unpack is None else pack(weights)
    before = _peak_bytes()
    result = run(given)
    extra = _peak_bytes() - before - result.nbytes

    best = [float("inf"), float("inf")]
    kept = []
    for _ in range(repeats):
        for index, (function, argument) in enumerate(((run, given), (torch.clone, weights))):
            start = time.thread_time()
            kept.append(function(argument))
            best[index] = min(best[index], time.thread_time() - start)
        if sum(each.nbytes for each in kept) > _KEPT:
            kept.clear()
    return n * k / best[0], max(0.0, extra), best[1] / best[0]


def _peak_bytes() -> float:
    """The process's peak resident memory so far. (Unlike ru_maxrss, it does not start at the parent's peak.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024.0


def check() -> None:
    """Check that each layout packs at half the rate of a copy, with at most 64 MB beside input and output.

    Raises:
        SystemExit: a layout exceeds a limit, or the measurement does not see the memory of a packing without chunks.
    """
    n, k = 8192, 8192
    problems = []
    for name, pack in PACK.items():
        rate, extra, ratio = measure(pack, None, n, k)
        print(
            f"pack {name}: {rate / 1e6:.0f} MB/s, {ratio:.2f} of a copy, {extra / 1e6:.1f} MB beside input and output",
            flush=True,
        )
        if extra > 64e6 or ratio < 0.5:
            problems.append(name)
    _, extra, _ = measure(cpu_all_at_once, None, n, k, repeats=1)
    if extra < 4 * n * k:  # the weights as int32
        problems.append("the measurement of memory")
    if problems:
        raise SystemExit(f"beyond the limits of 64 MB and half the rate of a copy: {', '.join(problems)}")


def main() -> None:
    """Print the table, or check the limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where packing is slower or needs more memory")
    if parser.parse_args().check:
        check()
        return
    host = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {host}, 1 thread\n")
    print(f"| {'layout':38} | {'N x K':>12} | {'MB/s':>6} | {'of a copy':>9} | {'extra MB':>8} |")
    print(f"|{'-' * 40}|{'-' * 14}|{'-' * 8}|{'-' * 11}|{'-' * 10}|")
    rows: list[tuple[str, Convert, Convert | None]] = [(f"pack {name}", pack, None) for name, pack in PACK.items()]
    rows.append(("pack cpu, without chunks", cpu_all_at_once, None))
    rows += [(f"unpack {name}", PACK[name], unpack) for name, unpack in UNPACK.items()]
    for name, pack, unpack in rows:
        for n, k in SIZES:
            rate, extra, ratio = measure(pack, unpack, n, k)
            cells = f"{f'{n} x {k}':>12} | {rate / 1e6:6.0f} | {ratio:9.2f} | {extra / 1e6:8.1f}"
            print(f"| {name:38} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
