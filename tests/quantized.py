"""Small quantized models for tests: weights as plain buffers read through dequantize_affine, for any scheme."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchao.quantization.quant_primitives  # noqa: F401  (registers dequantize_affine)
from torch import Tensor

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


class Quantized(torch.nn.Module):
    """``form(x, dequantized weight, bias)`` over a random weight [n, k].

    Args:
        n, k: out_features and in_features.
        group: block size along k; k for per-axis.
        low, high: the quantized range, both ends included.
        dtype: dtype of activations, bias and dequantized weight.
        scale_dtype: dtype of the scales, by default ``dtype``.
        zero_points: "random" within the range, "zero", or None for no zero point tensor at all.
        form: the computation, by default a linear with bias.
    """

    def __init__(
        self,
        n: int,
        k: int,
        group: int = 32,
        low: int = -8,
        high: int = 7,
        dtype: torch.dtype = torch.bfloat16,
        scale_dtype: torch.dtype | None = None,
        zero_points: str | None = "zero",
        form: Form = F.linear,
        storage: torch.dtype = torch.int8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.block, self.low, self.high, self.dtype, self.form = [1, group], low, high, dtype, form
        self.register_buffer("data", torch.randint(low, high + 1, (n, k), generator=random).to(storage))
        scale = torch.rand(n, k // group, generator=random) * 0.02 + 0.005
        self.register_buffer("scale", scale.to(scale_dtype or dtype))
        self.zero_point: Tensor | None
        if zero_points is None:
            self.zero_point = None
        else:
            points = torch.randint(low, high + 1, (n, k // group), generator=random)
            self.register_buffer("zero_point", (points * (zero_points == "random")).to(storage))
        self.bias = torch.nn.Parameter(torch.randn(n, generator=random).to(dtype))

    def weight(self) -> Tensor:
        """The weight as the graph dequantizes it, [n, k] in ``dtype``."""
        return torch.ops.torchao.dequantize_affine(
            self.data, self.block, self.scale, self.zero_point, self.data.dtype, self.low, self.high, self.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight(), self.bias)


def export(model: torch.nn.Module, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.export.ExportedProgram:
    """``model``, exported with one random input of ``shape``."""
    return torch.export.export(model, (torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype),))
