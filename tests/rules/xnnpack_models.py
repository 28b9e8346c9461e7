"""Models of the tests of XNNPACK's rules: linears as torchao and a PT2E quantizer write them, with parts to change."""

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
import torchao.quantization.quant_primitives  # noqa: F401  (registers the operators)
from torch import Tensor, nn

ao, qd = torch.ops.torchao, torch.ops.quantized_decomposed
IN, OUT, ROWS = 64, 32, 4
FP32, BF16, INT8, UINT8 = torch.float32, torch.bfloat16, torch.int8, torch.uint8


class Dynamic(nn.Module):
    """linear(fake-quantized x, dequantized weight [OUT, IN], bias) as torchao exports it; every part can be changed.

    Args:
        low, high, group: the range of the weight, and its block size along IN.
        rows: its block size along OUT.
        dtype, scale_dtype, storage: of activations, of scales, and of the integers.
        zero_point: its first zero point; None for no zero points at all.
        scale: its first scale; None for a random one.
        integer: its first integer; None for a random one.
        within: the scales are a part of a larger tensor.
        activation: changed arguments of choose_qparams, quantize and dequantize: low, high, mapping, eps.
        bias: "constant", "computed" or "none".
        reader: a second reader, of "integers" of the activation, of its "dequantized" value, or of the "weight" with
            another scale.
    """

    def __init__(
        self,
        low: int = -8,
        high: int = 7,
        group: int = 32,
        rows: int = 1,
        dtype: torch.dtype = FP32,
        scale_dtype: torch.dtype = FP32,
        storage: torch.dtype = INT8,
        zero_point: int | None = 0,
        scale: float | None = None,
        integer: int | None = None,
        within: bool = False,
        activation: dict[str, Any] | None = None,
        bias: str = "constant",
        reader: str = "",
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.range, self.block, self.dtype = (low, high), [rows, group], dtype
        self.bias_form, self.reader = bias, reader
        self.activation = {"low": -128, "high": 127, "mapping": "ASYMMETRIC", "eps": None, **(activation or {})}
        self.register_buffer("q", torch.randint(low, high + 1, (OUT, IN), generator=random).to(storage))
        if integer is not None:
            self.q[0, 0] = integer
        scales = (torch.rand(OUT // rows, IN // group, generator=random) * 0.02 + 0.01).to(scale_dtype)
        if scale is not None:
            scales[0, 0] = scale
        self.register_buffer("other_scale", scales * 3)
        self.register_buffer("scale", torch.cat([scales, scales])[: len(scales)] if within else scales)
        points = torch.zeros(scales.shape, dtype=storage)
        points[0, 0] = zero_point or 0
        self.register_buffer("zero_point", None if zero_point is None else points)
        self.bias = nn.Parameter(torch.randn(OUT, generator=random).to(dtype))

    def weight(self, scale: Tensor) -> Tensor:
        return ao.dequantize_affine(
            self.q, self.block, scale, self.zero_point, self.q.dtype, *self.range, output_dtype=self.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        block, (low, high, mapping, eps) = [1] * (x.dim() - 1) + [IN], self.activation.values()
        scale, zero = ao.choose_qparams_affine(x, mapping, block, INT8, low, high, eps, FP32, INT8)
        integers = ao.quantize_affine(x, block, scale, zero, INT8, low, high)
        dequantized = ao.dequantize_affine(integers, block, scale, zero, INT8, low, high, output_dtype=self.dtype)
        bias = None if self.bias_form == "none" else self.bias
        if self.bias_form == "computed":
            bias = self.bias * x.sum()
        y = F.linear(dequantized, self.weight(self.scale), bias)
        if self.reader == "weight":
            return y + F.linear(dequantized, self.weight(self.other_scale))
        return y + {"integers": integers, "dequantized": dequantized}[self.reader].sum() if self.reader else y


class InBranch(nn.Module):
    """``inner`` inside a branch of control flow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, self.inner, lambda y: y.new_ones(y.shape[0], OUT), (x,))
        return result


class Decomposed(nn.Module):
    """A linear as a PT2E quantizer writes it; every part can be changed.

    Args:
        activation: "static" or "dynamic".
        ends: the range and dtype of the activation.
        storage: dtype of the weight's integers.
        zero_point, scale: the first of the weight's.
        per_tensor: the weight has one scale, a number in the graph.
        axis: the weight's axis that has the scales.
        scale_dtype: dtype of the weight's scales.
        within: the integers are a part of a larger tensor.
        eps: the least scale of a dynamic activation.
        reader: a second reader, of the "activation" or of the "weight" with another scale.
        result: the result is quantized: "" for not, or "quantized", or "relu" for after a clamp, or "read" for
            quantized and read by another operator as well.
    """

    def __init__(
        self,
        activation: str = "static",
        ends: tuple[int, int, torch.dtype] = (-128, 127, INT8),
        storage: torch.dtype = INT8,
        zero_point: int = 0,
        scale: float = 0.01,
        per_tensor: bool = False,
        result: str = "quantized",
        axis: int = 0,
        scale_dtype: torch.dtype = FP32,
        within: bool = False,
        eps: float = 1e-5,
        reader: str = "",
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.activation, self.ends, self.result = activation, ends, result
        self.axis, self.eps, self.reader = axis, eps, reader
        self.one = (scale, zero_point) if per_tensor else None
        integers = torch.randint(0, 128, (OUT, IN), generator=random).to(storage)
        self.register_buffer("q", torch.cat([integers + 1, integers])[OUT:] if within else integers)
        count = (OUT, IN)[axis]
        self.register_buffer("scale", torch.tensor([scale, *[0.01] * (count - 1)], dtype=scale_dtype))
        self.register_buffer("other_scale", self.scale * 2)
        self.register_buffer("zero", torch.tensor([zero_point, *[0] * (count - 1)]))

    def weight(self, scale: Tensor | None = None) -> Tensor:
        if self.one is not None:
            return qd.dequantize_per_tensor(self.q, *self.one, 0, 127, self.q.dtype)
        scale = self.scale if scale is None else scale
        return qd.dequantize_per_channel(self.q, scale, self.zero, self.axis, 0, 127, self.q.dtype)

    def forward(self, x: Tensor) -> Tensor:
        low, high, dtype = self.ends
        if self.activation == "static":
            x = qd.dequantize_per_tensor(qd.quantize_per_tensor(x, 0.02, 3, *self.ends), 0.02, 3, *self.ends)
        else:
            scale, zero = qd.choose_qparams.tensor(x, low, high, self.eps, dtype)
            integers = qd.quantize_per_tensor.tensor(x, scale, zero, *self.ends)
            x = qd.dequantize_per_tensor.tensor(integers, scale, zero, *self.ends)
        z = self.quantized(F.linear(x, self.weight()))
        if self.reader == "weight":
            return z + self.quantized(F.linear(x, self.weight(self.other_scale)))
        return z + x.sum() if self.reader else z

    def quantized(self, y: Tensor) -> Tensor:
        """The result ``y`` of a linear, in the form of ``result``."""
        if not self.result:
            return y
        ends = (-128, 127, INT8)
        after = y.relu() if self.result == "relu" else y
        z: Tensor = qd.dequantize_per_tensor(qd.quantize_per_tensor(after, 0.05, -4, *ends), 0.05, -4, *ends)
        return z + y.sum() if self.result == "read" else z


class CalibratedConvolution(Decomposed):
    """``convolution(x, weight [OUT, IN, 1, 1], bias)`` of a vector x, calibrated."""

    def __init__(self, convolution: Callable[..., Tensor], computed: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.convolution, self.computed = convolution, computed
        self.q = self.q[..., None, None].clone()

    def forward(self, x: Tensor) -> Tensor:
        integers = qd.quantize_per_tensor(x[..., None, None], 0.02, 3, *self.ends)
        x = qd.dequantize_per_tensor(integers, 0.02, 3, *self.ends)
        bias = x.mean((0, 2, 3))[:OUT] if self.computed else None
        return self.quantized(self.convolution(x, self.weight(), bias))


class WeightOnly(nn.Module):
    """``read(x, dequantized weight [OUT, IN])``, in int8 with zero points; ``scale`` is the first of its scales."""

    def __init__(
        self,
        read: Callable[[Tensor, Tensor], Tensor] = F.linear,
        scale: float = 0.01,
        dtype: torch.dtype = FP32,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.read, self.dtype = read, dtype
        self.register_buffer("q", torch.randint(-128, 128, (OUT, IN), generator=random).to(INT8))
        scales = torch.rand(OUT, IN // 16, generator=random) * 0.02 + 0.01
        scales[0, 0] = scale
        self.register_buffer("scale", scales)
        self.register_buffer("zero", torch.randint(-9, 9, (OUT, IN // 16), generator=random).to(INT8))

    def weight(self) -> Tensor:
        return ao.dequantize_affine(self.q, [1, 16], self.scale, self.zero, INT8, -128, 127, output_dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.weight())


class Siblings(nn.Module):
    """Three quantized linears of one input.

    Args:
        other: how the third linear's input differs: "scale" (it is another tensor), "mutated" (it changes before the
            third linear), or "" (it does not).
    """

    def __init__(self, other: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, OUT) for _ in range(3))
        self.other = other

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The results of the three."""
        x = x + 0.5
        first, second = self.q(x), self.k(x)
        if self.other == "mutated":
            x.mul_(1.5)
        return first, second, self.v(x * 2 if self.other == "scale" else x)
