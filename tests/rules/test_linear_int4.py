"""linear_int4: options, sharing, and every way to miss, each with its reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.quantized import Quantized


def export(model: torch.nn.Module, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(shape, dtype=dtype),))


def missed(program: torch.export.ExportedProgram, target: str = "cuda", **options: object) -> list[ecp.Reason]:
    given = {"passes": [ecp.LinearInt4()], **options}
    rewritten, report = ecp.rewrite(program, target, **given, expect={"linear_int4": 0, "missed": 1})
    assert [n.target for n in rewritten.graph.nodes] == [n.target for n in program.graph.nodes]
    return report.outcomes[0].reasons


def test_a_dtype_that_the_kernel_lacks_is_missed_and_bf16_is_opt_in() -> None:
    model, x = Quantized(16, 64, dtype=torch.float32), torch.randn(2, 64)
    (reason,) = missed(torch.export.export(model, (x,)))
    assert (reason.wanted, reason.found) == ("activations of a dtype that the kernel has", "float32")
    assert "triton has bfloat16, float16" in reason.hint
    assert "LinearInt4(cast_to_bf16=True)" in reason.hint
    program = torch.export.export(model, (x,))
    rewritten, report = ecp.rewrite(program, "cuda", [ecp.LinearInt4(cast_to_bf16=True)], {"linear_int4": 1})
    got, wanted = rewritten.module()(x), model(x)
    assert got.dtype == torch.float32
    assert (got - wanted).norm() / wanted.norm() < 8e-3
    assert "computed in bf16" in report.outcomes[0].detail


@pytest.mark.parametrize(
    ("model", "wanted", "found", "hint"),
    [
        (Quantized(16, 64, low=-128, high=127), "a weight of at most 4 bits", "8 bits, -128..127", "torch.int4"),
        (Quantized(16, 64, low=-16, high=15), "a weight of at most 4 bits", "5 bits, -16..15", "torch.int4"),
        (Quantized(16, 96, group=16), "a group size that the kernel has", "group size 16", "PerGroup(32)"),
        (Quantized(16, 96, group=48), "a group size that the kernel has", "group size 48", "PerGroup(32)"),
        (
            Quantized(16, 384, group=24),
            "a group size that the kernel has",
            "group size 24",
            "PerGroup(32)",
        ),
        # 128 lies nearest, and does not divide 448.
        (
            Quantized(16, 448, group=112),
            "a group size that the kernel has",
            "group size 112",
            "PerGroup(64)",
        ),
    ],
)
def test_schemes_that_no_kernel_has(model: Quantized, wanted: str, found: str, hint: str) -> None:
    (reason,) = missed(export(model, 2, model.data.shape[1]))
    assert (reason.rule, reason.stage, reason.wanted, reason.found) == ("linear_int4", "metadata", wanted, found)
    assert hint in reason.hint


def test_all_that_is_wrong_is_said_at_once() -> None:
    reasons = missed(
        export(Quantized(16, 80, group=16, low=-128, high=127, dtype=torch.float32), 2, 80, dtype=torch.float32)
    )
    assert [reason.found for reason in reasons] == ["8 bits, -128..127", "group size 16", "K = 80", "float32"]


@pytest.mark.parametrize("block", [[16, 64], [4, 32], [2, 64]])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_a_scale_for_several_rows_is_repeated_for_each(block: list[int], target: str) -> None:
    model = Quantized(16, 64, zero_points=None)
    scales = torch.rand(16 // block[0], 64 // block[1]).bfloat16()
    model.block, model.scale = block, scales
    assert_rewrites(export(model, 2, 64), target, expect={"linear_int4": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(value: float) -> None:
    model = Quantized(16, 64)
    model.scale[3, 1] = value
    (reason,) = missed(export(model, 2, 64))
    assert reason.stage == "values"
    assert "NaN or infinite" in reason.found


def test_a_scale_that_overflows_the_kernels_dtype() -> None:
    model = Quantized(16, 64, scale_dtype=torch.float32, zero_points="random")
    model.scale[0, 0] = 3.4e38
    (reason,) = missed(export(model, 2, 64))
    assert reason.found == "2 that are NaN or infinite" or reason.found == "1 that are NaN or infinite"


def test_integers_outside_the_range_they_claim() -> None:
    model = Quantized(16, 64)
    model.data[5, 5] = 9
    (reason,) = missed(export(model, 2, 64))
    assert reason.found == "integers -8..9 for a range of -8..7"


def test_an_unknown_kernel_is_a_mistake_in_the_call() -> None:
    with pytest.raises(ValueError, match="target cuda has no int4 kernel 'marlin'; it has: triton, tinygemm"):
        ecp.rewrite(export(Quantized(16, 64), 2, 64), "cuda", [ecp.LinearInt4(kernel="marlin")])


def test_the_rule_on_a_target_without_int4_kernels() -> None:
    reasons = missed(export(Quantized(16, 64), 2, 64), "xnnpack", passes=[ecp.LinearInt4()])
    assert "target xnnpack, which has no int4 kernel" in [reason.found for reason in reasons]


class Shared(torch.nn.Module):
    """One weight read by two linears, through one dequantize or two, and by something else if ``also`` is given."""

    def __init__(self, once: bool, also: object = None) -> None:
        super().__init__()
        self.inner, self.once, self.also = Quantized(64, 64), once, also

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner.weight()
        second = first if self.once else self.inner.weight()
        y = F.linear(torch.relu(F.linear(x, first)), second)
        return y if self.also is None else y + self.also(first)  # type: ignore[operator]


@pytest.mark.parametrize("once", [True, False])
def test_a_shared_weight_is_packed_once(once: bool) -> None:
    model, x = Shared(once), torch.randn(3, 64).bfloat16()
    program = torch.export.export(model, (x,))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 2})
    assert sorted(name for name in rewritten.state_dict if "data" in name) == [
        "inner.data.packed",
        "inner.data.scale_and_zero",
    ]
    wanted = model(x)
    assert (rewritten.module()(x) - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("once", [True, False])
def test_a_weight_that_something_else_reads_too_stays_for_it(once: bool) -> None:
    model, x = Shared(once, also=lambda w: w.sum()), torch.randn(3, 64).bfloat16()
    rewritten, report = ecp.rewrite(torch.export.export(model, (x,)), "cuda", [ecp.LinearInt4()])
    assert report.counts() == {"rewritten": 2, "kept": 0, "missed": 1, "linear_int4": 2}
    (other,) = (outcome for outcome in report.outcomes if outcome.status == "missed")
    assert other.op == "aten.sum"
    assert "no pass for target cuda rewrites aten.sum" in str(other.reasons[0])
    wanted = model(x)
    assert (rewritten.module()(x) - wanted).norm() / wanted.norm() < 1e-2


class TwoScales(torch.nn.Module):
    """The same integers read with two scales."""

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


def test_one_tensor_of_integers_with_two_scales_is_packed_once_and_scaled_twice() -> None:
    model, x = TwoScales(), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        wanted = model(x)
        program = torch.export.export(model, (x,))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 2})
    names = sorted(name for name in rewritten.state_dict if "inner" in name and "bias" not in name)
    assert names == ["inner.data.packed", "inner.data.scale_and_zero", "inner.data.scale_and_zero_2"]
    assert (rewritten.module()(x) - wanted).norm() / wanted.norm() < 1e-2


class EightBitActivations(torch.nn.Module):
    """An int4 linear over activations quantized on the fly, and a view between them if ``view`` is set."""

    def __init__(self, view: bool = False, other_scale: bool = False) -> None:
        super().__init__()
        self.inner, self.view, self.other_scale = Quantized(48, 64), view, other_scale

    def forward(self, x: Tensor) -> Tensor:
        block, torchao = [1] * (x.dim() - 1) + [64], torch.ops.torchao
        scale, zero = torchao.choose_qparams_affine(
            x + 1 if self.other_scale else x, "ASYMMETRIC", block, torch.int8, -128, 127, None, x.dtype, torch.int8
        )
        q = torchao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
        x = torchao.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127, x.dtype)
        return F.linear(x.view(-1, 64) if self.view else x, self.inner.weight(), self.inner.bias)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_the_quantization_of_activations_is_kept_exact(view: bool, target: str) -> None:
    """Both sides quantize the same activations: what differs is bf16's rounding, and not by a step of 8 bits."""
    rewritten, report = assert_rewrites(export(EightBitActivations(view), 2, 3, 64), target, expect={"linear_int4": 1})
    assert torch.ops.torchao.quantize_affine.default in [node.target for node in rewritten.graph.nodes]
    assert "dropped" not in report.outcomes[0].detail


@pytest.mark.parametrize("view", [False, True])
def test_the_quantization_of_activations_is_dropped_by_name(view: bool) -> None:
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
    # Not what the graph said before: the option changes the numbers, by the activations' own rounding.
    assert (given - model(x)).norm() / wanted.norm() > 2e-3


def test_activations_quantized_with_a_scale_from_elsewhere_are_not_dropped() -> None:
    rule = ecp.LinearInt4(drop_activation_quantization=True)
    program = export(EightBitActivations(other_scale=True), 2, 64)
    assert_misses(program, "whose scale is chosen from another tensor", passes=[rule])


def test_the_option_leaves_other_linears_as_without_it() -> None:
    rule = ecp.LinearInt4(drop_activation_quantization=True)
    assert_rewrites(export(Quantized(16, 64), 2, 64), passes=[rule], expect={"linear_int4": 1})
