"""The launches of linears that AOTInductor gets: their grids, and the tensors that they mutate."""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from et_cuda_passes.kernels import linear_launch
from et_cuda_passes.kernels.buckets import buckets_for, in_bucket, stream_k_schedule
from et_cuda_passes.kernels.choose import Weight, buckets
from et_cuda_passes.kernels.gpus import GPUS, HOPPER, gpu_arch
from et_cuda_passes.kernels.tiling import UNBOUNDED, Tiling
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import INT4_LINEARS, INT8_LINEAR
from tests.kernels.launches import mutated_by_analysis

pytestmark = pytest.mark.usefixtures("hopper")
LINEAR = INT4_LINEARS["mma_tiled"].op


class Block(nn.Module):
    """x + down(silu(up(x))) with packed constants."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        for name, rows, columns in (("up", n, k), ("down", k, n)):
            self.register_buffer(f"{name}_packed", torch.empty(rows, columns // 8, dtype=torch.int32, device="cuda"))
            qparams = torch.empty(1, rows, mma_tiled.scale_row(columns, 32), dtype=torch.bfloat16, device="cuda")
            self.register_buffer(f"{name}_qparams", qparams)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        n, k = self.up_packed.shape[0], self.down_packed.shape[0]
        h = LINEAR(x, self.up_packed, self.up_qparams, None, 32, n, "silu")
        return (LINEAR(h, self.down_packed, self.down_qparams, None, 32, k, "", None, x),)


class Int8Block(nn.Module):
    """x @ up + bias in groups of 64 with zeros, then @ down with one scale a row."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        for name, rows, columns in (("up", n, k), ("down", k, n)):
            self.register_buffer(f"{name}_packed", torch.empty(rows, columns, dtype=torch.int8, device="cuda"))
        self.register_buffer("up_scale", torch.empty(n, k // 64, dtype=torch.bfloat16, device="cuda"))
        self.register_buffer("up_zero", torch.empty(n, k // 64, device="cuda"))
        self.register_buffer("up_bias", torch.empty(n, dtype=torch.bfloat16, device="cuda"))
        self.register_buffer("down_scale", torch.empty(k, 1, dtype=torch.bfloat16, device="cuda"))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        h = INT8_LINEAR(x, self.up_packed, self.up_scale, self.up_zero, self.up_bias, 64)
        return (INT8_LINEAR(h, self.down_packed, self.down_scale, None, None, self.up_packed.shape[0]),)


@cache
def launches(*arguments: Any, **named: Any) -> tuple[Any, list[torch.fx.Node]]:
    """:func:`traced`, once for all tests that trace the same block."""
    return traced(*arguments, **named)


def traced(
    rows: int | None, n: int = 8192, k: int = 3072, block: Callable[[int, int], nn.Module] = Block, batch: int = 2
) -> tuple[Any, list[torch.fx.Node]]:
    """The graph signature and the launches of a block, for a known number of rows of each batch or an unknown one."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = torch.empty(batch, rows or 16, k, dtype=torch.bfloat16, device="meta")
    length = DimDynamic.DYNAMIC if rows is None else DimDynamic.STATIC
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, length, DimDynamic.STATIC])
    shape = mode.from_tensor(given, symbolic_context=sizes).shape
    with mode:
        module, x = block(n, k), torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    graph_module, signature = aot_export_module(module, (x,), trace_joint=False)
    nodes = [node for node in graph_module.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    return signature, nodes


@pytest.mark.parametrize("rows", [None, 1, 700])
@pytest.mark.parametrize(("block", "batch"), [(Block, 1), (Block, 2), (Int8Block, 2)])
def test_launches_mutate_only_the_output_and_the_parts(
    rows: int | None, block: Callable[..., nn.Module], batch: int
) -> None:
    signature, nodes = launches(rows, block=block, batch=batch)
    assert len(nodes) >= 2
    assert (signature.buffers_to_mutate, signature.user_inputs_to_mutate) == ({}, {})
    assert len(signature.user_outputs) == 1
    for node in nodes:
        assert set(node.kwargs["tensors_to_clone"]) <= {"y_ptr", "parts_ptr"}
        assert set(node.kwargs["tensors_to_clone"]) == set(mutated_by_analysis(node))


def described(node: torch.fx.Node, pointer: str = "x_ptr") -> Any:
    """The shape of x's descriptor in a launch, or None."""
    return node.kwargs["tma_descriptor_metadata"].get(pointer)  # type: ignore[union-attr]


def test_batch_of_one_has_a_descriptor_if_its_tiling_has_bulk_copies() -> None:
    _, nodes = launches(None, block=Block, batch=1)
    products = [node for node in nodes if "x_ptr" in node.kwargs["kwargs"]]  # type: ignore[operator]
    weights = Weight(8192, 3072, 32), Weight(3072, 8192, 32, outputs=2)
    chosen = [tiling for weight in weights for tiling in buckets(HOPPER, weight).tilings.values()]
    assert any(tiling.bulk for tiling in chosen) and not all(tiling.bulk for tiling in chosen)
    wanted = [("stable", ((1, tiling.block_m, 64),)) if tiling.bulk else None for tiling in chosen]
    assert [described(node) for node in products] == wanted
    wanted = [("stable", ((1, tiling.extra_m, 64),)) if tiling.bulk and tiling.extra_m else None for tiling in chosen]
    assert [described(node, "extra_ptr") for node in products] == wanted
    # A tile would cross the end of the first batch of two.
    assert not any(described(node) for node in launches(None, block=Block, batch=2)[1])


@pytest.mark.parametrize("rows", [None, 333])
@pytest.mark.parametrize("batch", [1, 2])
def test_pieces_of_rows_have_a_descriptor_each(monkeypatch: pytest.MonkeyPatch, rows: int | None, batch: int) -> None:
    tiling = Tiling(128, 64, 64, 1, 2, 4, 4, 1, 64)
    monkeypatch.setattr(linear_launch, "buckets_for", lambda *_: {UNBOUNDED: tiling})
    signature, nodes = traced(rows, batch=batch)
    products = [node for node in nodes if "x_ptr" in node.kwargs["kwargs"]]  # type: ignore[operator]
    assert len(products) == 2 and (signature.buffers_to_mutate, signature.user_inputs_to_mutate) == ({}, {})
    for pointer, height in (("x_ptr", 128), ("extra_ptr", 64)):
        wanted = ("stable", ((1, height, 64),)) if batch == 1 else None
        assert [described(node, pointer) for node in products] == [wanted] * 2
    if rows is not None:
        # Tiles of 192 rows: 2 or 4 by 128 and 48 along N. Tiles beyond the last whole wave of 264 are split.
        tiles = -(-rows * batch // 192)
        grids = [node.kwargs["grid"][0][0] for node in products]
        assert grids == [
            stream_k_schedule(tiling, rows * batch, n, k, 132).grid for n, k in ((8192, 3072), (3072, 8192))
        ]
        assert all(grid >= tiles * n // 64 for grid, n in zip(grids, (8192, 3072), strict=True))
    for node in nodes:
        assert set(node.kwargs["tensors_to_clone"]) == set(mutated_by_analysis(node))


class Sources(nn.Module):
    """One weight [K, K]; ``get`` names a way to compute x from an input [1, M, K]."""

    ways: ClassVar[dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]]] = {
        "the input itself": (lambda x: x, True),
        "a sum": (lambda x: x + 1, True),
        "a norm": (lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), True),
        "a conversion": (lambda x: (x.float() * 2).bfloat16(), True),
        "another view": (lambda x: (x * 2).view(1, -1, 2, x.shape[-1] // 2).flatten(-2), False),
        "the heads of attention": (
            lambda x: (x.view(1, -1, 2, 1536).transpose(1, 2) * 2).transpose(1, 2).flatten(2),
            False,
        ),
        "a copy of a view": (lambda x: (x * 2).view(1, -1, 2, 1536).flatten(2).clone(), False),
        "a dense linear": (lambda x: x @ torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), False),
    }

    def __init__(self, n: int, k: int, way: str) -> None:
        super().__init__()
        self.make = self.ways[way][0]
        self.register_buffer("packed", torch.empty(n, k // 8, dtype=torch.int32, device="cuda"))
        qparams = torch.empty(1, n, mma_tiled.scale_row(k, 32), dtype=torch.bfloat16, device="cuda")
        self.register_buffer("qparams", qparams)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (LINEAR(self.make(x), self.packed, self.qparams, None, 32, self.packed.shape[0]),)


class Strided(nn.Module):
    """Two linears [K, K], int4 and int8, with one bias that is not contiguous."""

    def __init__(self, k: int, stride: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.empty_strided((k,), (stride,), dtype=torch.bfloat16, device="cuda"))
        self.register_buffer("packed", torch.empty(k, k // 8, dtype=torch.int32, device="cuda"))
        self.register_buffer("integers", torch.empty(k, k, dtype=torch.int8, device="cuda"))
        self.register_buffer("scale", torch.empty(k, 1, dtype=torch.bfloat16, device="cuda"))
        qparams = torch.empty(1, k, mma_tiled.scale_row(k, 32), dtype=torch.bfloat16, device="cuda")
        self.register_buffer("qparams", qparams)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        y = LINEAR(x, self.packed, self.qparams, self.bias, 32, x.shape[-1])
        return (INT8_LINEAR(y, self.integers, self.scale, None, self.bias, x.shape[-1]),)


@pytest.mark.parametrize("stride", [0, 2, 3], ids=["expanded", "every other", "a column"])
def test_kernels_read_a_contiguous_bias(stride: int) -> None:
    _, nodes = launches(4, 1024, 1024, lambda n, k: Strided(k, stride))
    biases = [node.kwargs["kwargs"]["bias_ptr"].meta["val"] for node in nodes]  # type: ignore[index, union-attr]
    assert len(biases) >= 2
    assert all(bias.shape == (1024,) and bias.is_contiguous() for bias in biases)


@pytest.mark.parametrize("rows", [None, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", Sources.ways)
def test_possible_view_has_no_descriptor(way: str, rows: int | None) -> None:
    _, nodes = launches(rows, block=lambda n, k: Sources(n, k, way), batch=1)
    assert any(described(node) for node in nodes) == Sources.ways[way][1]


@pytest.mark.parametrize("block", [Block, Int8Block])
def test_known_length_is_one_launch_a_linear(block: Callable[..., nn.Module]) -> None:
    _, nodes = launches(4, block=block, batch=2)
    grids = [node.kwargs["grid"][0] for node in nodes]
    assert len(nodes) == 2
    assert all(isinstance(size, int) and size > 0 for grid in grids for size in grid)


@pytest.mark.parametrize("block", [Block, Int8Block])
def test_unknown_length_is_one_launch_for_each_bucket(block: Callable[..., nn.Module]) -> None:
    _, nodes = launches(None, block=block, batch=2)
    products = [node for node in nodes if "x_ptr" in node.kwargs["kwargs"]]
    if block is Block:
        weights = Weight(8192, 3072, 32), Weight(3072, 8192, 32, outputs=2)
    else:
        weights = Weight(8192, 3072, 64, bits=8), Weight(3072, 8192, 8192, bits=8)
    assert len(products) == sum(len(buckets(HOPPER, weight).tilings) for weight in weights)
    assert all(isinstance(node.kwargs["grid"][0][0], torch.fx.Node) for node in nodes)


class Gate(nn.Module):
    """A gated layer of n columns."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.n = n
        self.register_buffer("packed", torch.empty(2 * n, k // 8, dtype=torch.int32, device="cuda"))
        qparams = torch.empty(1, 2 * n, mma_tiled.scale_row(k, 32), dtype=torch.bfloat16, device="cuda")
        self.register_buffer("qparams", qparams)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (LINEAR(x, self.packed, self.qparams, None, 32, self.n, "silu", None, None, True),)


@pytest.mark.parametrize("rows", [1, 300, None])
def test_gate_is_a_product_of_twice_the_rows_that_stores_half(rows: int | None) -> None:
    _, nodes = launches(rows, 8192, 3072, Gate)
    table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    weight = Weight(16384, 3072, 32, outputs=0.5)
    chosen = buckets_for(2 * rows, weight, HOPPER) if rows else buckets(HOPPER, weight).tilings
    given = [table.get_constant_args(node.kwargs["constant_args_idx"]) | node.kwargs["kwargs"] for node in nodes]
    products = [one for one in given if "words_ptr" in one]
    assert [one["BLOCK_M"] for one in products] == [tiling.block_m for tiling in chosen.values()]
    for one in given:
        assert (one["GATED"], one["N"], one["ACTIVATION"]) == (True, 16384, "silu")
        assert one["y_ptr"].meta["val"].shape[-1] == 8192
    assert all(set(node.kwargs["tensors_to_clone"]) == set(mutated_by_analysis(node)) for node in nodes)


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 64, 65, 256, 257, 4096])
def test_exactly_one_bucket_has_programs_at_any_length(rows: int) -> None:
    weight = Weight(8192, 3072, 32)
    assert [*buckets_for(rows, weight, HOPPER)] == [UNBOUNDED]
    first, flags = 0, []
    for bound in buckets(HOPPER, weight).tilings:
        flags.append(in_bucket(rows, first, bound))
        first = bound + 1
    assert sum(flags) == 1 and set(flags) <= {0, 1}


def test_bounded_length_has_no_buckets_beyond_its_bound() -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    length = mode.from_tensor(torch.empty(16, device="meta"), symbolic_context=sizes).shape[0]
    torch._check(length <= 16)
    chosen = buckets_for(length, Weight(8192, 3072, 32), HOPPER)
    assert chosen == buckets(HOPPER, Weight(8192, 3072, 32), last=16).tilings
    assert max(bound for bound in chosen if bound != UNBOUNDED) < 16


class Named(nn.Module):
    """An int4 and an int8 linear for a named GPU."""

    gpu: ClassVar[str]

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.empty(n, k // 8, dtype=torch.int32, device="cuda"))
        qparams = torch.empty(1, n, mma_tiled.scale_row(k, 32), dtype=torch.bfloat16, device="cuda")
        self.register_buffer("qparams", qparams)
        self.register_buffer("bytes", torch.empty(n, k, dtype=torch.int8, device="cuda"))
        self.register_buffer("scale", torch.empty(n, k // 64, dtype=torch.bfloat16, device="cuda"))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = LINEAR(x, self.packed, self.qparams, None, 32, self.packed.shape[0], gpu=self.gpu)
        return y, INT8_LINEAR(x, self.bytes, self.scale, None, None, 64, gpu=self.gpu)


@pytest.mark.parametrize("rows", [1, 700, None])
@pytest.mark.parametrize("name", [*GPUS, "sm_90:66", "sm_89:76"])
def test_launches_have_the_tilings_of_the_named_gpu(name: str, rows: int | None) -> None:
    _, nodes = launches(rows, 4096, 2048, type("", (Named,), {"gpu": name}), batch=1)
    table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    given = [table.get_constant_args(node.kwargs["constant_args_idx"]) | node.kwargs["kwargs"] for node in nodes]
    gpu = gpu_arch(name)
    wanted = []
    for weight in (Weight(4096, 2048, 32), Weight(4096, 2048, 64, bits=8)):
        wanted += list(buckets_for(rows, weight, gpu).values() if rows else buckets(gpu, weight).tilings.values())
    found = [one for one in given if "x_ptr" in one]
    assert [(one["BLOCK_M"], one["BLOCK_N"], one["BLOCK_K"], one["SEGMENTS"]) for one in found] == [
        (one.block_m, one.block_n, one.block_k, one.segments) for one in wanted
    ]
    assert {one["WGMMA"] for one in found} == {gpu.wgmma}
    # A split wave has a slot for each program that the multiprocessors of this GPU hold.
    slots = [one["SLOTS"] for one in found]
    assert all(slot in (0, tiling.waves * gpu.processors) for slot, tiling in zip(slots, wanted, strict=True))


@pytest.mark.parametrize(("least", "most"), [(1, 16), (17, 64), (100, 300), (5000, 8000)])
def test_exported_length_range_leaves_only_buckets_inside_it(least: int, most: int) -> None:
    """AOTInductor gets the fake inputs of the exported program, whose sizes have the range of the export."""
    x = torch.empty(1, least + 1, 3072, dtype=torch.bfloat16, device="meta")
    length = torch.export.Dim("length", min=least, max=most)
    program = torch.export.export(nn.Identity(), (x,), dynamic_shapes=({1: length},))
    shape = next(node for node in program.graph.nodes if node.op == "placeholder").meta["val"].shape
    with program.graph.output_node().args[0][0].meta["val"].fake_mode:
        module, given = Block(8192, 3072), torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    traced, _ = aot_export_module(module, (given,), trace_joint=False)
    nodes = [node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    products = [node for node in nodes if "x_ptr" in node.kwargs["kwargs"]]
    weights = Weight(8192, 3072, 32), Weight(3072, 8192, 32, outputs=2)
    wanted = [buckets(HOPPER, weight, first=least, last=most).tilings for weight in weights]
    assert len(products) == sum(map(len, wanted)) < sum(len(buckets(HOPPER, weight).tilings) for weight in weights)
    for chosen in wanted:
        assert all(least <= bound < most for bound in chosen if bound != UNBOUNDED)


def test_int8_kernel_gets_the_constants_of_its_form() -> None:
    _, nodes = launches(4, 512, 192, Int8Block)
    table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    up, down = (table.get_constant_args(node.kwargs["constant_args_idx"]) | node.kwargs["kwargs"] for node in nodes)
    wanted = {"UNIT": 64, "K_UNITS": 3, "GROUP_SIZE": 64, "PAIRS": False, "HAS_ZERO": True, "HAS_BIAS": True}
    assert {name: up[name] for name in wanted} == wanted
    wanted = {"UNIT": 512, "K_UNITS": 1, "GROUP_SIZE": 0, "PAIRS": False, "HAS_ZERO": False, "HAS_BIAS": False}
    assert {name: down[name] for name in wanted} == wanted
    assert up["SALT"] != down["SALT"]


@pytest.mark.parametrize(
    ("dtype", "scales", "k", "group"),
    [
        (torch.float32, torch.float32, 64, 32),
        (torch.bfloat16, torch.float32, 64, 32),
        (torch.bfloat16, torch.bfloat16, 64, 8),
        (torch.bfloat16, torch.bfloat16, 40, 40),
    ],
)
def test_form_without_an_int8_kernel_is_computed_by_other_operators(
    dtype: torch.dtype, scales: torch.dtype, k: int, group: int
) -> None:
    class Linear(nn.Module):
        def forward(self, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
            return (INT8_LINEAR(x, packed, scale, None, None, group),)

    with FakeTensorMode():
        tensors = (
            torch.empty(shape, dtype=kind, device="cuda")
            for shape, kind in (((2, k), dtype), ((24, k), torch.int8), ((24, k // group), scales))
        )
        graph_module, _ = aot_export_module(Linear(), tuple(tensors), trace_joint=False)
    called = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    assert "aten.mm.default" in called
    assert not any("triton" in name or "int8_linear" in name for name in called)
