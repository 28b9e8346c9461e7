"""Linears and pointwise convolutions: options, sharing, numbers against fp64, and every way to miss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.operators import op_name
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT8_LINEAR
from et_cuda_passes.targets import get_target
from et_cuda_passes.testing import Quantized, assert_misses, assert_rewrites
from tests.helpers import export_with_rows
from tests.rules.linear_models import SCHEMES, EightBitActivations, exact_weight, five_schemes, no_bias

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SPACE = (5, 3, 2)
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
INT8 = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}

# A kernel with everything that the operator can express; the kernel of a target may have less.
GENERAL = dataclasses.replace(
    get_target("cpu"),
    name="general",
    kernels={
        **get_target("cpu").kernels,
        "int8_linear": (
            Kernel(
                "general",
                "int8",
                (torch.bfloat16, torch.float32),
                (32, 64),
                scale_dtype=torch.float32,
                per_row=True,
            ),
        ),
        "int8_plain": (),
    },
    passes=lambda: [ecp.LinearInt8()],
)


# LinearInt4 -----------------------------------------------------------------------------------------------------------


def test_linear_int4_rejects_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="target cuda has no int4 kernel 'marlin'; it has: triton, tinygemm"):
        ecp.rewrite(export_with_rows(Quantized(16, 64), 2, 64), "cuda", [ecp.LinearInt4(kernel="marlin")])


def test_linear_int4_misses_on_target_without_int4_kernels() -> None:
    program = export_with_rows(Quantized(16, 64), 2, 64)
    assert_misses(program, "found target xnnpack, which has no int4 kernel", "xnnpack", passes=[ecp.LinearInt4()])


BIASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "addmm [M, N]": lambda x, w, b: torch.addmm(x[:, :48], x, w.t()),
    "addmm [M, 1]": lambda x, w, b: torch.addmm(x[:, :1], x, w.t()),
    "addmm [1, N]": lambda x, w, b: torch.addmm(b[None], x, w.t()),
    "addmm [1]": lambda x, w, b: torch.addmm(b[:1], x, w.t()),
    "addmm []": lambda x, w, b: torch.addmm(b.sum(), x, w.t()),
    "linear [1]": lambda x, w, b: F.linear(x, w, b[:1]),
    "linear, expanded": lambda x, w, b: F.linear(x, w, b[:1].expand(48)),
    "linear, every other": lambda x, w, b: F.linear(x, w, b.repeat(2)[::2]),
    "linear, a column": lambda x, w, b: F.linear(x, w, torch.stack([b, b + 1], 1)[:, 0]),
    "between views": lambda x, w, b: torch.addmm(x[:, :48], x[:, None].view(-1, 64), w.t()).view(-1, 1, 48),
}


@pytest.mark.parametrize(
    ("target", "group", "dynamic"),
    [
        ("cuda", 32, False),
        pytest.param("cuda", 32, True, marks=pytest.mark.slow),
        ("cuda", 64, False),
        ("cpu", 64, True),
        ("metal", 32, False),
    ],
)
@pytest.mark.parametrize("form", BIASES)
def test_bias_of_every_form_is_added(form: str, target: str, group: int, dynamic: bool) -> None:
    """A kernel adds a vector [N]; another bias is added after it."""
    bits = {} if group == 32 else {"low": -128, "high": 127}
    model, x = Quantized(48, 64, group, form=BIASES[form], **bits), torch.randn(5, 64).bfloat16()
    length = ({0: Dim("length", min=2, max=64)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=length)
    expect = {"linear_int4" if group == 32 else "linear_int8": 1, "missed": 0}
    rewritten, _ = assert_rewrites(program, target, expect=expect)
    (linear,) = (node for node in rewritten.graph.nodes if "et_cuda_passes" in str(node.target))
    bias = linear.args[3 if group == 32 else 4]
    assert bias is None or bias.meta["val"].shape == (48,)
    if target == "cuda" and form == "addmm [M, N]" and group == 32:
        assert linear.args[8] is not None  # FuseAdd fuses a bias of the shape of the result


class SharedWeight(torch.nn.Module):
    """Two linears with one weight, which is dequantized once or twice, and which ``also`` reads if it is given."""

    def __init__(self, once: bool, also: object = None) -> None:
        super().__init__()
        self.inner, self.once, self.also = Quantized(64, 64), once, also

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner.weight()
        second = first if self.once else self.inner.weight()
        y = F.linear(torch.relu(F.linear(x, first)), second)
        return y if self.also is None else y + self.also(first)  # type: ignore[operator]


@pytest.mark.parametrize("once", [True, False])
def test_shared_weight_is_packed_once(once: bool) -> None:
    model, x = SharedWeight(once), torch.randn(3, 64).bfloat16()
    program = torch.export.export(model, (x,))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 2})
    assert sorted(name for name in rewritten.state_dict if "data" in name) == [
        "inner.data.packed",
        "inner.data.scale_and_zero",
    ]
    wanted = model(x)
    assert (rewritten.module()(x) - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("once", [True, False])
def test_shared_weight_stays_for_readers_that_are_not_linears(once: bool) -> None:
    model, x = SharedWeight(once, also=lambda w: w.sum()), torch.randn(3, 64).bfloat16()
    rewritten, report = ecp.rewrite(torch.export.export(model, (x,)), "cuda", [ecp.LinearInt4()])
    assert report.counts() == {"rewritten": 2, "kept": 0, "missed": 1, "linear_int4": 2}
    (other,) = (outcome for outcome in report.outcomes if outcome.status == "missed")
    assert other.op == "aten.sum"
    assert "no pass for target cuda rewrites aten.sum" in str(other.reasons[0])
    wanted = model(x)
    assert (rewritten.module()(x) - wanted).norm() / wanted.norm() < 1e-2


class TwoScales(torch.nn.Module):
    """Two linears with the same integers and different scales."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Quantized(64, 64)
        self.register_buffer("other", self.inner.scale * 3)

    def forward(self, x: Tensor) -> Tensor:
        first, scale = self.inner.weight(), self.inner.scale
        self.inner.scale = self.other
        second = self.inner.weight()
        self.inner.scale = scale
        return F.linear(F.linear(x, first), second)


def test_integers_with_two_scales_are_packed_once() -> None:
    model, x = TwoScales(), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        wanted = model(x)
        program = torch.export.export(model, (x,))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 2})
    names = sorted(name for name in rewritten.state_dict if "inner" in name and "bias" not in name)
    assert names == ["inner.data.packed", "inner.data.scale_and_zero", "inner.data.scale_and_zero_2"]
    assert (rewritten.module()(x) - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_activation_quantization_is_kept_by_default(view: bool, target: str) -> None:
    """Both programs quantize the same activations, so the results differ only by the rounding to bf16."""
    rewritten, report = assert_rewrites(
        export_with_rows(EightBitActivations(view), 2, 3, 64), target, expect={"linear_int4": 1}
    )
    assert torch.ops.torchao.quantize_affine.default in [node.target for node in rewritten.graph.nodes]
    assert "dropped" not in report.outcomes[0].detail


@pytest.mark.parametrize("view", [False, True])
def test_activation_quantization_is_dropped_by_option(view: bool) -> None:
    model, x = EightBitActivations(view), torch.randn(2, 3, 64).bfloat16()
    program = torch.export.export(model, (x,))
    rule = ecp.LinearInt4(drop_activation_quantization=True)
    rewritten, report = ecp.rewrite(program, "cuda", [rule], expect={"linear_int4": 1, "missed": 0})
    assert report.outcomes[0].detail.endswith("activation quantization dropped")
    called = [node.target for node in rewritten.graph.nodes if node.op == "call_function"]
    assert not any("torchao" in str(target) for target in called)
    given, inner = rewritten.module()(x), model.inner
    wanted = F.linear(x.view(-1, 64) if view else x, inner.weight(), inner.bias)
    assert (given - wanted).norm() / wanted.norm() < 6e-3
    # The option changes the numbers, by the rounding of the activations.
    assert (given - model(x)).norm() / wanted.norm() > 2e-3


def test_activation_quantization_with_a_scale_of_another_tensor_is_not_dropped() -> None:
    rule = ecp.LinearInt4(drop_activation_quantization=True)
    program = export_with_rows(EightBitActivations(other_scale=True), 2, 64)
    assert_misses(program, "whose scale is chosen from another tensor", passes=[rule])


def test_activation_quantization_that_changes_the_dtype_is_not_dropped() -> None:
    rule = ecp.LinearInt4(drop_activation_quantization=True)
    program = export_with_rows(EightBitActivations(dtype=torch.bfloat16), 2, 64, dtype=torch.float32)
    reason = "quantization can be dropped, found torch.float32 quantized and dequantized to torch.bfloat16"
    assert_misses(program, reason, passes=[rule])


def test_option_to_drop_activation_quantization_accepts_other_linears() -> None:
    rule = ecp.LinearInt4(drop_activation_quantization=True)
    assert_rewrites(export_with_rows(Quantized(16, 64), 2, 64), passes=[rule], expect={"linear_int4": 1})


class LoraLinear(nn.Module):
    """base(x) + up(down(x)) * scale, with a quantized base and two small linears that are not quantized."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(in_features, out_features)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
def test_lora_base_is_packed_and_adapters_are_untouched(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LoraLinear(64, 128, 8), nn.SiLU(), LoraLinear(128, 64, 4)).bfloat16().eval()
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, config, filter_fn=lambda module, fqn: fqn.endswith("base"))
    x = torch.randn(2, 5, 64).bfloat16()
    program = torch.export.export(model, (x,))
    rewritten, report = ecp.rewrite(program, target, expect={"linear_int4": 2, "missed": 0, "kept": 0})
    names = set(rewritten.state_dict)
    for number in (0, 2):
        assert f"{number}.base.weight.packed" in names
        for adapter in ("down", "up"):
            name = f"{number}.{adapter}.weight"
            assert torch.equal(rewritten.state_dict[name], program.state_dict[name])
    floats = [node for node in rewritten.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(floats) == 4
    assert {outcome.fqn for outcome in report.outcomes} == {"0.base.weight", "2.base.weight"}
    wanted = model(x).double()
    off = (rewritten.module()(x).double() - wanted).norm() / wanted.norm()
    assert off.item() < 8e-3


# LinearInt8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (13, 48), (48, 64), (40, 1008)])
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-127, 127), (-64, 63), (-16, 15)])
def test_per_axis_outputs_on_cpu_agree_with_fp64(n: int, k: int, low: int, high: int, dtype: torch.dtype) -> None:
    model = Quantized(n, k, k, low, high, dtype, form=no_bias)
    program = export_with_rows(model, 3, k, dtype=dtype)
    rewritten, report = ecp.rewrite(program, "cpu", expect={"linear_int8": 1, "missed": 0})
    bits = (high - low).bit_length()
    # In float16 and float32 the kernel is scalar code.
    kernel = "int8pack_cpu" if dtype is torch.bfloat16 else "plain operators"
    assert report.outcomes[0].detail == f"int{bits} per-axis -> {kernel}"
    (x,) = program.example_inputs[0]
    rows, weight = x.double().numpy(), exact_weight(model)
    wanted = rows @ weight.T
    # One rounding of the result, and sums in fp32.
    allowed = np.abs(wanted) * DTYPES[dtype] + np.abs(rows) @ np.abs(weight).T * 1e-5
    assert bool((np.abs(rewritten.module()(x).double().numpy() - wanted) <= allowed).all())


@pytest.mark.parametrize("storage", [torch.uint8, torch.int16])
def test_unsigned_integers_around_128_are_symmetric(storage: torch.dtype) -> None:
    model = Quantized(16, 48, 48, 0, 255, storage=storage)
    model.zero_point.fill_(128)
    rewritten, _ = assert_rewrites(export_with_rows(model, 3, 48), "cpu", expect={"linear_int8": 1}, rtol=6e-3)
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.dtype is torch.int8
    assert torch.equal(packed.int(), model.data.int() - 128)
    assert not any(name.endswith(".zero") for name in rewritten.state_dict)


def test_int4_weight_without_int4_tiles_is_packed_by_row_or_as_int8() -> None:
    """K = 48 has no int4 tiles, and an odd K no whole bytes; int8 holds 4 bits exactly."""
    for k, detail in ((48, "plain operators (by_row)"), (45, "plain operators")):
        program = export_with_rows(Quantized(16, k, k), 3, k)
        _, report = assert_rewrites(program, "cpu", expect={"rewritten": 1}, rtol=6e-3)
        assert report.outcomes[0].detail == f"int4 per-axis -> {detail}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group"), [(1, 64, 32), (13, 48, 8), (40, 512, 128), (24, 10, 10)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("zero_points", ["random", "zero"])
def test_plain_int4_outputs_on_cpu_agree_with_fp64(
    n: int, k: int, group: int, rows: int, zero_points: str, dtype: torch.dtype
) -> None:
    model = Quantized(n, k, group, dtype=dtype, zero_points=zero_points, form=no_bias)
    program = export_with_rows(model, rows, k, dtype=dtype)
    passes = [ecp.LinearInt4(kernel="plain operators")]
    rewritten, report = ecp.rewrite(program, "cpu", passes, expect={"linear_int4": 1, "missed": 0})
    assert report.outcomes[0].detail.endswith("-> plain operators (by_row)")
    planes = [value for name, value in rewritten.state_dict.items() if name.endswith(".scale_and_zero")]
    assert [tuple(each.shape) for each in planes] == [(1 + (zero_points == "random"), n, k // group)]
    (x,) = program.example_inputs[0]
    values, weight = x.double().numpy(), exact_weight(model)
    wanted = values @ weight.T
    # One rounding of the result, sums in fp32, and with zeros and several rows roundings of the zero and the weight.
    step = model.scale.double().numpy().repeat(group, axis=1) * (16 if zero_points == "random" else 0)
    inexact = np.abs(weight) + step
    allowed = np.abs(wanted) * DTYPES[dtype] + np.abs(values) @ inexact.T * (DTYPES[dtype] + 1e-5)
    assert bool((np.abs(rewritten.module()(x).double().numpy() - wanted) <= allowed).all())


@pytest.mark.parametrize("group", [32, 64, 96, 192])
@pytest.mark.parametrize("zero_points", ["random", "zero", None])
@pytest.mark.parametrize(("low", "high", "storage"), [(-128, 127, torch.int8), (0, 255, torch.uint8)])
def test_int8_operator_holds_groups_and_zero_points_exactly(
    group: int, zero_points: str | None, low: int, high: int, storage: torch.dtype
) -> None:
    """With fp32 scales and zeros only the sums are rounded."""
    model = Quantized(8, 2 * group, group, low, high, torch.float32, None, zero_points, no_bias, storage)
    rewritten, _ = ecp.rewrite(
        export_with_rows(model, 2 * group, 2 * group, dtype=torch.float32), GENERAL, expect={"linear_int8": 1}
    )
    weight = rewritten.module()(torch.eye(2 * group)).T
    np.testing.assert_allclose(weight.double().numpy(), exact_weight(model), rtol=1e-5, atol=1e-6)
    (scale,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".scale"))
    assert scale.shape == (8, 2 * group // {32: 32, 64: 64, 96: 32, 192: 64}[group])
    assert any(name.endswith(".zero") for name in rewritten.state_dict) == (zero_points == "random" or low == 0)


CONFIGS = {
    "group 32": (
        IntxWeightOnlyConfig(torch.int8, PerGroup(32)),
        "found group size 32; int8pack_cpu has one scale per row: quantize with PerAxis(0)",
    ),
    "asymmetric": (
        IntxWeightOnlyConfig(torch.int8, PerAxis(0), mapping_type=MappingType.ASYMMETRIC),
        "found others; int8pack_cpu is symmetric: quantize with mapping_type=MappingType.SYMMETRIC",
    ),
}


@pytest.mark.parametrize("scheme", CONFIGS)
def test_cpu_kernel_named_by_option_rejects_groups_and_asymmetric_weights(scheme: str) -> None:
    config, reason = CONFIGS[scheme]
    model = torch.nn.Sequential(torch.nn.Linear(64, 16)).bfloat16().eval()
    quantize_(model, config)
    passes = [ecp.LinearInt8(kernel="int8pack_cpu")]
    assert_misses(export_with_rows(model, 2, 64), reason, "cpu", rule="linear_int8", passes=passes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "group"), [(64, 64), (40, 40), (64, 16), (192, 96), (512, 512)])
@pytest.mark.parametrize("zero_points", ["random", "zero", None])
@pytest.mark.parametrize("rows", [1, 3])
def test_groups_and_zero_points_on_cpu_agree_with_fp64(
    k: int, group: int, zero_points: str | None, rows: int, dtype: torch.dtype
) -> None:
    model = Quantized(13, k, group, -128, 127, dtype, None, zero_points, no_bias)
    program = export_with_rows(model, rows, k, dtype=dtype)
    rewritten, report = ecp.rewrite(program, "cpu", expect={"linear_int8": 1, "missed": 0})
    kernel = group == k and k % 16 == 0 and zero_points != "random" and dtype is torch.bfloat16
    assert report.outcomes[0].kernel == ("int8pack_cpu" if kernel else "plain operators")
    (x,) = program.example_inputs[0]
    inputs, weight = x.double().numpy(), exact_weight(model)
    points = 255 * model.scale.double().numpy().repeat(group, axis=1)
    wanted, got = inputs @ weight.T, rewritten.module()(x).double().numpy()
    # The result is rounded once; with several rows each weight is too. Sums and zeros are fp32.
    rounded = np.abs(weight) * DTYPES[dtype] if rows > 1 else 0
    allowed = np.abs(inputs) @ (rounded + points * 1e-5).T + np.abs(wanted) * DTYPES[dtype]
    assert bool((np.abs(got - wanted) <= allowed).all())


def test_casting_rule_prefers_the_kernel_to_plain_operators() -> None:
    program = export_with_rows(Quantized(16, 64, 64, -128, 127, torch.float32), 2, 64, dtype=torch.float32)
    _, report = ecp.rewrite(program, "cpu", [ecp.LinearInt8(cast_to_bf16=True)])
    assert report.outcomes[0].detail == "int8 per-axis -> int8pack_cpu, computed in bf16"


def test_weight_fits_8_bits_rejects_wider_weight() -> None:
    wide = Quantized(16, 64, 64, -1000, 1000, storage=torch.int16)
    assert_misses(
        export_with_rows(wide, 2, 64), "at most 8 bits, found 11 bits, -1000..1000", "cpu", rule="linear_int8"
    )


@pytest.mark.parametrize(("target", "kernel"), [("cpu", "int8pack_cpu"), ("cuda", None)])
def test_int8_kernel_rejects_k_that_its_tiles_do_not_divide(target: str, kernel: str | None) -> None:
    """The kernel would write past its result."""
    odd, passes = Quantized(16, 40, 40, -128, 127), [ecp.LinearInt8(kernel)]
    assert_misses(export_with_rows(odd, 2, 40), "found K = 40; K must be a multiple of 16", target, passes=passes)


def test_int8_kernel_rejects_dtype_that_it_lacks() -> None:
    half = export_with_rows(Quantized(16, 64, 64, -128, 127, torch.float16), 2, 64, dtype=torch.float16)
    assert_misses(half, "found float16; general has bfloat16, float32", GENERAL, rule="linear_int8")
    single = export_with_rows(Quantized(16, 64, 64, -128, 127, torch.float32), 2, 64, dtype=torch.float32)
    assert_misses(single, "found float32; triton has bfloat16, float16", "cuda", rule="linear_int8")


def test_linear_int8_rejects_infinite_scale() -> None:
    infinite = Quantized(16, 64, 64, -128, 127, scale_dtype=torch.float32)
    infinite.scale[3] = 3.4e38
    assert_misses(export_with_rows(infinite, 2, 64), "found 1 that are NaN or infinite", "cpu", rule="linear_int8")


def test_linear_int8_rejects_integer_outside_its_range() -> None:
    outside = Quantized(16, 64, 64, -64, 63)
    outside.data[0, 0] = 64
    assert_misses(
        export_with_rows(outside, 2, 64), "found integers -64..64 for a range of -64..63", "cpu", rule="linear_int8"
    )


def test_target_has_int8_kernel_rejects_metal() -> None:
    integers = export_with_rows(Quantized(16, 64, 64, -128, 127), 2, 64)
    assert_misses(integers, "metal, which has no int8 kernel", "metal", passes=[ecp.LinearInt8()])
    assert_misses(integers, "found 8 bits, -128..127; quantize with weight_dtype=torch.int4", "metal")


@pytest.mark.parametrize(
    ("target", "name", "known"), [("cpu", "marlin", "int8pack_cpu"), ("cuda", "int8pack_cpu", "triton")]
)
def test_linear_int8_rejects_unknown_kernel(target: str, name: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"target {target} has no int8 kernel '{name}'; it has: {known}"):
        ecp.rewrite(export_with_rows(Quantized(16, 64), 2, 64), target, [ecp.LinearInt8(kernel=name)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("k", "group"), [(48, 48), (64, 16), (192, 96), (256, 128), (256, 256), (1536, 768), (272, 16)]
)
@pytest.mark.parametrize("zero_points", ["random", None])
def test_groups_and_zero_points_on_cuda_agree_with_fp64(
    k: int, group: int, zero_points: str | None, dtype: torch.dtype
) -> None:
    model = Quantized(13, k, group, -128, 127, dtype, None, zero_points, no_bias)
    program = export_with_rows(model, 3, k, dtype=dtype)
    rewritten, report = ecp.rewrite(program, "cuda", expect={"linear_int8": 1, "missed": 0})
    assert report.outcomes[0].detail.endswith("-> triton")
    (x,) = program.example_inputs[0]
    rows, weight, points = (
        x.double().numpy(),
        exact_weight(model),
        255 * model.scale.double().numpy().repeat(group, axis=1),
    )
    wanted, got = rows @ weight.T, rewritten.module()(x).double().numpy()
    # Each weight is rounded once, and the result; sums and zeros are fp32.
    allowed = np.abs(rows) @ (np.abs(weight) * DTYPES[dtype] + points * 1e-5).T + np.abs(wanted) * DTYPES[dtype]
    assert bool((np.abs(got - wanted) <= allowed).all())
    assert torch.equal(rewritten.module()(x), rewritten.module()(x))
    (scale,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".scale"))
    native = group if group == k else max(size for size in (16, 32, 64, 128, 256) if group % size == 0)
    assert tuple(scale.shape) == (13, k // native)
    zeros = [value.dtype for name, value in rewritten.state_dict.items() if name.endswith(".zero")]
    assert zeros == ([torch.float32] if zero_points else [])


def test_triton_int8_kernel_rejects_groups_of_8() -> None:
    program = export_with_rows(Quantized(16, 64, 8, -128, 127), 2, 64)
    found = "found group size 8; triton has 16, 32, 64, 128, 256 and their multiples"
    assert_misses(program, found, "cuda", rule="linear_int8")


def test_explanation_of_int8_linear_names_its_tilings() -> None:
    _, report = ecp.rewrite(export_with_rows(Quantized(512, 256, 64, -128, 127), 3, 256), "cuda")
    assert report.outcomes[0].explanation.startswith("tilings on sm_90 for 512 x 256, group size 64: M = 3: 8x")


def test_views_of_decomposed_int8_linear_are_removed() -> None:
    table = torch.export.default_decompositions()
    table.pop(torch.ops.torchao.dequantize_affine.default, None)
    program = export_with_rows(Quantized(16, 64, 64, -128, 127), 2, 3, 64).run_decompositions(table)
    rewritten, _ = assert_rewrites(program, "cpu", expect={"linear_int8": 1, "remove_linear_views": 1})
    assert [node.target for node in rewritten.graph.nodes if node.op == "call_function"] == [INT8_LINEAR]


# ConvInt4 and ConvInt8 ------------------------------------------------------------------------------------------------


def conv(config: Any = INT4, kernel: int = 1, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """A convolution of 64 channels to 20 in two dimensions, as torchao quantizes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 20, kernel, **options)).to(dtype).eval()
    quantize_(model, config, filter_fn=lambda module, name: name == "0")
    return model


class Convolution(nn.Module):
    """A quantized convolution of 1, 2 or 3 dimensions; the configurations of torchao support at most 2."""

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


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
@pytest.mark.parametrize("rank", CONVS)
@pytest.mark.parametrize("batch", [None, 2])
def test_conv_int4_agrees_with_fp64_in_every_rank(rank: int, batch: int | None, target: str) -> None:
    model, x = Convolution(rank), image(rank, batch)
    rewritten, report = assert_rewrites(torch.export.export(model, (x,)), target, expect={"conv_int4": 1, "missed": 0})
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
def test_conv_int8_is_rewritten_on_cpu_as_written_and_decomposed(dtype: torch.dtype, decompose: bool) -> None:
    program = torch.export.export(conv(INT8, dtype=dtype), (image(2, dtype=dtype),))
    if decompose:
        table = torch.export.default_decompositions()
        table.pop(torch.ops.torchao.dequantize_affine.default, None)
        program = program.run_decompositions(table)
        assert "aten.convolution" in [op_name(node.target) for node in program.graph.nodes]
    rtol, kernel = (6e-3, "int8pack_cpu") if dtype is torch.bfloat16 else (1e-6, "plain operators")
    _, report = assert_rewrites(program, "cpu", expect={"conv_int8": 1, "missed": 0}, rtol=rtol)
    assert report.outcomes[0].detail == f"int8 per-axis -> {kernel}"


def test_convolution_of_dynamic_size_can_be_viewed() -> None:
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


def test_convolution_keeps_memory_format_of_output() -> None:
    model, x = conv(), image(2).to(memory_format=torch.channels_last)
    program = torch.export.export(model, (x,))
    rewritten, _ = assert_rewrites(program, "cpu", expect={"conv_int4": 1})
    assert rewritten.module()(x).stride() == model(x).stride() == (20 * 15, 1, 3 * 20, 20)
    assert "aten.clone" not in [op_name(n.target) for n in rewritten.graph.nodes if n.op == "call_function"]


def test_convolution_is_plain_accepts_dilation_of_one_element() -> None:
    assert_rewrites(torch.export.export(conv(dilation=3, padding="same"), (image(2),)), "cuda", expect={"conv_int4": 1})


OTHER_CONVOLUTIONS = {
    "kernel 3": (lambda: conv(kernel=3), "wanted kernels of size 1, found kernels of 3 x 3"),
    "stride": (lambda: conv(stride=2), "found stride [2, 2]"),
    "padding": (lambda: conv(padding=1), "found padding [1, 1]"),
    "groups": (lambda: conv(groups=2), "found groups 2"),
}


@pytest.mark.parametrize("case", OTHER_CONVOLUTIONS)
def test_convolution_that_is_not_a_linear_is_missed(case: str) -> None:
    make, reason = OTHER_CONVOLUTIONS[case]
    for target in ("cuda", "cpu"):
        report = assert_misses(torch.export.export(make(), (image(2),)), reason, target, rule="conv_int4")
        assert "leave this layer unquantized" in str(report)


def test_conv_int8_needs_an_int8_kernel() -> None:
    assert_misses(torch.export.export(conv(INT8), (image(2),)), "found 8 bits, -128..127", "metal", rule="conv_int4")
    assert_rewrites(torch.export.export(conv(INT8), (image(2),)), "cuda", expect={"conv_int8": 1}, rtol=6e-3)


@pytest.mark.parametrize("config", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_xnnpack_folds_every_convolution_exactly(kernel: int, config: Any) -> None:
    model, x = conv(config, kernel, torch.float32).eval(), image(2, dtype=torch.float32)
    ours = ecp.XnnpackPartitioner(expect={"fold_dequantize": 1, "missed": 0})
    buffer = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[ours]).to_executorch().buffer
    found = Runtime.get().load_program(buffer).load_method("forward").execute([x])[0]
    wanted = model(x)
    assert (found - wanted).norm() / wanted.norm() < 1e-5


# All rules together ---------------------------------------------------------------------------------------------------


def test_five_schemes_are_rewritten_in_one_call_and_reported_apart() -> None:
    program = torch.export.export(five_schemes(), (torch.randn(2, 3, 5, 64).bfloat16(),))
    _, report = assert_rewrites(program, "cpu", expect={"missed": 0, "rewritten": 5}, rtol=2e-2)
    found = {outcome.fqn.partition(".")[0]: (outcome.rule, outcome.detail) for outcome in report.outcomes}
    for name, (_, rule, scheme) in SCHEMES.items():
        assert found[name][0] == rule
        assert found[name][1].startswith(scheme)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 5
    assert report.conflicts == []
    for _, rule, scheme in SCHEMES.values():
        assert sum(f"{rule}  {scheme} ->" in line for line in lines) == 1
