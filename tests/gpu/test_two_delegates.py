"""Another delegate first: XNNPACK claims its operators, and the rest with our int4 linear goes to the GPU."""

from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as StockXnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.delegate import DelegateError, Program
from et_cuda_passes.delegate.files import read_ptd, read_pte
from et_cuda_passes.delegate.plan import read_plans
from tests.gpu.lowered import save

pytestmark = pytest.mark.gpu


class Mixed(torch.nn.Module):
    """A float linear, which XNNPACK claims, and a quantized one in bf16, which it does not claim."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 128)
        self.second = torch.nn.Linear(128, 64).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).bfloat16())


def test_rest_is_rewritten_after_another_delegate(tmp_path: Path) -> None:
    """The stock XNNPACK partitioner comes first, since ours would fold every quantized weight."""
    torch.manual_seed(0)
    model = Mixed().eval()
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, config, filter_fn=lambda module, name: name == "second")
    ours = ecp.CudaPartitioner(expect={"rewritten": 1, "missed": 0})
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(5, 64),))
        edge = to_edge_transform_and_lower(exported, partitioner=[StockXnnpackPartitioner(), ours])
    assert ours.report.counts()["rewritten"] == 1
    pte = save(edge, tmp_path)
    delegates = read_plans(read_pte(pte))["forward"].delegates
    assert sorted(delegate.backend for delegate in delegates) == ["CudaBackend", "XnnpackBackend"]
    (data,) = tmp_path.glob("*.ptd")
    names = [name.rpartition(":")[2] for name in read_ptd(data)]
    assert "second.bias" in names
    assert {name.partition(".")[0] for name in names} == {"second"}
    program = Program(pte)
    with pytest.raises(DelegateError, match="XnnpackBackend"):
        program.method()
