"""SmolLM2-135M-Instruct with 4 bits, and with the layers in 8 bits that ``suggest_recipe`` chooses.

python -m benchmarks.accuracy [--gain 1.5 3 6] [--tokens 128] [--text 512]

The noise of each layer is measured on the first tokens of a text. Each suggestion is followed: the model is quantized
again, with its recipe. The signal-to-noise ratio of the logits is then measured on the same tokens, and on the tokens
that follow them, on which also the perplexity is computed.
"""

import argparse
import copy
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from demo.model import smollm2
from et_cuda_passes.accuracy import Ratio
from et_cuda_passes.graph.interpret import Runner
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.hf.generation import hide_warnings
from et_cuda_passes.hf.loading import load
from et_cuda_passes.hf.suggestion import NoiseModel


def text() -> str:
    """A text that every machine with this version of Python has: its licence."""
    return (Path(os.__file__).parent / "LICENSE.txt").read_text(encoding="utf-8")


def export(model: Any, ids: Tensor) -> ExportedProgram:
    """The logits of a text of 2 to 2048 tokens."""
    with torch.no_grad():
        shapes = {"input_ids": {1: Dim("length", min=2, max=2048)}}
        return torch.export.export(model, (), {"input_ids": ids[:, :16]}, dynamic_shapes=shapes)


def logits(program: ExportedProgram, ids: Tensor) -> Tensor:
    """The first output of ``program``."""
    runner = Runner(program)
    found: Tensor = runner.run(runner.bind((ids,)))[0]
    return found


def ratio(wanted: Tensor, got: Tensor) -> float:
    """The signal-to-noise ratio of ``got``, in dB."""
    found = Ratio()
    found.add(wanted, got)
    assert found.decibels is not None
    return found.decibels


def perplexity(scores: Tensor, ids: Tensor) -> float:
    """The perplexity of ``ids`` [1, length], of which ``scores`` are the logits."""
    return float(torch.nn.functional.cross_entropy(scores[0, :-1].float(), ids[0, 1:]).exp())


def main() -> None:
    """Measure, suggest, follow the suggestions, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gain", type=float, nargs="+", default=[1.5, 3.0, 6.0], help="dB to gain (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to measure the layers on (%(default)s)")
    parser.add_argument("--text", type=int, default=512, help="tokens of the other part (%(default)s)")
    options = parser.parse_args()
    hide_warnings()
    loaded = load(Checkpoint.find(str(smollm2())), dtype="float32")
    model = loaded.model
    model.config.use_cache = False
    words = loaded.processor(text(), return_tensors="pt").input_ids
    chosen_on, other = words[:, : options.tokens], words[:, options.tokens :][:, : options.text]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchao", "transformers"))
    print(f"{versions}; {torch.get_num_threads()} threads; {chosen_on.shape[1]} and {other.shape[1]} tokens")

    def quantized(recipe: Any = None) -> ExportedProgram:
        copied = copy.deepcopy(model)
        ecp.quantize_model_(copied, qlinear="4w", recipe=recipe)
        return export(copied, words)

    plain, narrow = export(model, words), quantized()
    begin = time.perf_counter()
    noise = NoiseModel(narrow, plain, [(chosen_on,)], progress=lambda step: print(step, flush=True))
    print(f"measured {len(noise.layers)} weights in {time.perf_counter() - begin:.0f} s")
    wanted = {name: logits(plain, ids) for name, ids in (("same", chosen_on), ("other", other))}
    total = sum(layer.noise[0] for layer in noise.layers)
    alone = 10 * math.log10(float(wanted["same"].double().square().sum()) / total)
    print(f"the noises of the layers add up to {alone:.2f} dB")
    titles = ("weights", "layers in 8 bits", "bytes", "packed for cpu", "noises added", "predicted", "dB", "other part")
    print(f"| {' | '.join(titles)} | perplexity |")
    print("| --- " * (len(titles) + 1) + "|")

    def row(name: str, program: ExportedProgram, suggestion: Any = None) -> None:
        packed = ecp.rewrite(program, "cpu")[1].bytes_after if program is not plain else 0
        same, rest = logits(program, chosen_on), logits(program, other)
        cells = [name, "", "", "", "", "", "", ""]
        if packed:
            cells[3] = f"{packed:,}"
            cells[6:] = f"{ratio(wanted['same'], same):.2f}", f"{ratio(wanted['other'], rest):.2f}"
        if suggestion:
            moved = {move.layer for move in suggestion.moves}
            saved = sum(layer.noise[0] * (1 - layer.factor) for layer in noise.layers if layer.module in moved)
            added = noise.before_db + 10 * math.log10(total / (total - saved))
            cells[1:3] = str(len(moved)), f"{suggestion.bytes_after:,}"
            cells[4:6] = f"{added:.2f}", f"{suggestion.predicted_db:.2f}"
        print(f"| {' | '.join([*cells, f'{perplexity(rest, other):.2f}'])} |", flush=True)

    row("float32", plain)
    row("4w", narrow, noise.suggest(target_snr=-math.inf))
    for gain in options.gain:
        suggestion = noise.suggest(target_snr=noise.before_db + gain)
        row(f"4w, {gain:g} dB more", quantized(suggestion.recipe), suggestion)
        print(f"first: {', '.join(move.layer for move in suggestion.moves[:6])}")


if __name__ == "__main__":
    main()
