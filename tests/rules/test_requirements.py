"""The shared requirements: a near miss of each, the text of its reason, and a hint that leads to a rewrite."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.quant.decoders import DEQUANTIZE
from et_cuda_passes.targets import get_target
from et_cuda_passes.testing import Quantized, assert_misses, assert_rewrites, floats
from tests.helpers import export_with_rows

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INT4, INT8 = torch.int4, torch.int8
N, K = 48, 96
ONE_DTYPE = "activations, bias and result of one dtype"
GROUP_SIZE = "a group size that the kernel has"


def missed_reasons(program: torch.export.ExportedProgram, target: str = "cuda", **options: object) -> list[ecp.Reason]:
    given = {"passes": [ecp.LinearInt4()], **options}
    rewritten, report = ecp.rewrite(program, target, **given, expect={"linear_int4": 0, "missed": 1})
    assert [n.target for n in rewritten.graph.nodes] == [n.target for n in program.graph.nodes]
    return report.outcomes[0].reasons


def reason_texts(model: nn.Module, x: Tensor, target: str) -> list[str]:
    """The texts of all reasons for the one candidate of the model."""
    _, report = ecp.rewrite(torch.export.export(model, (x,)), target, expect={"missed": 1})
    return [str(reason) for reason in report.outcomes[0].reasons]


def rows(k: int = 64, n: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(n, k, dtype=dtype)


# One requirement after the other -------------------------------------------------------------------------------------


def test_weight_has_data_rejects_meta_tensors() -> None:
    program = torch.export.export(Quantized(16, 64).to("meta"), (rows().to("meta"),))
    reasons = missed_reasons(program)
    assert (reasons[0].wanted, reasons[0].found) == ("a constant weight that holds data", "meta or fake tensors")
    assert "export with real weights" in reasons[0].hint


@pytest.mark.parametrize(
    ("model", "wanted", "found", "hint"),
    [
        (Quantized(16, 64, low=-128, high=127), "a weight of at most 4 bits", "8 bits, -128..127", "torch.int4"),
        (Quantized(16, 64, low=-16, high=15), "a weight of at most 4 bits", "5 bits, -16..15", "torch.int4"),
        (Quantized(16, 96, group=8), GROUP_SIZE, "group size 8", "PerGroup(16)"),
        (Quantized(16, 160, group=40), GROUP_SIZE, "group size 40", "PerGroup(32)"),
        (Quantized(16, 384, group=24), GROUP_SIZE, "group size 24", "PerGroup(16)"),
        # 128 is nearest, and neither it nor 64 divides 416.
        (Quantized(16, 416, group=104), GROUP_SIZE, "group size 104", "PerGroup(32)"),
    ],
)
def test_linear_int4_rejects_schemes_that_no_kernel_has(model: Quantized, wanted: str, found: str, hint: str) -> None:
    (reason,) = missed_reasons(export_with_rows(model, 2, model.data.shape[1]))
    assert (reason.rule, reason.stage, reason.wanted, reason.found) == ("linear_int4", "metadata", wanted, found)
    assert hint in reason.hint


def test_kernel_has_activation_dtype_rejects_others_without_cast_to_bf16() -> None:
    model, x = Quantized(16, 64, dtype=torch.float32), torch.randn(2, 64)
    (reason,) = missed_reasons(torch.export.export(model, (x,)))
    assert (reason.wanted, reason.found) == ("activations of a dtype that the kernel has", "float32")
    assert "triton has bfloat16, float16" in reason.hint
    assert "LinearInt4(cast_to_bf16=True)" in reason.hint
    program = torch.export.export(model, (x,))
    rewritten, report = ecp.rewrite(program, "cuda", [ecp.LinearInt4(cast_to_bf16=True)], {"linear_int4": 1})
    got, wanted = rewritten.module()(x), model(x)
    assert got.dtype == torch.float32
    assert (got - wanted).norm() / wanted.norm() < 8e-3
    assert "computed in bf16" in report.outcomes[0].detail


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_are_finite_rejects_nan_and_infinity(value: float) -> None:
    model = Quantized(16, 64)
    model.scale[3, 1] = value
    (reason,) = missed_reasons(export_with_rows(model, 2, 64))
    assert reason.stage == "values"
    assert "NaN or infinite" in reason.found


def test_scales_are_finite_rejects_scale_that_overflows_dtype_of_kernel() -> None:
    model = Quantized(16, 64, scale_dtype=torch.float32, zero_points=None)
    model.scale[0, 0] = 3.4e38
    (reason,) = missed_reasons(export_with_rows(model, 2, 64))
    # Without zero points its zero is 0.
    assert reason.found == "1 that are NaN or infinite"


def test_integers_are_in_range_rejects_integer_outside() -> None:
    model = Quantized(16, 64)
    model.data[5, 5] = 9
    (reason,) = missed_reasons(export_with_rows(model, 2, 64))
    assert reason.found == "integers -8..9 for a range of -8..7"


def test_kernel_runs_in_control_flow_rejects_kernel_that_does_not() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Quantized(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.inner(x), lambda x: x + 1, (x,))

    program = torch.export.export(Branch(), (rows(),))
    named = [ecp.LinearInt4(kernel="int4pack_cpu")]
    assert_misses(program, "wanted a place where the kernel compiles, found control flow at", "cpu", passes=named)
    assert_rewrites(program, "cpu", expect={"linear_int4": 1})
    assert_rewrites(program, "cuda", expect={"linear_int4": 1})


def test_report_names_every_requirement_that_fails() -> None:
    reasons = missed_reasons(
        export_with_rows(
            Quantized(16, 40, group=40, low=-128, high=127, dtype=torch.float32), 2, 40, dtype=torch.float32
        )
    )
    assert [reason.found for reason in reasons] == ["8 bits, -128..127", "group size 40", "K = 40", "float32"]


@pytest.mark.parametrize("block", [[16, 64], [4, 32], [2, 64]])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_weight_with_scale_for_several_rows_is_rewritten(block: list[int], target: str) -> None:
    model = Quantized(16, 64, zero_points=None)
    scales = torch.rand(16 // block[0], 64 // block[1]).bfloat16()
    model.block, model.scale = block, scales
    assert_rewrites(export_with_rows(model, 2, 64), target, expect={"linear_int4": 1})


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_weight_fits_4_bits_rejects_wider_weight_without_int8_kernel(bits: int) -> None:
    program = exported_linear(quantized(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32))))
    assert_misses(program, f"at most 4 bits, found {bits} bits", "metal", rule="linear_int4")


# Operands of one dtype ------------------------------------------------------------------------------------------------


class Autocast(nn.Module):
    """``inner`` under autocast to bf16, its result bf16 whatever it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return self.inner(*inputs)


@cache
def exported_under_autocast(x: torch.dtype, weight: torch.dtype, bias: torch.dtype, bits: int = 4) -> ExportedProgram:
    form = {"low": -128, "high": 127, "group": 64} if bits == 8 else {}
    inner = Quantized(32, 64, dtype=weight, **form)
    inner.bias.data = inner.bias.data.to(bias)
    return torch.export.export(Autocast(inner), (floats(4, 64, dtype=x),))


@pytest.mark.parametrize(("target", "bits"), [("cuda", 4), ("cuda", 8), ("cpu", 4), ("cpu", 8), ("metal", 4)])
@pytest.mark.parametrize("weight", [FP32, BF16])
@pytest.mark.parametrize(("x", "bias"), [(FP32, FP32), (FP32, BF16), (BF16, FP32), (FP16, BF16), (FP16, FP16)])
def test_same_dtype_rejects_linear_of_another_dtype_than_its_result(
    x: torch.dtype, weight: torch.dtype, bias: torch.dtype, target: str, bits: int
) -> None:
    assert_misses(exported_under_autocast(x, weight, bias, bits), ONE_DTYPE, target)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("bits", [4, 8])
def test_hint_of_same_dtype_leads_to_rewrite(target: str, bits: int) -> None:
    """With the weight in bf16 the conversions, once they are written down, are around a linear of bf16."""
    program = exported_under_autocast(FP32, BF16, FP32, bits)
    report = assert_misses(program, "run_decompositions({})", target)
    assert "export the model outside of autocast, in bfloat16" in str(report.outcomes[0].reasons)
    assert_rewrites(program.run_decompositions({}), target, expect={"rewritten": 1, "missed": 0})


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_same_dtype_accepts_operands_of_the_result_dtype(target: str) -> None:
    assert_rewrites(exported_under_autocast(BF16, FP32, BF16), target, expect={"linear_int4": 1, "missed": 0})


@pytest.mark.parametrize("kernel", ["triton", "backend"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, FP32, FP32), (BF16, BF16, FP32)])
def test_same_dtype_rejects_attention_of_another_dtype(kernel: str, dtypes: tuple[torch.dtype, ...]) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    inputs = tuple(floats(1, 2, 5, 32, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
    program, report = ecp.rewrite(
        torch.export.export(Autocast(Attention()), inputs), "cuda", [ecp.UnmaskedAttention(kernel)]
    )
    assert not report.applied
    assert program.module()(*inputs).dtype is BF16


def test_same_dtype_rejects_linear_that_xnnpack_would_keep() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, Int8DynamicActivationIntxWeightConfig())
    program = torch.export.export(Autocast(model), (floats(4, 64, dtype=FP32),))
    assert_misses(program, ONE_DTYPE, "xnnpack", passes=[ecp.KeepDynamicInt8()])


# Hints ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cuda", "metal"])
@pytest.mark.parametrize("high", [7, 127])
def test_hint_advises_no_group_size_if_none_divides_k(target: str, high: int) -> None:
    reasons = reason_texts(Quantized(16, 40, 40, -high - 1, high), rows(40), target)
    assert not any("quantize with Per" in reason or "quantize with Intx" in reason for reason in reasons)
    multiple = 16 if target == "cuda" else 32
    assert f"K must be a multiple of {multiple}: leave this layer unquantized" in " ".join(reasons)


def test_hint_without_int8_kernel_names_the_scheme_of_the_target_once() -> None:
    *_, last = reason_texts(Quantized(16, 64, 8, -128, 127), rows(), "metal")
    assert last == (
        "linear_int8 wanted a target with an int8 kernel, found target metal, which has no int8 kernel; "
        "quantize with IntxWeightOnlyConfig(torch.int4, PerGroup(32))"
    )


@pytest.mark.parametrize(("k", "group"), [(64, 8), (48, 24)])
def test_hint_for_int4_weight_does_not_advise_int4(k: int, group: int) -> None:
    program, passes = torch.export.export(Quantized(16, k, group), (rows(k),)), [ecp.LinearInt8(kernel="int8pack_cpu")]
    report = assert_misses(program, "one scale per row", "cpu", passes=passes)
    assert report.outcomes[0].reasons[-1].hint == "int8pack_cpu has one scale per row: quantize with PerAxis(0)"


class ChangingScales(Quantized):
    """A linear with scales that are computed, or mutated after they are read."""

    def __init__(self, written: bool) -> None:
        super().__init__(16, 64)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale if self.written else self.scale * 2
        y = F.linear(x, DEQUANTIZE(self.data, self.block, scale, None, torch.int8, -8, 7, self.dtype))
        if self.written:
            self.scale.mul_(2)
        return y


@pytest.mark.parametrize("target", ["cuda", "xnnpack"])
@pytest.mark.parametrize(
    ("written", "hint"),
    [
        (False, "straight from a parameter or buffer: compute it before the export, and hold the result in a buffer"),
        (
            True,
            "a packed weight would keep the old values: read a copy that is never mutated, or leave this layer "
            "unquantized",
        ),
    ],
)
def test_hint_for_scales_that_are_not_constant_names_the_fix(written: bool, hint: str, target: str) -> None:
    *_, last = reason_texts(ChangingScales(written), rows(), target)
    assert last.endswith(hint)


class LargeKernel(nn.Module):
    """A convolution of kernel size 3, one scale a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("data", torch.zeros(16, 32, 3, 3, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(16).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        weight = DEQUANTIZE(self.data, [1, 32, 3, 3], self.scale, None, torch.int8, -8, 7, torch.bfloat16)
        return F.conv2d(x, weight)


def test_hint_for_larger_convolution_kernel_names_no_granularity() -> None:
    reasons = reason_texts(LargeKernel(), torch.zeros(1, 32, 5, 5).bfloat16(), "cuda")
    assert not any("granularity" in reason for reason in reasons)
    assert any("groups along K, found a weight of shape [16, 32, 3, 3] in blocks of" in reason for reason in reasons)
    assert "larger kernels have no quantized form: leave this layer unquantized" in " ".join(reasons)


@pytest.mark.parametrize("high", [7, 127])
def test_hint_advises_bf16_arithmetic_if_it_helps(high: int) -> None:
    model, x = Quantized(16, 64, 64, -high - 1, high, torch.float32), rows(dtype=torch.float32)
    advice = "LinearInt4(cast_to_bf16=True) in place of the default linear_int4"
    assert any(reason.endswith(advice) for reason in reason_texts(model, x, "cuda")) == (high == 7)
    passes = [rule for rule in ecp.default_passes("cuda") if rule.name not in ("linear_int4", "fused_linear_int4")]
    expect = {"linear_int4": int(high == 7)}
    ecp.rewrite(torch.export.export(model, (x,)), "cuda", [ecp.LinearInt4(cast_to_bf16=True), *passes], expect)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "w @ x": (lambda x, w, _: w @ x, rows(2, 64)),
    "x @ w": (lambda x, w, _: x @ w, rows(16)),
    "einsum": (lambda x, w, _: torch.einsum("bk,nk->bn", x, w), rows()),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_hint_for_matrix_product_advises_linear(product: str) -> None:
    form, x = PRODUCTS[product]
    reasons = [reason for reason in reason_texts(Quantized(16, 64, form=form), x, "cuda") if "[E, N, K]" in reason]
    assert [reason.partition("no stack of experts ")[2] for reason in reasons] == [
        "[E, N, K]: write a product with a matrix [N, K] as linear(x, weight)"
    ]


# The nearest scheme that a target supports ----------------------------------------------------------------------------


def quantized(config: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(dtype).eval()
    quantize_(model, config)
    linear: nn.Linear = model[0]
    return linear


def exported_linear(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> ExportedProgram:
    return torch.export.export(model, (torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(dtype),))


def exact_weight(weight: Any) -> np.ndarray:
    """The weight of a torchao ``IntxUnpackedToInt8Tensor``, in fp64."""
    spread = lambda t: t.double().numpy().repeat(weight.block_size[1], axis=1)  # noqa: E731
    result: np.ndarray = (weight.qdata.double().numpy() - spread(weight.zero_point)) * spread(weight.scale)
    return result


@pytest.mark.parametrize(("dtype", "bits"), [(INT4, 4), (INT8, 8)])
@pytest.mark.parametrize("group", [16, 48])
def test_weight_with_groups_of_multiples_of_16_is_packed_on_cuda(dtype: torch.dtype, bits: int, group: int) -> None:
    linear = quantized(IntxWeightOnlyConfig(dtype, PerGroup(group)))
    program = exported_linear(linear)
    rewritten, report = ecp.rewrite(program, "cuda", expect={f"linear_int{bits}": 1, "missed": 0})
    layout = " (mma_tiled)" if bits == 4 else ""
    assert [(o.fqn, o.detail) for o in report.outcomes] == [("weight", f"int{bits} group {group} -> triton{layout}")]
    (x,) = program.example_inputs[0]
    rows, weight = x.double().numpy(), exact_weight(linear.weight)
    wanted = rows @ weight.T
    # Each weight is rounded once to bf16, and the result; sums are fp32.
    allowed = np.abs(rows) @ np.abs(weight).T * (2.0**-8 + 1e-5) + np.abs(wanted) * 2.0**-8
    assert bool((np.abs(rewritten.module()(x).double().numpy() - wanted) <= allowed).all())
    held = {name: (value.dtype, tuple(value.shape)) for name, value in rewritten.state_dict.items()}
    if bits == 8:
        assert held == {"weight.packed": (INT8, (N, K)), "weight.scale": (torch.bfloat16, (N, K // 16))}
    else:
        assert held["weight.packed"] == (torch.int32, (N, mma_tiled.padded(K) // 8))


TRITON8 = "linear_int8 wanted a group size that the kernel has, found group size {}; triton has 16, 32, 64, 128, 256"
INT4_GROUPS = "found group size {}; {} has 32, 64, 128, 256 and their multiples: quantize with PerGroup(32)"
MISSED = [
    (
        "cuda",
        INT4,
        24,
        "linear_int4",
        "found group size 24; triton has 16, 32, 64, 128 and their multiples: quantize with PerGroup(16)",
    ),
    ("cuda", INT4, 24, "linear_int8", f"{TRITON8.format(24)} and their multiples: quantize with PerGroup(16)"),
    ("cuda", INT8, 24, "linear_int8", f"{TRITON8.format(24)} and their multiples: quantize with PerGroup(16)"),
    *(("metal", INT4, group, "linear_int4", INT4_GROUPS.format(group, "torchao")) for group in (16, 24, 48)),
    *(
        ("metal", INT8, group, "linear_int4", "found 8 bits, -128..127; quantize with weight_dtype=torch.int4")
        for group in (16, 24, 48)
    ),
    *(("metal", INT8, group, "linear_int4", INT4_GROUPS.format(group, "torchao")) for group in (16, 24, 48)),
]


@pytest.mark.parametrize(("target", "dtype", "group", "rule", "reason"), MISSED)
def test_kernel_has_group_size_names_the_nearest_group_size(
    target: str, dtype: torch.dtype, group: int, rule: str, reason: str
) -> None:
    report = assert_misses(
        exported_linear(quantized(IntxWeightOnlyConfig(dtype, PerGroup(group)))), reason, target, rule
    )
    assert [outcome.fqn for outcome in report.outcomes] == ["weight"]


def test_nearest_group_size_divides_k() -> None:
    """24 is as near to 32 as to 16, and 72 is nearer to 64; but 32 does not divide 240, and 64 does not divide 1008."""
    for k, group, nearest in ((160, 40, 32), (240, 24, 16), (576, 72, 64), (1008, 72, 16)):
        model = Quantized(8, k, group, -128, 127)
        program = torch.export.export(model, (torch.randn(2, k).bfloat16(),))
        assert_misses(program, f"and their multiples: quantize with PerGroup({nearest})", "cuda", "linear_int8")


@pytest.mark.parametrize("dtype", [INT4, INT8])
@pytest.mark.parametrize("group", [16, 24, 48])
def test_xnnpack_folds_other_group_sizes_exactly(dtype: torch.dtype, group: int) -> None:
    linear = quantized(IntxWeightOnlyConfig(dtype, PerGroup(group)), torch.float32)
    program = torch.export.export(linear, (torch.eye(K),))
    rewritten, _ = ecp.rewrite(program, "xnnpack", expect={"fold_dequantize": 1, "missed": 0})
    assert torch.equal(rewritten.module()(torch.eye(K)), linear(torch.eye(K)))
    np.testing.assert_allclose(
        rewritten.module()(torch.eye(K)).T.double().numpy(), exact_weight(linear.weight), rtol=1e-6
    )


def in_blocks(rows: int, columns: int, low: int, high: int) -> Quantized:
    """A weight in blocks of [rows, columns]."""
    model = Quantized(N, K, columns, low, high, zero_points=None, form=lambda x, w, b: F.linear(x, w))
    random = torch.Generator().manual_seed(2)
    model.block = [rows, columns]
    model.scale = (torch.rand(N // rows, K // columns, generator=random) * 0.02 + 0.005).bfloat16()
    return model


# A scale for several rows is repeated for each: only the size along K decides.
BLOCKS = {
    (4, 2, 32): {"cuda": "linear_int4", "metal": "linear_int4", "cpu": "linear_int4"},
    (4, N, K): {"cuda": "linear_int4", "metal": "linear_int4", "cpu": "linear_int4"},
    (8, 2, 96): {"cuda": "linear_int8", "metal": "at most 4 bits", "cpu": "linear_int8"},
    (8, N, K): {"cuda": "linear_int8", "metal": "at most 4 bits", "cpu": "linear_int8"},
    (8, 2, 32): {"cuda": "linear_int8", "metal": "at most 4 bits", "cpu": "linear_int8"},
    (4, 2, 16): {"cuda": "linear_int4", "metal": "torchao has 32, 64", "cpu": "linear_int4"},
    (4, 2, 24): {**dict.fromkeys(("cuda", "metal"), "has, found group size 24"), "cpu": "linear_int4"},
    (4, 8, 1): dict.fromkeys(("cuda", "metal", "cpu"), "a group size that the kernel has, found group size 1"),
}


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_over_both_axes_are_decided_by_their_size_along_k(block: tuple[int, int, int], target: str) -> None:
    bits, rows, columns = block
    model = in_blocks(rows, columns, -(1 << bits - 1), (1 << bits - 1) - 1)
    program, wanted = exported_linear(model), BLOCKS[block][target]
    if not wanted.startswith("linear_"):
        assert_misses(program, wanted, target)
        return
    rewritten, _ = ecp.rewrite(program, target, expect={wanted: 1, "missed": 0})
    (x,) = program.example_inputs[0]
    scale = model.scale.double().numpy().repeat(rows, axis=0).repeat(columns, axis=1)
    weight, inputs = model.data.double().numpy() * scale, x.double().numpy()
    # A weight's steps from -8 and its zero are rounded apart in some int4 layouts, by 16 steps of 2**-8 together.
    allowed = np.abs(inputs) @ (np.abs(weight) + (bits == 4) * 32 * scale).T * (2.0**-8 + 1e-5)
    result = inputs @ weight.T
    assert bool((np.abs(rewritten.module()(x).double().numpy() - result) <= allowed + np.abs(result) * 2.0**-8).all())


@pytest.mark.parametrize("target", ecp.targets())
@pytest.mark.parametrize("bits", [4, 8])
def test_advised_scheme_of_target_is_supported_by_target(target: str, bits: int) -> None:
    text = get_target(target).advised.for_bits(bits)
    names = {
        "IntxWeightOnlyConfig": IntxWeightOnlyConfig,
        "Int8DynamicActivationIntxWeightConfig": Int8DynamicActivationIntxWeightConfig,
    }
    config = eval(text, {"torch": torch, "PerGroup": PerGroup, "PerAxis": PerAxis, **names})
    dtype = torch.bfloat16 if target in ("cuda", "metal", "cpu", "mlx", "tensorrt") else torch.float32
    status = "rewritten" if target in ("cuda", "metal", "cpu", "openvino") else "kept"
    _, report = ecp.rewrite(exported_linear(quantized(config, dtype), dtype), target, expect={status: 1, "missed": 0})
    if target in ("vulkan", "coreml", "mlx", "tensorrt"):
        return
    # A target with one width advises it for all.
    assert report.outcomes[0].rule.endswith("int4" if target == "metal" else f"int{bits}")  # type: ignore[union-attr]


class EveryScheme(nn.Module):
    """A linear of every scheme, all of one input."""

    def __init__(self, configs: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: quantized(config, seed=i) for i, (name, config) in enumerate(configs.items())}
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers.values()]


CONFIGS = {
    "int4_32": IntxWeightOnlyConfig(INT4, PerGroup(32)),
    "int4_16": IntxWeightOnlyConfig(INT4, PerGroup(16)),
    "int4_24": IntxWeightOnlyConfig(INT4, PerGroup(24)),
    "int4_48": IntxWeightOnlyConfig(INT4, PerGroup(48)),
    "int8": IntxWeightOnlyConfig(INT8, PerAxis(0)),
    "int8_24": IntxWeightOnlyConfig(INT8, PerGroup(24)),
    "again": IntxWeightOnlyConfig(INT4, PerGroup(32)),
    "fp8": Float8WeightOnlyConfig(),
    "bytes": Int8WeightOnlyConfig(),
    "integers": Int8DynamicActivationInt8WeightConfig(),
    "mx": MXDynamicActivationMXWeightConfig(),
    "nvfp4": NVFP4WeightOnlyConfig(),
}


REWRITTEN = {
    "cuda": {
        "int4_32": "linear_int4", "again": "linear_int4", "int4_16": "linear_int4", "int4_48": "linear_int4",
        "int8": "linear_int8", "fp8": "linear_float8", "nvfp4": "linear_float4",
    },
    "cpu": {
        "int4_32": "linear_int4", "again": "linear_int4", "int4_16": "linear_int4", "int4_24": "linear_int4",
        "int4_48": "linear_int4", "int8": "linear_int8", "int8_24": "linear_int8", "fp8": "fold_floats",
        "nvfp4": "fold_floats",
    },
    "metal": {"int4_32": "linear_int4", "again": "linear_int4", "fp8": "fold_floats", "nvfp4": "fold_floats"},
}  # fmt: skip


@cache
def exported_schemes(*names: str) -> ExportedProgram:
    return exported_linear(EveryScheme({name: CONFIGS[name] for name in names}))


@pytest.mark.parametrize("target", REWRITTEN)
@pytest.mark.parametrize("without", [("mx",), ("nvfp4",), ()])
def test_model_of_every_scheme_is_rewritten_at_once(target: str, without: tuple[str, ...]) -> None:
    """MX weights under quantized activations are exported wrapped."""
    configs = {name: config for name, config in CONFIGS.items() if name not in without}
    program = exported_schemes(*configs)
    if "mx" in without:
        _, report = assert_rewrites(program, target, rtol=2.0**-7)
    else:  # no CPU computes these
        _, report = ecp.rewrite(program, target)
    rules = {name: rule for name, rule in REWRITTEN[target].items() if name in configs}
    if target == "cuda":  # two of one scheme and input
        rules |= dict.fromkeys(("int4_32", "again"), "fused_linear_int4")
    found = {outcome.fqn.split(".")[1]: outcome.rule for outcome in report.outcomes}
    assert found == {name: rules.get(name) for name in configs}
    assert len(report.outcomes) == len(configs)
    text = str(report)
    assert f"  2 x {rules['again']}  int4 group 32 -> " in text
    assert "(layers.int4_32.weight, ...)" in text
    if target == "cuda":
        assert "  1 x linear_int4  int4 group 16 -> triton (mma_tiled)  (layers.int4_16.weight)" in text
        assert "  1 x linear_int4  int4 group 48 -> triton (mma_tiled)  (layers.int4_48.weight)" in text
    for name in set(configs) - set(rules):
        (line,) = (
            line for line in text.splitlines() if line.startswith("  missed") and f"layers.{name}.weight" in line
        )
        assert "  1 x aten." in line
