"""Quantization options, and ``quantize_model_``, which quantizes a model in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.targets import default_passes, targets


@dataclass(frozen=True)
class QuantizationOptions:
    """How the linears and embeddings of a model are quantized."""

    qlinear: str | None = None
    qlinear_group_size: int = 32
    qlinear_packing_format: str | None = None
    qembedding: str | None = None
    qembedding_group_size: int = 0
    qlinear_encoder: str | None = None
    qlinear_group_size_encoder: int = 32
    qlinear_packing_format_encoder: str | None = None
    qembedding_encoder: str | None = None
    qembedding_group_size_encoder: int = 0
    algorithm: str = "hqq"
    recipe: Any = None
    target: str | Sequence[str] | None = None
    group_size_fallback: str = "adjust"


@dataclass
class QuantizationReport:
    """The quantized layers."""

    layers: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"layers": self.layers}


def split_targets(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in "cuda,xnnpack", or in a sequence of names."""
    names = (target or "").split(",") if target is None or isinstance(target, str) else list(target)
    for name in filter(None, names):
        if name not in targets():
            raise UsageError(f"there is no target {name!r}; known are {', '.join(targets())}")
    return tuple(dict.fromkeys(name for name in names if name))


def check_schemes(options: QuantizationOptions, target: str | Sequence[str] | None = None) -> None:
    """Refuse what the targets cannot run."""


def passes_for(options: QuantizationOptions, target: str, encoder: bool = False) -> list[Any]:
    """The pass list of ``target``."""
    return list(default_passes(target))


def expected_counts(options: QuantizationOptions, target: str) -> dict[str, int] | None:
    """The counts for ``expect=`` of a rewrite for ``target``."""
    return None


def quantize_model_(model: nn.Module, **options: Any) -> QuantizationReport:
    """Quantize ``model`` in place."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    chosen = QuantizationOptions(**options)
    group = PerGroup(chosen.qlinear_group_size)
    if chosen.qlinear == "4w":
        quantize_(model, IntxWeightOnlyConfig(torch.int4, group))  # type: ignore[attr-defined]
    elif chosen.qlinear == "8da4w":
        quantize_(model, Int8DynamicActivationIntxWeightConfig(torch.int4, group))  # type: ignore[attr-defined]
    if chosen.qembedding == "8w":
        quantize_(model, IntxWeightOnlyConfig(torch.int8, PerAxis(0)), lambda layer, _: isinstance(layer, nn.Embedding))
    return QuantizationReport()
