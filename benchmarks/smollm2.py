"""SmolLM2-135M-Instruct on this CPU in four exports: size, time to the first token, speed, perplexity.

python -m benchmarks.smollm2 [--folder FOLDER] [--rounds 5] [--only NAME ...]

An export that the folder holds already is used again. The exports are measured in turns, so that other load on the
machine meets all of them, and the best round of each counts.
"""

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import StaticCache

from demo.model import smollm2
from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.hf.generation import (
    ExportedDecoder,
    Speed,
    TimedStreamer,
    encode,
    generate,
    hide_warnings,
    load_exported,
    load_tokenizer,
)
from et_cuda_passes.hf.loading import generation_config, load

CACHE_LENGTH = 512
PROMPT = "What is the capital of France? Answer in one sentence, and name a river there."
NEW_TOKENS = 48
TEXT_TOKENS = 384


@dataclass(frozen=True)
class Variant:
    """One export.

    Attributes:
        target: of the export.
        qlinear: the scheme of the linears; None leaves the weights as they are.
        dtype: of the model.
    """

    target: str
    qlinear: str | None
    dtype: str


VARIANTS = {
    "XNNPACK fp32": Variant("xnnpack", None, "float32"),
    "XNNPACK 8da4w": Variant("xnnpack", "8da4w", "float32"),
    "AOTInductor bf16": Variant("cpu", None, "bfloat16"),
    "AOTInductor int4": Variant("cpu", "4w", "bfloat16"),
}


def export(name: str, variant: Variant, folder: Path) -> None:
    """Write the export of ``variant`` to ``folder``."""
    begin, processor = time.perf_counter(), time.process_time()

    def progress(step: str) -> None:
        seconds = f"{time.perf_counter() - begin:6.1f} s, {time.process_time() - processor:6.1f} s of the processor"
        print(f"{name}: after {seconds}: {step}", flush=True)

    loaded = load(Checkpoint.find(str(smollm2())), dtype=variant.dtype, max_length=CACHE_LENGTH)
    exported = EtExporter(progress).export_for_generation(
        loaded.model,
        loaded.inputs,
        EtConfig(target=variant.target, qlinear=variant.qlinear, dynamic=True, max_length=CACHE_LENGTH),
        generation_config=generation_config(loaded.model, CACHE_LENGTH),
    )
    progress("saving")
    exported.save_pretrained(folder, processor=loaded.processor)
    progress("done")


def text() -> str:
    """A text that every machine with this version of Python has: its licence."""
    return (Path(os.__file__).parent / "LICENSE.txt").read_text(encoding="utf-8")


def perplexity(decoder: ExportedDecoder, tokens: torch.Tensor) -> float:
    """The perplexity of ``tokens``, [1, length], by the component ``prefill``."""
    cache = StaticCache(decoder.config, max_cache_len=CACHE_LENGTH)
    logits = decoder(
        input_ids=tokens, position_ids=torch.arange(tokens.shape[1])[None], past_key_values=cache
    ).logits.float()
    assert logits.shape[1] == tokens.shape[1]
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).exp())


def size(folder: Path) -> float:
    """Megabytes of the programs and weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".pte", ".ptd", ".pt2")) / 1e6


def main() -> None:
    """Export what is missing, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("smollm2"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    hide_warnings()
    folders = {name: options.folder / name.lower().replace(" ", "-") for name in options.only}
    for name, folder in folders.items():
        if not (folder / "export.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            export(name, VARIANTS[name], folder)
    decoders = {name: ExportedDecoder(load_exported(folder)) for name, folder in folders.items()}
    tokenizer = load_tokenizer(next(iter(folders.values())))
    prompt = encode(tokenizer, PROMPT)
    words = tokenizer(text(), return_tensors="pt").input_ids[:, :TEXT_TOKENS]
    speeds: dict[str, list[Speed]] = {name: [] for name in decoders}
    answers: dict[str, str] = {}
    for _ in range(options.rounds):
        for name, decoder in decoders.items():
            streamer = TimedStreamer(tokenizer, silent=True)
            # No early end: each export generates the same number of tokens.
            decoder.generation_config.eos_token_id = None
            answer = generate(decoder, prompt, NEW_TOKENS, streamer=streamer)
            speeds[name].append(streamer.speed)
            answers[name] = tokenizer.decode(answer).partition("<|im_end|>")[0]
    print(f"prompt of {prompt.shape[1]} tokens, {NEW_TOKENS} new ones; perplexity of {words.shape[1]} tokens")
    print("| export | MB | first token, ms | tokens/s | perplexity |")
    print("| --- | --- | --- | --- | --- |")
    for name, decoder in decoders.items():
        first = min(speed.first for speed in speeds[name]) * 1e3
        rate = max((speed.tokens - 1) / speed.rest for speed in speeds[name])
        numbers = f"{size(folders[name]):.0f} | {first:.0f} | {rate:.1f} | {perplexity(decoder, words):.2f}"
        print(f"| {name} | {numbers} |", flush=True)
    for name, answer in answers.items():
        print(f"{name}: {answer!r}")


if __name__ == "__main__":
    main()
