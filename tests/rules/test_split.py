"""ReplaceSplit: parts of a tensor as slices, and the lowering of a program that has them."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.rules.split import ReplaceSplit
from et_cuda_passes.testing import assert_rewrites

aten = torch.ops.aten


class Parts(nn.Module):
    def __init__(self, split: Any) -> None:
        super().__init__()
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        first, second, *_ = self.split(x * 2)
        return F.silu(first) * second


SPLITS = {
    "split": lambda x: x.split(4, -1),
    "split with a shorter last part": lambda x: x.split(5, -1)[:2],
    "split into sizes": lambda x: x.split([4, 4, 4], 1),
    "chunk": lambda x: x.chunk(3, dim=-1),
    "unbind": lambda x: x.unbind(1),
}


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("name", SPLITS)
def test_replace_split_gives_the_same_parts(name: str, decompose: bool) -> None:
    rows = Dim("rows", min=2, max=16)
    program = torch.export.export(Parts(SPLITS[name]), (torch.randn(3, 12),), dynamic_shapes=({0: rows},))
    program = program.run_decompositions({}) if decompose else program
    parts = len(program.graph.find_nodes(op="call_function", target=operator.getitem))
    expect = {"replace_split": parts}
    rewritten, _ = assert_rewrites(program, "cuda", [ReplaceSplit()], expect, (torch.randn(7, 12),), 0.0)
    assert parts >= 2
    called = {node.target for node in rewritten.graph.nodes if node.op == "call_function"}
    assert called & {aten.slice.Tensor, aten.select.int}
    assert not any("split" in str(target) or "chunk" in str(target) for target in called)


def test_replace_split_leaves_a_dynamic_axis_and_mutated_parts() -> None:
    rows = Dim("rows", min=3, max=16)
    program = torch.export.export(
        Parts(lambda x: x.split([1, x.shape[0] - 1])[::-1] * 2), (torch.randn(3, 12),), dynamic_shapes=({0: rows},)
    )
    _, report = ecp.rewrite(program, "cuda", [ReplaceSplit()])
    assert report.applied.get("replace_split", 0) == 0

    class Mutated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.chunk(2, -1)[0].add_(1)
            return y

    assert_rewrites(
        torch.export.export(Mutated(), (torch.randn(3, 12),)), "cuda", [ReplaceSplit()], {"replace_split": 0}
    )


@pytest.mark.parametrize("passes", [None, []])
def test_cuda_partitioner_replaces_split_whatever_its_passes(passes: list[Any] | None) -> None:
    program = torch.export.export(Parts(lambda x: x.chunk(2, -1)), (torch.randn(3, 12),))
    rewritten = ecp.CudaPartitioner([], passes=passes).transform_for_pre_decomposition(program)
    assert aten.chunk.default not in {node.target for node in rewritten.graph.nodes}
