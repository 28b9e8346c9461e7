"""Encoders are found in models of transformers, and have options of their own."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import et_cuda_passes as ecp
from et_cuda_passes.hf.encoders import encoder_fqns

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"image_size": 32, "patch_size": 16, **SIZES}
TEXT = {"vocab_size": 64, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **SIZES}


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=16,
        vocab_size=64,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=64, d_kv=32, d_ff=96, num_layers=1, num_heads=2, vocab_size=64)
    return transformers.T5ForConditionalGeneration(config).eval()


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config={"model_type": "clip_vision_model", **VISION}
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **TEXT)).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=64, **SIZES)).eval()


class Wrapper(nn.Module):
    """A model in a module of the user's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    ("build", "fqns"),
    [
        (whisper, ("model.encoder",)),
        (t5, ("encoder",)),
        (llava, ("model.vision_tower", "model.multi_modal_projector")),
        (llama, ()),
        (bert, ()),
        (lambda: Wrapper(llava()), ("inner.model.vision_tower", "inner.model.multi_modal_projector")),
        (lambda: nn.Sequential(nn.Linear(64, 64)), ()),
    ],
    ids=["whisper", "t5", "llava", "llama", "bert", "wrapped", "plain"],
)
def test_encoder_is_found_beside_the_rest_of_a_model(build: Any, fqns: tuple[str, ...]) -> None:
    assert encoder_fqns(build()) == fqns


@pytest.mark.parametrize(
    ("name", "fqns"),
    [
        ("BartForConditionalGeneration", {"model.encoder"}),
        ("Qwen2VLForConditionalGeneration", {"model.visual"}),
        ("SmolVLMForConditionalGeneration", {"model.vision_model", "model.connector"}),
        ("VoxtralForConditionalGeneration", {"model.audio_tower", "model.multi_modal_projector"}),
        ("GraniteSpeechForConditionalGeneration", {"model.encoder", "model.projector"}),
        ("Qwen2_5OmniThinkerForConditionalGeneration", {"model.visual", "model.audio_tower"}),
        (
            "Florence2ForConditionalGeneration",
            {"model.language_model.encoder", "model.vision_tower", "model.multi_modal_projector"},
        ),
        ("Blip2ForConditionalGeneration", {"vision_model"}),
        ("Wav2Vec2Model", set()),
        ("T5EncoderModel", set()),
    ],
)
def test_encoders_of_known_architectures_are_found(name: str, fqns: set[str]) -> None:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    assert set(encoder_fqns(model)) == fqns


@pytest.mark.parametrize("build", [whisper, llava])
def test_options_of_the_encoder_reach_its_layers_alone(build: Any) -> None:
    model = build()
    encoders = encoder_fqns(model)
    report = ecp.quantize_model_(
        model, qlinear="4w", qlinear_encoder="8da8w", qembedding="4w", qembedding_encoder="8w", target="cpu"
    )
    for layer in report.layers:
        assert layer.encoder == any(layer.fqn.startswith(f"{fqn}.") for fqn in encoders)
        if layer.kind == "linear" and not layer.tied_to:
            assert layer.scheme == ("8da8w" if layer.encoder else "4w")
        elif layer.kind == "embedding" and layer.scheme:
            assert layer.scheme == ("8w" if layer.encoder else "4w")
    assert {layer.encoder for layer in report.layers} == {True, False}


def test_encoder_without_its_own_scheme_stays_float_with_the_reason() -> None:
    report = ecp.quantize_model_(llava(), qlinear="4w")
    reasons = {layer.reason for layer in report.layers if layer.encoder}
    assert reasons == {"qlinear_encoder is not given", "qembedding_encoder is not given"}
    assert all(layer.scheme == "4w" for layer in report.layers if layer.kind == "linear" and not layer.encoder)


def test_model_that_is_an_encoder_uses_the_options_without_suffix() -> None:
    report = ecp.quantize_model_(bert(), qlinear="4w")
    assert {layer.scheme for layer in report.layers if layer.kind == "linear"} == {"4w"}
    with pytest.raises(ValueError, match="the model has no encoder beside other parts; use qlinear"):
        ecp.quantize_model_(bert(), qlinear_encoder="4w")


def test_group_size_of_the_encoder_is_its_own() -> None:
    report = ecp.quantize_model_(
        whisper(), qlinear="4w", qlinear_encoder="4w", qlinear_group_size_encoder=64, group_size_fallback="adjust"
    )
    sizes = {(layer.encoder, layer.in_features): layer.group_size for layer in report.layers if layer.kind == "linear"}
    assert sizes == {(True, 64): 64, (True, 96): 32, (False, 64): 32, (False, 96): 32}


def test_table_that_encoder_and_decoder_share_is_the_decoders() -> None:
    model = t5()
    report = ecp.quantize_model_(model, qembedding="8w", qlinear_encoder="4w")
    shared = [layer for layer in report.layers if layer.fqn in ("shared", "lm_head", "decoder.embed_tokens")]
    assert {layer.form for layer in shared} == {"8w per axis"} and len(shared) == 3
    assert model.shared.weight is model.lm_head.weight is model.encoder.embed_tokens.weight


def test_embedding_that_reads_its_weight_itself_stays_float() -> None:
    model = whisper()
    report = ecp.quantize_model_(model, qlinear="4w", qembedding="8w", qembedding_encoder="8w")
    entry = report["model.decoder.embed_positions"]
    assert entry.reason == "WhisperPositionalEmbedding reads this weight itself, and not as an embedding"
    assert report["model.decoder.embed_tokens"].form == "8w per axis"
    features, tokens = torch.randn(1, 16, 32), torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        assert torch.isfinite(model(input_features=features, decoder_input_ids=tokens).logits).all()


def test_tied_model_of_transformers_keeps_its_tie() -> None:
    model = llama()
    report = ecp.quantize_model_(model, qlinear="4w", qembedding="8w")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report["lm_head"].form == report["model.embed_tokens"].form == "8w per axis"
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": torch.tensor([[1, 5, 7]]), "use_cache": False})
    rewritten, _ = ecp.rewrite(program, "cpu", expect={"rewritten": 9, "missed": 0, "embedding_int8": 1})
    tables = [t for t in (*rewritten.state_dict.values(), *rewritten.constants.values()) if tuple(t.shape) == (64, 64)]
    assert sum(t.dtype is torch.int8 for t in tables) == 1
    with torch.no_grad():
        got = rewritten.module()(input_ids=torch.tensor([[3, 2, 9]]), use_cache=False).logits
        wanted = model(input_ids=torch.tensor([[3, 2, 9]])).logits
    assert float((got - wanted).norm() / wanted.norm()) < 2.0**-7
