"""attempts: which place is the nearest, what its tree marks, and the node that selects it."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import et_cuda_passes as ecp
from et_cuda_passes.attempts import Attempt
from et_cuda_passes.testing import Quantized, attempts, export, floats

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Gate(ecp.Rule):
    """silu(linear(x, gate)) * linear(x, up) -> ..."""

    def pattern(self, x: Any) -> Any:
        gate, up = (ecp.op(aten.linear.default)(x, ecp.dequantized(..., name=name)) for name in ("gate", "up"))
        return ecp.op(aten.mul.Tensor)(ecp.op(aten.silu.default)(gate), up)

    def rewrite(self, b: Any, m: Any) -> Any:
        raise NotImplementedError


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight)


class Net(nn.Module):
    def __init__(self, use: Any, up: Any = plain) -> None:
        super().__init__()
        self.gate, self.up = Quantized(8, 32, form=plain), Quantized(8, 32, form=up)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(F.silu(self.gate(x)), self.up(x))


def tried(use: Any, at: str | None = None, **options: Any) -> list[Attempt]:
    return attempts(export(Net(use, **options), floats(2, 32)), Gate(), "cuda", passes=[], at=at)


def test_argument_that_the_pattern_leaves_out_has_a_mark_if_it_is_the_reason() -> None:
    (attempt,) = tried(torch.mul, up=F.linear)
    assert [line for line in attempt.tree if "✗" in line] == [
        "   └─ ✗ bias: wanted aten.linear(bias=None), found placeholder p_up_bias"
    ]


def test_node_with_another_reader_is_the_nearest_place_and_can_be_selected() -> None:
    first = tried(lambda gate, up: (gate * up, gate))[0]
    assert (first.node, first.stopped_at) == ("mul", "silu")
    assert "aten.silu (silu, 2 users); it is read by mul, output" in str(first.reason)
    assert tried(lambda gate, up: (gate * up, gate), at="silu")[0] == first


def test_operands_in_the_other_order_are_the_nearest_place() -> None:
    first = tried(lambda gate, up: up * gate)[0]
    assert first.node == "mul" and "write both orders in the pattern, with any_of" in str(first.reason)
    assert tried(torch.mul)[0].matches
