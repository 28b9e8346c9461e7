"""conv_int4 and conv_int8: convolutions of kernel size 1 against fp64, in every rank; the others are missed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.operators import op_name
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.quantized import Quantized

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SPACE = (5, 3, 2)
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
INT8 = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))


def conv(config: Any = INT4, kernel: int = 1, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """A convolution of 64 channels to 20 in two dimensions, as torchao quantizes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 20, kernel, **options)).to(dtype).eval()
    quantize_(model, config, filter_fn=lambda module, name: name == "0")
    return model


class ByHand(nn.Module):
    """The same in 1, 2 or 3 dimensions, where torchao's configurations know no more than 2."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner, self.ones = Quantized(20, 64, zero_points="random"), (1,) * rank
        self.inner.data = self.inner.data.view(20, 64, *self.ones)
        self.inner.block = [1, 32, *self.ones]
        for name in ("scale", "zero_point"):
            setattr(self.inner, name, getattr(self.inner, name).view(20, 2, *self.ones))

    def forward(self, x: Tensor) -> Tensor:
        return CONVS[len(self.ones)](x, self.inner.weight(), self.inner.bias)


def image(rank: int, batch: int | None = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    shape = (64, *SPACE[:rank]) if batch is None else (batch, 64, *SPACE[:rank])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def exported(model: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(model, (x,))


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
@pytest.mark.parametrize("rank", CONVS)
@pytest.mark.parametrize("batch", [None, 2])
def test_int4_in_every_rank(rank: int, batch: int | None, target: str) -> None:
    model, x = ByHand(rank), image(rank, batch)
    rewritten, report = assert_rewrites(exported(model, x), target, expect={"conv_int4": 1, "missed": 0})
    assert report.outcomes[0].fqn == "inner.data"
    got = rewritten.module()(x)
    assert got.stride() == model(x).stride()
    # An independent reference: the dequantized weight as a matrix over the channels, in fp64.
    inner = model.inner
    points = inner.zero_point.double().flatten(1).repeat_interleave(32, 1)
    weight = (inner.data.double().flatten(1) - points) * inner.scale.double().flatten(1).repeat_interleave(32, 1)
    wanted = torch.einsum("nk,bk...->bn...", weight, x.double().reshape(-1, 64, *SPACE[:rank]))
    wanted = (wanted + inner.bias.double().view(-1, *[1] * rank)).detach().reshape(got.shape)
    assert (got.double() - wanted).norm() / wanted.norm() < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decompose", [False, True])
def test_int8_on_the_cpu(dtype: torch.dtype, decompose: bool) -> None:
    program = exported(conv(INT8, dtype=dtype), image(2, dtype=dtype))
    if decompose:
        table = torch.export.default_decompositions()
        table.pop(torch.ops.torchao.dequantize_affine.default, None)
        program = program.run_decompositions(table)
        assert "aten.convolution" in [op_name(node.target) for node in program.graph.nodes]
    rtol = 6e-3 if dtype is torch.bfloat16 else 1e-6
    _, report = assert_rewrites(program, "cpu", expect={"conv_int8": 1, "missed": 0}, rtol=rtol)
    assert report.outcomes[0].detail == "int8 per-axis -> int8pack_cpu"


def test_a_dynamic_size_without_a_bias_and_with_a_view_behind() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.view(y.shape[0], -1)

    model, x = Flat(), image(2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", max=8), 2: Dim("height", max=64)},))
    rewritten, _ = assert_rewrites(program, "cuda", expect={"conv_int4": 1})
    for height in (1, 9):
        other = torch.randn(3, 64, height, 3).bfloat16()
        wanted = model(other)
        assert (rewritten.module()(other) - wanted).norm() / wanted.norm() < 5e-3


def test_the_memory_format_of_the_output_stays() -> None:
    model, x = conv(), image(2).to(memory_format=torch.channels_last)
    program = exported(model, x)
    rewritten, _ = assert_rewrites(program, "cpu", expect={"conv_int4": 1})
    assert rewritten.module()(x).stride() == model(x).stride() == (20 * 15, 1, 3 * 20, 20)
    assert "aten.clone" not in [op_name(n.target) for n in rewritten.graph.nodes if n.op == "call_function"]


def test_the_dilation_of_one_element_says_nothing() -> None:
    assert_rewrites(exported(conv(dilation=3, padding="same"), image(2)), "cuda", expect={"conv_int4": 1})


MISSED = {
    "kernel 3": (lambda: conv(kernel=3), "wanted kernels of size 1, found kernels of 3 x 3"),
    "stride": (lambda: conv(stride=2), "found stride [2, 2]"),
    "padding": (lambda: conv(padding=1), "found padding [1, 1]"),
    "groups": (lambda: conv(groups=2), "found groups 2"),
}


@pytest.mark.parametrize("case", MISSED)
def test_a_convolution_that_is_no_linear_is_missed(case: str) -> None:
    make, reason = MISSED[case]
    for target in ("cuda", "cpu"):
        report = assert_misses(exported(make(), image(2)), reason, target, rule="conv_int4")
        assert "leave this layer unquantized" in str(report)


def test_int8_needs_an_int8_kernel() -> None:
    assert_misses(exported(conv(INT8), image(2)), "found 8 bits, -128..127", "metal", rule="conv_int4")
    assert_rewrites(exported(conv(INT8), image(2)), "cuda", expect={"conv_int8": 1}, rtol=6e-3)


@pytest.mark.parametrize("config", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_xnnpack_folds_every_convolution_and_is_right(kernel: int, config: Any) -> None:
    model, x = conv(config, kernel, torch.float32).eval(), image(2, dtype=torch.float32)
    ours = ecp.XnnpackPartitioner(expect={"fold_dequantize": 1, "missed": 0})
    buffer = to_edge_transform_and_lower(exported(model, x), partitioner=[ours]).to_executorch().buffer
    found = Runtime.get().load_program(buffer).load_method("forward").execute([x])[0]
    wanted = model(x)
    assert (found - wanted).norm() / wanted.norm() < 1e-5
