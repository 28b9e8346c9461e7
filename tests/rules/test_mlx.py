"""MLX: what the report says of the kernels that its source names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import et_cuda_passes as ecp
from et_cuda_passes.testing import Quantized, export, floats


def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight) + F.linear(x * 2, weight)


@pytest.mark.parametrize(
    ("group", "form", "kernel"),
    [
        (32, F.linear, "quantized_matmul"),
        (96, F.linear, "quantized_matmul"),
        (192, F.linear, "quantized_matmul"),
        (16, F.linear, "dequantize, in every call"),
        (48, F.linear, "dequantize, in every call"),
        (32, twice, "dequantize, in every call"),
        (16, lambda x, weight, bias: F.embedding(x.int(), weight), "gather"),
    ],
)
def test_report_names_the_kernel_of_the_readers(group: int, form: object, kernel: str) -> None:
    program = export(Quantized(32, 192, group=group, form=form), floats(4, 192).abs())  # type: ignore[arg-type]
    _, report = ecp.rewrite(program, "mlx", expect={"missed": 0})
    assert f" for MLX's {kernel} " in str(report)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 0.5, 1), (torch.float16, 0, 0.125)])
def test_zeros_of_int8_that_bf16_rounds_are_named(dtype: torch.dtype, least: float, most: float) -> None:
    """The delegate computes ``scale * Q + B`` with ``Q = q + 128`` and B in the dtype of the scale."""
    model = Quantized(64, 192, low=-128, high=127, dtype=dtype, zero_points="random")
    _, report = ecp.rewrite(export(model, floats(4, 192).to(dtype)), "mlx", expect={"missed": 0})
    assert ("off by up to one step of the integers" in str(report)) == (dtype is torch.bfloat16)
    assert model.zero_point is not None
    offset = model.zero_point.to(dtype) + 128
    steps = (-model.scale * offset).double() / model.scale.double() + offset.double()
    assert least <= float(steps.abs().max()) <= most


def test_zeros_of_symmetric_int8_are_exact_in_bf16() -> None:
    model = Quantized(64, 192, low=-128, high=127)
    assert "one step" not in str(ecp.rewrite(export(model, floats(4, 192)), "mlx")[1])
    assert torch.equal((-model.scale * 128).double(), -model.scale.double() * 128)
