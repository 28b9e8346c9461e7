"""One token through Voxtral's decoder: time with and without a CUDA graph, and the launches by kind.

    python -m benchmarks.voxtral.one_token [--layers 30] [--variants bf16 ours unfused ungated] [--folder DIR]

Each variant is a .pte with one method for exactly one token, lowered in its own process; variants in the folder are not
lowered again. Needs a CUDA device. The lowering of 4 layers takes a minute or two a variant.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from benchmarks.voxtral.clock import latency
from benchmarks.voxtral.dimensions import SCALES, Dimensions
from benchmarks.voxtral.kernels import CLASSES, OTHER, profiled
from benchmarks.voxtral.model import Voxtral
from benchmarks.voxtral.table import table
from benchmarks.voxtral.variants import VARIANTS

ROOT = Path(__file__).parents[2]
CALLS = 20
METHOD = "text_decoder"


def export(model: Voxtral, dimensions: Dimensions) -> ExportedProgram:
    """The decoder for one token; its position is an input."""
    weight = model.token_embedding.embed_tokens.weight
    example = weight.new_zeros(1, 1, dimensions.features), torch.tensor([dimensions.prompt], device=weight.device)
    with torch.no_grad():
        return torch.export.export(model.text_decoder, example)


def lower(name: str, dimensions: Dimensions, folder: Path) -> None:
    """Write ``folder``/model.pte and its .ptd."""
    from executorch.exir import to_edge_transform_and_lower

    from benchmarks.voxtral.lowering import partitioners
    from benchmarks.voxtral.weights import build

    variant = VARIANTS[name]
    model, _ = build(dimensions, "int4" if variant.quantized else "float", "cuda")
    program = export(model, dimensions)
    del model
    partitioner = partitioners(variant, dimensions)[METHOD]
    with torch.no_grad():
        lowered = to_edge_transform_and_lower({METHOD: program}, partitioner={METHOD: partitioner}).to_executorch()
    folder.mkdir(parents=True, exist_ok=True)
    lowered.write_tensor_data_to_file(str(folder))
    lowered.save(str(folder / "model.pte"))


def lower_missing(names: Sequence[str], layers: int, folder: Path) -> None:
    """Lower the variants that the folder lacks, one process after another, each with its own compiler cache."""
    for name in names:
        if (folder / name / "model.pte").exists():
            continue
        command = [sys.executable, "-m", "benchmarks.voxtral.one_token", "--layers", str(layers), "--lower", name]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / name)}
        subprocess.run([*command, "--folder", str(folder)], check=True, cwd=ROOT, env=environment)


def measure(pte: Path, dimensions: Dimensions) -> dict[str, Any]:
    """Milliseconds of a token, kernel by kernel and as a graph, and the kernels of a call.

    Raises:
        SystemExit: the graph's tokens differ from those without a graph.
    """
    from et_cuda_passes.delegate import load

    plain, graph = load(pte, method=METHOD), load(pte, method=METHOD, cuda_graph=True)
    random = torch.Generator("cuda").manual_seed(0)
    size = (1, 1, dimensions.features)
    # Both caches begin empty: token after token, each with the tokens before it.
    for at in range(8):
        x = torch.randn(size, generator=random, device="cuda").bfloat16()
        position = torch.tensor([at], device="cuda")
        if not torch.equal(plain(x, position)[0], graph(x, position)[0]):
            raise SystemExit(f"{pte}: token {at} of the graph differs from the one without")
    position = torch.tensor([dimensions.prompt], device="cuda")
    calls = {"plain": partial(plain, x, position), "graph": partial(graph, x, position)}
    found: dict[str, Any] = {name: latency(call, "cuda")["median_ms"] for name, call in calls.items()}
    profiled(calls["plain"], 1, "cuda")  # the start of the profiler
    return found | {"profile": profiled(calls["plain"], CALLS, "cuda")}


def times(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A line for each variant, with its ratios to bf16; gaps are the time in which no kernel runs."""
    lines = [["variant", "ms a token", "in a CUDA graph", "of bf16", "of bf16, both in graphs", "kernels", "gaps"]]
    base = results.get("bf16")
    for name, result in results.items():
        ratios = [f"{result[way] / base[way]:.2f}" if base else "" for way in ("plain", "graph")]
        busy = result["profile"]["busy_ms"]
        gaps = max(0.0, result["plain"] - busy) / result["plain"]
        numbers = [f"{result['plain']:.3f}", f"{result['graph']:.3f}", *ratios, f"{busy:.3f}", f"{gaps:.0%}"]
        lines.append([VARIANTS[name].summary, *numbers])
    return lines


def launches(results: Mapping[str, Mapping[str, Any]], layers: int) -> list[list[str]]:
    """Launches of a token, launches of a layer and microseconds of a token, by variant and kind."""
    lines = [["variant", "kind", "launches", "a layer", "microseconds"]]
    for name, result in results.items():
        profile = result["profile"]
        kinds = [kind for kind in [*CLASSES, OTHER] if kind in profile["classes_ms"]]
        rows = [(kind, profile["classes_launches"][kind], profile["classes_ms"][kind]) for kind in kinds]
        for kind, count, milliseconds in [*rows, ("all", profile["kernels"], profile["busy_ms"])]:
            numbers = [f"{count:.0f}", f"{count / layers:.1f}", f"{milliseconds * 1e3:.0f}"]
            lines.append([VARIANTS[name].summary, kind, *numbers])
    return lines


def kernels(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The kernels that take longest, by variant."""
    lines = [["variant", "kernel", "launches", "microseconds"]]
    for name, result in results.items():
        for kernel in result["profile"]["top"]:
            numbers = [f"{kernel['launches']:.0f}", f"{kernel['ms'] * 1e3:.1f}"]
            lines.append([VARIANTS[name].summary, f"`{kernel['name']}`", *numbers])
    return lines


def main() -> None:
    """Lower, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--variants", nargs="+", default=["bf16", "ours", "unfused", "ungated"], choices=list(VARIANTS))
    parser.add_argument("--folder", type=Path, help="default build/one-token-LAYERS")
    parser.add_argument("--lower", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    folder = (options.folder or ROOT / "build" / f"one-token-{options.layers}").absolute()
    dimensions = replace(SCALES["full"], layers=options.layers)
    if options.lower:
        lower(options.lower, dimensions, folder / options.lower)
        return
    folder.mkdir(parents=True, exist_ok=True)
    lower_missing(options.variants, options.layers, folder)
    results = {}
    for name in options.variants:
        results[name] = measure(folder / name / "model.pte", dimensions)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers and the lm_head")
    for lines in (times(results), launches(results, options.layers), kernels(results)):
        print(f"\n{table(lines)}")


if __name__ == "__main__":
    main()
