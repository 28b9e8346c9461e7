"""Before and after as text: what each target makes of what torch.export leaves. `make golden` rewrites the texts."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.ops import op_name


class Model(torch.nn.Module):
    """Two layers, the first with a bias, and an output read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 44, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(F.silu(self.up(x)))
        return y, y.sum(-1)


def exported(config: object, dtype: torch.dtype) -> ExportedProgram:
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    quantize_(model, config)
    dynamic = ({1: Dim("length", min=1, max=64)},)
    return torch.export.export(model, (torch.randn(2, 5, 64, dtype=dtype),), dynamic_shapes=dynamic)


def text(program: ExportedProgram) -> str:
    """A line a node: what it calls on what, and the shape and dtype of its value."""

    def show(node: Node) -> str:
        value = node.meta.get("val")
        shape = (
            f"  # {str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else ""
        )
        if node.op == "placeholder":
            return f"{node.name}{shape}"
        arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
        return f"{node.name} = {op_name(node.target) if node.op == 'call_function' else node.op}({arguments}){shape}"

    return "\n".join(show(node) for node in program.graph.nodes)


CASES = {
    "4w": (IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), torch.bfloat16),
    "8w": (IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)), torch.bfloat16),
    "8da4w": (
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
        torch.float32,
    ),
}


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu", "xnnpack"])
@pytest.mark.parametrize("case", CASES)
def test_before_and_after(case: str, target: str, golden: Callable[[str, str], None]) -> None:
    before = exported(*CASES[case])
    after, report = ecp.rewrite(before, target)
    told = f"before\n\n{text(before)}\n\nafter\n\n{text(after)}\n\nreport\n\n{report}"
    # Names of symbols are torch's own affair, and the path is that of this checkout.
    golden(f"graphs/{case}-{target}", re.sub(r"\bs\d+\b", "s", told).replace(__file__, "model.py"))
