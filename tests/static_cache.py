"""A small Qwen3 as transformers exports it for generation with a static cache, and its greedy text token by token."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx._pytree as fx_pytree
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.exporters import DynamoConfig, DynamoExporter, ExportedComponent, ExportedModel
from transformers.exporters.metadata import load_treespec

from et_cuda_passes.hf import EtConfig, EtExporter

CACHE_LENGTH = 48
CONFIG = GenerationConfig(cache_implementation="static", max_cache_len=CACHE_LENGTH, do_sample=False)
GENERATION_SEED = 3
"""With these weights the greedy tokens differ."""
FORMATS = ("dynamo", "cpu", "xnnpack")
"""transformers' own format, and the targets of ours that run without a GPU."""
Run = Callable[..., list[Any]]


def qwen3(hidden: int = 64, seed: int = 0, layers: int = 1) -> Qwen3ForCausalLM:
    """A decoder with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=256,
    )
    return Qwen3ForCausalLM(config).eval()


def export(model: Qwen3ForCausalLM) -> ExportedModel:
    """``prefill`` of 2 tokens and more, and ``decode`` of one token."""
    tokens = torch.ones(1, 7, dtype=torch.int64)
    return DynamoExporter().export_for_generation(
        model,
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        DynamoConfig(dynamic=True),
        generation_config=CONFIG,
    )


def saved_export(name: str, folder: Path) -> Path:
    """`qwen3` of `GENERATION_SEED`, exported in one of `FORMATS` into ``folder``, with a tokenizer."""
    # torch's own message about the cache in the saved inputs cannot be formatted.
    logging.getLogger("torch._export.serde.serialize").disabled = True
    model = qwen3(seed=GENERATION_SEED)
    if name == "dynamo":
        exported = export(model)
    else:
        tokens = torch.ones(1, 7, dtype=torch.int64)
        exported = EtExporter().export_for_generation(
            model,
            {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
            EtConfig(target=name, dynamic=True),
            generation_config=CONFIG,
        )
    exported.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each of the 64 tokens: w0, w1, ..."""
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def inputs_of(component: ExportedComponent, kwargs: Mapping[str, Any]) -> list[Any]:
    """The inputs of a component in the order in which they were exported."""
    leaves: list[Any] = fx_pytree.tree_flatten_spec(
        ((), {**component.metadata.in_constants, **kwargs}), load_treespec(component.metadata.in_spec)
    )
    return leaves


def outputs_of(component: ExportedComponent, outputs: list[Any]) -> Any:
    """The model's outputs. The program's outputs begin with the new values of its mutated inputs."""
    spec = load_treespec(component.metadata.out_spec)
    assert not component.metadata.out_constants
    return torch.utils._pytree.tree_unflatten(outputs[len(outputs) - spec.num_leaves :], spec)


def steps(
    exported: ExportedModel, methods: Mapping[str, Run], prompt: Tensor, follow: Tensor
) -> Iterator[tuple[Tensor, StaticCache]]:
    """The logits of the last position and the cache: after the prompt, and after each token of ``follow``."""
    cache = StaticCache(exported.config, max_cache_len=CACHE_LENGTH)
    length = prompt.shape[1]
    kwargs = {
        "input_ids": prompt,
        "attention_mask": {"full_attention": None},
        "position_ids": torch.arange(length)[None],
        "past_key_values": cache,
    }
    prefill, decode = exported.components["prefill"], exported.components["decode"]
    out = outputs_of(prefill, methods["prefill"](*inputs_of(prefill, kwargs)))
    yield out.logits[0, -1], out.past_key_values
    cache = out.past_key_values
    for token in follow:
        kwargs = {
            "input_ids": token.view(1, 1),
            "attention_mask": {"full_attention": (torch.arange(CACHE_LENGTH) <= length).view(1, 1, 1, -1)},
            "position_ids": torch.tensor([[length]]),
            "past_key_values": cache,
        }
        out = outputs_of(decode, methods["decode"](*inputs_of(decode, kwargs)))
        length += 1
        yield out.logits[0, -1], cache


def greedy(model: Qwen3ForCausalLM, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens that eager chooses after ``prompt``, and the logits of each choice."""
    config = GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    out = model.generate(prompt, generation_config=config)
    return out.sequences[0, prompt.shape[1] :], torch.cat(out.logits)


def least_margin(logits: Tensor) -> float:
    """The least distance between the two largest logits of a choice, in standard deviations of its logits."""
    top = logits.float().topk(2).values
    return float(((top[:, 0] - top[:, 1]) / logits.float().std(dim=1)).min())
