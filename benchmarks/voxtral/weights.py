"""Random weights, created and quantized module by module: the model is never in memory twice, nor in fp32."""

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from benchmarks.voxtral.dimensions import Dimensions
from benchmarks.voxtral.model import RmsNorm, Rotary, Voxtral

GROUP_SIZE = 32
Form = Literal["float", "int4", "dequantized"]
"""The form of linears: float, quantized, or quantized and dequantized."""


def build(
    dimensions: Dimensions,
    form: Form,
    device: str | torch.device,
    kept: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Voxtral, str]:
    """A model with random weights, which are equal for every ``form`` on one ``device``.

    Every linear preserves the scale of its input, so that 30 layers neither vanish nor overflow.

    Args:
        dimensions: sizes.
        form: form of the linears; embeddings and convolutions are always float.
        device: device on which weights are created and quantized.
        kept: device on which they stay.
        dtype: dtype of all float tensors except the frequencies of the rotation.

    Returns:
        The model, and a digest of its weights before quantization.
    """
    with torch.device("meta"):
        model = Voxtral(dimensions).to(dtype).eval()
    device, kept = torch.device(device), torch.device(kept)
    random = torch.Generator(device).manual_seed(0)
    digest = hashlib.sha256()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            value.normal_(_mean(module, name), _deviation(module, name), generator=random)
            digest.update(value.flatten()[:16].float().cpu().numpy().tobytes())
            _set(module, name, value)
        if form != "float" and isinstance(module, nn.Linear):
            _quantize(module, form)
        for name, parameter in list(module.named_parameters(recurse=False)):
            _set(module, name, parameter.detach().to(kept))
        for name, buffer in list(module.named_buffers(recurse=False)):
            value = module.frequencies(kept) if isinstance(module, Rotary) else torch.zeros_like(buffer, device=kept)
            setattr(module, name, value)
    return model, digest.hexdigest()


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, RmsNorm))


def _mean(module: nn.Module, name: str) -> float:
    return float(_is_norm(module) and name == "weight")


def _deviation(module: nn.Module, name: str) -> float:
    if name == "bias" or _is_norm(module):
        return 0.05
    if isinstance(module, nn.Linear):
        return float(module.in_features**-0.5)
    if isinstance(module, nn.Conv1d):
        return float((module.in_channels * module.kernel_size[0]) ** -0.5)
    return 1.0


def _quantize(linear: nn.Linear, form: Form) -> None:
    int4: Any = torch.int4  # type: ignore[attr-defined]  # torch makes its small integer dtypes at run time
    quantize_(nn.Sequential(linear), IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP_SIZE)))
    if form == "dequantized":
        weight: Any = linear.weight
        _set(linear, "weight", weight.dequantize())
