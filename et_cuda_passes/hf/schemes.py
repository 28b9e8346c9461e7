"""``quantize_model_``: quantize the linears and embeddings of a model by the names of schemes.

Nothing is quantized before everything is checked. Each linear and each embedding has one entry in the report, with its
scheme, or with the reason why it stays floating-point.
"""

from typing import Any

import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from et_cuda_passes.hf.options import (
    QuantizationOptions,
    check_schemes,
    expected_counts,
    passes_for,
    promised_targets,
)
from et_cuda_passes.hf.plan import Plan
from et_cuda_passes.hf.report import LayerReport, QuantizationReport
from et_cuda_passes.hf.support import Scheme, parse_scheme

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
]


@torch.no_grad()
def quantize_model_(model: nn.Module, **options: Any) -> QuantizationReport:
    """Quantize the linears and the embeddings of ``model`` in place.

    A weight that several layers share, such as that of an embedding and a tied lm_head, is quantized once and stays
    shared: with the embedding's scheme if there is one, else with the linear's.

    Args:
        model: any module; encoders are recognized by the methods and names that transformers gives its models.
        options: those of :class:`QuantizationOptions`, by name.

    Returns:
        The report, with one entry for each linear and each embedding.

    Raises:
        ValueError: the options do not go together or do not fit the model. The model is then unchanged.
        OSError: the recipe cannot be read.
    """
    chosen = QuantizationOptions.of(options)
    check_schemes(chosen)
    plan = Plan(model, chosen)
    report, configs, shared = plan.report(), plan.configs(), plan.shared()
    # The plan holds the floating-point weights. Without it, each is freed when its layer is quantized.
    del plan
    if configs:
        quantize_(model, FqnToConfig(fqn_to_config=configs), filter_fn=None)
    for first, *others in shared:
        for other in others:
            other.weight = first.weight
    return report
