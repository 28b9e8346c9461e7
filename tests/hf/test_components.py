"""The components of a model: complete, one name for each constant, and equal to the whole model when run in turn."""

from typing import Any

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import nn
from torch._export.verifier import SpecViolationError
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import EncoderDecoderCache, FalconConfig, FalconForCausalLM, StaticCache

from et_cuda_passes.executorch.packed import load_model
from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.artifact import ExportError
from et_cuda_passes.hf.components import split_model, structural_copy, tensor_first, with_fqns_of_root
from et_cuda_passes.hf.schemes import quantize_model_
from et_cuda_passes.targets.gpu import gpu_named_in
from tests.hf.models import CACHE, IMAGE_TOKEN, image_and_text, llava, quantized, qwen, static_cache, t5, tokens

STEPS = 6


def assert_like(found: torch.Tensor, reference: torch.Tensor, unquantized: torch.Tensor) -> None:
    """``found`` is the quantized model's, and not the other's: 4 bits are far outside the tolerance."""
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)
    assert (unquantized - reference).abs().max() > 1e-2


def test_structural_copy_shares_tensors_and_nothing_else() -> None:
    model = qwen()
    copied = structural_copy(model)
    for (name, mine), (other, theirs) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert name == other
        assert mine is theirs
    assert copied.config is not model.config
    copied.lm_head.weight = nn.Parameter(torch.zeros(96, 64))
    quantize_model_(copied, qlinear="4w")
    assert type(model.model.layers[0].mlp.up_proj.weight) is nn.Parameter
    assert model.lm_head.weight.abs().max() > 0


def test_model_and_its_attributes_are_unchanged_by_an_export() -> None:
    model = qwen().bfloat16().train()
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    config = model.config.to_dict()
    EtExporter().export(model, tokens(), EtConfig(target="cuda", qlinear="4w"))
    assert model.config.to_dict() == config
    assert model.training
    for name, value in model.state_dict(keep_vars=True).items():
        assert id(value) == state[name][0]
        assert value.requires_grad
        assert torch.equal(value, state[name][1])


def test_split_adds_what_generate_runs_before_forward() -> None:
    assert list(split_model(qwen(), tokens(), None, False)) == ["prefill", "decode"]
    assert list(split_model(t5(), tokens(), None, False)) == ["encoder", "prefill", "decode"]
    parts = split_model(llava(), image_and_text(), None, False)
    assert list(parts) == [
        "image_encoder", "multi_modal_projector", "token_embedding", "language_model", "lm_head", "decode"
    ]  # fmt: skip
    assert all(not isinstance(value, nn.Module) for _, inputs in parts.values() for value in inputs.values())
    assert "image_encoder" not in split_model(llava(), tokens(), None, False)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return self.linear(x) + torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.count


def test_input_that_is_no_tensor_does_not_come_first() -> None:
    class Masked(nn.Module):
        def forward(self, attention_mask: Any = None, x: Any = None) -> torch.Tensor:
            return torch.where(x > 0.5, x + 1.5, 0.25)

    ordered = tensor_first({"attention_mask": {"full": None}, "x": torch.ones(1, 2)})
    assert list(ordered) == ["x", "attention_mask"]
    assert list(tensor_first({"attention_mask": None})) == ["attention_mask"]
    # The reason. Should this not fail, check whether the order still matters.
    for inputs in (ordered, {"attention_mask": {"full": None}, "x": torch.ones(1, 2)}):
        program = torch.export.export(Masked(), (), dict(inputs))
        if inputs is ordered:
            to_edge_transform_and_lower(program)
        else:
            with pytest.raises(SpecViolationError, match="does not match node name attention_mask"):
                to_edge_transform_and_lower(program)


def test_constants_have_the_names_of_the_whole_model() -> None:
    x, module = torch.randn(2, 4), Inner()
    expected = module.linear(x) + torch.tensor([1.0, 2.0, 3.0, 4.0]) + 1
    program = torch.export.export(module, (x,))
    named = with_fqns_of_root(program, "a.b", "part")
    targets = {spec.target for spec in named.graph_signature.input_specs if spec.target}
    assert {"a.b.linear.weight", "a.b.linear.bias", "a.b.count"} < targets
    (lifted,) = targets - {"a.b.linear.weight", "a.b.linear.bias", "a.b.count"}
    assert lifted.startswith("part_lifted")
    assert set(named.state_dict) | set(named.constants) == targets
    torch.testing.assert_close(named.module()(x), expected)
    decomposed = named.run_decompositions({})
    assert list(decomposed.graph_signature.buffers_to_mutate.values()) == ["a.b.count"]
    assert set(program.state_dict) == {"linear.weight", "linear.bias", "count"}


@pytest.mark.slow
def test_encoder_decoder_gives_the_numbers_of_the_quantized_model() -> None:
    model, inputs = t5(), tokens()
    config = static_cache()
    config.decoder_start_token_id = 0
    exported = EtExporter().export_for_generation(
        model, inputs, EtConfig(target="cpu", qlinear="4w"), generation_config=config
    )
    inputs, written = tokens(), torch.randint(1, 90, (1, STEPS))
    with torch.no_grad():
        unquantized = model(**inputs, decoder_input_ids=written).logits
        expected = quantized(model, qlinear="4w")(**inputs, decoder_input_ids=written).logits
    run = exported.runners
    encoded = run["encoder"](**inputs)
    decoder = model.config.get_text_config(decoder=True)
    cache = EncoderDecoderCache(*(StaticCache(config=decoder, max_cache_len=length) for length in (CACHE, 7)))
    logits = []
    for position in range(STEPS):
        output = run["prefill" if position == 0 else "decode"](
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=written[:, position : position + 1],
            decoder_attention_mask=(torch.arange(CACHE) <= position)[None, None, None],
            encoder_outputs=encoded,
            past_key_values=cache,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    assert_like(torch.cat(logits, 1), expected, unquantized)


@pytest.mark.slow
def test_image_and_text_give_the_numbers_of_the_quantized_model() -> None:
    model, inputs = llava(), image_and_text()
    exported = EtExporter().export_for_generation(
        model, inputs, EtConfig(target="cpu", qlinear="4w"), generation_config=static_cache()
    )
    inputs, written = image_and_text(), torch.randint(1, 90, (1, STEPS))
    run, ids = exported.runners, inputs["input_ids"]
    length = ids.shape[1]
    whole = {"input_ids": torch.cat([ids, written], 1), "pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        unquantized = model(**whole).logits
        expected = quantized(model, qlinear="4w")(**whole).logits
    image = run["image_encoder"](pixel_values=inputs["pixel_values"])
    features = run["multi_modal_projector"](image_features=image.hidden_states[-1])
    embeddings = run["token_embedding"](input=ids)
    output = run["language_model"](
        attention_mask={"full_attention": None},
        position_ids=torch.arange(length)[None],
        past_key_values=StaticCache(config=model.config.get_text_config(), max_cache_len=CACHE),
        inputs_embeds=embeddings.masked_scatter((ids == IMAGE_TOKEN)[..., None], features),
    )
    cache = output.past_key_values
    logits = [run["lm_head"](input=output.last_hidden_state)]
    for position in range(length, length + STEPS):
        output = run["decode"](
            input_ids=whole["input_ids"][:, position : position + 1],
            attention_mask={"full_attention": (torch.arange(CACHE) <= position)[None, None, None]},
            position_ids=torch.tensor([[position]]),
            past_key_values=cache,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    assert_like(torch.cat(logits, 1), expected, unquantized)


def test_components_have_their_own_configs_and_targets() -> None:
    configs = {
        "prefill": EtConfig(target="xnnpack,cuda", qlinear="8da4w", cast_to_bf16=True),
        "decode": {"target": "cuda", "cast_to_bf16": True},
    }
    model = qwen(num_hidden_layers=1)
    exported = EtExporter().export_for_generation(model, tokens(), configs)
    prefill, decode = (exported.components[name].program for name in ("prefill", "decode"))
    assert list(prefill.builds) == ["xnnpack", "cuda"]
    assert list(decode.builds) == ["cuda"]
    assert prefill.report["xnnpack"]["counts"]["kept"] == 8
    assert decode.report["cuda"]["outcomes"] == []
    assert list(exported.report["targets"]) == ["xnnpack", "cuda"]
    assert list(exported.report["targets"]["xnnpack"]) == ["prefill"]
    with pytest.raises(ExportError, match="no entry for decode; the components are prefill, decode"):
        EtExporter().export_for_generation(model, tokens(), {"prefill": configs["prefill"]})


def test_weight_that_is_read_other_than_by_a_linear_stays_float_or_is_an_error_with_the_line() -> None:
    config = FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    model = FalconForCausalLM(config).bfloat16()
    exported = EtExporter().export(model, tokens(), EtConfig(target="cuda", qlinear="4w"))
    layers = {each["fqn"]: each for each in exported.report["quantization"][0]["layers"]}
    dense = layers["transformer.h.0.self_attention.dense"]
    assert (dense["scheme"], dense["reason"]) == (None, "FalconLinear reads this weight itself, and not as a linear")
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    message = r"model: modeling_falcon.py:\d+ reads a quantized weight with aten\.\w+, .*skip it in a recipe"
    with pytest.raises(ExportError, match=message):
        EtExporter().export(model, tokens(), EtConfig(target="cuda"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="packs for another machine")
def test_gpu_of_the_config_is_named_in_the_packed_program_of_cuda_alone() -> None:
    config = EtConfig(target="cuda,cpu", qlinear="4w", gpu="sm_89")
    exported = EtExporter().export(qwen().bfloat16(), tokens(), config)
    builds = exported.components["model"].program.builds
    assert gpu_named_in(load_model(builds["cuda"].files[0], "cuda").program) == "sm_89"
    notes = {name: parts["model"]["notes"] for name, parts in exported.report["targets"].items()}
    assert "predicted, not measured, for sm_89" in notes["cuda"][0] and notes["cpu"] == []


def test_wrong_configs_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="needs a target"):
        EtConfig()
    with pytest.raises(ValueError, match="there is no target 'cdua'"):
        EtConfig(target="cdua")
    with pytest.raises(ExportError, match="is in bfloat16, and xnnpack computes in float32"):
        EtExporter(pytest.fail).export(qwen().bfloat16(), tokens(), EtConfig(target="xnnpack"))
    with pytest.raises(ValueError, match="'h100' names no known GPU: use one of sm_80"):
        EtConfig(target="cuda", gpu="h100")
    with pytest.raises(ExportError, match="gpu='sm_89' selects the tilings of cuda, and the target is cpu"):
        EtConfig(target="cpu", gpu="sm_89")
    with pytest.raises(TypeError, match="must be an EtConfig"):
        EtExporter().export(qwen(), tokens(), "cpu")
