"""The constants of kernels: shapes, strides and names."""

import pytest
import torch

import et_cuda_passes as ecp
from tests.experts import Experts

aten = torch.ops.aten


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("k", [32, 96])
def test_experts_are_packed_with_contiguous_strides(target: str, k: int) -> None:
    """With one group, ``contiguous()`` would keep the strides of a transposed tensor."""
    model = Experts(lambda weight, x: torch.bmm(x, weight.transpose(1, 2)), shape=(3, 32, k))
    exported = torch.export.export(model, (torch.randn(3, 2, k).bfloat16(),))
    program, _ = ecp.rewrite(exported, target, expect={"bmm_int4": 1})
    assert program.state_dict.keys() == {"data.packed", "data.scale_and_zero"}
    for tensor in program.state_dict.values():
        assert tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
