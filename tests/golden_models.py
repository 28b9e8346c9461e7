"""The model of the golden texts: two layers in three quantization schemes, exported with a dynamic length."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup


class Model(torch.nn.Module):
    """Two layers, the first with a bias, and an output read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 44, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(F.silu(self.up(x)))
        return y, y.sum(-1)


CASES = {
    "4w": (IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), torch.bfloat16),
    "8w": (IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)), torch.bfloat16),
    "8da4w": (
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
        torch.float32,
    ),
}


def exported(case: str) -> ExportedProgram:
    """The program of one of :data:`CASES`, the same weights each time."""
    config, dtype = CASES[case]
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    quantize_(model, config)
    dynamic = ({1: Dim("length", min=1, max=64)},)
    return torch.export.export(model, (torch.randn(2, 5, 64, dtype=dtype),), dynamic_shapes=dynamic)
