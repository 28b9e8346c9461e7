"""``quantize_model_``: quantize the linears, experts and embeddings of a model by the names of schemes.

Nothing is quantized before everything is checked. Each linear, each stack of experts and each embedding has one entry
in the report, with its scheme, or with the reason why it stays floating-point.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from et_cuda_passes.hf.conv1d import replace_conv1d
from et_cuda_passes.hf.experts import quantize_stack
from et_cuda_passes.hf.options import (
    DEFAULT_GROUP_SIZE,
    QuantizationOptions,
    check_schemes,
    expected_counts,
    passes_for,
    promised_targets,
)
from et_cuda_passes.hf.plan import Plan
from et_cuda_passes.hf.recipe import Recipe
from et_cuda_passes.hf.report import LayerReport, QuantizationReport
from et_cuda_passes.hf.support import PER_AXIS, Scheme, parse_scheme

__all__ = [
    "LayerReport",
    "QuantizationOptions",
    "QuantizationReport",
    "Scheme",
    "check_schemes",
    "expected_counts",
    "parse_scheme",
    "passes_for",
    "promised_targets",
    "quantize_model_",
    "quantize_with",
]


def quantize_model_(
    model: nn.Module,
    qlinear: str | None = None,
    qlinear_group_size: int = DEFAULT_GROUP_SIZE,
    qlinear_packing_format: str | None = None,
    qembedding: str | None = None,
    qembedding_group_size: int = PER_AXIS,
    algorithm: str = "hqq",
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    target: str | Sequence[str] | None = None,
    group_size_fallback: str = "adjust",
    *,
    qlinear_encoder: str | None = None,
    qlinear_group_size_encoder: int = DEFAULT_GROUP_SIZE,
    qlinear_packing_format_encoder: str | None = None,
    qembedding_encoder: str | None = None,
    qembedding_group_size_encoder: int = PER_AXIS,
    cast_to_bf16: bool = False,
    xnnpack_weight_only: str = "fold",
) -> QuantizationReport:
    """Quantize the linears, the experts and the embeddings of ``model`` in place.

    The options are those of :class:`QuantizationOptions`, which describes them.

    A weight that several layers share, such as that of an embedding and a tied lm_head, is quantized once and stays
    shared: with the embedding's scheme if there is one, else with the linear's.

    A ``Conv1D`` of transformers, the linear of GPT-2, becomes an ``nn.Linear`` under the same FQN if it is quantized.

    The stacked matrices of a mixture of experts of transformers are linears too, and have ``qlinear``'s scheme if it
    leaves activations as they are. If the targets have no kernel for them, they stay floating-point, with the reason.

    Encoders are recognized by the methods and names that transformers gives its models.

    Returns:
        The report, with one entry for each linear, stack of experts and embedding.

    Raises:
        ValueError: the options do not go together or do not fit the model. The model is then unchanged.
        OSError: the recipe cannot be read.
    """
    return quantize_with(
        model,
        QuantizationOptions(
            qlinear=qlinear,
            qlinear_group_size=qlinear_group_size,
            qlinear_packing_format=qlinear_packing_format,
            qembedding=qembedding,
            qembedding_group_size=qembedding_group_size,
            qlinear_encoder=qlinear_encoder,
            qlinear_group_size_encoder=qlinear_group_size_encoder,
            qlinear_packing_format_encoder=qlinear_packing_format_encoder,
            qembedding_encoder=qembedding_encoder,
            qembedding_group_size_encoder=qembedding_group_size_encoder,
            algorithm=algorithm,
            recipe=recipe,
            target=target,
            group_size_fallback=group_size_fallback,
            cast_to_bf16=cast_to_bf16,
            xnnpack_weight_only=xnnpack_weight_only,
        ),
    )


@torch.no_grad()
def quantize_with(model: nn.Module, options: QuantizationOptions) -> QuantizationReport:
    """:func:`quantize_model_` with options that are built already."""
    check_schemes(options)
    plan = Plan(model, options)
    report, configs, shared = plan.report(), plan.configs(), plan.shared()
    stacks = [layer.fqn for layer in report.layers if layer.kind == "experts" and layer.fqn in configs]
    # The plan holds the floating-point weights. Without it, each is freed when its layer is quantized.
    del plan
    for fqn in stacks:
        module, _, name = fqn.rpartition(".")
        quantize_stack(model.get_submodule(module), name, configs.pop(fqn))
    if configs:
        replace_conv1d(model, configs)
        quantize_(model, FqnToConfig(fqn_to_config=configs), filter_fn=None)
    for first, *others in shared:
        for other in others:
            other.weight = first.weight
    return report
