"""The rules for XNNPACK: where each applies, and the reason where it does not."""

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
import torchao.quantization.quant_primitives  # noqa: F401  (registers the operators)
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.rules.xnnpack import SplitBroadcastBias
from et_cuda_passes.rules.xnnpack_activations import QuantizeActivation, ShareActivation
from et_cuda_passes.rules.xnnpack_operators import ExpandTanhGelu, LargestAlone
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.rules.xnnpack_models import (
    BF16,
    FP32,
    IN,
    INT8,
    OUT,
    ROWS,
    UINT8,
    CalibratedConvolution,
    Decomposed,
    Dynamic,
    InBranch,
    Siblings,
    WeightOnly,
)
from tests.xnnpack import Stock, error, example, lowered, output

ao = torch.ops.torchao


def exported(model: nn.Module, *shape: int, dtype: torch.dtype = FP32) -> ExportedProgram:
    return torch.export.export(model.eval(), (example(*(shape or (ROWS, IN)), dtype=dtype),))


def assert_kept(program: ExportedProgram, rule: Any, summary: str) -> None:
    """``rule`` keeps the one candidate, says why, and changes nothing."""
    after, report = ecp.rewrite(program, "xnnpack", [rule], expect={rule.name: 1, "kept": 1, "missed": 0})
    (outcome,) = report.outcomes
    assert (outcome.rule, outcome.detail) == (rule.name, summary)
    assert "XNNPACK has its own kernel" in str(outcome.reasons[0])
    assert str(after.graph) == str(program.graph)


# KeepDynamicInt4 and KeepDynamicInt8.


INT4_FORM: dict[str, Any] = {}
INT8_FORM: dict[str, Any] = {"low": -128, "high": 127, "group": IN}
INT4_RULE, INT8_RULE = ecp.KeepDynamicInt4(), ecp.KeepDynamicInt8()
BOTH = pytest.mark.parametrize(("rule", "form"), [(INT4_RULE, INT4_FORM), (INT8_RULE, INT8_FORM)], ids=["int4", "int8"])


@pytest.mark.parametrize("shape", [(ROWS, IN), (2, ROWS, IN)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, torch.float16])
@pytest.mark.parametrize("bias", ["constant", "none"])
def test_dynamic_int4_linear_is_kept(bias: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    program = exported(Dynamic(bias=bias, dtype=dtype), *shape, dtype=dtype)
    assert_kept(program, INT4_RULE, "8-bit dynamic activation, int4 group 32")


@pytest.mark.parametrize("dtype", [FP32, torch.float16])
def test_dynamic_int8_linear_is_kept(dtype: torch.dtype) -> None:
    program = exported(Dynamic(**INT8_FORM, dtype=dtype), dtype=dtype)
    assert_kept(program, INT8_RULE, "8-bit dynamic activation, int8 per-axis")


def test_bf16_int4_linear_is_kept_with_the_option_alone() -> None:
    program = exported(Dynamic(dtype=BF16), dtype=BF16)
    assert_kept(program, ecp.KeepDynamicInt4(bf16=True), "8-bit dynamic activation, int4 group 32")
    reason = "wanted activations in float32 or float16, found bfloat16; export in float32, or lower with enable_bf16"
    assert_misses(program, reason, "xnnpack", passes=[INT4_RULE])


def test_bf16_int8_linear_is_missed() -> None:
    reason = "wanted activations in float32 or float16, found bfloat16; export in float32"
    program = exported(Dynamic(**INT8_FORM, dtype=BF16), dtype=BF16)
    assert_misses(program, reason, "xnnpack", passes=[INT8_RULE])


PER_TOKEN = "wanted activations quantized per token, asymmetric, in -128..127, found "
NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "4-bit activations": ({"activation": {"low": -8, "high": 7}}, PER_TOKEN + "ASYMMETRIC, -8..7"),
    "symmetric activations": ({"activation": {"mapping": "SYMMETRIC"}}, PER_TOKEN + "SYMMETRIC, -128..127"),
    "large eps": ({"activation": {"eps": 1e-3}}, PER_TOKEN + "ASYMMETRIC, -128..127, blocks of [1, 64], eps 0.001"),
    "reader of the quantized activation": (
        {"reader": "integers"},
        "wanted quantized activations that only quantized linears read, found sum_1, which reads quantize_affine too",
    ),
    "reader of the dequantized activation": (
        {"reader": "dequantized"},
        "found sum_1, which reads the dequantized activation too",
    ),
    "computed bias": ({"bias": "computed"}, "wanted no bias, or a constant one, found mul, which the program computes"),
    "uint8 storage": ({"storage": UINT8}, "found torch.uint8 storage"),
    "no zero points": ({"zero_point": None}, "found no zero point tensor"),
    "scale of two rows": ({"rows": 2}, "found one scale for 2 rows"),
    "second scale": (
        {"reader": "weight"},
        "wanted one scale and one zero point for these integers, found dequantize_affine_2, which dequantizes",
    ),
    "scales inside a larger tensor": (
        {"within": True},
        "wanted integers and scales that own their memory, found b_scale, a view into a larger tensor",
    ),
    "zero points": ({"zero_point": 3}, "wanted zero points that are all 0, found 1 that are not"),
    "scale 0": ({"scale": 0.0}, "wanted scales that are positive, finite and normal, found 1 that are not"),
    "infinite scale": ({"scale": float("inf")}, "wanted scales that are positive, finite and normal, found 1"),
    "scale that is infinite in bfloat16": (
        {"scale": 3.4e38},
        "wanted scales that are positive, finite and normal, found 1",
    ),
    "NaN scale": ({"scale": float("nan")}, "wanted scales that are positive, finite and normal, found 1"),
    "subnormal scale": ({"scale": 1e-39}, "wanted scales that are positive, finite and normal, found 1"),
}


@BOTH
@pytest.mark.parametrize("case", NEAR_MISSES)
def test_dynamic_linear_is_missed_with_the_reason(case: str, rule: Any, form: dict[str, Any]) -> None:
    options, reason = NEAR_MISSES[case]
    if options.get("storage") is UINT8:
        form = {**form, "low": 0, "high": 15 if rule is INT4_RULE else 255}
    assert_misses(exported(Dynamic(**{**form, **options})), reason, "xnnpack", rule.name, [rule])


@BOTH
def test_linear_of_a_vector_is_missed(rule: Any, form: dict[str, Any]) -> None:
    reason = "wanted activations of two dimensions or more, found 1 dimension; unsqueeze the input"
    assert_misses(exported(Dynamic(**form), IN), reason, "xnnpack", passes=[rule])


@BOTH
def test_linear_under_autocast_is_missed(rule: Any, form: dict[str, Any]) -> None:
    class Autocast(Dynamic):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return super().forward(x)

    reason = "wanted activations, bias and result of one dtype, found float32, float32 for a result in bfloat16"
    assert_misses(exported(Autocast(**form)), reason, "xnnpack", passes=[rule])


@BOTH
def test_linear_without_data_is_missed(rule: Any, form: dict[str, Any]) -> None:
    program = torch.export.export(Dynamic(**form).to("meta"), (torch.empty(ROWS, IN, device="meta"),))
    reason = "wanted a constant weight that holds data, found meta or fake tensors"
    assert_misses(program, reason, "xnnpack", passes=[rule])


@BOTH
def test_dynamic_linear_in_control_flow_is_missed(rule: Any, form: dict[str, Any]) -> None:
    reason = "wanted a place outside control flow, found true_graph_0"
    assert_misses(exported(InBranch(Dynamic(**form))), reason, "xnnpack", passes=[rule])


INT8_STORAGE = "wanted int8 storage, a zero point tensor, and one float32 scale for each output, found "


@pytest.mark.parametrize(
    ("rule", "form", "reason"),
    [
        (INT4_RULE, {"group": 16}, "multiple of 32, found group size 16, no multiple of 32"),
        (
            INT4_RULE,
            {"low": -4, "high": 3},
            "wanted a 4-bit weight, found -4..3; quantize with",
        ),
        (INT8_RULE, {**INT8_FORM, "group": 32}, INT8_STORAGE + "group size 32, where int8 is per-axis only"),
        (INT8_RULE, {**INT8_FORM, "scale_dtype": BF16}, INT8_STORAGE + "bfloat16 scales, read as float32"),
        (
            INT8_RULE,
            {"group": IN},
            "wanted a weight in int8, not 4-bit, found -8..7; 4 bits are kept by",
        ),
    ],
    ids=["int4 group 16", "int3", "int8 in groups", "int8 with bf16 scales", "int4 per axis"],
)
def test_weight_that_the_kernel_lacks_is_missed(rule: Any, form: dict[str, Any], reason: str) -> None:
    assert_misses(exported(Dynamic(**form)), reason, "xnnpack", rule.name, [rule])


# KeepDynamicPerTensor and KeepStaticInt8.


STATIC_FORM: dict[str, Any] = {"activation": "static"}
TENSOR_FORM: dict[str, Any] = {"activation": "dynamic", "result": ""}
STATIC_RULE, TENSOR_RULE = ecp.KeepStaticInt8(), ecp.KeepDynamicPerTensor()
BOTH_DECOMPOSED = pytest.mark.parametrize(
    ("rule", "form"), [(STATIC_RULE, STATIC_FORM), (TENSOR_RULE, TENSOR_FORM)], ids=["static", "dynamic"]
)


@pytest.mark.parametrize("result", ["quantized", "relu"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_calibrated_linear_is_kept(per_tensor: bool, result: str) -> None:
    program = exported(Decomposed(per_tensor=per_tensor, result=result))
    scheme = "int7 per-tensor" if per_tensor else "int7 per-axis"
    assert_kept(program, STATIC_RULE, f"8-bit calibrated activation, {scheme}")


@pytest.mark.parametrize(("rule", "rows"), [(TENSOR_RULE, 1), (ecp.KeepDynamicPerTensor(per_row=True), ROWS)])
def test_per_tensor_dynamic_linear_is_kept(rule: Any, rows: int) -> None:
    program = exported(Decomposed(**TENSOR_FORM), rows, IN)
    assert_kept(program, rule, "8-bit dynamic activation per tensor, int7 per-axis")


DECOMPOSED_NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "activation range": (
        {"ends": (-127, 127, INT8)},
        "wanted activations in int8, -128..127, found int8, -127..127; quantize with executorch's XNNPACKQuantizer",
    ),
    "activation dtype": ({"ends": (0, 255, UINT8)}, "wanted activations in int8, -128..127, found uint8, 0..255"),
    "storage": (
        {"storage": UINT8},
        "wanted a weight in int8 and activations in float32, found torch.uint8 dequantized to torch.float32",
    ),
    "zero points": ({"zero_point": 5}, "wanted zero points that are all 0, found 1 that are not"),
    "scale 0": ({"scale": 0.0}, "wanted scales that are positive, finite and normal, found 1 that are not"),
    "infinite scale": ({"scale": float("inf")}, "wanted scales that are positive, finite and normal, found 1"),
}


@BOTH_DECOMPOSED
@pytest.mark.parametrize("case", DECOMPOSED_NEAR_MISSES)
def test_decomposed_linear_is_missed_with_the_reason(case: str, rule: Any, form: dict[str, Any]) -> None:
    options, reason = DECOMPOSED_NEAR_MISSES[case]
    assert_misses(exported(Decomposed(**form, **options), 1, IN), reason, "xnnpack", rule.name, [rule])


@BOTH_DECOMPOSED
def test_decomposed_linear_of_bf16_activations_is_missed(rule: Any, form: dict[str, Any]) -> None:
    reason = "found torch.int8 dequantized to torch.float32, activations torch.bfloat16"
    assert_misses(exported(Decomposed(**form), 1, IN, dtype=BF16), reason, "xnnpack", rule.name, [rule])


@BOTH_DECOMPOSED
def test_decomposed_linear_without_data_is_missed(rule: Any, form: dict[str, Any]) -> None:
    program = torch.export.export(Decomposed(**form).to("meta"), (torch.empty(1, IN, device="meta"),))
    assert_misses(program, "found meta or fake tensors", "xnnpack", rule.name, [rule])


@BOTH_DECOMPOSED
def test_decomposed_linear_in_control_flow_is_missed(rule: Any, form: dict[str, Any]) -> None:
    reason = "wanted a place outside control flow, found true_graph_0"
    assert_misses(exported(InBranch(Decomposed(**form)), 1, IN), reason, "xnnpack", rule.name, [rule])


@pytest.mark.parametrize(
    ("options", "found"),
    [({"scale": 0.01, "zero_point": 5}, "0, found 5"), ({"scale": -1.0}, "normal, found 1 that are not")],
    ids=["zero point", "scale"],
)
def test_numbers_of_a_per_tensor_weight_are_checked(options: dict[str, Any], found: str) -> None:
    program = exported(Decomposed(per_tensor=True, **options))
    assert_misses(program, found, "xnnpack", "keep_static_int8", [STATIC_RULE])


@pytest.mark.parametrize(
    ("result", "reader"), [("", "output"), ("read", "sum_1")], ids=["not quantized", "read by a second operator"]
)
def test_result_that_is_not_quantized_is_missed(result: str, reader: str) -> None:
    reason = f"wanted a result that is quantized, found {reader}, which reads the result itself; quantize the"
    assert_misses(exported(Decomposed(result=result)), reason, "xnnpack", "keep_static_int8", [STATIC_RULE])


@pytest.mark.parametrize(
    ("options", "found"),
    [({}, "int7 per-axis"), ({"axis": 1, "groups": 4}, "int7 blocks of 32 x 1 x 1 x 1 and 4 groups")],
    ids=["scales of inputs", "groups"],
)
def test_transposed_convolution_without_a_scale_for_each_output_is_missed(options: dict[str, Any], found: str) -> None:
    groups = options.pop("groups", 1)
    model = CalibratedConvolution(lambda x, *given: F.conv_transpose2d(x, *given, groups=groups), **options)
    reason = f"wanted an int8 weight with one scale for each output, or one for all, found {found}; quantize"
    assert_misses(exported(model, 1, OUT), reason, "xnnpack", passes=[STATIC_RULE])


def test_transposed_convolution_with_a_scale_for_each_output_is_kept() -> None:
    program = exported(CalibratedConvolution(F.conv_transpose2d, axis=1), 1, OUT)
    assert_kept(program, STATIC_RULE, "8-bit calibrated activation, int7 blocks of 32 x 1 x 1 x 1")


def test_integer_beyond_4_bits_is_missed() -> None:
    reason = "wanted integers within the quantized range, found integers -8..100 for a range of -8..7"
    assert_misses(exported(Dynamic(integer=100)), reason, "xnnpack", passes=[INT4_RULE])


def test_per_tensor_dynamic_linear_of_more_rows_is_missed() -> None:
    reason = "wanted activations of one row, found rows 2 x 4; the delegate quantizes each row by itself"
    assert_misses(exported(Decomposed(**TENSOR_FORM), 2, ROWS, IN), reason, "xnnpack", passes=[TENSOR_RULE])


def test_per_tensor_weight_with_dynamic_activations_is_missed() -> None:
    reason = "wanted one scale for each output, found int7 per-tensor; quantize with is_per_channel=True"
    program = exported(Decomposed(**TENSOR_FORM, per_tensor=True), 1, IN)
    assert_misses(program, reason, "xnnpack", passes=[TENSOR_RULE])


# FoldDequantize.


FOLD = [ecp.FoldDequantize()]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dequantize_is_folded_to_its_own_result(dtype: torch.dtype) -> None:
    model = WeightOnly(dtype=dtype)
    program, report = assert_rewrites(exported(model, dtype=dtype), "xnnpack", FOLD, {"fold_dequantize": 1}, rtol=0)
    (outcome,) = report.outcomes
    assert outcome.detail == "int8 group 16 -> float weight"
    dtype_name = str(dtype).removeprefix("torch.")
    assert f"this int8 group 16 weight: folded to {dtype_name}, as large as before" in str(outcome.reasons[0])
    assert "for an 8-bit kernel quantize with Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))" in str(
        outcome.reasons[0]
    )
    assert torch.equal(program.state_dict["q.dequantized"], model.weight())


def test_folded_table_names_the_scheme_of_a_quantized_embedding() -> None:
    program = exported(WeightOnly(lambda x, table: F.embedding(x.long().clamp(0, 3), table)), 3)
    _, report = assert_rewrites(program, "xnnpack", FOLD, {"fold_dequantize": 1}, rtol=0)
    assert "for a quantized embedding quantize with IntxWeightOnlyConfig" in str(report.outcomes[0].reasons[0])


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_weight_with_a_scale_that_is_not_finite_is_not_folded(scale: float) -> None:
    reason = "found 1 that are NaN or infinite; quantize the weight again"
    assert_misses(exported(WeightOnly(scale=scale)), reason, "xnnpack", passes=FOLD)


def test_per_tensor_weight_with_an_infinite_scale_is_not_folded() -> None:
    weight = Decomposed(per_tensor=True, scale=float("inf")).weight
    reason = "wanted scales and zeros that are finite where they are stored, found 1 that are NaN or infinite"

    class Plain(Decomposed):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight())

    assert weight().isinf().any()
    assert_misses(exported(Plain(per_tensor=True, scale=float("inf"))), reason, "xnnpack", passes=FOLD)


@pytest.mark.parametrize("model", [Dynamic(), Decomposed()], ids=["torchao", "PT2E"])
def test_weight_under_quantized_activations_is_not_folded(model: nn.Module) -> None:
    reason = "wanted readers of float activations, found aten.linear (linear), whose activations are quantized"
    assert_misses(exported(model), reason, "xnnpack", passes=FOLD)


def test_weight_without_data_is_not_folded() -> None:
    program = torch.export.export(WeightOnly().to("meta"), (torch.empty(ROWS, IN, device="meta"),))
    assert_misses(program, "found meta or fake tensors", "xnnpack", passes=FOLD)


# SplitBroadcastBias.

SHAPES = [(1,), (ROWS, OUT), (ROWS, 1), (1, OUT)]
SCHEMES: dict[str, Any] = {
    "kept, 4 bits": Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),
    "kept, 8 bits": Int8DynamicActivationIntxWeightConfig(INT8, PerAxis(0)),
    "folded": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
    "float": None,
}


class Biased(nn.Module):
    """``F.linear`` with a bias of any shape that broadcasts."""

    def __init__(self, shape: tuple[int, ...], scheme: str = "float", computed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(IN, OUT, bias=False)
        self.bias = nn.Parameter(3 * torch.randn(shape))
        self.computed = computed
        if SCHEMES[scheme] is not None:
            quantize_(self.inner, SCHEMES[scheme], filter_fn=lambda module, fqn: True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.bias * x.sum() if self.computed else self.bias)


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        # The bias is split before the weight is looked at: each shape and each scheme is enough once.
        pytest.param(shape, scheme, marks=() if scheme == "float" or shape == (ROWS, OUT) else pytest.mark.slow)
        for shape in SHAPES
        for scheme in SCHEMES
    ],
    ids=str,
)
def test_delegate_adds_a_split_bias_correctly(shape: tuple[int, ...], scheme: str) -> None:
    model, x = Biased(shape, scheme).eval(), example(ROWS, IN)
    partitioner = ecp.XnnpackPartitioner(expect={"split_broadcast_bias": 1, "missed": 0})
    # The delegate rounds activations to 8 bits as the graph does, now and then to the neighbouring step.
    assert error(output(lowered(exported(model), partitioner), x), model(x)) < 2e-3


def test_stock_partitioner_reads_beyond_such_a_bias_without_an_error() -> None:
    """The reason for the rule. Should this fail, check whether the rule is still needed."""
    model, x = Biased((ROWS, OUT)).eval(), example(ROWS, IN)
    assert not error(output(lowered(exported(model), Stock()), x), model(x)) < 0.1


def test_bias_is_split_first_with_a_list_that_lacks_the_rule() -> None:
    model, x = Biased((ROWS, OUT), "folded").eval(), example(ROWS, IN)
    partitioner = ecp.XnnpackPartitioner(passes=[ecp.FoldDequantize()])
    assert error(output(lowered(exported(model), partitioner), x), model(x)) < 1e-5
    assert partitioner.report.passes == ["split_broadcast_bias", "expand_tanh_gelu", "fold_dequantize"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bias_vector_stays_and_is_not_reported(scheme: str) -> None:
    _, report = ecp.rewrite(exported(Biased((OUT,), scheme)), "xnnpack")
    assert report.applied.get("split_broadcast_bias", 0) == 0
    assert "split_broadcast_bias" not in str(report) + str(report.rejected)


NOT_CONSTANT = (
    "wanted no bias, or a constant one, found mul, which the program computes; add such a bias behind the linear"
)


@pytest.mark.parametrize(
    ("shape", "computed", "reason"),
    [
        ((OUT,), False, "wanted a bias that is no vector [out_features], found p_bias [32]"),
        ((ROWS, OUT), True, NOT_CONSTANT),
    ],
    ids=["vector", "computed"],
)
def test_bias_that_needs_no_split_is_rejected(shape: tuple[int, ...], computed: bool, reason: str) -> None:
    class Reporting(SplitBroadcastBias):
        reports_misses = True

    before = exported(Biased(shape, computed=computed))
    after, report = ecp.rewrite(before, "xnnpack", [Reporting()])
    assert str(after.graph) == str(before.graph)
    assert [text.partition(": reporting ")[2] for text in report.rejected["reporting"]] == [reason]


def test_split_bias_leaves_the_numbers_unchanged() -> None:
    program = exported(Biased((ROWS, 1)))
    assert_rewrites(program, "xnnpack", [SplitBroadcastBias()], expect={"split_broadcast_bias": 1}, rtol=1e-6)


# ExpandTanhGelu.


class Gelu(nn.Module):
    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)


def gelu_input() -> Tensor:
    return torch.linspace(-9, 9, ROWS * IN).view(ROWS, IN)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_delegate_computes_either_gelu(approximate: str) -> None:
    model, x = Gelu(approximate), gelu_input()
    counts = {"expand_tanh_gelu": int(approximate == "tanh")}
    method = lowered(exported(model), ecp.XnnpackPartitioner(expect=counts))
    torch.testing.assert_close(output(method, x), model(x), rtol=1e-6, atol=2e-6)


def test_stock_partitioner_computes_the_exact_gelu_for_the_approximate_one() -> None:
    """The reason for the rule. Should this fail, check whether the rule is still needed."""
    x = gelu_input()
    wrong = output(lowered(exported(Gelu()), Stock()), x)
    assert float((wrong - F.gelu(x, approximate="tanh")).abs().max()) > 4e-4
    torch.testing.assert_close(wrong, F.gelu(x), rtol=1e-6, atol=2e-6)


def test_expanded_gelu_leaves_the_numbers_unchanged() -> None:
    program = torch.export.export(Gelu(), (gelu_input(),))
    assert_rewrites(program, "xnnpack", [ExpandTanhGelu()], expect={"expand_tanh_gelu": 1}, rtol=1e-5)


# LargestAlone.


class Largest(nn.Module):
    def __init__(self, keepdim: bool = True) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x - x.max(dim=-1, keepdim=self.keepdim).values.view(-1, 1)


class LargestPlace(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = x.max(dim=-1)
        return values + 1, places


@pytest.mark.parametrize("keepdim", [True, False])
def test_largest_value_without_its_place_is_lowered_and_right(keepdim: bool) -> None:
    model, x = Largest(keepdim), example(ROWS, IN)
    method = lowered(exported(model), ecp.XnnpackPartitioner(expect={"largest_alone": 1}))
    assert torch.equal(output(method, x), model(x))


def test_largest_value_with_its_place_stays() -> None:
    after, _ = ecp.rewrite(exported(LargestPlace()), "xnnpack", [LargestAlone()], expect={"largest_alone": 0})
    assert after.graph.find_nodes(op="call_function", target=torch.ops.aten.max.dim)


# ShareActivation.


def siblings(other: str = "") -> ExportedProgram:
    torch.manual_seed(0)
    model = Siblings(other)
    quantize_(model, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    return exported(model)


def quantizations(program: ExportedProgram) -> int:
    return len(program.graph.find_nodes(op="call_function", target=ao.quantize_affine.default))


def test_linears_of_one_input_share_its_quantization() -> None:
    program = siblings()
    after, report = ecp.rewrite(program, "xnnpack", expect={"keep_dynamic_int4": 3, "missed": 0})
    assert (quantizations(program), quantizations(after)) == (3, 1), report
    x = example(ROWS, IN)
    for found, wanted in zip(after.module()(x), program.module()(x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("other", ["scale", "mutated", "eps"])
def test_quantization_of_another_value_or_scheme_is_not_shared(other: str) -> None:
    program = siblings(other)
    if other == "eps":
        *_, last = program.graph.find_nodes(op="call_function", target=ao.choose_qparams_affine.default)
        # The argument after the range is the least scale.
        last.args = (*last.args[:6], 0.25, *last.args[7:])
        program.graph_module.recompile()
    after, _ = ecp.rewrite(program, "xnnpack", [ShareActivation()])
    x = example(ROWS, IN)
    for found, wanted in zip(after.module()(x), program.module()(x), strict=True):
        assert torch.equal(found, wanted)
    # A mutated tensor is never shared, not even by the linears before the mutation.
    assert quantizations(after) == (3 if other == "mutated" else 2)


# QuantizeActivation.

WEIGHT_ONLY, DYNAMIC = IntxWeightOnlyConfig, Int8DynamicActivationIntxWeightConfig


def siblings_with(config: Any, bias: bool = True) -> ExportedProgram:
    torch.manual_seed(0)
    model = Siblings()
    if not bias:
        model.v.bias = None
    quantize_(model, config)
    return exported(model)


def with_dynamic_activations() -> Any:
    return ecp.default_passes("xnnpack").insert_before("share_activation", QuantizeActivation())


@pytest.mark.parametrize("bias", [True, False])
def test_weight_only_linear_becomes_that_of_the_scheme_with_dynamic_activations(bias: bool) -> None:
    program = siblings_with(WEIGHT_ONLY(torch.int4, PerGroup(32)), bias)
    expect = {"keep_dynamic_int4": 3, "fold_dequantize": 0, "missed": 0}
    after, report = ecp.rewrite(program, "xnnpack", with_dynamic_activations(), expect=expect)
    assert "quantize_activation" in str(report)
    assert quantizations(after) == 1
    x = example(ROWS, IN)
    reference = siblings_with(DYNAMIC(torch.int4, PerGroup(32)), bias).module()(x)
    for found, wanted, before in zip(after.module()(x), reference, program.module()(x), strict=True):
        assert torch.equal(found, wanted)
        # The change that the option is named for: half a step of 255 in an activation.
        assert 1e-4 < error(found, before) < 2e-2


def test_weight_only_linear_is_folded_without_the_rule() -> None:
    ecp.rewrite(siblings_with(WEIGHT_ONLY(torch.int4, PerGroup(32))), "xnnpack", expect={"fold_dequantize": 3})


@pytest.mark.parametrize("config", [WEIGHT_ONLY(torch.int8, PerAxis(0)), WEIGHT_ONLY(torch.int4, PerGroup(16))])
def test_weight_without_a_dynamic_kernel_is_folded_exactly(config: Any) -> None:
    program = siblings_with(config)
    expect = {"fold_dequantize": 3, "missed": 0}
    after, _ = ecp.rewrite(program, "xnnpack", with_dynamic_activations(), expect=expect)
    x = example(ROWS, IN)
    for found, wanted in zip(after.module()(x), program.module()(x), strict=True):
        assert torch.equal(found, wanted)


def test_quantized_activation_is_not_quantized_again() -> None:
    program = siblings_with(DYNAMIC(torch.int4, PerGroup(32)))
    after, _ = ecp.rewrite(program, "xnnpack", with_dynamic_activations(), expect={"keep_dynamic_int4": 3})
    assert quantizations(after) == 1
