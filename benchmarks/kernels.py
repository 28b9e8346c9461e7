"""The int4 kernels alone beside cuBLAS in bf16: microseconds by layer and rows M, on the GPU of this machine.

    python -m benchmarks.kernels [--bits 4] [--group 32] [--layers up down] [--rows 1 4 16 64 256 1500 4096]

With ``--bits 8`` it is the int8 kernel, in groups or, with ``--group 0``, with one scale a row.

Weights are rotated through more memory than the L2 cache holds, so that each call reads them from memory; a CUDA graph
of all of them is replayed, so that launches cost nothing. The number is the median of the replays, per call. The last
line of a layer is how much of the limit the Triton kernel reaches: the larger of the bytes at the bandwidth of a copy
and of the operations at the rate of a large product of cuBLAS, both measured here.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.int4 import LAYERS, copies, copy_bandwidth, microseconds, random_weight
from et_cuda_passes.kernels.int4_launch import GROUP_SIZES
from et_cuda_passes.layouts import mma_tiled, scale_and_zero, tile_packed_to_4d
from et_cuda_passes.ops import INT4_LINEARS, INT8_LINEAR

ROWS = (1, 4, 16, 64, 256, 1500, 4096)
int4pack = torch.ops.aten._weight_int4pack_mm
triton_linear = INT4_LINEARS["mma_tiled"].op


def flop_rate() -> float:
    """Operations a second of a large bf16 product of cuBLAS, on random data."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return float(2 * 8192**3 / microseconds([lambda: torch.nn.functional.linear(a, b)] * 3) * 1e6)


def layer_times(n: int, k: int, group: int, rows: tuple[int, ...]) -> dict[str, list[float]]:
    """Microseconds by kernel and number of rows."""
    q, scale = random_weight(n, k, group)
    zero = torch.zeros_like(scale)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
    tiny = (tile_packed_to_4d.pack(q, 2).cuda(), scale_and_zero.pack(scale, zero).cuda())
    ours = (mma_tiled.pack(q).cuda(), mma_tiled.scale_and_zero(scale, zero, torch.bfloat16, k).cuda())
    many = copies(n * k // 2)
    tinies, trebles = ([(p.clone(), s.clone()) for _ in range(many)] for p, s in (tiny, ours))
    times: dict[str, list[float]] = {"cuBLAS bf16": [], "tinygemm": [], "triton": []}
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        times["cuBLAS bf16"].append(microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]))
        times["tinygemm"].append(microseconds([lambda p=p, s=s, x=x: int4pack(x, p, group, s) for p, s in tinies]))
        times["triton"].append(
            microseconds([lambda p=p, s=s, x=x: triton_linear(x, p, s, None, group, n) for p, s in trebles])
        )
    return times


def int8_times(n: int, k: int, group: int, rows: tuple[int, ...]) -> dict[str, list[float]]:
    """As :func:`layer_times`, for the int8 kernel; group 0 is one scale a row."""
    group = group or k
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
    weights = []
    for _ in range(copies(n * k)):
        packed = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
        weights.append((packed, (torch.rand(n, k // group, device="cuda") * 0.001 + 0.001).bfloat16()))
    times: dict[str, list[float]] = {"cuBLAS bf16": [], "triton": []}
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        times["cuBLAS bf16"].append(microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]))
        times["triton"].append(
            microseconds([lambda p=p, s=s, x=x: INT8_LINEAR(x, p, s, None, None, group) for p, s in weights])
        )
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group", type=int, default=32, choices=(0, 16, 32, 64, 128, 256))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if options.bits == 4 and options.group not in GROUP_SIZES:
        parser.error(f"the int4 kernel has groups of {', '.join(map(str, GROUP_SIZES))}")
    bandwidth, rate, rows = copy_bandwidth(), flop_rate(), tuple(options.rows)
    table = Table("layer", "N x K", "kernel", *(f"M = {m}" for m in rows), title="microseconds")
    for name in options.layers:
        n, k = LAYERS[name]
        times = (layer_times if options.bits == 4 else int8_times)(n, k, options.group, rows)
        table.add_row(name, f"{n} x {k}", "", *("" for _ in rows))
        for kernel, row in times.items():
            table.add_row("", "", kernel, *(f"{time:.1f}" for time in row))
        pairs = list(zip(times["triton"], times["cuBLAS bf16"], strict=True))
        table.add_row("", "", "triton / cuBLAS", *(f"{ours / theirs:.2f}" for ours, theirs in pairs))
        moved = [n * k * (options.bits / 8 + 2 / (options.group or k)) + 2 * m * (n + k) for m in rows]
        floors = [max(size / bandwidth, 2 * m * n * k / rate) * 1e6 for size, m in zip(moved, rows, strict=True)]
        parts = zip(floors, times["triton"], strict=True)
        table.add_row("", "", "of the limit", *(f"{100 * floor / time:.0f} %" for floor, time in parts))
    device = torch.cuda.get_device_name(0)
    console = Console(width=160)
    console.print(table, f"{device}, torch {torch.__version__}, int{options.bits}, group size {options.group},")
    console.print(f"copy {bandwidth / 1e12:.2f} TB/s, cuBLAS {rate / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
