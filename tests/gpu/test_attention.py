"""Attention without a mask, through ExecuTorch's CUDA backend: right at lengths that fill no block of keys."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.executorch.delegate import load

pytestmark = pytest.mark.gpu


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_without_a_mask(dynamic: bool, tmp_path: Path) -> None:
    qkv = [torch.randn(2, 4, 60, 32, device="cuda").bfloat16() for _ in range(3)]
    length = {2: Dim("length", min=2, max=512)} if dynamic else None
    program = torch.export.export(Attention(), tuple(t.cpu() for t in qkv), dynamic_shapes=(length,) * 3)
    with torch.no_grad():
        lowered = to_edge_transform_and_lower(program, partitioner=[ecp.CudaPartitioner([])]).to_executorch()
    lowered.save(str(tmp_path / "model.pte"))
    lowered.write_tensor_data_to_file(str(tmp_path))
    run = load(tmp_path / "model.pte")
    for rows in (2, 33, 60, 128, 300) if dynamic else (60,):
        q, k, v = (torch.randn(2, 4, rows, 32, device="cuda").bfloat16() for _ in range(3))
        wanted = (q.double() @ k.double().transpose(-2, -1) * 32**-0.5).softmax(-1) @ v.double()
        assert (run(q, k, v)[0].double() - wanted).norm() < 8e-3 * wanted.norm()
