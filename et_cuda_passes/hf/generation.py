"""Text from an exported decoder: transformers' own ``generate`` over the components ``prefill`` and ``decode``.

Sampling, logits processors, stopping criteria, masks and positions are transformers'. Only the forward pass is the
exported program's.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    TextStreamer,
)
from transformers.exporters.base import EXPORT_MANIFEST_FILE
from transformers.utils import logging

from et_cuda_passes.hf.components import with_full_layers
from et_cuda_passes.hf.config import FORMAT
from et_cuda_passes.hf.exporter import ExportedModel
from et_cuda_passes.hf.finish import read_export

COMPONENTS = ("prefill", "decode")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class GenerationError(ValueError):
    """An export cannot generate text, or not from this prompt; the message has the fix."""


class ExportedDecoder(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is not followed
    """An exported decoder with transformers' ``generate``.

    A call runs ``prefill`` if the cache is empty, and ``decode`` otherwise.

    Args:
        exported: has the components ``prefill`` and ``decode``, as ``export_for_generation`` makes them.

    Attributes:
        cache_length: the number of tokens that the exported cache holds; None if it is not of a fixed size.

    Raises:
        GenerationError: it has other components, or no config.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, exported: ExportedModel) -> None:
        if missing := [name for name in COMPONENTS if name not in exported.components]:
            raise GenerationError(
                f"the export has no component {' and no component '.join(missing)}, only "
                f"{', '.join(exported.components)}: export a decoder with export_for_generation"
            )
        if others := [name for name in exported.components if name not in COMPONENTS]:
            raise GenerationError(
                f"the export has the components {', '.join(others)} too, and only decoders of text generate here: run "
                "the components in Python (ExportedModel.runners), or one by one with et-cuda-passes run"
            )
        if exported.config is None:
            raise GenerationError("the export has no config.json: export the model again")
        traced = exported.components["decode"].metadata.kwargs
        described = [*_tensors(traced.get("attention_mask") or {})]
        if described and all(each["dtype"] != "bool" for each in described):
            # Attention in plain operators has masks that are added. The saved config does not name its kind.
            exported.config._attn_implementation = "eager"
        super().__init__(exported.config)
        self.exported = exported
        self.generation_config = exported.generation_config or GenerationConfig.from_model_config(exported.config)
        static = traced.get("past_key_values", {}).get("container") == "StaticCache"
        self.cache_length = (self.generation_config.max_cache_len or _mask_length(traced)) if static else None
        self.generation_config.cache_implementation = "static" if static else None
        self.generation_config.max_cache_len = self.cache_length
        # The program is compiled already.
        self.generation_config.disable_compile = True

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Create the cache that ``generate`` fills, with the layers that the export was traced with."""
        return with_full_layers(super()._prepare_static_cache(*args, **kwargs), self.cache_length)

    @property
    def device(self) -> torch.device:
        """Where the components run."""
        return torch.device(self.exported.device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the export."""
        dtype: torch.dtype = self.exported.dtype
        return dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run a component, which returns the same as the model's forward.

        ``generate`` reads the names of the arguments to know what to prepare.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **kwargs,
        }
        name = "prefill" if past_key_values is None or int(past_key_values.get_seq_length()) == 0 else "decode"
        traced = self.exported.components[name].metadata.kwargs
        if name == "prefill":
            given["attention_mask"] = _traced_masks(attention_mask, traced.get("attention_mask"))
        outputs = self.exported.runners[name](**{key: value for key, value in given.items() if key in traced})
        if name == "decode" and self.cache_length is not None:
            # The program has written to the tensors of this cache. The cache in the outputs is a copy of it.
            outputs.past_key_values = past_key_values
        return outputs

    def room(self, prompt: int) -> int | None:
        """The number of tokens that can follow a prompt of ``prompt`` tokens; None if there is no limit.

        Raises:
            GenerationError: the prompt itself is too long.
        """
        if self.cache_length is None:
            return None
        most = min(self.cache_length, _longest_prompt(self.exported) or self.cache_length)
        if prompt > most:
            raise GenerationError(
                f"the prompt has {prompt} tokens, but the model was exported for {most}: shorten it, or export the "
                "model with a longer cache"
            )
        # The cache does not need a place for the last token.
        return self.cache_length - prompt + 1


@dataclass(frozen=True)
class Speed:
    """How long a generation took.

    Attributes:
        first: seconds until the first token.
        rest: seconds from the first token to the last.
        tokens: the number of tokens.
    """

    first: float
    rest: float
    tokens: int

    def __str__(self) -> str:
        text = f"{self.tokens} tokens, the first after {self.first:.2f} s"
        return f"{text}, then {(self.tokens - 1) / self.rest:.1f} tokens per second" if self.rest else text


class TimedStreamer(TextStreamer):  # type: ignore[misc]  # transformers is not followed
    """Prints the text as it is generated, and measures the time.

    Args:
        tokenizer: decodes the tokens.
        silent: print nothing.
    """

    def __init__(self, tokenizer: Any, silent: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._silent = silent
        self._times = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        """Receive the prompt, and then each token."""
        if not self.next_tokens_are_prompt:
            self._times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print finished words."""
        if not self._silent:
            super().on_finalized_text(text, stream_end)

    @property
    def speed(self) -> Speed:
        """The time of the generation so far."""
        start, *tokens = self._times
        return Speed(tokens[0] - start, tokens[-1] - tokens[0], len(tokens)) if tokens else Speed(0.0, 0.0, 0)


def hide_warnings() -> None:
    """Let transformers log errors only, and show no progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in the folder of an export.

    Raises:
        GenerationError: the folder has none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise GenerationError(f"{folder} has no tokenizer: copy the tokenizer files of the model into it")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise GenerationError(f"the tokenizer in {folder} cannot be read ({_first_line(error)})") from error


def load_config(folder: Path) -> Any:
    """The config of the model in the folder of an export; None if the folder has none that can be read."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def check_export(folder: Path) -> None:
    """Check that a folder holds an export.

    Raises:
        GenerationError: it does not.
    """
    if not (folder / EXPORT_MANIFEST_FILE).is_file():
        problem = f"has no {EXPORT_MANIFEST_FILE}" if folder.is_dir() else "is not a folder"
        raise GenerationError(f"{folder} is not an export: it {problem}")


def load_exported(folder: Path, device: str | None = None, target: str | None = None) -> ExportedModel:
    """The export in a folder, ready to run. THIS EXECUTES CODE FROM THE FILES, unless the target is xnnpack.

    Raises:
        GenerationError: the folder is no export, or nothing in it runs on ``device`` or for ``target``.
    """
    check_export(folder)
    try:
        manifest = _manifest(folder)
        if manifest["export_format"] == FORMAT:
            # transformers reads the same files, and its errors do not name them.
            read_export(folder)
        elif target is not None:
            raise GenerationError(
                f"the export in {folder} is in the format {manifest['export_format']}, which has no targets: leave "
                "the target out"
            )
        options = {} if target is None else {"target": target}
        return ExportedModel.from_pretrained(folder, device=device, local_files_only=True, **options)
    except GenerationError:
        raise
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise GenerationError(
            f"the export in {folder} cannot be loaded ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / EXPORT_MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = {}
    if not isinstance(manifest, dict) or "export_format" not in manifest:
        raise GenerationError(f"{path} is damaged: copy the whole folder again, or export the model again")
    return manifest


def load_original(name: str) -> Any:
    """A model of transformers, from a folder or the Hub.

    Raises:
        GenerationError: there is no such model.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise GenerationError(f"{name} cannot be loaded: {_first_line(error)}") from error
    # transformers fills them with random numbers.
    if absent := sorted(info["missing_keys"]):
        raise GenerationError(f"{name} generates no text: it has no weights for {absent[0]}")
    return model.eval()


def encode(tokenizer: Any, prompt: str) -> Tensor:
    """The tokens of a prompt, in the chat template of the tokenizer if it has one.

    Raises:
        GenerationError: the prompt has no tokens, or is no text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(f"the prompt is not UTF-8 ({error.reason} at position {error.start})") from error
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    else:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
    if tokens.shape[1] == 0:
        raise GenerationError("the prompt has no tokens")
    return tokens  # type: ignore[no-any-return]


def generate(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> Tensor:
    """The tokens that a model adds to a prompt.

    Args:
        model: an :class:`ExportedDecoder`, or a model of transformers.
        tokens: the prompt, [1, length].
        max_new_tokens: the largest number of tokens to add.
        temperature: 0 takes the most likely token each time.
        streamer: receives each token.
    """
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokens = tokens.to(model.device)
    result = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **sampling,
    )
    return result[0, tokens.shape[1] :].cpu()  # type: ignore[no-any-return]


def first_difference(first: Tensor, second: Tensor) -> int | None:
    """The position of the first token that differs; None if all are the same."""
    for position, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=False)):
        if one != other:
            return position
    return None if len(first) == len(second) else min(len(first), len(second))


def _traced_masks(mask: Any, traced: dict[str, Any] | None) -> Any:
    """The masks that ``prefill`` takes: without those that its attention has built in, which are causal.

    Whether ``generate`` makes a causal mask at all depends on the length of the prompt.

    Args:
        mask: one tensor, or one for each kind of layer.
        traced: the description of the mask in the export; None if it was traced without.

    Raises:
        GenerationError: a mask is not causal, and the export was traced without it.
    """
    if isinstance(mask, dict):
        leaves = (traced or {}).get("leaves", {})
        return {kind: _traced_masks(each, leaves.get(kind)) for kind, each in mask.items()}
    if mask is None or (traced is not None and any(_tensors(traced))):
        return mask
    visible = mask if mask.dtype == torch.bool else mask == 0
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dim() == 2:
        visible, causal = mask.bool(), torch.ones_like(mask, dtype=torch.bool)
    if not torch.equal(visible, causal.expand_as(visible)):
        raise GenerationError(
            "prefill was traced without padding, and this prompt has some (zeros in attention_mask): leave the padding "
            "out"
        )
    return None


def _mask_length(traced: dict[str, Any]) -> int:
    """The length of a static cache, which is that of the attention masks of ``decode``."""
    lengths = {mask["shape"][-1] for mask in _tensors(traced.get("attention_mask", {}))}
    if not lengths:
        raise GenerationError(
            "the length of the exported cache is unknown: export with "
            "GenerationConfig(cache_implementation='static', max_cache_len=...)"
        )
    return int(max(lengths))


def _longest_prompt(exported: ExportedModel) -> int | None:
    """The largest number of tokens that ``prefill`` takes at once; None if the format of the export does not say so."""
    signature = getattr(exported.components["prefill"].program, "signature", None)
    if signature is None:
        return None
    sizes = [each.shape[1] for each in signature.inputs if each.name == "input_ids"]
    if not sizes or isinstance(sizes[0], int):
        return sizes[0] if sizes else None
    most: int | None = signature.ranges.get(sizes[0], (1, None))[1]
    return most


def _tensors(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "shape" in described:
        yield described
    for leaf in described.get("leaves", {}).values():
        yield from _tensors(leaf)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
