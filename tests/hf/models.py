"""Small models of transformers with random weights, and what they are exported with."""

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from et_cuda_passes.hf.components import structural_copy
from et_cuda_passes.hf.schemes import quantize_model_

CACHE = 32


def bert(**options: Any) -> Any:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 32,
    }
    return BertModel(BertConfig(**(sizes | options))).eval()


def qwen_config(**options: Any) -> Any:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    return Qwen3Config(**(sizes | options))


def qwen(**options: Any) -> Any:
    return Qwen3ForCausalLM(qwen_config(**options)).eval()


def mixtral() -> Any:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **sizes)).eval()


def gpt2(**options: Any) -> Any:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**(sizes | ids | options))).eval()


def t5() -> Any:
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).eval()


IMAGE_TOKEN, IMAGE_TOKENS = 95, 16


def llava() -> Any:
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=qwen_config(num_hidden_layers=1).to_dict(),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def image_and_text(length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE_TOKEN), torch.randint(1, 90, (1, length))], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}


def tokens(rows: int = 1, length: int = 7, vocabulary: int = 90) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def static_cache(length: int = CACHE) -> GenerationConfig:
    return GenerationConfig(
        cache_implementation="static", max_cache_len=length, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def quantized(model: Any, **options: Any) -> Any:
    """A quantized copy."""
    copied = structural_copy(model)
    quantize_model_(copied, **options)
    return copied
