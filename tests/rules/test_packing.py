"""The constants of kernels: values against fp64 for every scheme, shapes, strides and names."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.testing import Experts, Quantized, assert_rewrites, floats

TARGETS = ("cuda", "metal", "cpu")
ROUNDOFF = 2.0**-8
"""The largest relative error of rounding to bf16, which has 8 significant bits."""
WIDTHS = {bits: getattr(torch, f"int{bits}") for bits in range(1, 9)}
aten = torch.ops.aten


def computed_weight(
    program: torch.export.ExportedProgram, in_features: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight of a rewritten linear without bias: its result for the identity matrix."""
    return program.module()(torch.eye(in_features, dtype=dtype)).T


@st.composite
def schemes(draw: st.DrawFn) -> Quantized:
    group = draw(st.sampled_from([32, 64, 96, 128, 160, 192, 256, 320, 512]))
    low, high = draw(st.sampled_from([(-8, 7), (0, 15), (-4, 3), (-2, 1), (-7, 8), (-8, 0)]))
    return Quantized(
        n=draw(st.integers(1, 40)),
        k=group * draw(st.integers(1, 3)),
        group=group,
        low=low,
        high=high,
        scale_dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        zero_points=draw(st.sampled_from(["random", "zero", None])),
        form=lambda x, w, b: torch.nn.functional.linear(x, w),
        storage=draw(st.sampled_from([torch.int8, torch.int16, torch.int32])) if low < 0 else torch.uint8,
        seed=draw(st.integers(0, 1000)),
    )


def exact_and_bound(model: Quantized, target: str) -> tuple[np.ndarray, np.ndarray]:
    """The weight of the scheme in fp64, and the largest error of each element after the rounding to bf16.

    The packed format rounds scale, zero and their sum to bf16, once each, by at most 2**-8 of each.
    """
    spread = lambda t: t.double().numpy().repeat(model.block[1], axis=1)  # noqa: E731
    data, scale = model.data.double().numpy(), spread(model.scale)
    zero_point = 0.0 if model.zero_point is None else spread(model.zero_point)
    exact = (data - zero_point) * scale
    middle = 8 - (8 if model.low >= -8 and model.high <= 7 else -min(model.low, 0))
    zero = np.abs((middle - zero_point) * scale)
    steps = np.abs(data - middle)
    if target == "metal":
        # The stored zero is that of q * S + Z, which is eight scales further.
        zero, steps = zero + 8 * scale, steps + 16
    return exact, ROUNDOFF * (steps * scale + zero + np.abs(exact)) * 1.02


@settings(max_examples=60, deadline=None)
@given(schemes(), st.sampled_from(TARGETS))
def test_packed_weight_equals_dequantized_weight(model: Quantized, target: str) -> None:
    k = model.data.shape[1]
    program = torch.export.export(model, (torch.eye(k).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, target, expect={"linear_int4": 1, "missed": 0})
    exact, bound = exact_and_bound(model, target)
    assert bool((np.abs(computed_weight(rewritten, k).double().numpy() - exact) <= bound).all())


@settings(max_examples=30, deadline=None)
@given(schemes(), st.sampled_from(TARGETS), st.integers(1, 9))
def test_outputs_of_int4_linear_agree_with_fp64(model: Quantized, target: str, rows: int) -> None:
    x = torch.randn(rows, model.data.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
    rewritten, _ = ecp.rewrite(torch.export.export(model, (x,)), target)
    exact, bound = exact_and_bound(model, target)
    given_x = x.double().numpy()
    wanted = given_x @ exact.T
    # To the rounding of the weights come that of the output to bf16, and fp32 sums.
    allowed = np.abs(given_x) @ bound.T + np.abs(wanted) * ROUNDOFF + np.abs(given_x) @ np.abs(exact).T * 1e-5
    assert bool((np.abs(rewritten.module()(x).double().numpy() - wanted) <= allowed).all())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("zero_points", ["random", "zero", None])
def test_weights_with_bf16_scales_and_zeros_are_exact(target: str, zero_points: str | None) -> None:
    """Scales and zeros that bf16 represents are not rounded again."""
    model = Quantized(16, 64, zero_points=zero_points, form=lambda x, w, b: torch.nn.functional.linear(x, w))
    model.scale.fill_(0.015625)
    program = torch.export.export(model, (torch.eye(64).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, target)
    assert torch.equal(computed_weight(rewritten, 64), model.weight())


@pytest.mark.parametrize(("k", "tiles"), [(32, 2), (64, 4), (96, 2), (128, 8), (192, 4), (256, 8), (576, 4), (1280, 8)])
def test_inner_k_tiles_follow_k_without_padding(k: int, tiles: int) -> None:
    program = torch.export.export(Quantized(8, k), (torch.randn(1, k).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "cuda", [ecp.LinearInt4(kernel="tinygemm")])
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.shape == (1, k // (16 * tiles), 32, tiles // 2)


@pytest.mark.parametrize(
    ("target", "kernel", "multiple"),
    [("cuda", "triton", 1), ("cuda", "tinygemm", 8), ("metal", "torchao", 4), ("cpu", "int4pack_cpu", 16)],
)
@pytest.mark.parametrize("n", [1, 8, 13])
def test_packed_rows_are_padded_and_output_is_not(target: str, kernel: str, multiple: int, n: int) -> None:
    model, x = Quantized(n, 64), torch.randn(3, 64).bfloat16()
    rewritten, _ = ecp.rewrite(torch.export.export(model, (x,)), target, [ecp.LinearInt4(kernel=kernel)])
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.numel() * packed.element_size() == -(-n // multiple) * multiple * 64 // 2
    assert rewritten.module()(x).shape == (3, n)


@pytest.mark.parametrize("k", [32, 96, 160, 576])
def test_packed_k_is_padded_to_whole_blocks_of_the_layout(k: int) -> None:
    """The K of the linear does not change: x is not padded."""
    model, x = Quantized(8, k), torch.randn(3, k).bfloat16()
    rewritten, _ = ecp.rewrite(torch.export.export(model, (x,)), "cuda")
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.shape == (8, -(-k // 64) * 8)
    got, wanted = rewritten.module()(x), model(x)
    assert (got - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize(("group", "native"), [(32, 32), (96, 32), (128, 128), (192, 64), (256, 128), (640, 128)])
def test_scales_are_repeated_for_group_sizes_of_the_triton_kernel(group: int, native: int) -> None:
    program = torch.export.export(Quantized(8, 2 * group, group=group), (torch.randn(1, 2 * group).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "cuda")
    (call,) = (n for n in rewritten.graph.nodes if "int4_linear" in str(n.target))
    assert call.args[4] == native
    (rows,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".scale_and_zero"))
    groups = 2 * group // native
    scales = rows[0, :, :groups]
    assert torch.equal(scales, scales[:, :: group // native].repeat_interleave(group // native, dim=1))
    assert not rows[0, :, groups:].any()


@pytest.mark.parametrize(("group", "native"), [(32, 32), (96, 32), (128, 128), (192, 64), (256, 256), (512, 256)])
def test_scales_are_repeated_for_group_sizes_of_tinygemm(group: int, native: int) -> None:
    program = torch.export.export(Quantized(8, group, group=group), (torch.randn(1, group).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "cuda", [ecp.LinearInt4(kernel="tinygemm")])
    (pair,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".scale_and_zero"))
    assert pair.shape == (group // native, 8, 2)


def test_linear_computes_in_dtype_of_activations_that_kernel_has() -> None:
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        model, x = Quantized(24, 128, dtype=dtype, zero_points="random"), torch.randn(3, 128, dtype=dtype)
        program = torch.export.export(model, (x,))
        for passes in (("cpu", None), ("metal", [ecp.LinearInt4(kernel="mps")])):
            rewritten, _ = ecp.rewrite(program, *passes, expect={"linear_int4": 1})
            got, wanted = rewritten.module()(x), model(x)
            assert got.dtype == dtype
            assert (got - wanted).norm() / wanted.norm() < bound


def identity(config: IntxWeightOnlyConfig, dtype: torch.dtype) -> tuple[nn.Module, torch.export.ExportedProgram]:
    """A quantized linear without bias, and its program over the identity, whose result is the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24, bias=False)).to(dtype).eval()
    quantize_(model, config)
    return model, torch.export.export(model, (torch.eye(64, dtype=dtype),))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_axis_weight_of_every_width_is_exact_on_cpu(bits: int, dtype: torch.dtype) -> None:
    model, program = identity(IntxWeightOnlyConfig(WIDTHS[bits], PerAxis(0)), dtype)
    rule = "linear_int4" if bits <= 4 else "linear_int8"
    rewritten, report = ecp.rewrite(program, "cpu", expect={rule: 1, "missed": 0})
    assert report.outcomes[0].detail.startswith(f"int{bits} per-axis")
    # The scheme is symmetric with scales in the dtype of the activations: each weight is one product, rounded once.
    assert torch.equal(rewritten.module()(torch.eye(64, dtype=dtype)).T, model[0].weight.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_weight_of_up_to_four_bits_is_exact_in_int4_groups(bits: int, target: str) -> None:
    model, program = identity(IntxWeightOnlyConfig(WIDTHS[bits], PerGroup(32)), torch.bfloat16)
    rewritten, report = assert_rewrites(program, target, expect={"linear_int4": 1}, rtol=0)
    assert report.outcomes[0].detail.startswith(f"int{bits} group 32")
    assert torch.equal(rewritten.module()(torch.eye(64).bfloat16()).T, model[0].weight.dequantize())


@pytest.mark.parametrize(
    "ends", [(-1, 0), (-2, 1), (-3, 3), (-4, 3), (-7, 7), (-8, 7), (0, 3), (0, 7), (0, 15), (-5, 10)]
)
@pytest.mark.parametrize("zero_points", ["random", None])
def test_zeros_on_metal_are_rounded_in_proportion_to_the_range(ends: tuple[int, int], zero_points: str | None) -> None:
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
def test_weight_of_five_to_eight_bits_is_exact_in_int8_groups(bits: int) -> None:
    model, program = identity(IntxWeightOnlyConfig(WIDTHS[bits], PerGroup(32)), torch.bfloat16)
    rewritten, report = assert_rewrites(program, "cuda", expect={"linear_int8": 1}, rtol=0)
    assert report.outcomes[0].detail == f"int{bits} group 32 -> triton"
    assert torch.equal(rewritten.module()(torch.eye(64).bfloat16()).T, model[0].weight.dequantize())


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("k", [32, 96])
def test_experts_are_packed_with_contiguous_strides(target: str, k: int) -> None:
    """With one group, ``contiguous()`` would keep the strides of a transposed tensor."""
    model = Experts(lambda weight, x: torch.bmm(x, weight.transpose(1, 2)), shape=(3, 32, k))
    exported = torch.export.export(model, (torch.randn(3, 2, k).bfloat16(),))
    program, _ = ecp.rewrite(exported, target, expect={"bmm_int4": 1})
    assert program.state_dict.keys() == {"data.packed", "data.scale_and_zero"}
    for tensor in program.state_dict.values():
        assert tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


class Reads(nn.Module):
    """``x`` times the same integers [32, 64], dequantized by each of ``ways``."""

    def __init__(self, *ways: Any) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.ways = ways
        self.register_buffer("data", torch.randint(-8, 8, (32, 64), generator=random).to(torch.int8))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x.to(weight.dtype), weight) for weight in (way(self.data) for way in self.ways)]


def by_number(scale: float, zero_point: int, low: int = -128, dtype: torch.dtype = torch.float32) -> Any:
    operator = torch.ops.quantized_decomposed.dequantize_per_tensor
    return lambda data: operator(data, scale, zero_point, low, 127, torch.int8, out_dtype=dtype)


@pytest.mark.parametrize(
    "other",
    [by_number(0.05, 0), by_number(0.01, 3), by_number(0.01, 0, dtype=torch.float16)],
    ids=["scale", "zero point", "dtype"],
)
def test_integers_read_with_equal_arguments_share_one_constant(other: Any) -> None:
    model, x = Reads(by_number(0.01, 0), other, by_number(0.01, 0)), floats(4, 64, dtype=torch.float32)
    folded, _ = assert_rewrites(torch.export.export(model, (x,)), "xnnpack", expect={"fold_dequantize": 3}, rtol=0)
    assert sorted(folded.state_dict) == ["data.dequantized", "data.dequantized_2"]
