"""linear_int4 over quantization schemes: rewritten against the original in eager, the error within bf16 rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import et_cuda_passes as ecp
from tests.quantized import Quantized

TARGETS = ("cuda", "metal", "cpu")
ROUNDOFF = 2.0**-8
"""The largest relative error of rounding to bf16, which has 8 significant bits."""


def weight_of(program: torch.export.ExportedProgram, in_features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight that a rewritten linear without bias computes with, read off by giving it the identity."""
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
    """What the scheme says the weight is, in fp64, and how far bf16's rounding may take each element of it.

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
        # There the stored zero is that of q * S + Z, eight scales further.
        zero, steps = zero + 8 * scale, steps + 16
    return exact, ROUNDOFF * (steps * scale + zero + np.abs(exact)) * 1.02


@settings(max_examples=60, deadline=None)
@given(schemes(), st.sampled_from(TARGETS))
def test_the_packed_weight_is_the_dequantized_weight(model: Quantized, target: str) -> None:
    k = model.data.shape[1]
    program = torch.export.export(model, (torch.eye(k).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, target, expect={"linear_int4": 1, "missed": 0})
    exact, bound = exact_and_bound(model, target)
    assert bool((np.abs(weight_of(rewritten, k).double().numpy() - exact) <= bound).all())


@settings(max_examples=30, deadline=None)
@given(schemes(), st.sampled_from(TARGETS), st.integers(1, 9))
def test_outputs_agree_with_fp64(model: Quantized, target: str, rows: int) -> None:
    x = torch.randn(rows, model.data.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
    rewritten, _ = ecp.rewrite(torch.export.export(model, (x,)), target)
    exact, bound = exact_and_bound(model, target)
    given_x = x.double().numpy()
    wanted = given_x @ exact.T
    # Beside the weights' rounding: the output's own to bf16, and fp32 sums.
    allowed = np.abs(given_x) @ bound.T + np.abs(wanted) * ROUNDOFF + np.abs(given_x) @ np.abs(exact).T * 1e-5
    assert bool((np.abs(rewritten.module()(x).double().numpy() - wanted) <= allowed).all())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("zero_points", ["random", "zero", None])
def test_bf16_scales_and_no_zero_points_are_exact(target: str, zero_points: str | None) -> None:
    """With scales that bf16 holds and zeros that bf16 holds, nothing is rounded that was not before."""
    model = Quantized(16, 64, zero_points=zero_points, form=lambda x, w, b: torch.nn.functional.linear(x, w))
    model.scale.fill_(0.015625)
    program = torch.export.export(model, (torch.eye(64).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, target)
    assert torch.equal(weight_of(rewritten, 64), model.weight())


@pytest.mark.parametrize(("k", "tiles"), [(32, 2), (64, 4), (96, 2), (128, 8), (192, 4), (256, 8), (576, 4), (1280, 8)])
def test_inner_k_tiles_follows_k_and_k_is_not_padded(k: int, tiles: int) -> None:
    program = torch.export.export(Quantized(8, k), (torch.randn(1, k).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "cuda", [ecp.LinearInt4(kernel="tinygemm")])
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.shape == (1, k // (16 * tiles), 32, tiles // 2)


@pytest.mark.parametrize(
    ("target", "kernel", "multiple"),
    [("cuda", "triton", 1), ("cuda", "tinygemm", 8), ("metal", "torchao", 4), ("cpu", "int4pack_cpu", 16)],
)
@pytest.mark.parametrize("n", [1, 8, 13])
def test_rows_are_padded_and_the_output_is_not(target: str, kernel: str, multiple: int, n: int) -> None:
    model, x = Quantized(n, 64), torch.randn(3, 64).bfloat16()
    rewritten, _ = ecp.rewrite(torch.export.export(model, (x,)), target, [ecp.LinearInt4(kernel=kernel)])
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.numel() * packed.element_size() == -(-n // multiple) * multiple * 64 // 2
    assert rewritten.module()(x).shape == (3, n)


@pytest.mark.parametrize("k", [32, 96, 160, 576])
def test_k_is_padded_where_the_layout_has_whole_blocks(k: int) -> None:
    """The linear's own K stays what it was: x is not padded."""
    model, x = Quantized(8, k), torch.randn(3, k).bfloat16()
    rewritten, _ = ecp.rewrite(torch.export.export(model, (x,)), "cuda")
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.shape == (8, -(-k // 64) * 8)
    got, wanted = rewritten.module()(x), model(x)
    assert (got - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize(("group", "native"), [(32, 32), (96, 32), (128, 128), (192, 64), (256, 128), (640, 128)])
def test_group_sizes_become_those_of_the_triton_kernel(group: int, native: int) -> None:
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
def test_group_sizes_become_native_ones(group: int, native: int) -> None:
    program = torch.export.export(Quantized(8, group, group=group), (torch.randn(1, group).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "cuda", [ecp.LinearInt4(kernel="tinygemm")])
    (pair,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".scale_and_zero"))
    assert pair.shape == (group // native, 8, 2)


def test_activations_in_other_dtypes_compute_in_their_own_where_the_kernel_can() -> None:
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        model, x = Quantized(24, 128, dtype=dtype, zero_points="random"), torch.randn(3, 128, dtype=dtype)
        program = torch.export.export(model, (x,))
        for passes in (("cpu", None), ("metal", [ecp.LinearInt4(kernel="mps")])):
            rewritten, _ = ecp.rewrite(program, *passes, expect={"linear_int4": 1})
            got, wanted = rewritten.module()(x), model(x)
            assert got.dtype == dtype
            assert (got - wanted).norm() / wanted.norm() < bound
