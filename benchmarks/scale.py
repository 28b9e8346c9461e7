"""Rewriting decoders of 0.1 to 32 billion weights: seconds of each stage, peak memory, bytes.

    python -m benchmarks.scale [--shapes SmolLM2-135M Llama-3.1-8B] [--forms streamed] [--target cuda] [--folder DIR]
    python -m benchmarks.scale --shapes Qwen3-32B --forms "mapped, streamed" --sparse  # 35 GB of weights
    python -m benchmarks.scale --check    # the limits of memory on small shapes, and that time is linear in nodes

Each line is a process of its own: it builds the decoder of a shape without its embedding, exports it, fills the int8
weights with random integers, and rewrites the program. The weights lie in memory, or with `mapped` in files, which are
mapped as those of a checkpoint are. With `streamed`, the packed constants go into mapped files, and the sources are
released.

**Peak** is the largest resident memory of the whole process during the rewrite, Python and torch included: `VmHWM` of
/proc/self/status, reset before the rewrite. It counts anonymous memory and pages of mapped files that are in memory.
**Private** is the largest anonymous part of it, sampled every 5 ms: pages that no file backs, which the system cannot
take back without swapping.
"""

import argparse
import math
import multiprocessing
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import constant_bytes
from et_cuda_passes.mapped import forget_pages
from tests.helpers import chain

_T = TypeVar("_T")

GROUP_SIZE = 32
SLACK = 512e6
"""Bytes beside the weights that a rewrite may need, Python and torch included."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int


SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 64, 49152),
    "Llama-3.2-1B": Shape(2048, 8192, 16, 32, 8, 64, 128256),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "Qwen3-32B": Shape(5120, 25600, 64, 64, 8, 128, 151936),
}
SMALL = Shape(2048, 8192, 8, 16, 8, 128, 32768)
"""For the limits, which have to be checked in seconds."""
FORMS = ("", "streamed", "mapped, streamed")


class Weights:
    """Creates int8 tensors: in memory that is not touched yet, or in mapped files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.created: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        """A tensor without values."""
        count = math.prod(shape)
        if self._folder is None:
            data = torch.empty(shape, dtype=torch.int8)
        else:
            path = str(self._folder / f"weight_{len(self.created)}")
            data = torch.from_file(path, shared=True, size=count, dtype=torch.int8).view(shape)
        self.created.append(data)
        return data

    def fill(self) -> None:
        """Write -8..7, the same 16 MB again and again: random numbers for 32 billion weights would take minutes.

        Each weight begins at another of them, since a constant that equals another one is stored once.
        """
        block = torch.randint(-8, 8, (16 << 20,), dtype=torch.int8)
        for number, data in enumerate(self.created):
            block = block.roll(number)
            for part in data.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
            if self._folder is not None:
                forget_pages(data)  # a checkpoint that was just mapped has no pages in memory
        self.created.clear()


Linear = Callable[[int, int], nn.Linear]
"""Makes a linear without bias from its out_features and in_features."""


def linear(weights: Weights, n: int, k: int) -> nn.Linear:
    """A linear with an int4 weight in the form that torchao's ``IntxWeightOnlyConfig`` makes."""
    scale = torch.full((n, k // GROUP_SIZE), 0.01, dtype=torch.bfloat16)
    layer = nn.Linear(k, n, bias=False, device="meta", dtype=torch.bfloat16)
    int4: Any = torch.int4  # type: ignore[attr-defined]  # torch makes its small integer dtypes at run time
    quantized = IntxUnpackedToInt8Tensor(
        weights(n, k), scale, torch.zeros_like(scale, dtype=torch.int8), int4, (1, GROUP_SIZE), torch.bfloat16, None
    )
    layer.weight = nn.Parameter(quantized, requires_grad=False)
    return layer


class Layer(nn.Module):
    """Attention and a gated feed-forward network."""

    def __init__(self, shape: Shape, linear: Linear) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden, dtype=torch.bfloat16) for _ in range(2))
        self.q = linear(wide, shape.hidden)
        self.k = linear(narrow, shape.hidden)
        self.v = linear(narrow, shape.hidden)
        self.o = linear(shape.hidden, wide)
        self.gate = linear(shape.intermediate, shape.hidden)
        self.up = linear(shape.intermediate, shape.hidden)
        self.down = linear(shape.hidden, shape.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """One block with residual connections."""
        y = self.norms[0](x)
        q, k, v = (
            part(y).unflatten(-1, (-1, self.shape.head_size)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """All layers and the linear to the vocabulary; the input is embedded already."""

    def __init__(self, shape: Shape, linear: Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, linear) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, dtype=torch.bfloat16)
        self.head = linear(shape.vocabulary, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def exported(shape: Shape, linear: Linear) -> torch.export.ExportedProgram:
    """The program of a decoder for any number of tokens; the model itself is gone."""
    with torch.no_grad():
        return torch.export.export(
            Decoder(shape, linear).eval(),
            (torch.zeros(1, 16, shape.hidden, dtype=torch.bfloat16),),
            dynamic_shapes=({1: torch.export.Dim("tokens", min=2, max=2048)},),
        )


class Peaks:
    """The peaks of resident memory of this process from its creation on, in bytes. Linux only."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self.private, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.private = max(self.private, status("RssAnon"))

    def stop(self) -> tuple[int, int]:
        """The peak of all resident memory, and that of its anonymous part."""
        self._done.set()
        self._thread.join()
        return status("VmHWM"), max(self.private, status("RssAnon"))


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


@dataclass(frozen=True)
class Row:
    """One rewrite.

    Attributes:
        name: of the shape.
        form: one of ``FORMS``.
        nodes: of the exported program.
        linears: that were rewritten.
        before, after: bytes of all constants.
        export, fill, rewrite: seconds.
        peak, private: bytes; see the module.
    """

    name: str
    form: str
    nodes: int
    linears: int
    before: int
    after: int
    export: float
    fill: float
    rewrite: float
    peak: int
    private: int

    @property
    def limit(self) -> float:
        """The largest peak that is allowed: both sets of weights, or streamed the larger one, and ``SLACK``."""
        weights = max(self.before, self.after) if self.form else self.before + self.after
        return weights + SLACK


def measure(name: str, shape: Shape, form: str, target: str, folder: str | None, sparse: bool = False) -> Row:
    """Build, export, fill and rewrite, in this process."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        sources, packed = Path(temporary) / "sources", Path(temporary) / "packed"
        for each in (sources, packed):
            each.mkdir()
        times = [time.perf_counter()]
        weights = Weights(sources if "mapped" in form else None)
        program = exported(shape, partial(linear, weights))
        times.append(time.perf_counter())
        if not (sparse and "mapped" in form):
            weights.fill()
        times.append(time.perf_counter())
        before, nodes = constant_bytes(program), len(program.graph.nodes)
        peaks = Peaks()
        try:
            times.append(time.perf_counter())
            options: dict[str, Any] = {"stream": packed} if "streamed" in form else {}
            result, report = ecp.rewrite(program, target, gpu="sm_90" if target == "cuda" else None, **options)
            times.append(time.perf_counter())
        finally:
            peak, private = peaks.stop()
        after, linears = constant_bytes(result), report.counts()["rewritten"]
        del result
    export, fill, rewrite = times[1] - times[0], times[2] - times[1], times[4] - times[3]
    return Row(name, form, nodes, linears, before, after, export, fill, rewrite, peak, private)


HEADER = "| shape | form | nodes | linears | quantized | packed | export | fill | rewrite | peak | limit | private |"


def table_line(row: Row) -> str:
    """The line of a Markdown table."""
    sizes = [f"{size / 1e9:.2f} GB" for size in (row.before, row.after)]
    memory = [f"{size / 1e9:.2f} GB" for size in (row.peak, row.limit, row.private)]
    times = [f"{seconds:.1f} s" for seconds in (row.export, row.fill, row.rewrite)]
    cells = [row.name, row.form or "in memory", str(row.nodes), str(row.linears), *sizes, *times, *memory]
    return f"| {' | '.join(cells)} |"


NODES = (1_000, 10_000, 100_000)
STEEPEST = 1.1
"""The largest slope of log(seconds) over log(nodes)."""


def slope(points: list[tuple[int, float]]) -> float:
    """The slope of log(seconds) over log(nodes), by least squares."""
    logs = [(math.log(nodes), math.log(seconds)) for nodes, seconds in points]
    x0, y0 = (sum(axis) / len(logs) for axis in zip(*logs, strict=True))
    return sum((x - x0) * (y - y0) for x, y in logs) / sum((x - x0) ** 2 for x, _ in logs)


def time_of_nodes(count: int, target: str) -> tuple[int, float]:
    """Nodes of a chain of quantized linears [32, 32], and the processor seconds of its rewrite.

    The weights are so small that the graph costs the time.
    """
    program = chain(count // 4)
    begin = time.process_time()
    ecp.rewrite(program, target, gpu="sm_90" if target == "cuda" else None)
    return len(program.graph.nodes), time.process_time() - begin


def in_process(function: Callable[..., _T], *arguments: Any) -> _T:
    """The result of a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def check(folder: str | None) -> None:
    """Check the peaks of memory on a small shape, and that time is linear in nodes.

    Raises:
        SystemExit: a limit is exceeded.
    """
    problems = []
    for form in FORMS:
        row = in_process(measure, "small", SMALL, form, "cuda", folder)
        print(table_line(row), flush=True)
        if row.peak > row.limit:
            problems.append(f"{form or 'in memory'}: a peak of {row.peak / 1e9:.2f} GB")
    points = [in_process(time_of_nodes, count, "cuda") for count in (1_000, 4_000, 16_000)]
    steep = slope(points)
    print(", ".join(f"{nodes} nodes: {seconds:.2f} s" for nodes, seconds in points), f"slope {steep:.2f}", flush=True)
    if steep > STEEPEST:
        problems.append(f"a slope of {steep:.2f} over nodes, beyond {STEEPEST}")
    if problems:
        raise SystemExit(f"beyond the limits: {'; '.join(problems)}")


def main() -> None:
    """Print the tables, or check the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--nodes", nargs="*", type=int, default=NODES, help="numbers of nodes to time; none: no table")
    parser.add_argument("--target", default="cuda", choices=ecp.targets())
    parser.add_argument("--folder", help="for weights and packed constants in files")
    parser.add_argument(
        "--sparse", action="store_true", help="leave weights in mapped files 0, in files that take no space on the disk"
    )
    parser.add_argument("--check", action="store_true", help="fail where a rewrite needs more memory, or time grows")
    options = parser.parse_args()
    if options.check:
        check(options.folder)
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    if options.shapes:
        print(HEADER, f"|{'---|' * (HEADER.count('|') - 1)}", sep="\n", flush=True)
    for name in options.shapes:
        for form in options.forms:
            arguments = (name, SHAPES[name], form, options.target, options.folder, options.sparse)
            print(table_line(in_process(measure, *arguments)), flush=True)
    points = [in_process(time_of_nodes, count, options.target) for count in options.nodes]
    for nodes, seconds in points:
        print(f"{nodes} nodes: {seconds:.2f} s of the processor, {1e6 * seconds / nodes:.0f} us a node", flush=True)
    if len(points) > 1:
        print(f"slope of log(seconds) over log(nodes): {slope(points):.3f}")


if __name__ == "__main__":
    main()
