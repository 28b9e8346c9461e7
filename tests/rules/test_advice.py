"""What a miss tells to change: every hint of the cases in which one was wrong, or of another place."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import et_cuda_passes as ecp
from et_cuda_passes.quant.affine import DEQUANTIZE
from tests.quantized import Quantized


def told(model: nn.Module, x: Tensor, target: str) -> list[str]:
    """Every reason that the report of the program gives for its one reader."""
    _, report = ecp.rewrite(torch.export.export(model, (x,)), target, expect={"missed": 1})
    return [str(reason) for reason in report.outcomes[0].reasons]


def rows(k: int = 64, n: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(n, k, dtype=dtype)


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
@pytest.mark.parametrize("high", [7, 127])
def test_no_group_is_advised_for_rows_that_none_divides(target: str, high: int) -> None:
    reasons = told(Quantized(16, 40, 40, -high - 1, high), rows(40), target)
    assert not any("quantize with Per" in reason or "quantize with Intx" in reason for reason in reasons)
    assert "K must be a multiple of 32: leave this layer unquantized" in " ".join(reasons)


def test_a_target_without_an_int8_kernel_is_told_once_with_what_it_takes() -> None:
    *_, last = told(Quantized(16, 64, 8, -128, 127), rows(), "metal")
    assert last == (
        "linear_int8 wanted a target with an int8 kernel, found target metal, which has no int8 kernel; "
        "quantize with IntxWeightOnlyConfig(torch.int4, PerGroup(32))"
    )


@pytest.mark.parametrize(("k", "group"), [(64, 8), (48, 24)])
def test_what_is_int4_already_is_not_told_to_become_it(k: int, group: int) -> None:
    *_, last = told(Quantized(16, k, group), rows(k), "cpu")
    assert last.endswith("int8pack_cpu has one scale per row: quantize with PerAxis(0)")


class Changing(Quantized):
    """Its scales are computed, or written after they are read."""

    def __init__(self, written: bool) -> None:
        super().__init__(16, 64)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale if self.written else self.scale * 2
        y = F.linear(x, DEQUANTIZE(self.data, self.block, scale, None, torch.int8, -8, 7, self.dtype))
        if self.written:
            self.scale.mul_(2)
        return y


@pytest.mark.parametrize("target", ["cuda", "xnnpack"])
@pytest.mark.parametrize(
    ("written", "said"),
    [
        (False, "straight from a parameter or buffer: compute it before the export, and hold the result in a buffer"),
        (
            True,
            "which a packed weight would not follow: read a copy that nothing writes, or leave this layer unquantized",
        ),
    ],
)
def test_scales_that_are_no_constants(written: bool, said: str, target: str) -> None:
    *_, last = told(Changing(written), rows(), target)
    assert last.endswith(said)


class Large(nn.Module):
    """A convolution of kernel size 3, one scale a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("data", torch.zeros(16, 32, 3, 3, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(16).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        weight = DEQUANTIZE(self.data, [1, 32, 3, 3], self.scale, None, torch.int8, -8, 7, torch.bfloat16)
        return F.conv2d(x, weight)


def test_a_larger_kernel_is_not_told_of_a_granularity() -> None:
    reasons = told(Large(), torch.zeros(1, 32, 5, 5).bfloat16(), "cuda")
    assert not any("granularity" in reason for reason in reasons)
    assert "larger kernels have no quantized form: leave this layer unquantized" in " ".join(reasons)


@pytest.mark.parametrize("high", [7, 127])
def test_bf16_arithmetic_is_advised_where_it_helps(high: int) -> None:
    model, x = Quantized(16, 64, 64, -high - 1, high, torch.float32), rows(dtype=torch.float32)
    advice = "LinearInt4(cast_to_bf16=True) in place of the default linear_int4"
    assert any(reason.endswith(advice) for reason in told(model, x, "cuda")) == (high == 7)
    passes = [rule for rule in ecp.default_passes("cuda") if rule.name not in ("linear_int4", "fused_linear_int4")]
    expect = {"linear_int4": int(high == 7)}
    ecp.rewrite(torch.export.export(model, (x,)), "cuda", [ecp.LinearInt4(cast_to_bf16=True), *passes], expect)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "w @ x": (lambda x, w, _: w @ x, rows(2, 64)),
    "x @ w": (lambda x, w, _: x @ w, rows(16)),
    "einsum": (lambda x, w, _: torch.einsum("bk,nk->bn", x, w), rows()),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_matrix_is_not_advised_as_experts_are(product: str) -> None:
    form, x = PRODUCTS[product]
    reasons = [reason for reason in told(Quantized(16, 64, form=form), x, "cuda") if "[E, N, K]" in reason]
    assert [reason.partition("no stack of experts ")[2] for reason in reasons] == [
        "[E, N, K]: write a product with a matrix [N, K] as linear(x, weight)"
    ]
