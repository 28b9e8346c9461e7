"""Lowering a decoder whole for cuda: seconds of each stage, peaks of host and GPU memory, bytes.

    python -m benchmarks.whole [--shape Llama-3.1-8B] [--layers 32] [--variants ours ours-low bf16] [--folder DIR]

Variants: ``bf16`` has bf16 weights and ExecuTorch's own CudaPartitioner; ``ours`` has int4 weights in groups of 32 and
the rewriting one; ``ours-low`` and ``bf16-low`` are the same with the compile spec ``low_memory_mode``. Each is a
process of its own. The decoders are those of :mod:`benchmarks.scale`: no embedding, no cache, random weights, any
number of tokens.

**Host** is the peak of resident memory of the process from its start, weights and export included. **GPU** is the
largest memory of the GPU in use, by all processes and above what was in use before, sampled every 20 ms.
"""

import argparse
import itertools
import platform
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as StockCudaPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from benchmarks.scale import SHAPES, Shape, Weights, exported, in_process, linear, status
from et_cuda_passes.executorch.lower import gc_throttled

VARIANTS = ("ours", "ours-low", "bf16", "bf16-low")


class TimedPartitioner(ecp.CudaPartitioner):
    """Adds up the seconds of its rewrites."""

    seconds = 0.0

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """As that of the base class."""
        begin = time.perf_counter()
        result = super().transform_for_pre_decomposition(exported_program)
        self.seconds += time.perf_counter() - begin
        return result


def bf16_linear(n: int, k: int) -> nn.Linear:
    """A linear with random bf16 weights, the same 16 million numbers again and again."""
    layer = nn.Linear(k, n, bias=False, device="meta", dtype=torch.bfloat16)
    block = torch.randn(16 << 20, dtype=torch.bfloat16) / 64
    weight = torch.empty(n, k, dtype=torch.bfloat16)
    for part in weight.view(-1).split(len(block)):
        part.copy_(block[: len(part)])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class GpuPeak:
    """The largest memory in use of the current GPU since the creation, above that at the creation."""

    def __init__(self) -> None:
        self._first, self.bytes, self._done = self._used(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @staticmethod
    def _used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, self._used() - self._first)

    def stop(self) -> int:
        """The peak in bytes."""
        self._done.set()
        self._thread.join()
        return self.bytes


@dataclass(frozen=True)
class Row:
    """One lowering: seconds, and bytes of files and memory."""

    variant: str
    linears: int
    export: float
    lower: float
    rewrite: float
    write: float
    host: int
    gpu: int
    files: int


def measure(variant: str, shape: Shape, folder: str | None) -> Row:
    """Build, export, lower and write, in this process."""
    ours = variant.startswith("ours")
    peak = GpuPeak()
    times = [time.perf_counter()]
    if ours:
        weights = Weights(None)
        program = exported(shape, lambda n, k: linear(weights, n, k))
        weights.fill()
    else:
        program = exported(shape, bf16_linear)
    times.append(time.perf_counter())
    specs = [CompileSpec("method_name", b"forward")]
    if variant.endswith("-low"):
        specs.append(CompileSpec("low_memory_mode", b"ON"))
    linears = 7 * shape.layers + 1
    timed = TimedPartitioner(specs, expect={"rewritten": linears, "missed": 0}) if ours else None
    with torch.no_grad(), gc_throttled():
        edge = to_edge_transform_and_lower({"forward": program}, partitioner=[timed or StockCudaPartitioner(specs)])
        del program
        times.append(time.perf_counter())
        lowered: Any = edge.to_executorch()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        with open(Path(temporary) / "model.pte", "wb") as file:
            lowered.write_to_file(file)
        lowered.write_tensor_data_to_file(temporary)
        files = sum(path.stat().st_size for path in Path(temporary).iterdir())
    times.append(time.perf_counter())
    export, lower, write = (end - begin for begin, end in itertools.pairwise(times))
    rewrite = timed.seconds if timed else 0.0
    return Row(variant, linears, export, lower, rewrite, write, status("VmHWM"), peak.stop(), files)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Llama-3.1-8B", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--variants", nargs="*", default=["ours", "bf16"], choices=VARIANTS)
    parser.add_argument("--folder", help="for the files, which are removed; they need three times the weights")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.whole needs a CUDA device")
    shape = SHAPES[options.shape]
    if options.layers:
        shape = replace(shape, layers=options.layers)
    print(f"{options.shape}, {shape.layers} layers; {torch.cuda.get_device_name()}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, {torch.get_num_threads()} threads\n")  # fmt: skip
    print("| variant | linears | export | lower | of it rewriting | write | host | GPU | files |")
    print(f"|{'---|' * 9}", flush=True)
    for variant in options.variants:
        row = in_process(measure, variant, shape, options.folder)
        seconds = [f"{each:.1f} s" for each in (row.export, row.lower, row.rewrite, row.write)]
        sizes = [f"{each / 1e9:.2f} GB" for each in (row.host, row.gpu, row.files)]
        print(f"| {' | '.join([row.variant, str(row.linears), *seconds, *sizes])} |", flush=True)


if __name__ == "__main__":
    main()
