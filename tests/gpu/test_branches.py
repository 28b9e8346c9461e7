"""A packed weight inside a branch: lowered to CUDA, and run in both branches."""

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn

import et_cuda_passes as ecp
from et_cuda_passes.delegate import load
from et_cuda_passes.testing import Quantized
from tests.graph.subgraph_models import INPUTS, cond, exported

pytestmark = pytest.mark.gpu


def test_cond_with_weights_in_both_branches_runs(tmp_path: Path) -> None:
    partitioner = ecp.CudaPartitioner([], expect={"linear_int4": 5})
    with torch.no_grad():
        lowered = to_edge_transform_and_lower(exported(cond), partitioner=[partitioner]).to_executorch()
    lowered.save(str(tmp_path / "model.pte"))
    lowered.write_tensor_data_to_file(str(tmp_path))
    program = load(tmp_path / "model.pte")
    for x in INPUTS:
        wanted = exported(cond).module()(x).float()
        got = program(x.cuda())[0]
        assert (got.float().cpu() - wanted).norm() <= 2**-6 * wanted.norm()


class Either(nn.Module):
    """One of two linears of x, by the sign of its sum, with a number of rows that is copied in bulk.

    The branches contain no number: ExecuTorch 1.5.1 turns it into a tensor in the branch, which Inductor cannot
    compile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Quantized(128, 256, seed=1), Quantized(128, 256, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, lambda x: self.first(x + x), lambda x: self.second(x), (x,))
        return y


def test_rows_are_copied_in_bulk_in_a_branch_too(tmp_path: Path) -> None:
    x = torch.randn(1, 300, 256).bfloat16()
    partitioner = ecp.CudaPartitioner([], expect={"linear_int4": 2})
    with torch.no_grad():
        exported_model = torch.export.export(Either(), (x,))
        lowered = to_edge_transform_and_lower(exported_model, partitioner=[partitioner]).to_executorch()
    lowered.save(str(tmp_path / "model.pte"))
    lowered.write_tensor_data_to_file(str(tmp_path))
    program = load(tmp_path / "model.pte")
    for sign in (1, -1):
        given = sign * x * x.sum().sign()
        wanted = exported_model.module()(given).float()
        assert (program(given.cuda())[0].float().cpu() - wanted).norm() <= 2**-6 * wanted.norm()
