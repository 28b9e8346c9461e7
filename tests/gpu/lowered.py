"""A quantized block, lowered for CUDA."""

from pathlib import Path

import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp


class Block(torch.nn.Module):
    """x + down(silu(up(x))), with a bias in one of the two linears."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(features, hidden)
        self.down = torch.nn.Linear(hidden, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def quantized(*features: int, granularity: object = PerGroup(32)) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Block(*features).bfloat16().eval()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))
    return model


def save(edge: object, folder: Path) -> Path:
    lowered = edge.to_executorch()  # type: ignore[attr-defined]
    lowered.save(str(folder / "model.pte"))
    lowered.write_tensor_data_to_file(str(folder))
    return folder / "model.pte"


def lower(program: object, folder: Path, **options: object) -> tuple[Path, ecp.CudaPartitioner]:
    partitioner = ecp.CudaPartitioner([], **options)
    with torch.no_grad():
        return save(to_edge_transform_and_lower(program, partitioner=[partitioner]), folder), partitioner


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.float().cpu() - wanted.float()).norm() / wanted.float().norm())
