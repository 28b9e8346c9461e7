"""Attention without a mask: our Triton kernel beside torch's flash attention and ExecuTorch's kernel, on this GPU.

    python -m benchmarks.attention [--cases "Voxtral encoder" ViT] [--sweep]

Every kernel is first compared with fp64, and ours must repeat its bits three times. Then all calls of one CUDA graph
are timed, so that launches cost nothing; a number is the median of the replays, per call. "of the limit" relates to the
larger of two times: the bytes at the bandwidth of a copy, and the operations at the rate of a large product of cuBLAS,
both measured here. Tensors have the form that linears write, [batch, rows, heads, head dimension].

ExecuTorch's kernel is that of its CUDA backend, if it can be imported: with a mask of ones, with which it is correct,
and without a mask; the error of the latter is printed.

``--sweep`` times our kernel in every plausible choice of blocks, warps and stages, fastest first. Choices that do not
compile, do not fit or are wrong are listed without a time.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.int4 import microseconds
from benchmarks.limit import Limit
from et_cuda_passes.kernels.attention_launch import Blocks, blocks, launch
from et_cuda_passes.kernels.device import gpu_of

MOST_WRONG = 5e-3
AXES = (2, 2, 2, 2)
COPIES = 4
"""Number of inputs in rotation; they come from the L2 cache, as between layers of a model."""
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one attention."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    d: int

    @property
    def operations(self) -> float:
        """Operations of both products."""
        return 4.0 * self.batch * self.heads * self.rows * self.keys * self.d

    @property
    def nbytes(self) -> float:
        """Bytes of q, k, v and the result."""
        return 4.0 * self.batch * self.d * (self.heads * self.rows + self.kv_heads * self.keys)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v in bf16, [batch, rows, heads, head dimension]."""
        sizes = ((self.rows, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
        q, k, v = (torch.randn(self.batch, *size, self.d, device="cuda").bfloat16() for size in sizes)
        return q, k, v

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.heads} heads, {self.kv_heads} of keys, {self.rows} x {self.keys}, "
            f"head dimension {self.d}"
        )


CASES = {
    "Voxtral encoder": Case(1, 20, 20, 1500, 1500, 64),
    "ViT": Case(8, 12, 12, 197, 197, 64),
    "ViT, large batch": Case(64, 12, 12, 197, 197, 64),
    "Llama prompt": Case(1, 32, 8, 1024, 1024, 128),
    "Whisper decoder": Case(1, 20, 20, 4, 1500, 64),
    "heads of 256": Case(1, 8, 8, 1024, 1024, 256),
}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in fp64, [batch, rows, heads, head dimension], one head at a time."""
    group = q.shape[2] // k.shape[2]
    y = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(q.shape[2]):
        one = (q[:, :, head], k[:, :, head // group], v[:, :, head // group])
        a, b, c = (t.double() for t in one)
        y[:, :, head] = (a @ b.mT * q.shape[3] ** -0.5).softmax(-1) @ c
    return y


def error(y: Tensor, wanted: Tensor) -> float:
    """Relative error; NaN if a result is NaN, which fails every comparison."""
    return float((y.double() - wanted).norm() / wanted.norm())


def ours(q: Tensor, k: Tensor, v: Tensor, chosen: Blocks | None = None) -> Tensor:
    """Our kernel, with its own choice of blocks or with ``chosen``."""
    if chosen is None:
        chosen = blocks(gpu_of(q.device), q.shape[3], q.shape[1])
    return launch(q, k, v, q.shape[3] ** -0.5, AXES, chosen)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's flash attention on transposed views."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def backends(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel of ExecuTorch's CUDA backend on transposed views, without the copies that the backend adds."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    y: Tensor = torch.ops.triton.sdpa(q, k, v, mask, 0.0, False, q.shape[3] ** -0.5, shared)
    return y.transpose(1, 2)


def kernels(case: Case) -> dict[str, Kernel]:
    """The kernels that this machine has."""
    found: dict[str, Kernel] = {"ours": ours, "flash": flash}
    try:
        import_module("executorch.backends.cuda.triton.kernels")
    except ImportError:
        return found
    mask = torch.ones(case.batch, 1, case.rows, case.keys, dtype=torch.bool, device="cuda")
    return found | {"executorch, mask": partial(backends, mask), "executorch, no mask": partial(backends, None)}


def sweep_blocks(d: int) -> list[Blocks]:
    """Plausible blocks for a head dimension."""
    sizes = [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)]
    sizes += [(128, 64, 4), (128, 32, 4), (128, 256, 8), (256, 64, 8), (256, 32, 8)] if d <= 64 else [(64, 16, 4)]
    return [Blocks(m, n, warps, stages) for (m, n, warps), stages in product(sizes, (2, 3, 4))]


def timed(kernel: Kernel, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Microseconds a call."""
    return microseconds([partial(kernel, *tensors) for tensors in inputs])


def compare(name: str, case: Case, limit: Limit) -> Table:
    """All kernels on one case.

    Raises:
        RuntimeError: our kernel is wrong, or does not repeat its bits.
    """
    inputs = [case.tensors() for _ in range(COPIES)]
    wanted = exact(*inputs[0])
    table = Table(f"{name}: {case}", "us", "TFLOP/s", "of the limit", "error")
    for label, kernel in kernels(case).items():
        try:
            y = kernel(*inputs[0])
            off = error(y, wanted)
            if kernel is ours and not (off < MOST_WRONG and all(torch.equal(ours(*inputs[0]), y) for _ in range(3))):
                raise RuntimeError(f"our kernel is off by {off:.2e} on {case}, or gives other bits another time")
            time = timed(kernel, inputs)
        except Exception as problem:
            if kernel is ours:
                raise
            # A failure of another kernel is printed, and the other measurements continue.
            table.add_row(label, "", "", "", f"{type(problem).__name__}: {str(problem)[:80]}")
            continue
        part = limit.microseconds(case.nbytes, case.operations) / time
        table.add_row(label, f"{time:.1f}", f"{case.operations / time / 1e6:.0f}", f"{part:.0%}", f"{off:.1e}")
    return table


def swept(name: str, case: Case) -> Table:
    """Our kernel in every choice of blocks, fastest first."""
    inputs = [case.tensors() for _ in range(COPIES)]
    wanted = exact(*inputs[0])
    times: dict[Blocks, float] = {}
    left_out: dict[Blocks, str] = {}
    for chosen in sweep_blocks(case.d):
        kernel = partial(ours, chosen=chosen)
        try:
            y = kernel(*inputs[0])
            torch.cuda.synchronize()
        except Exception as problem:  # ptxas, shared memory or registers: the choice does not compile or fit
            left_out[chosen] = type(problem).__name__
            continue
        off = error(y, wanted)
        if not off < MOST_WRONG or not all(torch.equal(kernel(*inputs[0]), y) for _ in range(3)):
            left_out[chosen] = f"WRONG: {off:.1e}, or other bits another time"
            continue
        times[chosen] = timed(kernel, inputs)
    now = blocks(gpu_of(torch.device("cuda")), case.d, case.rows)
    table = Table(f"{name}: {case}", "us", "TFLOP/s", "")
    for chosen, time in sorted(times.items(), key=lambda item: item[1]):
        mark = "what is chosen now" if chosen == now else ""
        table.add_row(str(chosen), f"{time:.1f}", f"{case.operations / time / 1e6:.0f}", mark)
    for chosen, why in left_out.items():
        table.add_row(str(chosen), "", "", why)
    return table


def main() -> None:
    """Print each table when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sweep", action="store_true", help="our kernel in every choice of blocks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.manual_seed(0)
    limit, console = Limit.measured(), Console(width=160)
    console.print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {limit}; bf16")
    for name in options.cases:
        case = CASES[name]
        console.print(swept(name, case) if options.sweep else compare(name, case, limit))


if __name__ == "__main__":
    main()
