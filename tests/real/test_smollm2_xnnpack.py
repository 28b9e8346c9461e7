"""SmolLM2 with its own weights for XNNPACK, run by ExecuTorch's runtime."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[demo]'")

from transformers import StaticCache

from demo.model import smollm2
from et_cuda_passes.hf import EtConfig, EtExporter, ExportedModel
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.hf.generation import ExportedDecoder, encode, generate, load_exported, load_tokenizer
from et_cuda_passes.hf.loading import Loaded, generation_config, load
from et_cuda_passes.hf.schemes import quantize_model_

LENGTH = 96
QUESTION = "What is the capital of France? Answer in one sentence."
# Mean and worst relative error of a position. The delegate rounds the scales of 4-bit weights to bf16, and some
# activations to another integer than eager. Folded weights are those of eager.
LIMITS = {"8da4w": (2.0**-6, 2.0**-4), "4w": (2.0**-17, 2.0**-17)}


@pytest.fixture(scope="module")
def smollm() -> Loaded:
    return load(Checkpoint.find(str(smollm2())), dtype="float32", max_length=LENGTH)


def exported(model: Loaded, scheme: str, folder: Path) -> ExportedDecoder:
    export: ExportedModel = EtExporter().export_for_generation(
        model.model,
        model.inputs,
        EtConfig(target="xnnpack", qlinear=scheme, dynamic=True, max_length=LENGTH),
        generation_config=generation_config(model.model, LENGTH),
    )
    reports = export.report["targets"]["xnnpack"]
    assert all(outcome["status"] != "missed" for report in reports.values() for outcome in report["outcomes"])
    export.save_pretrained(folder, processor=model.processor)
    return ExportedDecoder(load_exported(folder, target="xnnpack"))


def logits(decoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of all positions but the last from one call, and those of the last from a second call."""
    cache = StaticCache(decoder.config, max_cache_len=LENGTH)
    positions = torch.arange(tokens.shape[1])[None]
    first = decoder(input_ids=tokens[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
    mask = (torch.arange(LENGTH) < tokens.shape[1]).view(1, 1, 1, -1)
    last = decoder(
        input_ids=tokens[:, -1:],
        position_ids=positions[:, -1:],
        past_key_values=first.past_key_values,
        attention_mask=mask,
    )
    return torch.cat([first.logits, last.logits], 1)[0].float()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["8da4w", "4w"])
def test_first_two_layers_of_smollm2_have_the_logits_of_eager(smollm: Loaded, scheme: str, tmp_path: Path) -> None:
    model = copy.deepcopy(smollm.model)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    decoder = exported(replace(smollm, model=model), scheme, tmp_path / "export")
    quantize_model_(model, qlinear=scheme)
    # Longer than the inputs of the export, and as long as its cache.
    tokens = encode(smollm.processor, QUESTION + " " + "Name a river. " * 20)[:, :LENGTH]
    for length in (3, LENGTH):
        with torch.no_grad():
            wanted = logits(model, tokens[:, :length])
            got = logits(decoder, tokens[:, :length])
        assert got.shape == wanted.shape
        error = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
        mean, worst = LIMITS[scheme]
        assert float(error.mean()) < mean
        assert float(error.max()) < worst


@pytest.mark.slow
@pytest.mark.parametrize("scheme", LIMITS)
def test_smollm2_answers_with_executorchs_runtime(smollm: Loaded, scheme: str, tmp_path: Path) -> None:
    decoder = exported(smollm, scheme, tmp_path / "export")
    tokenizer = load_tokenizer(tmp_path / "export")
    answer = tokenizer.decode(generate(decoder, encode(tokenizer, QUESTION), 16), skip_special_tokens=True)
    assert "Paris" in answer
