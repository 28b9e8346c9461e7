"""From a model to exported programs: a decoder with its cache, quantized or not, and rewritten for a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp

GROUP_SIZE = 32
ALGORITHM = "hqq_scale_only"


class Decoder(nn.Module):
    """A decoder from tokens at a position of the text to the logits of the next token.

    forward(tokens int64 [1, n], start int64 [1]) -> [1, 1, vocabulary]. `start` is the position of the first token. The
    buffers contain the keys and values of all earlier positions, from earlier calls. So one program with a dynamic n
    reads a prompt at once (n is its length) and answers token by token (n = 1). A new text at position 0 needs no
    reset: attention reads only positions that were written before.
    """

    def __init__(self, model: Any, cache_length: int) -> None:
        super().__init__()
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(model.config, max_cache_len=cache_length)
        config = model.config
        self.cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
        for index, layer in enumerate(self.cache.layers):
            # A copy, because torch.export requires the state of the program in buffers.
            self.register_buffer(f"keys_{index}", torch.zeros_like(layer.keys), persistent=False)
            self.register_buffer(f"values_{index}", torch.zeros_like(layer.values), persistent=False)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        for index, layer in enumerate(self.cache.layers):
            layer.keys = self.get_buffer(f"keys_{index}")
            layer.values = self.get_buffer(f"values_{index}")
            # The layer increments it in place, so each layer gets its own tensor.
            layer.cumulative_length = start[0].clone()
        positions = start + torch.arange(tokens.shape[1], device=tokens.device)
        output = self.model(
            input_ids=tokens,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits


def quantize(model: Any) -> Any:
    """Quantize every nn.Linear of `model` in place to int4, weight-only, in groups of 32; returns `model`.

    An output head that shares its weight with the embedding gets its own quantized weight; the embedding is unchanged.
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]  # torch makes its small integer dtypes at run time
        granularity=PerGroup(GROUP_SIZE),
        intx_choose_qparams_algorithm=ALGORITHM,
    )
    quantize_(model, config)
    return model


def export(model: Any, cache_length: int) -> ExportedProgram:
    """`model` in a Decoder, exported once with a dynamic number of tokens from 1 to `cache_length`."""
    length = Dim("length", min=1, max=cache_length)
    # Any length but 0 and 1 works: torch.export treats these as constants.
    example = (torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        return torch.export.export(Decoder(model, cache_length), example, dynamic_shapes=({1: length}, None))


def save_rewritten(program: ExportedProgram, target: str, path: Path) -> None:
    """Rewrite every linear of `program` for `target` and save it at `path`, with the report beside it.

    Raises:
        et_cuda_passes.ExpectationError: a linear was not rewritten.
    """
    rewritten, report = ecp.rewrite(program, target=target, expect={"missed": 0, "kept": 0})
    _report_path(path).write_text(str(report) + "\n", encoding="utf-8")
    torch.export.save(rewritten, path)


def report_of(path: Path) -> str:
    """The report that save_rewritten wrote beside `path`."""
    return _report_path(path).read_text(encoding="utf-8").rstrip()


def _report_path(path: Path) -> Path:
    # An unfinished file is named partial-<name>; its report is that of <name>.
    return path.with_name(path.name.removeprefix("partial-")).with_suffix(".report.txt")
