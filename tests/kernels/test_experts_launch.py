"""The launches of experts that AOTInductor gets: their grids, and the tensors that they mutate."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from et_cuda_passes.kernels.choose import Weight, buckets, candidates, costs_of, tiling_for
from et_cuda_passes.kernels.experts_launch import MOST_LAUNCHES
from et_cuda_passes.kernels.gpus import HOPPER
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import INT4_EXPERTS

pytestmark = pytest.mark.usefixtures("hopper")

E, N, K = 8, 1536, 2048
ROWS = 8192
OPS = INT4_EXPERTS["mma_tiled"]


class Layer(nn.Module):
    """One product with packed constants."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("order", torch.empty(ROWS, dtype=torch.int64, device="cuda"))
        self.register_buffer("packed", torch.empty(E, N, K // 8, dtype=torch.int32, device="cuda"))
        row = mma_tiled.scale_row(K, 32)
        self.register_buffer("qparams", torch.empty(1, E, N, row, dtype=torch.bfloat16, device="cuda"))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor]:
        if self.form == "gathered":
            x = torch.ops.aten.index.Tensor(x, [self.order])
        if self.form in ("grouped", "gathered"):
            return (OPS.grouped_mm(x, self.packed, self.qparams, chosen, 32, N),)
        if self.form == "chosen":
            return (OPS.bmm(x.unsqueeze(1), self.packed, self.qparams, chosen, 32, N),)
        return (OPS.bmm(x.unsqueeze(0), self.packed, self.qparams, None, 32, N),)


def launches(form: str, rows: int | None) -> tuple[Any, list[torch.fx.Node]]:
    """The graph signature and the launches of a layer, for a known number of rows or an unknown one."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = torch.empty(rows or 16, K, dtype=torch.bfloat16, device="meta")
    length = DimDynamic.DYNAMIC if rows is None else DimDynamic.STATIC
    sizes = StatelessSymbolicContext(dynamic_sizes=[length, DimDynamic.STATIC])
    shape = mode.from_tensor(given, symbolic_context=sizes).shape
    with mode:
        module, x = Layer(form), torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        chosen = torch.empty(shape[:1] if form == "chosen" else (E,), dtype=torch.int32, device="cuda")
    graph_module, signature = aot_export_module(module, (x, chosen), trace_joint=False)
    nodes = [node for node in graph_module.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    return signature, nodes


@pytest.mark.parametrize("rows", [None, 1, 700])
@pytest.mark.parametrize("form", ["all", "chosen", "grouped"])
def test_launch_mutates_only_the_output(form: str, rows: int | None) -> None:
    signature, nodes = launches(form, rows)
    assert (signature.buffers_to_mutate, signature.user_inputs_to_mutate) == ({}, {})
    assert len(signature.user_outputs) == 1
    assert nodes
    for node in nodes:
        assert set(node.kwargs["tensors_to_clone"]) <= {"y_ptr"}


@pytest.mark.parametrize(("form", "rows", "of_one"), [("all", 8, 8), ("chosen", 700, 1), ("grouped", 64, 8)])
def test_known_number_of_rows_is_one_launch(form: str, rows: int, of_one: int) -> None:
    _, (node,) = launches(form, rows)
    count = 700 if form == "chosen" else E
    tiling = tiling_for(HOPPER, Weight(N, K, 32, batch=count, experts=True, grouped=form == "grouped"), of_one)
    # Every group of rows, and the rows without an expert, may end in a tile that is not full.
    tiles = rows // tiling.block_m + E + 1 if form == "grouped" else count * -(-of_one // tiling.block_m)
    across = -(-N // tiling.block_n)
    assert node.kwargs["grid"] == [(tiles * across, 1, 1) if form == "grouped" else (tiles, across, 1)]


@pytest.mark.parametrize("form", ["all", "grouped"])
def test_unknown_number_of_rows_is_one_launch_for_each_bucket(form: str) -> None:
    _, nodes = launches(form, None)
    weight = Weight(N, K, 32, batch=E, experts=True, grouped=form == "grouped")
    chosen = buckets(HOPPER, weight, MOST_LAUNCHES).tilings
    assert 1 < len(nodes) <= MOST_LAUNCHES and len(nodes) == len(chosen)
    assert all(isinstance(node.kwargs["grid"][0][0], torch.fx.Node) for node in nodes)


def test_unknown_number_of_indexed_experts_is_one_launch() -> None:
    """Each indexed expert has one row."""
    _, (node,) = launches("chosen", None)
    assert isinstance(node.kwargs["grid"][0][0], torch.fx.Node)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_tilings_of_experts_have_supported_features(group: int) -> None:
    for grouped in (False, True):
        weight = Weight(N, K, group, experts=True, grouped=grouped)
        found = [tiling for tiling, _ in candidates(costs_of(HOPPER, 4), weight)]
        assert found
        assert {(tiling.segments, tiling.waves, tiling.extra_m) for tiling in found} == {(1, 0, 0)}
        assert any(tiling.bulk for tiling in found) == grouped


def test_rows_sorted_by_expert_are_copied_in_bulk_and_other_rows_are_not() -> None:
    """Also if the rows are gathered before the product, as a mixture of experts sorts them."""
    for form, wanted in (("grouped", True), ("gathered", True), ("all", False)):
        _, (node,) = launches(form, ROWS)
        tiling = tiling_for(HOPPER, Weight(N, K, 32, batch=E, experts=True, grouped=wanted), ROWS // E)
        assert tiling.bulk == wanted
        block = ((tiling.block_m, 64),)
        assert node.kwargs["tma_descriptor_metadata"] == ({"x_ptr": ("stable", block)} if wanted else {})
