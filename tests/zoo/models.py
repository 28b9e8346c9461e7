"""Architectures of transformers in small, with random weights, and what each is called with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LENGTH, VOCABULARY = 9, 128

# Under the names that the configs of most models use. A config ignores the names that it does not know.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 1,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_channels": 3}


def words() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY - 8, (1, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 4000)}


def spectrum() -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, 16, 60)}


def written(inputs: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """With the words that a decoder has written so far."""
    return lambda: {**inputs(), "decoder_input_ids": torch.randint(3, VOCABULARY - 8, (1, 5))}


def image_and_words() -> dict[str, Tensor]:
    return {**words(), **image()}


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        model_type: as transformers names it.
        head: the auto class.
        inputs: the kwargs of its forward, or of ``generate``.
        sizes: beside :data:`SIZES`; with the value ``...`` the config has no such name, or computes it.
        generates: export what generation needs, with a static cache, instead of the forward alone.
        cache: the implementation of the cache.
    """

    model_type: str
    head: str
    inputs: Callable[[], dict[str, Tensor]] = words
    sizes: dict[str, Any] = field(default_factory=dict)
    generates: bool = False
    cache: str | None = "static"

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.sizes.keys() >= EXPERTS.keys()

    def build(self, dtype: torch.dtype) -> Any:
        """The model, with random weights."""
        import transformers

        torch.manual_seed(0)
        sizes = {name: value for name, value in {**SIZES, **self.sizes}.items() if value is not ...}
        config = transformers.CONFIG_MAPPING[self.model_type](**sizes)
        model = getattr(transformers, self.head).from_config(config)
        return model.to(dtype).eval()


def _causal(*types: str, **sizes: Any) -> list[Model]:
    return [Model(name, "AutoModelForCausalLM", sizes=sizes, generates=True) for name in types]


MODELS: tuple[Model, ...] = (
    # Text, decoder only.
    *_causal("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "olmo2", "smollm3", "granite", "starcoder2"),
    *_causal("gemma2", "gemma3_text", sliding_window=16, query_pre_attn_scalar=16),
    *_causal("stablelm", "glm", "cohere", "helium", "persimmon"),
    *_causal("gpt_neox"),
    *_causal("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=128),
    *_causal("opt", word_embed_proj_dim=64, ffn_dim=128),
    *_causal("falcon", multi_query=True, head_dim=...),
    *_causal("bloom", n_layer=2, n_head=4),
    # Mixtures of experts.
    *_causal("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", **EXPERTS),
    *_causal("gpt_oss", **EXPERTS, sliding_window=16),
    # State space and recurrent.
    Model("mamba", "AutoModelForCausalLM", sizes={"state_size": 8, "time_step_rank": 32}, generates=False),
    Model("mamba2", "AutoModelForCausalLM", sizes={"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1}),
    Model("falcon_h1", "AutoModelForCausalLM", sizes={"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8}),
    # Text, encoders.
    Model("bert", "AutoModel"),
    Model("roberta", "AutoModel"),
    Model("distilbert", "AutoModel", sizes={"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}),
    Model("electra", "AutoModel", sizes={"embedding_size": 64}),
    Model("albert", "AutoModel", sizes={"embedding_size": 64}),
    Model("modernbert", "AutoModel"),
    Model("deberta-v2", "AutoModel"),
    Model("xlm-roberta", "AutoModel"),
    # Encoder and decoder.
    Model(
        "t5",
        "AutoModelForSeq2SeqLM",
        sizes={"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        generates=True,
    ),
    Model("bart", "AutoModelForSeq2SeqLM", sizes=ENCODER_DECODER, generates=True),
    Model("marian", "AutoModelForSeq2SeqLM", sizes=ENCODER_DECODER, generates=True),
    Model("m2m_100", "AutoModelForSeq2SeqLM", sizes=ENCODER_DECODER, generates=True),
    Model("pegasus", "AutoModelForSeq2SeqLM", sizes=ENCODER_DECODER, generates=True),
    # Audio.
    Model(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        spectrum,
        {
            **ENCODER_DECODER,
            "num_mel_bins": 16,
            "max_source_positions": 30,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        generates=True,
    ),
    Model(
        "wav2vec2",
        "AutoModel",
        wave,
        {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
    Model(
        "hubert",
        "AutoModel",
        wave,
        {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
    Model(
        "wavlm",
        "AutoModel",
        wave,
        {
            "num_attention_heads": 2,
            "conv_dim": [32] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    Model(
        "audio-spectrogram-transformer",
        "AutoModel",
        lambda: {"input_values": torch.randn(1, 64, 32)},
        {"max_length": 64, "num_mel_bins": 32, "patch_size": 8},
    ),
    # Vision.
    Model("vit", "AutoModel", image, VISION),
    Model("deit", "AutoModel", image, VISION),
    Model("beit", "AutoModel", image, VISION),
    Model("dinov2", "AutoModel", image, VISION),
    Model("siglip_vision_model", "AutoModel", image, VISION),
    Model("clip_vision_model", "AutoModel", image, VISION),
    Model("convnext", "AutoModel", image, {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}),
    Model(
        "segformer",
        "AutoModel",
        image,
        {
            "hidden_sizes": [32, 64],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    # Images and text.
    Model(
        "clip",
        "AutoModel",
        image_and_words,
        {"projection_dim": 64, "vision_config": {**SIZES, **VISION}, "text_config": {**SIZES, "eos_token_id": 2}},
    ),
    Model(
        "siglip",
        "AutoModel",
        image_and_words,
        {"vision_config": {**SIZES, **VISION}, "text_config": {**SIZES, "projection_size": 64}},
    ),
)
