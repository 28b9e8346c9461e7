"""Checkpoints on disk: small models with random weights, a tokenizer, and GGUF files with blocks of random bits."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests.hf.models import bert, llava, qwen, t5

WORDS = (
    "[UNK]",
    "[EOS]",
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "sleeps",
)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]")


def saved(model: Any, folder: Path, *others: Any) -> Path:
    model.save_pretrained(folder)
    for each in others:
        each.save_pretrained(folder)
    return folder


def causal(folder: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    return saved(qwen(**options), folder, tokenizer())


def masked(folder: Path) -> Path:
    return saved(BertForMaskedLM(bert().config), folder, tokenizer())


def image_classifier(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return saved(ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)), folder)


def speech_recognizer(folder: Path) -> Path:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 32,
    }
    config = Wav2Vec2Config(
        conv_dim=(32, 32),
        conv_kernel=(10, 8),
        conv_stride=(8, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **sizes,
    )
    return saved(Wav2Vec2ForCTC(config), folder, Wav2Vec2FeatureExtractor(sampling_rate=8000))


def whisper(folder: Path) -> Path:
    config = WhisperConfig(
        vocab_size=96,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        max_target_positions=64,
        num_mel_bins=80,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    return saved(WhisperForConditionalGeneration(config), folder, WhisperFeatureExtractor(chunk_length=1))


def encoder_decoder(folder: Path) -> Path:
    return saved(t5(), folder, tokenizer())


def image_text(folder: Path) -> Path:
    return saved(llava(), folder)


def text_and_image_encoders(folder: Path, model: type = SiglipModel, config: type = SiglipConfig) -> Path:
    """Two encoders, whose activation function is the approximate GELU for SigLIP."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"vocab_size": 96, "max_position_embeddings": 32, "projection_size": 64, "projection_dim": 64}
    image = {"image_size": 32, "patch_size": 8, "projection_dim": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return saved(model(config(text_config=sizes | text | special, vision_config=sizes | image)), folder)


# GGUF -----------------------------------------------------------------------------------------------------------------

# Blocks of 256 weights, so that every in_features is a multiple of that.
HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 256, 512, 4, 2, 64
BLOCK_BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q4_1": 20}
SHAPES = {
    "token_embd.weight": (VOCABULARY, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (FFN, HIDDEN),
    "blk.0.ffn_up.weight": (FFN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FFN),
}
MIXED = {"token_embd.weight": "Q6_K", "blk.0.ffn_down.weight": "Q6_K", "blk.0.attn_v.weight": "Q5_K"}
"""As llama.cpp's mixtures do: most in Q4_K, and some with more bits."""


def blocks(kind: str, rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """Blocks of random bits, whose factors are small positive numbers."""
    size, weights = BLOCK_BYTES[kind], 32 if kind == "Q4_1" else 256
    raw = random.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    for place in {"Q6_K": [208]}.get(kind, [0, 2]):
        factors = (random.random(len(raw)) * 2e-4 + 1e-5) * (20 if kind == "Q4_1" else 1)
        raw[:, place : place + 2] = factors.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def llama_gguf(
    path: Path, types: dict[str, str] | None = None, usual: str = "Q4_K", architecture: str = "llama"
) -> dict[str, np.ndarray]:
    """Write a llama of one layer; return the bytes of each tensor in blocks."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    written = {}
    for name, shape in SHAPES.items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        kind = (types or {}).get(name, usual)
        written[name] = blocks(kind, *shape, random)
        writer.add_tensor(name, written[name], raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def llama(folder: Path) -> Path:
    """The config and a tokenizer for :func:`llama_gguf`, without weights."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        architectures=[LlamaForCausalLM.__name__],
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
