"""Modules with a quantized weight of any form: plain buffers that are read through torchao's dequantize operator."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchao.quantization.quant_primitives  # noqa: F401  (registers dequantize_affine)
from torch import Tensor, nn
from torch.export import ExportedProgram

DEQUANTIZE = torch.ops.torchao.dequantize_affine.default
BF16 = torch.bfloat16


class Quantized(nn.Module):
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
        dtype: torch.dtype = BF16,
        scale_dtype: torch.dtype | None = None,
        zero_points: str | None = "zero",
        form: Callable[..., Any] = F.linear,
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
        self.bias = nn.Parameter(torch.randn(n, generator=random).to(dtype))

    def weight(self) -> Tensor:
        """The weight as the graph dequantizes it, [n, k] in ``dtype``."""
        scheme = (self.data.dtype, self.low, self.high, self.dtype)
        weight: Tensor = DEQUANTIZE(self.data, self.block, self.scale, self.zero_point, *scheme)
        return weight

    def forward(self, x: Tensor) -> Any:
        """``form`` of x, the weight and the bias."""
        return self.form(x, self.weight(), self.bias)


class Experts(nn.Module):
    """``form(weight, *inputs)`` over a random stack of experts [E, N, K], or [E, K, N] if ``columns``.

    Args:
        form: the computation on the dequantized stack.
        block: elements along each axis of the stored stack that share a scale; groups of 32 along K by default.
        low, high: the quantized range, both ends included.
        zero_points: "random" within the range, or None for no zero point tensor at all.
        columns: whether the stack is stored as [E, K, N].
        dtype: dtype of the dequantized weight and the scales.
        shape: E, N and K.
    """

    data: Tensor
    scale: Tensor

    def __init__(
        self,
        form: Callable[..., Any],
        block: tuple[int, ...] | None = None,
        low: int = -8,
        high: int = 7,
        zero_points: str | None = "random",
        columns: bool = False,
        dtype: torch.dtype = BF16,
        shape: tuple[int, ...] = (4, 40, 96),
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        experts, n, k = shape
        stored = (experts, k, n) if columns else shape
        self.block = list(block or ((1, 32, 1) if columns else (1, 1, 32)))
        self.form, self.low, self.high, self.dtype, self.columns = form, low, high, dtype, columns
        blocks = [size // of for size, of in zip(stored, self.block, strict=True)]
        self.register_buffer("data", torch.randint(low, high + 1, stored, generator=random).to(torch.int8))
        self.register_buffer("scale", (torch.rand(blocks, generator=random) * 0.02 + 0.005).to(dtype))
        self.zero_point: Tensor | None = None
        if zero_points is not None:
            points = torch.randint(low, high + 1, blocks, generator=random).to(torch.int8)
            del self.zero_point
            self.register_buffer("zero_point", points)

    def forward(self, *inputs: Tensor) -> Any:
        """``form`` of the stack and the inputs."""
        scheme = (self.data.dtype, self.low, self.high, self.dtype)
        return self.form(DEQUANTIZE(self.data, self.block, self.scale, self.zero_point, *scheme), *inputs)

    def exact(self) -> Tensor:
        """The weights in fp64, as [E, N, K]."""
        expanded = []
        for part in (self.scale, self.zero_point):
            table = torch.zeros(self.scale.shape) if part is None else part
            for axis, size in enumerate(self.block):
                table = table.repeat_interleave(size, dim=axis)
            expanded.append(table.double())
        weight = (self.data.double() - expanded[1]) * expanded[0]
        return weight.transpose(1, 2) if self.columns else weight


def floats(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Normally distributed numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def export(model: nn.Module, *inputs: Tensor, dynamic: Any = None, decompose: bool = False) -> ExportedProgram:
    """The exported program of a model.

    Args:
        model: it is set to evaluation.
        *inputs: its positional inputs.
        dynamic: for each input its dynamic axes, as ``torch.export.export`` takes them: ``({0: Dim("rows")},)``.
        decompose: decompose the program into core operators, except the dequantize.
    """
    shapes = dynamic
    if dynamic is not None:
        variadic = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind is parameter.VAR_POSITIONAL
        ]
        shapes = {variadic[0]: dynamic} if variadic else dynamic
    with torch.no_grad():
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)
        if not decompose:
            return program
        table = torch.export.default_decompositions()
        table.pop(DEQUANTIZE, None)
        decomposed: ExportedProgram = program.run_decompositions(table)
        return decomposed
