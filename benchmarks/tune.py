"""Find the Triton kernel's tilings for the GPU of this machine, and write its table.

    python -m benchmarks.tune [--bits 4] [--layers up down] [--groups 32] [--rows 64 256] [--out tuned/sm_90.json]

Without ``--out`` it is the package's own table. Entries of other weights, measured on the same GPU, stay in it, with
``--rows`` the other buckets of rows as well. With ``--bits 8`` it is the int8 kernel, whose group 0 is one scale a row,
and the table ``sm_90_int8.json``.

Every candidate is checked against fp64 and for the same bits three times over before it is timed (as
:mod:`benchmarks.kernels` times); one that is wrong, does not compile or does not fit is left out. Candidates compile in
processes side by side. A tiling that cuts tiles along K has a second launch, and an
allocation, which a CUDA graph hides in part: it has to be faster by CUT_COST.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.compiling import Job, compile_all, compile_one, run
from benchmarks.int4 import LAYERS, copies, int4_pair, microseconds, random_weight
from et_cuda_passes.kernels import int8_launch
from et_cuda_passes.kernels.int4_launch import GROUP_SIZES
from et_cuda_passes.kernels.launching import gpu_of
from et_cuda_passes.kernels.tiling import ROWS, UNBOUNDED, Tiling, Tuned, even, load_table

MEASURED = {**{bound: (bound,) for bound in ROWS}, 8: (1, 4, 8), 2048: (400, 1500), UNBOUNDED: (4096,)}
"""Bucket of rows -> the numbers of rows that are timed for it."""
CUT_COST = {8: 3.5, 16: 3.5, 32: 3.5}
"""Microseconds by bucket of rows, 1.5 in the others: with few rows it is the host that is slow, by launches."""
MOST_WRONG = 4e-3
FEW_COLUMNS = (Tiling(64, 32, 128, 2, 0, 4, 3), Tiling(64, 16, 64, 4, 0, 4, 4))
"""For weights of so few rows that tiles of 64 leave most of a GPU idle."""


def candidates(bound: int, bulk: int = 1) -> list[Tiling]:
    """Tilings worth a try for a bucket of rows, from what won anywhere in wider sweeps; with bulk copies, if 1."""
    if bound == 8:
        segmented = [(32, 256, 2, 4, 3), (32, 256, 2, 4, 4), (32, 128, 2, 4, 4), (64, 256, 2, 8, 3)]
        segmented += [(16, 256, 4, 4, 3), (16, 128, 4, 4, 4), (32, 256, 4, 8, 3), (16, 128, 8, 8, 3)]
        return [Tiling(8, n, k, segments, 0, warps, stages) for n, k, segments, warps, stages in segmented]
    if bound <= 64:
        found = [Tiling(bound, 64, k, 1, waves, 4, 3) for k, waves in product((128, 256), (0, 1, 2, 3))]
        found += [Tiling(bound, 64, 128, 1, waves, 4, 4) for waves in (0, 1, 2)]
        if bound == 64:
            found += [Tiling(64, 128, 128, 1, waves, 8, 4) for waves in (0, 1)]
            found += [Tiling(64, 64, 64, 1, waves, 4, 6, bulk) for waves in (0, 1, 2)]
            return [*found, Tiling(64, 128, 64, 1, 1, 8, 6, bulk), *FEW_COLUMNS]
        found += [Tiling(bound, 32, k, 2, 0, 4, 3) for k in (128, 256)]
        return [*found, Tiling(bound, 16, 128, 4, 0, 4, 3)]
    # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, bulk; and how many programs a multiprocessor can hold.
    shapes = [((128, 128, 64, 8, 4, bulk), 2), ((128, 128, 128, 8, 3, 0), 1)]
    if bound > 128:
        shapes += [((256, 128, 64, 8, 4, bulk), 1)]
    if bound > 512:
        shapes += [((256, 128, 64, 8, 5, bulk), 1)]
    if bound <= 512:
        shapes += [((64, 64, 64, 4, 6, bulk), 2), ((64, 64, 128, 4, 4, 0), 1), ((128, 64, 64, 4, 6, bulk), 2)]
    if bound <= ROWS[-1]:
        shapes += [((128, 64, 64, 4, 4, bulk), 3), ((128, 128, 64, 4, 4, bulk), 2), ((256, 64, 64, 4, 3, bulk), 2)]
    return [
        Tiling(m, n, k, 1, waves, warps, stages, each)
        for (m, n, k, warps, stages, each), most in shapes
        for waves in range(most + 1)
        if bound > 512 or m <= bound
    ]


def of_weight(bound: int, bits: int, k: int, bulk: int = 1) -> list[Tiling]:
    """The candidates for a weight of ``bits``, those with steps that K is whole ones of as well."""
    found = candidates(bound, bulk if bits == 4 else 0)
    # A tile that is copied in bulk has to be whole.
    found = [tiling for tiling in found if not (tiling.bulk and k % tiling.block_k)]
    return list(dict.fromkeys([*found, *(even(tiling, k) for tiling in found)]))


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
    pair = int4_pair(q, scale)
    exact = (q.cuda().double() - 8) * scale.bfloat16().double().cuda().repeat_interleave(group, dim=1)
    return pair, exact.bfloat16().double()


def measure(bits: int, n: int, k: int, group: int, bounds: Iterable[int], bulk: int) -> dict[int, dict[Tiling, float]]:
    """Microseconds of every candidate, by bucket: the geometric mean over the rows that stand for the bucket."""
    pair, exact = random_pair(bits, n, k, group)
    weights = [pair, *((pair[0].clone(), pair[1].clone()) for _ in range(copies(n * k * bits // 8) - 1))]
    found: dict[int, dict[Tiling, float]] = {}
    for bound in bounds:
        lengths = MEASURED[bound]
        inputs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for m in lengths]
        wanted = [x.double() @ exact.T for x in inputs]
        found[bound] = {}
        for tiling in of_weight(bound, bits, k, bulk):
            if not compile_one(Job(tiling, bits, n, k, group, lengths[0])):
                continue
            results = ([run(tiling, x, *pair, group) for _ in range(3)] for x in inputs)
            if not all(right(result, target) for result, target in zip(results, wanted, strict=True)):
                continue
            times = [microseconds([lambda w=w, x=x, t=tiling: run(t, x, *w, group) for w in weights]) for x in inputs]
            found[bound][tiling] = math.prod(times) ** (1 / len(times))
        if not found[bound]:
            raise RuntimeError(f"{n} x {k}, group size {group}: no tiling for {bound} rows compiles and is right here")
    return found


def fastest(bound: int, times: Mapping[Tiling, float]) -> Tiling:
    """The tiling of a bucket, cut tiles made dearer by what a second launch costs."""
    return min(times, key=lambda tiling: times[tiling] + CUT_COST.get(bound, 1.5) * (tiling.waves > 0))


def earlier(out: Path, gpu: str) -> list[Tuned]:
    """The entries of a table that was written before, if it is of this GPU."""
    if not out.exists() or json.loads(out.read_text())["gpu"] != gpu:
        return []
    return list(load_table(out))


def merged(measured: Iterable[Tuned], kept: Iterable[Tuned]) -> list[Tuned]:
    """The entries from before, and what was measured: by weight (N, K, group size) and bucket."""
    entries = {(entry.n, entry.k, entry.group_size): dict(entry.tilings) for entry in kept}
    for entry in measured:
        entries.setdefault((entry.n, entry.k, entry.group_size), {}).update(entry.tilings)
    return [Tuned(*weight, dict(sorted(tilings.items()))) for weight, tilings in entries.items()]


def without_all_buckets(tuned: Iterable[Tuned]) -> list[str]:
    """The weights of which a table would lack a bucket of rows."""
    return [f"{one.n} x {one.k} in groups of {one.group_size}" for one in tuned if len(one.tilings) != len(MEASURED)]


def text(gpu: str, tuned: Sequence[Tuned]) -> str:
    """The table, a line a tiling, by weight."""
    lines = ["{", f' "gpu": {json.dumps(gpu)},', ' "tuned": [']
    for number, entry in enumerate(sorted(tuned, key=lambda entry: (entry.n, entry.k, entry.group_size))):
        lines.append(f'  {{"n": {entry.n}, "k": {entry.k}, "group_size": {entry.group_size}, "tilings": {{')
        rows = [
            f'   "{"more" if bound == UNBOUNDED else bound}": '
            f"{json.dumps([getattr(t, field.name) for field in fields(Tiling)])}"
            for bound, t in entry.tilings.items()
        ]
        lines += [row + "," * (row is not rows[-1]) for row in rows]
        lines.append("  }}" + "," * (number + 1 < len(tuned)))
    return "\n".join([*lines, " ]", "}"]) + "\n"


def lines_of(times: Mapping[tuple[int, int, int], Mapping[int, Mapping[Tiling, float]]]) -> Iterator[str]:
    """A line of text for every weight and bucket."""
    for (n, k, group), found in times.items():
        for bound, each in found.items():
            ranked = sorted(each.items(), key=lambda item: item[1])
            listed = "; ".join(f"{time:.1f} {tiling}, {tiling.warps} w, {tiling.stages} st" for tiling, time in ranked)
            yield f"{n} x {k}, group {group}, {'more' if bound == UNBOUNDED else bound}: {listed}\n"


def bucket(text: str) -> int:
    """A bucket of rows as it is written in a table."""
    bound = UNBOUNDED if text == "more" else int(text)
    if bound not in MEASURED:
        raise argparse.ArgumentTypeError(f"{text}: the buckets are {', '.join(map(str, ROWS))} and more")
    return bound


def main() -> None:
    """Tune, write, and say what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--groups", type=int, nargs="+", default=[32], choices=(0, *int8_launch.GROUP_SIZES))
    parser.add_argument(
        "--rows", type=bucket, nargs="+", default=list(MEASURED), help="buckets of rows, the last is more"
    )
    parser.add_argument("--jobs", type=int, help="processes that compile side by side")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--times", type=Path, help="a file for the times of every candidate, fastest first")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    gpu, _ = gpu_of(torch.device("cuda"))
    bits, bulk = options.bits, int(gpu.wgmma)  # what has the one instruction has the other
    if bits == 4 and not set(options.groups) <= set(GROUP_SIZES):
        parser.error(f"the int4 kernel has groups of {', '.join(map(str, GROUP_SIZES))}")
    name = gpu.name if bits == 4 else f"{gpu.name}_int8"
    out = options.out or Path("et_cuda_passes/kernels/tuned") / f"{name}.json"
    shapes = [(*LAYERS[layer], group or LAYERS[layer][1]) for layer, group in product(options.layers, options.groups)]
    device = torch.cuda.get_device_name(0)
    kept = earlier(out, device)  # first: a file that can't be read should not cost the measurements
    asked = [Tuned(*shape, dict.fromkeys(options.rows)) for shape in shapes]  # type: ignore[arg-type]
    if lacking := without_all_buckets(merged(asked, kept)):
        parser.error(f"{out} has no entry yet for {', '.join(lacking)}: measure all rows first, without --rows")
    jobs = [
        Job(tiling, bits, n, k, group, MEASURED[bound][0])
        for n, k, group in shapes
        for bound in options.rows
        for tiling in of_weight(bound, bits, k, bulk)
    ]
    compile_all(jobs, options.jobs)
    times: dict[tuple[int, int, int], dict[int, dict[Tiling, float]]] = {}
    for shape in track(shapes, "timing"):
        times[shape] = measure(bits, *shape, options.rows, bulk)
        # After every weight: a run that is ended keeps what it measured.
        tuned = [Tuned(*each, {b: fastest(b, t) for b, t in found.items()}) for each, found in times.items()]
        entries = merged(tuned, kept)
        out.write_text(text(device, entries))
        if options.times:
            options.times.write_text("".join(lines_of(times)))
    Console().print(f"{out}: {len(times)} weights measured, {len(entries) - len(times)} kept")


if __name__ == "__main__":
    main()
