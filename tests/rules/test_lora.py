"""A quantized base with adapters of its own: the base is packed, the adapters stay as they are."""

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp


class LoraLinear(nn.Module):
    """base(x) + up(down(x)) * scale, a base that is quantized and two small linears that are not."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(in_features, out_features)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
def test_the_base_is_packed_and_the_adapters_are_untouched(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LoraLinear(64, 128, 8), nn.SiLU(), LoraLinear(128, 64, 4)).bfloat16().eval()
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, config, filter_fn=lambda module, fqn: fqn.endswith("base"))
    x = torch.randn(2, 5, 64).bfloat16()
    program = torch.export.export(model, (x,))
    rewritten, report = ecp.rewrite(program, target, expect={"linear_int4": 2, "missed": 0, "kept": 0})
    names = set(rewritten.state_dict)
    for number in (0, 2):
        assert f"{number}.base.weight.packed" in names
        for adapter in ("down", "up"):
            name = f"{number}.{adapter}.weight"
            assert torch.equal(rewritten.state_dict[name], program.state_dict[name])
    floats = [node for node in rewritten.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(floats) == 4
    assert {outcome.fqn for outcome in report.outcomes} == {"0.base.weight", "2.base.weight"}
    wanted = model(x).double()
    off = (rewritten.module()(x).double() - wanted).norm() / wanted.norm()
    assert off.item() < 8e-3
