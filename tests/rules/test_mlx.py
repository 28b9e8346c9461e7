"""MLX: what the report says of the kernels that its source names."""

import pytest
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
