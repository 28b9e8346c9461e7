"""Find the Triton kernel's tilings for the GPU of this machine, and write its table.

    python -m benchmarks.tune [--bits 4] [--layers up down] [--groups 32] [--out tuned/sm_90.json]

Without ``--out`` it is the package's own table. With ``--bits 8`` it is the int8 kernel, whose group 0 is one scale a
row, and the table ``sm_90_int8.json``.

Every candidate is checked against fp64 and for the same bits three times over before it is timed (as
:mod:`benchmarks.kernels` times); one that is wrong, does not compile or does not fit is left out. Candidates compile in
processes side by side. A tiling that cuts tiles along K has a second launch, and an
allocation, which a CUDA graph hides in part: it has to be faster by CUT_COST.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.int4 import LAYERS, copies, microseconds, random_weight
from et_cuda_passes.kernels import int8_launch
from et_cuda_passes.kernels.int4_launch import GROUP_SIZES, Epilogue, launch
from et_cuda_passes.kernels.launching import gpu_of
from et_cuda_passes.kernels.tiling import ROWS, UNBOUNDED, Tiling
from et_cuda_passes.layouts import mma_tiled

MEASURED = {8: (1, 4, 8), **{bound: (bound,) for bound in ROWS[1:]}, UNBOUNDED: (1500, 4096)}
"""Bucket of rows -> the numbers of rows that are timed for it."""
CUT_COST = {8: 3.5, 16: 3.5, 32: 3.5, 64: 3.5}
"""Microseconds by bucket of rows, 1.5 in the others: with few rows it is the host that is slow, by launches."""
MOST_WRONG = 4e-3


def candidates(bound: int) -> list[Tiling]:
    """Tilings worth a try for a bucket of rows, from what won anywhere in wider sweeps."""
    if bound == 8:
        segmented = [(32, 256, 2, 4, 3), (32, 256, 2, 4, 4), (32, 512, 2, 4, 3), (32, 128, 2, 4, 4), (64, 256, 2, 8, 3)]
        segmented += [(16, 256, 4, 4, 3), (16, 128, 4, 4, 4), (32, 256, 4, 8, 3), (16, 128, 8, 8, 4)]
        found = [Tiling(8, n, k, segments, 0, warps, stages) for n, k, segments, warps, stages in segmented]
        return [*found, Tiling(16, 64, 256, 1, 0, 4, 3), Tiling(16, 64, 256, 1, 2, 4, 3)]
    if bound <= 64:
        found = [Tiling(bound, 64, k, 1, waves, 4, 3) for k, waves in product((128, 256), (0, 1, 2, 3))]
        found += [Tiling(bound, 64, 128, 1, waves, 4, 4) for waves in (0, 1, 2)]
        found += [Tiling(bound, 32, k, 2, 0, 4, 3) for k in (128, 256)] + [Tiling(bound, 16, 128, 4, 0, 4, 3)]
        return [*found, *(Tiling(bound, 128, 128, 1, waves, 8, 4) for waves in (0, 1))]
    if bound <= 512:
        shapes = [(128, 64, 128, 4, 3), (128, 128, 128, 8, 4), (128, 128, 64, 8, 4), (256, 128, 64, 8, 4)]
        shapes += [(64, 64, 128, 4, 4), (64, 128, 128, 8, 4), (128, 64, 64, 4, 4)]
    else:
        shapes = [(256, 128, 64, 8, stages) for stages in (3, 4, 5)] + [(128, 128, 64, 8, 4), (128, 256, 64, 8, 4)]
    return [Tiling(m, n, k, 1, waves, w, s) for (m, n, k, w, s), waves in product(shapes, (0, 1, 2))]


def run(tiling: Tiling, x: torch.Tensor, packed: torch.Tensor, qparams: torch.Tensor, group: int) -> torch.Tensor:
    """One call in this tiling, of the kernel that takes such a weight."""
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


def fits(tiling: Tiling, bits: int, group: int) -> bool:
    """Whether the kernel has this tiling: the int4 kernel's steps hold whole groups."""
    return bits == 8 or tiling.block_k >= group


def compile_one(job: tuple[Tiling, int, int, int, int, int]) -> bool:
    """Whether a candidate compiles and starts; its machine code then lies in Triton's cache."""
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


def right(y: Iterable[torch.Tensor], wanted: torch.Tensor) -> bool:
    """Whether every result is close to fp64, and all are the same."""
    first, *others = y
    off = ((first.double() - wanted).norm() / wanted.norm()).item()
    return off < MOST_WRONG and all(torch.equal(first, other) for other in others)


def random_pair(bits: int, n: int, k: int, group: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A weight as the kernel takes it, and in fp64 as it multiplies it."""
    q, scale = random_weight(n, k, group)
    if bits == 8:
        packed, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8).cuda(), (scale / 16).bfloat16().cuda()
        exact = packed.double() * scale.double().repeat_interleave(group, dim=1)
        return (packed, scale), exact if group == k else exact.bfloat16().double()
    pair = (mma_tiled.pack(q).cuda(), mma_tiled.scale_and_zero(scale, scale * 0, torch.bfloat16, k).cuda())
    exact = (q.cuda().double() - 8) * scale.bfloat16().double().cuda().repeat_interleave(group, dim=1)
    return pair, exact.bfloat16().double()


def tune(bits: int, n: int, k: int, group: int) -> dict[int, Tiling]:
    """The fastest tiling of each bucket, by the product of its times over the rows that stand for the bucket."""
    pair, exact = random_pair(bits, n, k, group)
    weights = [pair, *((pair[0].clone(), pair[1].clone()) for _ in range(copies(n * k * bits // 8) - 1))]
    best: dict[int, Tiling] = {}
    for bound, lengths in MEASURED.items():
        inputs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for m in lengths]
        wanted = [x.double() @ exact.T for x in inputs]
        scores: dict[Tiling, float] = {}
        for tiling in candidates(bound):
            if not fits(tiling, bits, group) or not compile_one((tiling, bits, n, k, group, lengths[0])):
                continue
            results = ([run(tiling, x, *pair, group) for _ in range(3)] for x in inputs)
            if not all(right(result, target) for result, target in zip(results, wanted, strict=True)):
                continue
            times = [microseconds([lambda w=w, x=x, t=tiling: run(t, x, *w, group) for w in weights]) for x in inputs]
            scores[tiling] = math.prod(time + CUT_COST.get(bound, 1.5) * (tiling.waves > 0) for time in times)
        best[bound] = min(scores, key=lambda tiling: scores[tiling])
    return best


def text(gpu: str, tuned: Sequence[tuple[int, int, int, dict[int, Tiling]]]) -> str:
    """The table, a line a tiling."""
    lines = ["{", f' "gpu": {json.dumps(gpu)},', ' "tuned": [']
    for number, (n, k, group, tilings) in enumerate(tuned):
        lines.append(f'  {{"n": {n}, "k": {k}, "group_size": {group}, "tilings": {{')
        rows = [
            f'   "{"more" if bound == UNBOUNDED else bound}": '
            f"{json.dumps([t.block_m, t.block_n, t.block_k, t.segments, t.waves, t.warps, t.stages])}"
            for bound, t in tilings.items()
        ]
        lines += [row + "," * (row is not rows[-1]) for row in rows]
        lines.append("  }}" + "," * (number + 1 < len(tuned)))
    return "\n".join([*lines, " ]", "}"]) + "\n"


def main() -> None:
    """Tune, write, and say what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--groups", type=int, nargs="+", default=[32], choices=(0, *int8_launch.GROUP_SIZES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    gpu, _ = gpu_of(torch.device("cuda"))
    bits = options.bits
    if bits == 4 and not set(options.groups) <= set(GROUP_SIZES):
        parser.error(f"the int4 kernel has groups of {', '.join(map(str, GROUP_SIZES))}")
    name = gpu.name if bits == 4 else f"{gpu.name}_int8"
    out = options.out or Path("et_cuda_passes/kernels/tuned") / f"{name}.json"
    shapes = [(*LAYERS[layer], group or LAYERS[layer][1]) for layer, group in product(options.layers, options.groups)]
    jobs = [
        (tiling, bits, n, k, group, lengths[0])
        for n, k, group in shapes
        for bound, lengths in MEASURED.items()
        for tiling in candidates(bound)
        if fits(tiling, bits, group)
    ]
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for _ in track(pool.map(compile_one, jobs, chunksize=4), "compiling", len(jobs)):
            pass
    tuned = [(n, k, group, tune(bits, n, k, group)) for n, k, group in track(shapes, "timing")]
    out.write_text(text(torch.cuda.get_device_name(0), tuned))
    Console().print(f"{out}: {len(tuned)} weights")


if __name__ == "__main__":
    main()
