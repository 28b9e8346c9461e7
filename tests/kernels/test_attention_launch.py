"""The launches of attention that AOTInductor gets: their grids, their arguments, and the tensors that they mutate."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from et_cuda_passes.kernels.attention_launch import FEW_ROWS, HEAD_DIMS, blocks
from et_cuda_passes.kernels.gpus import HOPPER
from et_cuda_passes.ops import ATTENTION
from tests.kernels.launches import mutated_by_analysis

pytestmark = pytest.mark.usefixtures("hopper")


class Attention(nn.Module):
    def __init__(self, axes: Sequence[int], scale: float = 0.125, swap: bool = False) -> None:
        super().__init__()
        self.axes, self.scale, self.swap = list(axes), scale, swap

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor]:
        if self.swap:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (ATTENTION(q, k, v, self.scale, self.axes),)


def traced(
    module: nn.Module, *shapes: tuple[int, ...], dynamic: Sequence[int] = (), dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any, ShapeEnv]:
    """Graph, signature and shapes of ``module``; ``dynamic`` axes can have any size, equal ones are one symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = []
    for shape in shapes:
        kinds = [DimDynamic.DUCK if axis in dynamic else DimDynamic.STATIC for axis in range(len(shape))]
        sizes = StatelessSymbolicContext(dynamic_sizes=kinds)
        fake = mode.from_tensor(torch.empty(shape, device="meta"), symbolic_context=sizes)
        with mode:
            given.append(torch.empty(fake.shape, dtype=dtype, device="cuda"))
    graph_module, signature = aot_export_module(module, tuple(given), trace_joint=False)
    assert mode.shape_env is not None
    return graph_module.graph, signature, mode.shape_env


def launches(graph: Any) -> list[Any]:
    return [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def table() -> Any:
    return torch._higher_order_ops.triton_kernel_wrap.kernel_side_table


def passed(node: Any) -> dict[str, Any]:
    """All arguments of a launch, with constants."""
    return table().get_constant_args(node.kwargs["constant_args_idx"]) | node.kwargs["kwargs"]


VOXTRAL = (1, 1500, 20, 64)


def test_known_length_is_one_launch_that_mutates_its_result() -> None:
    graph, signature, _ = traced(Attention([2, 2, 2, 2]), VOXTRAL, VOXTRAL, VOXTRAL)
    (launch,) = launches(graph)
    assert next(iter(launch.kwargs["grid"][0])) == 20 * 12
    assert launch.kwargs["tensors_to_clone"] == mutated_by_analysis(launch) == ["y_ptr"]
    assert (signature.buffers_to_mutate, signature.user_inputs_to_mutate) == ({}, {})
    given = passed(launch)
    many = blocks(HOPPER, 64, 1500)
    wanted = {"M": 1500, "L": 1500, "D": 64, "HEADS": 20, "KV_HEADS": 20, "BLOCK_M": many.block_m, "NEGATED": False}
    assert {name: given[name] for name in wanted} == wanted
    assert given["SCALE"] == pytest.approx(0.125 * 1.442695040888963, rel=1e-12)
    # The launch reads the inputs themselves, without a copy.
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert not any("clone" in name or "transpose" in name or "permute" in name for name in called)
    assert [node.name for node in (given["q_ptr"], given["k_ptr"], given["v_ptr"])] == ["arg0_1", "arg1_1", "arg2_1"]


def test_few_rows_have_their_own_blocks() -> None:
    few, many = blocks(HOPPER, 128, 1), blocks(HOPPER, 128, 300)
    assert few.block_m < many.block_m
    for rows, chosen in ((1, few), (FEW_ROWS, few), (FEW_ROWS + 1, many)):
        graph, *_ = traced(Attention([1, 1, 1, 2], -0.5), (2, 32, rows, 128), *[(2, 8, 300, 128)] * 2)
        (launch,) = launches(graph)
        given = passed(launch)
        assert (given["BLOCK_M"], given["BLOCK_N"]) == (chosen.block_m, chosen.block_n)
        (config,) = table().get_kernel(launch.kwargs["kernel_idx"]).configs
        assert (config.num_warps, config.num_stages) == (chosen.warps, chosen.stages)
        assert (given["HEADS"], given["KV_HEADS"], given["NEGATED"]) == (32, 8, True)
        assert [given[f"{name}_ROW"] for name in "QKVY"] == [128, 128, 128, 32 * 128]
        assert next(iter(launch.kwargs["grid"][0])) == 2 * 32 * -(-rows // chosen.block_m)


@pytest.mark.parametrize("dynamic", [(2,), (0, 2), (0,)])
def test_unknown_sizes_are_one_launch_without_a_guard(dynamic: tuple[int, ...]) -> None:
    graph, _, env = traced(Attention([1, 1, 1, 1]), (3, 4, 50, 64), *[(3, 2, 70, 64)] * 2, dynamic=dynamic)
    assert env.guards == []
    (launch,) = launches(graph)
    chosen = blocks(HOPPER, 64, 300 if 2 in dynamic else 50)
    assert passed(launch)["BLOCK_M"] == chosen.block_m
    programs = next(iter(launch.kwargs["grid"][0])).meta["val"].node.expr
    batch, rows = (node.meta["val"].shape[axis] for node in graph.nodes if node.name == "arg0_1" for axis in (0, 2))
    for b, m in ((1, 1), (3, 50), (2, 127), (2, 128), (5, 129), (1, 1500)):
        sizes = {s.node.expr: n for s, n in ((batch, b), (rows, m)) if isinstance(s, torch.SymInt)}
        b, m = b if 0 in dynamic else 3, m if 2 in dynamic else 50
        assert int(programs.subs(sizes).doit()) == b * 4 * -(-m // chosen.block_m)


class OfOne(nn.Module):
    """q, k and v from columns of one tensor [B, rows, columns], transposed or not."""

    def __init__(self, heads: int, skipped: int = 0, swap: bool = False, step: int = 1) -> None:
        super().__init__()
        self.heads, self.skipped, self.swap, self.step = heads, skipped, swap, step

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        columns = torch.ops.aten.slice.Tensor(x, 2, self.skipped, None, self.step).split(self.heads * 64, 2)
        parts = [part.view(*part.shape[:2], self.heads, 64) for part in columns]
        q, k, v = (part.transpose(1, 2) if self.swap else part for part in parts)
        return (ATTENTION(q, k, v, 0.125, [1 if self.swap else 2] * 3 + [2]),)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dynamic", [(), (0,), (1,)])
def test_columns_of_one_tensor_are_read_without_a_copy(swap: bool, dynamic: tuple[int, ...]) -> None:
    graph, *_ = traced(OfOne(20, swap=swap), (2, 1500, 3 * 1280), dynamic=dynamic)
    (launch,) = launches(graph)
    assert [passed(launch)[f"{name}_ROW"] for name in "QKVY"] == [3840, 3840, 3840, 1280]
    assert not any("clone" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("batch", "rows", "keys"), [(2, 3, 0), (2, 0, 3), (0, 3, 3), (1, 1, 1)])
def test_empty_tensor_of_any_strides_is_not_copied(batch: int, rows: int, keys: int, axis: int) -> None:
    shapes = [(batch, 2, n, 64) if axis == 1 else (batch, n, 2, 64) for n in (rows, keys, keys)]
    graph, *_ = traced(Attention([axis] * 4), *shapes)
    (launch,) = launches(graph)
    assert all(isinstance(passed(launch)[f"{name}_ROW"], int) for name in "QKVY")
    assert not any("clone" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize(("skipped", "step", "columns"), [(0, 2, 7680), (4, 1, 3844)])
def test_unsupported_strides_are_copied(skipped: int, step: int, columns: int) -> None:
    """Every other column, or rows whose stride is no multiple of 16 bytes."""
    graph, *_ = traced(OfOne(20, skipped, step=step), (1, 1500, columns))
    (launch,) = launches(graph)
    given = passed(launch)
    assert [given[f"{name}_ROW"] for name in "QKVY"] == [1280] * 4
    assert given["q_ptr"].meta["val"].is_contiguous()
    assert sum("clone" in str(node.target) for node in graph.nodes) == 3


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 64), (torch.bfloat16, 24), (torch.bfloat16, 512)])
def test_operator_rejects_what_the_kernel_lacks(dtype: torch.dtype, d: int) -> None:
    assert d not in HEAD_DIMS or dtype is torch.float32
    with pytest.raises(Exception, match="the CUDA kernel has bf16 and fp16 and head dimensions 16, 32, 64, 128, 256"):
        traced(Attention([1, 1, 1, 1]), *[(1, 2, 3, d)] * 3, dtype=dtype)


def test_different_lengths_are_kernels_with_different_salts() -> None:
    salts = set()
    for rows, keys in ((300, 300), (300, 301), (301, 300)):
        graph, *_ = traced(Attention([1, 1, 1, 1]), (1, 2, rows, 64), *[(1, 2, keys, 64)] * 2)
        salts.add(passed(launches(graph)[0])["SALT"])
    assert len(salts) == 3
