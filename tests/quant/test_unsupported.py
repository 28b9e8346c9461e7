"""Weights in forms that no rule matches: each is reported with the fix."""

from functools import cache
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.quant.unsupported import SuggestedSchemes, unwrapped, wrapped_reason, wrapped_weights
from et_cuda_passes.testing import Quantized, Sketch, assert_misses

MULTIPLIED = {
    "mx": (MXDynamicActivationMXWeightConfig(), "float8_e4m3fn", "aten._scaled_mm"),
    "int8 of both": (Int8DynamicActivationInt8WeightConfig(), "int8", "aten._int_mm"),
}
INT4, INT8 = "IntxWeightOnlyConfig(torch.int4, PerGroup(32))", "IntxWeightOnlyConfig(torch.int8, PerAxis(0))"
NEAREST = {"cuda": INT8, "cpu": INT8, "metal": INT4}
DYNAMIC = "Int8DynamicActivationIntxWeightConfig"


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
UNWRAPS_NVFP4 = TORCH >= (2, 14)


def exported(config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, ExportedProgram, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype).eval()
    quantize_(model, config)
    x = torch.randn(3, 64, dtype=dtype)
    return model, torch.export.export(model, (x,)), x


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_weight_without_a_dequantize_is_missed_with_the_fix(target: str, decompose: bool) -> None:
    _, program, _ = exported(Int8WeightOnlyConfig())
    program = program.run_decompositions({}) if decompose else program
    report = assert_misses(program, "its weight is int8, converted by the program itself", target)
    (outcome,) = report.outcomes
    assert outcome.fqn == "0.weight"
    assert f"quantize with {NEAREST[target]}, which leaves a dequantize" in str(outcome.reasons[0])


@cache
def multiplied(scheme: str, decompose: bool) -> ExportedProgram:
    _, program, _ = exported(MULTIPLIED[scheme][0])
    return program.run_decompositions({}) if decompose else program


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("scheme", MULTIPLIED)
@pytest.mark.parametrize("target", NEAREST)
def test_narrow_weight_of_a_product_is_missed_with_the_fix(scheme: str, target: str, decompose: bool) -> None:
    _, dtype, op = MULTIPLIED[scheme]
    _, report = ecp.rewrite(multiplied(scheme, decompose), target)
    (outcome,) = report.outcomes
    assert (outcome.op, outcome.fqn, outcome.status) == (op, "0.weight", "missed")
    assert str(outcome.reasons[0]) == (
        f"its weight is {dtype}, multiplied as it is by the program itself, and no kernel reads that form: "
        f"quantize with {NEAREST[target]}, which leaves a dequantize"
    )


def test_scales_and_activations_of_fp8_are_no_weights() -> None:
    """The program computes both operands, as an attention in fp8 does."""
    sketch = Sketch()
    x, y = (sketch.input(name, 16, 16, dtype=torch.float8_e4m3fn) for name in "xy")
    scale = sketch.buffer("scale", torch.ones(()))
    product = sketch.raw(
        torch.ops.aten._scaled_mm.default,
        x,
        sketch.call(torch.ops.aten.t.default, y),
        scale,
        scale,
        val=torch.empty(16, 16),
    )
    _, report = ecp.rewrite(sketch.program(product), "cuda")
    assert report.outcomes == []


def test_xnnpack_rejects_a_converted_weight_with_the_fix() -> None:
    _, program, _ = exported(Int8WeightOnlyConfig(), torch.float32)
    with pytest.raises(ValueError, match=rf"0\.weight.*converted by the program itself.*with {DYNAMIC}\(torch\.int8"):
        to_edge_transform_and_lower(program, partitioner=[ecp.XnnpackPartitioner()])


def test_stock_partitioner_computes_int8_weight_only_wrongly_without_an_error() -> None:
    """The reason why our partitioner rejects the weight. If this test fails, check whether it may stay in place."""
    model, program, x = exported(Int8WeightOnlyConfig(), torch.float32)
    buffer = to_edge_transform_and_lower(program, partitioner=[Stock()]).to_executorch().buffer
    found = Runtime.get().load_program(buffer).load_method("forward").execute([x])[0]
    assert (found - model(x)).norm() / model(x).norm() > 1


class Dequantized(nn.Module):
    """A weight that the model's own code dequantizes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        linear = nn.Sequential(nn.Linear(64, 48, bias=False)).bfloat16()
        quantize_(linear, config)
        self.weight = linear[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.dequantize())


@pytest.mark.parametrize(
    ("config", "kind", "nearest"),
    [
        (NVFP4WeightOnlyConfig(), "NVFP4Tensor", INT4),
        (MXDynamicActivationMXWeightConfig(), "float8_e4m3fn", INT8),
    ],
)
def test_weight_that_the_model_dequantizes_is_missed(config: Any, kind: str, nearest: str) -> None:
    program = torch.export.export(Dequantized(config), (torch.randn(3, 64).bfloat16(),))
    for form in (program, program.run_decompositions({})):
        _, report = ecp.rewrite(form, "cuda")
        assert [(outcome.op, outcome.fqn) for outcome in report.outcomes] == [("aten.linear", "weight")]
        reason = str(report.outcomes[0].reasons[0])
        if form is program:
            assert reason.startswith(f"its weight is {kind}, converted by the program itself")
            assert f"quantize with {nearest}," in reason


@pytest.mark.skipif(UNWRAPS_NVFP4, reason="torch 2.14 unwraps NVFP4")
def test_reason_names_the_other_subclasses_that_stay_wrapped() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    quantize_(model[0], NVFP4WeightOnlyConfig())
    quantize_(model[1], MXDynamicActivationMXWeightConfig())
    program = torch.export.export(model, (torch.randn(3, 64).bfloat16(),))
    same, why = unwrapped(program)
    assert same is program and why.endswith("; MXTensor, NVFP4Tensor stand in one program")
    weights = wrapped_weights(program)
    first, second = (wrapped_reason(weights[name], why, SuggestedSchemes()) for name in ("0.weight", "1.weight"))
    assert first.startswith("its weight is NVFP4Tensor, 4 bits an element") and first.endswith(INT4)
    assert second.startswith("its weight is MXTensor, 8 bits an element") and second.endswith(INT8)


class Table(nn.Module):
    """A mask and a table of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.uint8))
        self.register_buffer("table", torch.ones(9, 4, dtype=torch.int8))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return x * self.mask.to(x.dtype) + self.table[rows].to(x.dtype)


def test_mask_and_table_are_no_weights() -> None:
    program = torch.export.export(Table(), (torch.randn(4, 4), torch.tensor([0, 1, 2, 3])))
    for target in ecp.targets():
        _, report = ecp.rewrite(program, target)
        assert report.outcomes == []


# A dequantize that was decomposed before the rewrite ---------------------------------------------------------------


def test_decomposed_dequantize_gives_a_warning() -> None:
    model = nn.Sequential(nn.Linear(64, 16, dtype=torch.bfloat16))
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    program = torch.export.export(model, (torch.randn(2, 64, dtype=torch.bfloat16),)).run_decompositions()
    _, report = ecp.rewrite(program, "cuda")
    assert report.outcomes == []
    (warning,) = report.warnings
    assert "decomposed" in warning
    assert "run_decompositions({})" in warning
    assert "0." in warning
    assert warning in str(report)


def test_decomposed_dequantize_beside_other_candidates_gives_a_warning() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, int4, lambda _, name: name == "0")
    quantize_(model, Int8WeightOnlyConfig(), lambda _, name: name == "1")
    program = torch.export.export(model, (torch.randn(2, 64, dtype=torch.bfloat16),)).run_decompositions()
    _, report = ecp.rewrite(program, "cuda")
    assert [outcome.fqn for outcome in report.outcomes] == ["1.weight"]
    (warning,) = report.warnings
    assert "converts 1 integer matrices itself (0." in warning


def test_integers_that_are_no_weight_give_no_warning() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.uint8))
            self.register_buffer("cache", torch.ones(4, 4, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.cache.add_(1)
            return x + (self.mask.to(x.dtype) - 1) * 1e4 + self.cache.to(x.dtype) * self.scale

    program = torch.export.export(Bytes(), (torch.randn(4, 4),))
    for form in (program, program.run_decompositions()):
        assert ecp.rewrite(form, "cuda")[1].warnings == []


@pytest.mark.parametrize("decomposed", [False, True])
def test_conversion_of_an_earlier_rewrite_gives_no_warning(decomposed: bool) -> None:
    model = Quantized(64, 128, low=-128, high=127, dtype=torch.float32)
    rewritten, report = ecp.rewrite(torch.export.export(model, (torch.randn(2, 128),)), "openvino")
    assert report.counts()["decompress_int8"] == 1
    again = rewritten.run_decompositions({}) if decomposed else rewritten
    assert ecp.rewrite(again, "openvino")[1].warnings == []
