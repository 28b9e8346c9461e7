"""Memory of ExecuTorch after the rewrite in a partitioner's hook: which constants it copies.

    python -m benchmarks.hook [--size 2048] [--layers 24]

Each line is a process of its own: it exports a chain of quantized linears, and gives it to ExecuTorch with a
partitioner of this package that streams. The memory is the anonymous part of the resident one, which no file backs,
sampled every 5 ms from the end of the hook on. Without a CUDA device the lowering for cuda ends where ExecuTorch moves
the program to the device, which is after the copies on the host.
"""

import argparse
import gc
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from benchmarks.scale import Peaks, status
from et_cuda_passes.graph.constants import constant_bytes


def measure(variant: str, size: int, layers: int) -> tuple[float, float]:
    """Bytes of the constants after the rewrite, and those above them."""
    target = variant.partition(" ")[0]
    dtype = torch.float32 if target == "xnnpack" else torch.bfloat16
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))).to(dtype)
    ecp.quantize_model_(model, qlinear="8da4w" if target == "xnnpack" else "4w", target=target)
    program = torch.export.export(model, (torch.randn(4, size, dtype=dtype),))
    del model
    peaks: list[Peaks] = []
    sizes: list[tuple[int, int]] = []
    base = ecp.XnnpackPartitioner if target == "xnnpack" else ecp.CudaPartitioner

    class Watched(base):  # type: ignore[misc,valid-type]
        def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
            rewritten: ExportedProgram = super().transform_for_pre_decomposition(exported_program)
            gc.collect()
            sizes.append((constant_bytes(rewritten), status("RssAnon")))
            peaks.append(Peaks())
            return rewritten

    with tempfile.TemporaryDirectory() as folder:
        specs = []
        if "low_memory_mode" in variant:
            from executorch.backends.cuda.cuda_backend import CudaBackend

            specs = [
                CudaBackend.generate_method_name_compile_spec("forward"),
                CompileSpec("low_memory_mode", b"ON"),
            ]
        partitioner = Watched(compile_spec=specs, stream=folder) if specs else Watched(stream=folder)
        try:
            to_edge_transform_and_lower(program, partitioner=[partitioner])
        except AssertionError as error:
            if "CUDA" not in str(error):
                raise
        constants, start = sizes[0]
        return constants, peaks[0].stop()[1] - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    print("| lowering | constants after the rewrite | memory above that |\n| --- | --- | --- |")
    for variant in ("cuda", "cuda, low_memory_mode=ON", "xnnpack"):
        name = variant.replace(",", "")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            constants, copied = pool.submit(measure, name, options.size, options.layers).result()
        print(f"| {variant} | {constants / 1e6:.1f} MB | {copied / 1e6:.1f} MB |", flush=True)


if __name__ == "__main__":
    main()
