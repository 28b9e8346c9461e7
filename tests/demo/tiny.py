"""A model of the demo's architecture that is small enough for every step in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo.model import Source

LAYERS = 1
LINEARS = 7 * LAYERS + 1
CACHE_LENGTH = 48


def tiny_model(dtype: torch.dtype = torch.bfloat16, hidden_size: int = 64) -> Any:
    """Random weights, equal in each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


class Letters:
    """A token for each ASCII character."""

    end = 0

    def encode(self, prompt: str) -> list[int]:
        return [ord(letter) for letter in prompt]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens)


def tiny_source() -> Source:
    return Source("tiny", tiny_model, Letters, CACHE_LENGTH)
