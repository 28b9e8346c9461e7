"""Small quantized models, exported and saved, for tests of the command line."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

_INT4 = torch.int4  # type: ignore[attr-defined]
SCHEMES = {
    "float": None,
    "4w": IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=PerGroup(32)),
    "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=_INT4, weight_granularity=PerGroup(32)),
}


class Mlp(nn.Module):
    """down(relu(up(x))), 64 -> 128 -> 64."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


def save(folder: Path, scheme: str, dtype: torch.dtype = torch.float32) -> tuple[Path, nn.Module]:
    """`folder`/model.pt2 with 1 to 64 rows, and the quantized module that it was exported from."""
    torch.manual_seed(0)
    module = Mlp().to(dtype).eval().requires_grad_(False)
    if SCHEMES[scheme] is not None:
        quantize_(module, SCHEMES[scheme])
    rows = Dim("rows", min=1, max=64)
    exported = torch.export.export(module, (torch.randn(3, 64, dtype=dtype),), dynamic_shapes=({0: rows},))
    path = folder / "model.pt2"
    torch.export.save(exported, path)
    return path, module


def difference(result: Tensor, reference: Tensor) -> float:
    """The relative error of `result` in the 2-norm."""
    return float((result - reference).float().norm() / reference.float().norm())
