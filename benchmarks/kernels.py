"""The int4 kernels alone beside cuBLAS in bf16: microseconds by layer and rows M, on the GPU of this machine.

    python -m benchmarks.kernels [--group 32]

Weights are rotated through more memory than the L2 cache holds, so that each call reads them from memory; a CUDA graph
of all of them is replayed, so that launches cost nothing. The number is the median of the replays, per call.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from et_cuda_passes.layouts import scale_and_zero, tile_packed_to_4d

LAYERS = {"up": (8192, 3072), "down": (3072, 8192), "encoder up": (5120, 1280), "Llama up": (14336, 4096)}
ROWS = (1, 2, 4, 8, 16, 64, 256, 1500)
REPLAYS = 30
int4pack = torch.ops.aten._weight_int4pack_mm


def copies(nbytes: int) -> int:
    """How many weights of this size overflow the cache twice over."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-2 * cache // nbytes))


def microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Median time of one call, all of ``calls`` being one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def packed(n: int, k: int, group: int) -> tuple[Tensor, Tensor]:
    """A random packed weight and its scale_and_zero, on the GPU."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale, zero = torch.rand(n, k // group) * 0.01 + 0.01, torch.randn(n, k // group) * 0.01
    return tile_packed_to_4d.pack(q, 8).cuda(), scale_and_zero.pack(scale, zero).cuda()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=32, choices=(32, 64, 128, 256))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    table = Table("layer", "N x K", "kernel", *(f"M = {rows}" for rows in ROWS), title="microseconds")
    for name, (n, k) in LAYERS.items():
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
        first = packed(n, k, options.group)
        quantized = [first, *((first[0].clone(), first[1].clone()) for _ in range(copies(n * k // 2) - 1))]
        bf16, int4 = [], []
        for rows in ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            bf16.append(microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]))
            int4.append(microseconds([lambda p=p, s=s, x=x: int4pack(x, p, options.group, s) for p, s in quantized]))
        table.add_row(name, f"{n} x {k}", "cuBLAS bf16", *(f"{time:.1f}" for time in bf16))
        table.add_row("", "", "tinygemm", *(f"{time:.1f}" for time in int4))
        ratios = (four / sixteen for four, sixteen in zip(int4, bf16, strict=True))
        table.add_row("", "", "ratio", *(f"{ratio:.2f}" for ratio in ratios))
        del dense, quantized
    device = torch.cuda.get_device_name(0)
    Console(width=160).print(table, f"{device}, torch {torch.__version__}, group size {options.group}")


if __name__ == "__main__":
    main()
