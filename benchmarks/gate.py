"""A gated layer, silu(gate(x)) * up(x), as one product and as two: microseconds by weight and rows M, on this GPU.

    python -m benchmarks.gate [--group 32] [--layers "Voxtral" "SmolLM2"] [--rows 1 16 64 256 1500 4096]

Without ``FuseGate`` the default passes write two products for such a layer: the second multiplies the result of the
first. Weights are rotated past the L2 cache, and launches cost nothing (a CUDA graph), which favours the two.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.compiling import side_by_side
from benchmarks.int4 import copies, int4_pair, microseconds, random_weight
from et_cuda_passes.kernels.linear_launch import INT4_GROUP_SIZES
from et_cuda_passes.ops import INT4_LINEARS

LAYERS = {"Voxtral": (8192, 3072), "Llama": (14336, 4096), "Qwen": (9728, 2560), "SmolLM2": (1536, 576)}
"""N of each of the two weights, and K."""
ROWS = (1, 4, 16, 64, 256, 388, 1500, 4096)
MOST_APART = 1e-2
linear = INT4_LINEARS["mma_tiled"].op
Packed = tuple[Tensor, Tensor]


def packed(n: int, k: int, group: int) -> Packed:
    """A random weight and its scales, in the kernel's layout."""
    return int4_pair(*random_weight(n, k, group))


def apart(x: Tensor, gate: Packed, up: Packed, group: int) -> Tensor:
    """The layer as two products."""
    n = gate[0].shape[0]
    first = linear(x, *gate, None, group, n, "silu")
    return linear(x, *up, None, group, n, "", first)  # type: ignore[no-any-return]


def together(x: Tensor, both: Packed, group: int) -> Tensor:
    """The layer as one product with the weight of :func:`joined`."""
    n = both[0].shape[0] // 2
    return linear(x, *both, None, group, n, "silu", None, None, True)  # type: ignore[no-any-return]


def joined(gate: Packed, up: Packed) -> Packed:
    """Both weights in one: eight rows of ``gate``, eight of ``up``, and so on."""

    def alternate(first: Tensor, second: Tensor, dim: int) -> Tensor:
        eights = [part.unflatten(dim, (-1, 8)) for part in (first, second)]
        return torch.stack(eights, dim + 1).flatten(dim, dim + 2).contiguous()

    return alternate(gate[0], up[0], 0), alternate(gate[1], up[1], 1)


def warm(job: tuple[int, int, int, int]) -> None:
    """Compile the kernels of a measurement, and check that both forms agree: N, K, group size, M."""
    n, k, group, m = job
    gate, up, x = packed(n, k, group), packed(n, k, group), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    one, two = together(x, joined(gate, up), group), apart(x, gate, up, group)
    off = ((one - two).float().norm() / two.float().norm()).item()
    if not off <= MOST_APART:
        raise RuntimeError(f"{n} x {k}, M = {m}: one product and two differ by {off:.1e}")


def times(n: int, k: int, group: int, rows: Sequence[int]) -> list[tuple[float, float]]:
    """Microseconds of two products and of one, for each number of rows."""
    pairs = [(packed(n, k, group), packed(n, k, group))]
    pairs += [tuple((p.clone(), s.clone()) for p, s in pairs[0]) for _ in range(copies(n * k) - 1)]  # type: ignore[misc]
    found = []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        forms: list[list[Callable[[], Tensor]]] = [
            [partial(apart, x, gate, up, group) for gate, up in pairs],
            [partial(together, x, joined(gate, up), group) for gate, up in pairs],
        ]
        two, one = (microseconds(calls) for calls in forms)
        found.append((two, one))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=32, choices=INT4_GROUP_SIZES)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--jobs", type=int, help="processes that compile side by side")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    jobs = [(*LAYERS[name], options.group, m) for name, m in product(options.layers, options.rows)]
    side_by_side(warm, jobs, options.jobs)
    console = Console(width=160)
    console.print(
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, group size {options.group}; microseconds"
    )
    for name in options.layers:
        n, k = LAYERS[name]
        table = Table(f"{name}, 2 x {n} x {k}", *(f"M = {m}" for m in options.rows))
        found = times(n, k, options.group, options.rows)
        table.add_row("two products", *(f"{two:.1f}" for two, _ in found))
        table.add_row("one", *(f"{one:.1f}" for _, one in found))
        table.add_row("one / two", *(f"{one / two:.2f}" for two, one in found))
        console.print(table)


if __name__ == "__main__":
    main()
