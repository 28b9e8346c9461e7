"""Integers of 1 to 8 bits in a byte each: every width goes to the next kernel that holds it, and nothing is lost."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.quantized import Quantized

WIDTHS = {bits: getattr(torch, f"int{bits}") for bits in range(1, 9)}


def identity(config: IntxWeightOnlyConfig, dtype: torch.dtype) -> tuple[nn.Module, torch.export.ExportedProgram]:
    """A quantized linear without bias, and its program over the identity, which gives the weight itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24, bias=False)).to(dtype).eval()
    quantize_(model, config)
    return model, torch.export.export(model, (torch.eye(64, dtype=dtype),))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_axis_on_the_cpu_is_exact(bits: int, dtype: torch.dtype) -> None:
    model, program = identity(IntxWeightOnlyConfig(WIDTHS[bits], PerAxis(0)), dtype)
    rule = "linear_int4" if bits <= 4 else "linear_int8"
    rewritten, report = ecp.rewrite(program, "cpu", expect={rule: 1, "missed": 0})
    assert report.outcomes[0].detail.startswith(f"int{bits} per-axis")
    # Symmetric, with scales of the activations' dtype: each weight is one product, rounded once, on both sides.
    assert torch.equal(rewritten.module()(torch.eye(64, dtype=dtype)).T, model[0].weight.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_up_to_four_bits_are_exact_in_int4_groups(bits: int, target: str) -> None:
    model, program = identity(IntxWeightOnlyConfig(WIDTHS[bits], PerGroup(32)), torch.bfloat16)
    rewritten, report = assert_rewrites(program, target, expect={"linear_int4": 1}, rtol=0)
    assert report.outcomes[0].detail.startswith(f"int{bits} group 32")
    assert torch.equal(rewritten.module()(torch.eye(64).bfloat16()).T, model[0].weight.dequantize())


@pytest.mark.parametrize(
    "ends", [(-1, 0), (-2, 1), (-3, 3), (-4, 3), (-7, 7), (-8, 7), (0, 3), (0, 7), (0, 15), (-5, 10)]
)
@pytest.mark.parametrize("zero_points", ["random", None])
def test_on_metal_a_zero_costs_no_more_than_the_range_is_wide(ends: tuple[int, int], zero_points: str | None) -> None:
    low, high = ends
    model = Quantized(24, 64, 32, low, high, zero_points=zero_points, form=lambda x, weight, bias: x @ weight.T)
    program = torch.export.export(model, (torch.eye(64).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "metal", expect={"linear_int4": 1})
    scale, points = (
        0 if part is None else part.double().repeat_interleave(32, dim=1) for part in (model.scale, model.zero_point)
    )
    exact = (model.data.double() - points) * scale
    off = (rewritten.module()(torch.eye(64).bfloat16()).T.double() - exact).abs()
    # A scale is bf16 already; Z = -(zero point - low) * S is rounded once, and then each weight.
    zero = 0 if zero_points is None and low != -5 else high - low
    assert bool((off <= 2.0**-8 * (zero * scale + exact.abs())).all())


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_wider_ones_are_exact_in_int8_groups(bits: int) -> None:
    model, program = identity(IntxWeightOnlyConfig(WIDTHS[bits], PerGroup(32)), torch.bfloat16)
    rewritten, report = assert_rewrites(program, "cuda", expect={"linear_int8": 1}, rtol=0)
    assert report.outcomes[0].detail == f"int{bits} group 32 -> triton"
    assert torch.equal(rewritten.module()(torch.eye(64).bfloat16()).T, model[0].weight.dequantize())


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_wider_ones_are_missed_where_there_is_no_int8_kernel(bits: int) -> None:
    _, program = identity(IntxWeightOnlyConfig(WIDTHS[bits], PerGroup(32)), torch.bfloat16)
    assert_misses(program, f"at most 4 bits, found {bits} bits", "metal", rule="linear_int4")


class Mixed(nn.Module):
    """Five layers for five schemes."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.eight = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two, self.six = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.point = nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.eight(torch.relu(self.four(x))))
        x = torch.relu(self.six(torch.relu(self.two(x))))
        result: Tensor = self.point(x.movedim(-1, 1))
        return result


SCHEMES = {
    "four": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "linear_int4", "int4 group 32"),
    "eight": (IntxWeightOnlyConfig(torch.int8, PerAxis(0)), "linear_int8", "int8 per-axis"),
    "two": (IntxWeightOnlyConfig(torch.int2, PerGroup(64)), "linear_int4", "int2 per-axis"),
    "six": (IntxWeightOnlyConfig(torch.int6, PerAxis(0)), "linear_int8", "int6 per-axis"),
    "point": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "conv_int4", "int4 group 32"),
}


def mixed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Mixed().bfloat16().eval()
    for name, (config, _, _) in SCHEMES.items():
        quantize_(model, config, filter_fn=lambda _, fqn, name=name: fqn == name)
    return model, torch.randn(2, 3, 5, 64).bfloat16()


def test_five_schemes_lower_in_one_call_and_the_report_tells_them_apart(tmp_path: Path) -> None:
    model, x = mixed()
    program = torch.export.export(model, (x,))
    packed, report = assert_rewrites(program, "cpu", expect={"missed": 0, "rewritten": 5}, rtol=2e-2)
    fates = {outcome.fqn.partition(".")[0]: (outcome.rule, outcome.detail) for outcome in report.outcomes}
    for name, (_, rule, scheme) in SCHEMES.items():
        assert fates[name][0] == rule
        assert fates[name][1].startswith(scheme)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 5
    assert report.conflicts == []
    for _, rule, scheme in SCHEMES.values():
        assert sum(f"{rule}  {scheme} ->" in line for line in lines) == 1

    # And under AOTInductor, whose kernels these are.
    path = aoti_compile_and_package(packed, package_path=str(tmp_path / "mixed.pt2"))
    got, wanted = aoti_load_package(path)(x), model(x)
    assert got.shape == wanted.shape
    assert got.stride() == wanted.stride()
    assert (got - wanted).norm() / wanted.norm() < 2e-2
