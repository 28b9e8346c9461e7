"""Linears of one input, fused into one, lowered to CUDA and run."""

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.delegate import load
from tests.rules.fused_models import PASSES, Block, X

pytestmark = pytest.mark.gpu


def test_fused_block_agrees_with_eager(tmp_path: Path) -> None:
    length = Dim("length", min=2, max=64)
    block = torch.export.export(Block(), (X,), dynamic_shapes=({1: length},))
    passes = [*PASSES, ecp.UnmaskedAttention()]
    partitioner = ecp.CudaPartitioner([], passes=passes, expect={"fused_linear_int4": 5, "linear_int4": 2})
    with torch.no_grad():
        lowered = to_edge_transform_and_lower(block, partitioner=[partitioner]).to_executorch()
    lowered.save(str(tmp_path / "model.pte"))
    lowered.write_tensor_data_to_file(str(tmp_path))
    program, model = load(tmp_path / "model.pte"), Block()
    for rows in (2, 5, 60):
        x = torch.randn(2, rows, 64).bfloat16()
        got, wanted = program(x.cuda())[0].float().cpu(), model(x).float()
        assert (got - wanted).norm() <= 2**-6 * wanted.norm()
