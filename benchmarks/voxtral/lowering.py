"""Lowers a variant from random weights to a .pte and a .ptd."""

import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as StockCudaPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec

import et_cuda_passes as ecp
from benchmarks.voxtral.clock import Laps
from benchmarks.voxtral.dimensions import Dimensions
from benchmarks.voxtral.programs import export
from benchmarks.voxtral.variants import Variant
from benchmarks.voxtral.weights import build
from et_cuda_passes.executorch.lower import gc_throttled


def passes(variant: Variant) -> list[Any]:
    """The default passes for cuda, with the variant's kernels."""
    left_out = ["fused_linear_int4"] * (not variant.fused) + ["fuse_gate"] * (not variant.gated)
    rules: list[Any] = [rule for rule in ecp.default_passes("cuda") if rule.name not in left_out]
    if variant.kernel is not None:
        named = ("linear_int4", "fused_linear_int4")
        rules = [replace(rule, kernel=variant.kernel) if rule.name in named else rule for rule in rules]
    return rules


def partitioners(variant: Variant, dimensions: Dimensions) -> dict[str, list[Any]]:
    """The partitioner of each method; ours fail unless every linear is rewritten."""
    by_method: dict[str, list[Any]] = {}
    for method, linears in dimensions.linears.items():
        specs = [CompileSpec("method_name", method.encode())]
        if variant.ours:
            expect = {"rewritten": linears, "missed": 0}
            by_method[method] = [ecp.CudaPartitioner(specs, passes=passes(variant), expect=expect)]
        else:
            by_method[method] = [StockCudaPartitioner(specs)]
    return by_method


def lower(variant: Variant, dimensions: Dimensions, folder: Path, device: str) -> dict[str, Any]:
    """Write ``folder``/model.pte and its .ptd.

    Args:
        variant: the variant.
        dimensions: sizes of the networks.
        folder: emptied first.
        device: device on which the weights are created and quantized. The export runs on the CPU, and ExecuTorch moves
            a method to the GPU while it compiles it.

    Returns:
        Seconds, bytes and counts, as data for JSON.

    Raises:
        RuntimeError: the disk has too little space.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Each weight is written twice: by the compiler, and into the .ptd.
    needed = dimensions.bf16_bytes * (1 if variant.quantized else 2)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise RuntimeError(f"{folder} has {free / 1e9:.0f} GB free, lowering {variant.name} takes {needed / 1e9:.0f}")
    lap = Laps()
    model, digest = build(dimensions, "int4" if variant.quantized else "float", device)
    lap("weights")
    programs = export(model, dimensions, variant.hint(dimensions))
    del model
    lap("export")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    by_method = partitioners(variant, dimensions)
    with torch.no_grad(), gc_throttled():
        edge = to_edge_transform_and_lower(programs, partitioner=by_method)
        lap("lower")
        lowered = edge.to_executorch()
    with open(folder / "model.pte", "wb") as file:
        lowered.write_to_file(file)
    lowered.write_tensor_data_to_file(str(folder))
    lap("write")
    reports = {name: listed[0].report.counts() for name, listed in by_method.items()} if variant.ours else {}
    return {
        "seconds": lap.seconds,
        "weights": digest,
        "counts": reports,
        "pte_bytes": (folder / "model.pte").stat().st_size,
        "ptd_bytes": sum(path.stat().st_size for path in folder.glob("*.ptd")),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
