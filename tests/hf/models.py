"""Small models of transformers with random weights, and what they are exported with."""

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CACHE = 32


def bert(**options: Any) -> Any:
    return BertModel(
        BertConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=100,
            max_position_embeddings=32,
            **options,
        )
    ).eval()


def qwen(**options: Any) -> Any:
    sizes = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        max_position_embeddings=64,
    )
    return Qwen3ForCausalLM(Qwen3Config(**(sizes | options))).eval()


def tokens(rows: int = 1, length: int = 7, vocabulary: int = 90) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def static_cache(length: int = CACHE) -> GenerationConfig:
    return GenerationConfig(
        cache_implementation="static", max_cache_len=length, do_sample=False, eos_token_id=None, pad_token_id=0
    )
