"""The lengths that an export was traced for are those that its programs run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir import EdgeCompileConfig
from transformers import StaticCache

import et_cuda_passes as ecp
from et_cuda_passes.executorch import lower
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.artifact import ExportError
from et_cuda_passes.hf.components import split_model, structural_copy
from tests.hf.models import CACHE, mixtral, qwen, static_cache, tokens

LENGTHS = (3, 7, 16, 25)
"""The second is that of the export; with the third, the experts of all tokens are as many as the cache is long."""


@pytest.mark.slow
def test_mixture_of_experts_runs_at_all_lengths_on_xnnpack() -> None:
    torch.manual_seed(0)
    model = mixtral()
    config = EtConfig(target="xnnpack", dynamic=True, max_length=CACHE)
    exported = EtExporter().export_for_generation(model, tokens(), config, generation_config=static_cache())
    for length in LENGTHS:
        ids = torch.randint(1, 90, (1, length))
        cache = StaticCache(config=model.config, max_cache_len=CACHE)
        positions = torch.arange(length)[None]
        found = exported.runners["prefill"](input_ids=ids, position_ids=positions, past_key_values=cache).logits
        with torch.no_grad():
            expected = model(ids).logits
        torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def prefill() -> Any:
    """The prefill of a mixture of experts, with a dynamic length."""
    torch.manual_seed(0)
    model = structural_copy(mixtral())
    name, part = next(iter(split_model(model, tokens(), static_cache(), False).items()))
    config = EtConfig(target="xnnpack", qlinear="8da4w", dynamic=True, max_length=CACHE)
    return EtExporter().trace({name: part}, {name: config}, model, 7).programs[name]


def test_lowering_that_fixes_a_length_is_refused_before_anything_is_written(prefill: Any, tmp_path: Path) -> None:
    """ExecuTorch's verifier of operators fixes it, which the lowering for XNNPACK leaves out."""
    verifier = {"compile_config": EdgeCompileConfig(_check_ir_validity=True, _skip_dim_order=True)}
    message = (
        r"prefill: ExecuTorch's lowering limits axis 1 of input_ids to 7, and it was exported for sizes up to 32, "
        r"because it assumes Eq\(2\*s\d+, 14\) for aten_\w+ \(at .*arg_validator.py:\d+ in call_function\): export the "
        "model with fixed sizes"
    )
    with pytest.raises(UsageError, match=message):
        lower._executorch(
            {"prefill": prefill}, {"prefill": ecp.XnnpackPartitioner()}, tmp_path, "model", lambda step: None, verifier
        )
    assert list(tmp_path.iterdir()) == []


# Frequencies of rotary positions that depend on the length.


def dynamic_rope() -> Any:
    """A model for 32 positions, whose frequencies are others for more."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return qwen(num_hidden_layers=1, max_position_embeddings=CACHE, rope_parameters=rope)


@pytest.mark.slow
def test_dynamic_rope_is_exported_for_the_positions_of_the_model() -> None:
    model = dynamic_rope()
    with torch.no_grad():
        model(torch.randint(1, 90, (1, 2 * CACHE)))
    rope = model.model.rotary_emb
    assert not torch.equal(rope.inv_freq, rope.original_inv_freq)
    grown = rope.inv_freq.clone()
    config = EtConfig(target="cpu", dynamic=True, max_length=CACHE)
    exported = EtExporter().export_for_generation(model, tokens(), config, generation_config=static_cache())
    assert rope.rope_type == "dynamic" and torch.equal(rope.inv_freq, grown)
    fresh = dynamic_rope()
    for length in (5, CACHE - 1):
        ids = torch.randint(1, 90, (1, length))
        cache = StaticCache(config=model.config, max_cache_len=CACHE)
        arguments = {"input_ids": ids, "position_ids": torch.arange(length)[None], "past_key_values": cache}
        found = exported.runners["prefill"](**arguments, attention_mask={"full_attention": None}).logits[:, -1]
        with torch.no_grad():
            torch.testing.assert_close(found, fresh(ids).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "given"), [(CACHE + 1, "33 tokens"), (None, "texts of any length")])
def test_dynamic_rope_is_refused_for_more_positions_before_any_work(length: int | None, given: str) -> None:
    message = rf"model: beyond 32 tokens the model .*\(rope_type dynamic\), .*is for {given}: give at most 32 tokens"
    with pytest.raises(ExportError, match=message):
        EtExporter(pytest.fail).export(
            dynamic_rope(), tokens(), EtConfig(target="cpu", dynamic=True, max_length=length)
        )
    steps: list[str] = []
    cache = static_cache(CACHE + 1)
    with pytest.raises(ExportError, match="prefill: beyond 32 tokens .* is for 33 tokens"):
        EtExporter(steps.append).export_for_generation(
            dynamic_rope(), tokens(), EtConfig(target="cpu"), generation_config=cache
        )
    assert steps == ["splitting the model into components"]
