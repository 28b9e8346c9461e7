"""One tensor of integers that several dequantizes read: a constant for each, and one for those with equal arguments."""

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from et_cuda_passes.testing import assert_rewrites
from tests.experts import floats


class Reads(nn.Module):
    """``x`` times the same integers [32, 64], dequantized by each of ``ways``."""

    def __init__(self, *ways: Any) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.ways = ways
        self.register_buffer("data", torch.randint(-8, 8, (32, 64), generator=random).to(torch.int8))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x.to(weight.dtype), weight) for weight in (way(self.data) for way in self.ways)]


def by_number(scale: float, zero_point: int, low: int = -128, dtype: torch.dtype = torch.float32) -> Any:
    operator = torch.ops.quantized_decomposed.dequantize_per_tensor
    return lambda data: operator(data, scale, zero_point, low, 127, torch.int8, out_dtype=dtype)


@pytest.mark.parametrize(
    "other",
    [by_number(0.05, 0), by_number(0.01, 3), by_number(0.01, 0, dtype=torch.float16)],
    ids=["scale", "zero point", "dtype"],
)
def test_folded_with_other_numbers(other: Any) -> None:
    model, x = Reads(by_number(0.01, 0), other, by_number(0.01, 0)), floats(4, 64, dtype=torch.float32)
    folded, _ = assert_rewrites(torch.export.export(model, (x,)), "xnnpack", expect={"fold_dequantize": 3}, rtol=0)
    assert sorted(folded.state_dict) == ["data.dequantized", "data.dequantized_2"]
