"""GPT-2, whose linears are transformers' Conv1D: quantized under their names, with the numbers of the model."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.pytorch_utils import Conv1D

import et_cuda_passes as ecp
from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.components import structural_copy
from tests.hf.models import CACHE, gpt2, static_cache, tokens

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    found = gpt2()
    # The small random weights of a new model would hide an error of a layer behind the residual.
    for name, parameter in found.named_parameters():
        if parameter.dim() == 2 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return found


def names() -> list[str]:
    return [f"transformer.h.{layer}.{name}" for layer in range(2) for name in LINEARS]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def dequantized(model: Any, quantized: Any) -> Any:
    """``model`` with the values of the quantized weights, in its own Conv1D."""
    copied = structural_copy(model)
    for name in names():
        weight = quantized.get_submodule(name).weight.dequantize()
        copied.get_submodule(name).weight = nn.Parameter(weight.t().contiguous())
    table = quantized.lm_head.weight.dequantize()
    copied.lm_head.weight = copied.transformer.wte.weight = nn.Parameter(table)
    return copied


def test_conv1d_is_quantized_as_a_linear_under_its_name(model: Any) -> None:
    quantized = structural_copy(model)
    report = ecp.quantize_model_(quantized, qlinear="4w")
    assert [each.fqn for each in report.layers if each.kind == "linear"] == [*names(), "lm_head"]
    up = report["transformer.h.0.mlp.c_fc"]
    assert (up.out_features, up.in_features, up.form) == (256, 64, "4w group 32")
    assert all(type(quantized.get_submodule(name)) is nn.Linear for name in names())
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert {name for name, _ in quantized.named_parameters()} == {name for name, _ in model.named_parameters()}
    inputs = tokens()
    with torch.no_grad():
        found, expected, unquantized = (
            each(**inputs).logits for each in (quantized, dequantized(model, quantized), model)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert error(found, unquantized) > 3e-2


def test_conv1d_that_is_not_quantized_stays_as_it_is(model: Any) -> None:
    copied = structural_copy(model)
    recipe = {"layer": [{"pattern": "*.c_attn", "skip": True}]}
    report = ecp.quantize_model_(copied, qlinear="4w", recipe=recipe)
    kinds = {name: type(copied.get_submodule(name)) for name in names()}
    assert kinds == {name: Conv1D if name.endswith("c_attn") else nn.Linear for name in names()}
    assert report["transformer.h.0.attn.c_attn"].reason == "the recipe skips it"


def test_conv1d_that_is_used_twice_stays_one_module(model: Any) -> None:
    copied = structural_copy(model)
    copied.transformer.h[1].mlp.c_fc = copied.transformer.h[0].mlp.c_fc
    ecp.quantize_model_(copied, qlinear="4w")
    first, second = (copied.transformer.h[layer].mlp.c_fc for layer in (0, 1))
    assert first is second and type(first) is nn.Linear


def test_conv1d_that_shares_its_weight_stays_float_with_the_reason(model: Any) -> None:
    copied = structural_copy(model)
    copied.transformer.h[1].mlp.c_fc.weight = copied.transformer.h[0].mlp.c_fc.weight
    report = ecp.quantize_model_(copied, qlinear="4w")
    assert report["transformer.h.1.mlp.c_fc"].reason.startswith("a weight of Conv1D that other modules share")
    assert type(copied.transformer.h[0].mlp.c_fc) is Conv1D


@pytest.mark.slow
def test_gpt2_on_cpu_and_xnnpack_has_the_numbers_of_the_quantized_model(model: Any) -> None:
    config = EtConfig(target="cpu,xnnpack,cuda", qlinear="4w", dynamic=True, max_length=CACHE, cast_to_bf16=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        exported = EtExporter().export_for_generation(model, tokens(), config, generation_config=static_cache())
    expected_fqns = sorted([*(f"{name}.weight" for name in names()), *["transformer.wte.weight"] * 2])
    for parts in exported.report["targets"].values():
        for report in parts.values():
            assert report["counts"]["missed"] == 0
            found = [fqn for each in report["outcomes"] for fqn in each["fqn"].split(", ")]
            assert sorted(found) == expected_fqns
    quantized = structural_copy(model)
    ecp.quantize_model_(quantized, qlinear="4w")
    ids = torch.randint(1, 90, (1, 5))
    with torch.no_grad():
        expected = quantized(ids).logits
    for target, limit in (("cpu", 3e-2), ("xnnpack", 1e-4)):
        exported.to(target=target)
        cache = StaticCache(config=model.config, max_cache_len=CACHE)
        arguments = {"input_ids": ids, "position_ids": torch.arange(5)[None], "past_key_values": cache}
        found = exported.runners["prefill"](**arguments).logits
        assert error(found, expected[:, -found.shape[1] :]) < limit
