"""A rewrite has its own shape environment: comparisons in a pass do not change guards and ranges of the original."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_rewrites
from tests.quantized import Quantized

aten = torch.ops.aten


class Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = Quantized(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.q(x))


def dynamic(model: nn.Module, *shape: int) -> ExportedProgram:
    return torch.export.export(
        model, (torch.randn(*shape).bfloat16(),), dynamic_shapes=({0: Dim("rows", min=3, max=64)},)
    )


def environments(program: ExportedProgram) -> Iterator[ShapeEnv]:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            for value in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, FakeTensor):
                    yield value.fake_mode.shape_env
                    sizes: list[Any] = [*value.shape, *value.stride(), value.storage_offset()]
                else:
                    sizes = [value]
                yield from (size.node.shape_env for size in sizes if isinstance(size, torch.SymInt))


class Compares(ecp.Rule):
    """relu(x) -> relu(x), chosen by a comparison of the dynamic size with 4"""

    def pattern(self, x: ecp.Capture) -> ecp.Pattern:
        return ecp.op(aten.relu.default)(x)

    def rewrite(self, b: ecp.Builder, m: ecp.Match) -> Node:
        if m.val(m.x).shape[0] > 4:
            return b.call(aten.clamp_min.default, m.x, 0)
        return b.call(aten.relu.default, m.x)


def test_rule_that_compares_a_dynamic_size_fails_every_time_and_leaves_no_guard() -> None:
    program = dynamic(Relu(), 4, 64)
    for _ in range(3):
        with pytest.raises(ecp.RuleError, match="holds only if .* <= 4, which depends on the program.s dynamic shapes"):
            ecp.rewrite(program, "cuda", [Compares()])
    assert not any(shapes.guards for shapes in environments(program))
    assert_rewrites(program, "cuda", expect={"linear_int4": 1}, inputs=(torch.randn(9, 64).bfloat16(),))


def test_guard_of_a_callable_pass_is_the_result_s_alone() -> None:
    def compares(module: GraphModule) -> None:
        (relu,) = module.graph.find_nodes(op="call_function", target=aten.relu.default)
        assert relu.meta["val"].shape[0] <= 4

    program = dynamic(Relu(), 4, 64)
    result, _ = ecp.rewrite(program, "cuda", [compares])
    assert not any(shapes.guards for shapes in environments(program))
    program.module()(torch.randn(9, 64).bfloat16())
    with pytest.raises(AssertionError, match="Guard failed"):
        result.module()(torch.randn(9, 64).bfloat16())


class Everything(nn.Module):
    """Values of every kind: subclass parameters, subgraphs, views with an offset, sizes, unbacked sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q = Quantized(32, 64)
        self.linear = nn.Linear(64, 32, dtype=torch.bfloat16)
        quantize_(self, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        chosen = torch.cond(x.sum() > 0, lambda y: self.q(y), lambda y: self.q(y + 1), (x,))
        picked = self.linear(x)[chosen.sum(-1) > 0]
        with torch.no_grad():
            tail = self.linear(x[1:])
        return chosen, picked, tail[:, 1:], x.shape[0] * 2


def test_values_of_the_copy_are_in_one_new_environment() -> None:
    program = dynamic(Everything(), 6, 64)
    result, report = assert_rewrites(program, "cuda", expect={"missed": 0})
    assert report.counts()["rewritten"] == 4
    before, after = set(environments(program)), set(environments(result))
    assert len(after) == 1
    assert before.isdisjoint(after)


def test_program_without_dynamic_sizes_shares_its_environment() -> None:
    program = torch.export.export(Relu(), (torch.randn(4, 64).bfloat16(),))
    result, _ = ecp.rewrite(program, "cuda")
    assert set(environments(program)) == set(environments(result))
