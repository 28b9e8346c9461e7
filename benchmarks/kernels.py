"""The packed kernels alone beside cuBLAS in bf16: microseconds by layer and rows M, on the GPU of this machine.

    python -m benchmarks.kernels [--bits 4] [--group 32] [--layers up down] [--rows 1 4 16 64 256 1500 4096] [--tuned]

``--bits 8`` selects the int8 kernel, in groups or, with ``--group 0``, with one scale a row. If the package ``gemlite``
is installed, its int4 kernels are timed too, in their default setting, and with ``--tuned`` also after its own
autotuning, which takes minutes for a layer.

Weights are rotated through more memory than the L2 cache, so that each call reads them from memory. A CUDA graph of all
calls is replayed, so that launches cost nothing. A number is the median of the replays, per call. tinygemm is not timed
beyond 256 rows, where it takes 20 times as long. The last line of a layer is the fraction of the limit that the Triton
kernel reaches. The limit is the larger of two times: the bytes at the bandwidth of a copy, and the operations at the
rate of a large product of cuBLAS, both measured here.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.compiling import Job, compile_all
from benchmarks.int4 import LAYERS, copies, int4_pair, microseconds, random_weight
from benchmarks.limit import Limit
from et_cuda_passes.kernels import choose
from et_cuda_passes.kernels.device import gpu_of
from et_cuda_passes.kernels.linear_launch import INT4_GROUP_SIZES
from et_cuda_passes.layouts import scale_and_zero, tile_packed_to_4d
from et_cuda_passes.ops import INT4_LINEARS, INT8_LINEAR

ROWS = (1, 4, 16, 64, 256, 1500, 4096)
MOST_ROWS = {"tinygemm": 256}
"""Largest number of rows for which a kernel is timed."""
CUBLAS, OURS = "cuBLAS bf16", "triton"
int4pack = torch.ops.aten._weight_int4pack_mm
triton_linear = INT4_LINEARS["mma_tiled"].op
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weight:
    """A random int4 weight: q uint8 [N, K], and scales fp32 [N, K / group], on the CPU."""

    q: Tensor
    scale: Tensor
    group: int

    @property
    def zero(self) -> Tensor:
        """Zeros with the shape of the scales."""
        return torch.zeros_like(self.scale)

    def repeat(self, make: Callable[[], Linear]) -> list[Linear]:
        """Linears with copies of the weight that exceed the cache."""
        return [make() for _ in range(copies(self.q.numel() // 2))]


def dense(n: int, k: int) -> list[Linear]:
    """cuBLAS in bf16."""
    weights = (torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k)))
    return [partial(F.linear, weight=weight) for weight in weights]


def tinygemm(weight: Weight) -> list[Linear]:
    """torch's own int4 kernel."""
    packed = tile_packed_to_4d.pack(weight.q, 2).cuda()
    pair = scale_and_zero.pack(weight.scale, weight.zero).cuda()

    def make() -> Linear:
        p, s = packed.clone(), pair.clone()
        return lambda x: int4pack(x, p, weight.group, s)

    return weight.repeat(make)


def ours(weight: Weight) -> list[Linear]:
    """The Triton kernel of this package."""
    n = weight.q.shape[0]
    packed, pair = int4_pair(weight.q, weight.scale)

    def make() -> Linear:
        p, s = packed.clone(), pair.clone()
        return lambda x: triton_linear(x, p, s, None, weight.group, n)

    return weight.repeat(make)


def gemlite(weight: Weight) -> list[Linear]:
    """gemlite's kernels, in its current setting."""
    from gemlite.helper import A16Wn

    def make() -> Linear:
        q, scale = weight.q.cuda(), weight.scale.bfloat16().cuda()
        maker = A16Wn(device="cuda", dtype=torch.bfloat16)
        return maker.from_weights(q, scale, torch.full_like(scale, 8), 4, weight.group)  # type: ignore[no-any-return]

    copies = weight.repeat(make)
    x = torch.randn(3, weight.q.shape[1], device="cuda", dtype=torch.bfloat16)
    wanted = ours(weight)[0](x)
    off = float((copies[0](x) - wanted).norm() / wanted.norm())
    # On an H100 it is 1.2e-2 to 1.9e-2, where ours is within 4e-3 of fp64. A wrong weight gives more than 1.
    if not off <= 3e-2:
        raise RuntimeError(f"gemlite's result is another, by {off:.1e}")
    return copies


def ours_int8(n: int, k: int, group: int) -> list[Linear]:
    """The int8 Triton kernel of this package; group 0 is one scale a row."""
    group = group or k

    def make() -> Linear:
        packed = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
        scale = (torch.rand(n, k // group, device="cuda") * 0.001 + 0.001).bfloat16()
        return lambda x: INT8_LINEAR(x, packed, scale, None, None, group)

    return [make() for _ in range(copies(n * k))]


def timed(linears: Iterable[Linear], k: int, rows: Iterable[int], most: int | None = None) -> list[float | None]:
    """Microseconds a call for each number of rows, None beyond ``most``."""
    linears = list(linears)
    times: list[float | None] = []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        within = most is None or m <= most
        times.append(microseconds([partial(linear, x) for linear in linears]) if within else None)
    return times


def layer_times(n: int, k: int, bits: int, group: int, rows: tuple[int, ...]) -> dict[str, list[float | None]]:
    """Microseconds by kernel and number of rows."""
    times = {CUBLAS: timed(dense(n, k), k, rows)}
    if bits == 8:
        return times | {OURS: timed(ours_int8(n, k, group), k, rows)}
    weight = Weight(*random_weight(n, k, group), group)
    kernels: dict[str, Callable[[Weight], list[Linear]]] = {"tinygemm": tinygemm, OURS: ours}
    if has_gemlite():
        kernels["gemlite"] = gemlite
    for name, make in kernels.items():
        try:
            times[name] = timed(make(weight), k, rows, MOST_ROWS.get(name))
        except Exception as error:
            if name == OURS:
                raise
            # A failure of another kernel is printed, and the other measurements continue.
            print(f"{name}, {n} x {k}: {type(error).__name__}: {error}")
    return times


def has_gemlite() -> bool:
    """Whether gemlite can be imported, which needs a GPU."""
    try:
        import gemlite  # noqa: F401
    except ImportError:
        return False
    return True


def shown(times: Iterable[float | None], form: str) -> list[str]:
    """Times as cells of the table."""
    return ["" if time is None else form.format(time) for time in times]


def layer_table(
    name: str, bits: int, group: int, rows: tuple[int, ...], times: dict[str, list[float | None]], limit: Limit
) -> Table:
    """Times, ratios, and the fraction of the limit that the Triton kernel reaches."""
    n, k = LAYERS[name]
    table = Table(f"{name}, {n} x {k}", *(f"M = {m}" for m in rows))
    for kernel, row in times.items():
        table.add_row(kernel, *shown(row, "{:.1f}"))
    for kernel, row in times.items():
        if kernel != OURS:
            pairs = zip(times[OURS], row, strict=True)
            ratios = [None if a is None or b is None else a / b for a, b in pairs]
            table.add_row(f"triton / {kernel}", *shown(ratios, "{:.2f}"))
    moved = [n * k * (bits / 8 + 2 / (group or k)) + 2 * m * (n + k) for m in rows]
    floors = [limit.microseconds(size, 2 * m * n * k) for size, m in zip(moved, rows, strict=True)]
    parts = [floor / time * 100 for floor, time in zip(floors, times[OURS], strict=True) if time is not None]
    table.add_row("of the limit", *shown(parts, "{:.0f} %"))
    return table


def main() -> None:
    """Print each table when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group", type=int, default=32, choices=(0, 16, 32, 64, 128, 256))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--jobs", type=int, help="processes that compile side by side")
    parser.add_argument("--tuned", action="store_true", help="gemlite after its own autotuning too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if options.bits == 4 and options.group not in INT4_GROUP_SIZES:
        parser.error(f"the int4 kernel has groups of {', '.join(map(str, INT4_GROUP_SIZES))}")
    if options.tuned and not (options.bits == 4 and has_gemlite()):
        parser.error("--tuned is for the int4 kernels of the package gemlite, which is not installed")
    gpu = gpu_of(torch.device("cuda"))
    weights = [(options.bits, *LAYERS[name], options.group or LAYERS[name][1]) for name in options.layers]
    jobs = [
        Job(choose.tiling_for(gpu, choose.Weight(n, k, group, bits), m), bits, n, k, group, m)
        for (bits, n, k, group), m in product(weights, options.rows)
    ]
    compile_all(jobs, options.jobs)
    limit, rows, console = Limit.measured(), tuple(options.rows), Console(width=160)
    console.print(
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, int{options.bits}, group size {options.group}, "
        f"{limit}, a kernel of one element {limit.start:.1f} µs; microseconds"
    )
    found = {}
    for name in options.layers:
        n, k = LAYERS[name]
        found[name] = layer_times(n, k, options.bits, options.group, rows)
        console.print(layer_table(name, options.bits, options.group, rows, found[name], limit))
    if options.tuned:
        import gemlite as package

        # The setting applies to the whole process, so all other kernels are timed before.
        package.reset_config()
        package.set_autotune("max")
        for name in options.layers:
            n, k = LAYERS[name]
            copies = gemlite(Weight(*random_weight(n, k, options.group), options.group))
            times = found[name] | {"gemlite, tuned": timed(copies, k, rows)}
            console.print(layer_table(name, options.bits, options.group, rows, times, limit))


if __name__ == "__main__":
    main()
