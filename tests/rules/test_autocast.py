"""Under autocast an operator converts what it reads unseen: what would be of another dtype is missed, and says why."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.experts import floats
from tests.quantized import Quantized

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
REASON = "activations, bias and result of one dtype"


class Autocast(nn.Module):
    """``inner`` under autocast to bf16, its result bf16 whatever it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return self.inner(*inputs)


@cache
def exported(x: torch.dtype, weight: torch.dtype, bias: torch.dtype, bits: int = 4) -> ExportedProgram:
    form = {"low": -128, "high": 127, "group": 64} if bits == 8 else {}
    inner = Quantized(32, 64, dtype=weight, **form)
    inner.bias.data = inner.bias.data.to(bias)
    return torch.export.export(Autocast(inner), (floats(4, 64, dtype=x),))


@pytest.mark.parametrize(("target", "bits"), [("cuda", 4), ("cuda", 8), ("cpu", 4), ("cpu", 8), ("metal", 4)])
@pytest.mark.parametrize("weight", [FP32, BF16])
@pytest.mark.parametrize(("x", "bias"), [(FP32, FP32), (FP32, BF16), (BF16, FP32), (FP16, BF16), (FP16, FP16)])
def test_a_linear_of_another_dtype_than_its_result(
    x: torch.dtype, weight: torch.dtype, bias: torch.dtype, target: str, bits: int
) -> None:
    assert_misses(exported(x, weight, bias, bits), REASON, target)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_the_hint_says_is_so(target: str, bits: int) -> None:
    """With the weight in bf16 the conversions, once they are written down, are around a linear of bf16."""
    program = exported(FP32, BF16, FP32, bits)
    report = assert_misses(program, "run_decompositions({})", target)
    assert "export the model outside of autocast, in bfloat16" in str(report.outcomes[0].reasons)
    assert_rewrites(program.run_decompositions({}), target, expect={"rewritten": 1, "missed": 0})


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_what_is_of_the_results_dtype_is_rewritten(target: str) -> None:
    assert_rewrites(exported(BF16, FP32, BF16), target, expect={"linear_int4": 1, "missed": 0})


@pytest.mark.parametrize("kernel", ["triton", "backend"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, FP32, FP32), (BF16, BF16, FP32)])
def test_attention(kernel: str, dtypes: tuple[torch.dtype, ...]) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    inputs = tuple(floats(1, 2, 5, 32, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
    program, report = ecp.rewrite(
        torch.export.export(Autocast(Attention()), inputs), "cuda", [ecp.UnmaskedAttention(kernel)]
    )
    assert not report.applied
    assert program.module()(*inputs).dtype is BF16


def test_what_xnnpack_would_compute_in_the_activations_dtype() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, Int8DynamicActivationIntxWeightConfig())
    program = torch.export.export(Autocast(model), (floats(4, 64, dtype=FP32),))
    assert_misses(program, REASON, "xnnpack", passes=[ecp.KeepDynamicInt8()])
