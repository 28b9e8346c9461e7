"""A packed weight inside a branch: lowered to CUDA and run, both ways."""

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower

import et_cuda_passes as ecp
from et_cuda_passes.executorch.delegate import load
from tests.graph.test_branches import INPUTS, cond, exported

pytestmark = pytest.mark.gpu


def test_a_cond_with_weights_in_both_branches_runs(tmp_path: Path) -> None:
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
