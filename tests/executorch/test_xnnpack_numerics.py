"""XNNPACK's numbers with our partitioner, also where the stock one computes something else without an error.

ExecuTorch's own runtime runs every lowered program. The results are compared with the quantized model in eager.
"""

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_misses
from tests.helpers import Together
from tests.xnnpack import Stock, error, example, lowered, output, through

IN, HIDDEN, OUT = 64, 128, 32

# The delegate rounds group scales to bf16. With scales that are bf16 already, the only error left is the rounding of
# one activation to the next integer: far below the 6e-3 by which dropping the activation's quantization would show.
EXACT_SCALES = torch.bfloat16
FLOAT_ERROR = 1e-5
DYNAMIC_ERROR = 1e-3
DYNAMIC_ERROR_ROUNDED_SCALES = 1e-2


class Mlp(nn.Module):
    """down(relu(up(x))), x [..., IN] to [..., OUT], with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def weight_only(bits: int, group: int | None, mapping: MappingType = MappingType.SYMMETRIC) -> IntxWeightOnlyConfig:
    """The weight-only scheme of torchao; group None is per axis."""
    granularity = PerAxis(0) if group is None else PerGroup(group)
    return IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity, mapping)


def dynamic(bits: int = 4, group: int | None = 32, **options: Any) -> Int8DynamicActivationIntxWeightConfig:
    """The 8-bit dynamic activation scheme of torchao; group None is per axis."""
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        weight_granularity=PerAxis(0) if group is None else PerGroup(group),
        **options,
    )


def mlp(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp().to(dtype).eval()
    quantize_(model, config)
    return model


def one(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One quantized linear, inside another module."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).to(dtype).eval()
    quantize_(model, config)
    return model


def fates(partitioner: Any) -> list[tuple[str, str | None]]:
    return [(outcome.status, outcome.rule) for outcome in partitioner.report.outcomes]


def test_weight_only_is_correct_with_ours_and_wrong_with_the_stock_partitioner() -> None:
    models = {"4w in groups of 32": mlp(weight_only(4, 32)), "8w per axis": mlp(weight_only(8, None))}
    given = [(example(5, IN) + number,) for number in range(len(models))]
    program = torch.export.export(Together(models.values()), (given,))

    def errors(partitioner: Stock) -> list[float]:
        method = Runtime.get().load_program(lowered(program, partitioner)).load_method("forward")
        found = method.execute([x for (x,) in given])
        return [error(y, model(x)) for y, model, (x,) in zip(found, models.values(), given, strict=True)]

    ours = ecp.XnnpackPartitioner()
    assert max(errors(ours)) < FLOAT_ERROR
    assert fates(ours) == [("rewritten", "fold_dequantize")] * 4
    for outcome in ours.report.outcomes:
        assert "Int8DynamicActivationIntxWeightConfig" in " ".join(map(str, outcome.reasons))

    lift = f"executorch {version('executorch')} no longer needs fold_dequantize: check whether the weight can be kept"
    try:
        stock = errors(Stock())
    except Exception as refusal:
        pytest.fail(f"the stock partitioner now refuses weight-only instead of a wrong result: {refusal}. {lift}")
    if min(stock) < 0.01:
        pytest.fail(f"the stock partitioner now computes weight-only correctly (relative errors {stock}). {lift}")
    # The error is large, because the delegate reads raw integers without their scales.
    assert min(stock) > 1


def test_folded_weight_with_zero_points_is_correct_for_dynamic_rows() -> None:
    model = mlp(weight_only(4, 32, MappingType.ASYMMETRIC))
    x = example(2, 3, IN)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("rows", min=1, max=64)},))
    pte = lowered(program, ecp.XnnpackPartitioner())
    for rows in (1, 3, 64):
        x = example(2, rows, IN)
        assert error(output(pte, x), model(x)) < FLOAT_ERROR


def test_8da4w_gives_the_bytes_of_the_stock_partitioner() -> None:
    model, x = mlp(dynamic(4, 32)), example(5, IN)
    program = torch.export.export(model, (x,))
    stock = lowered(program, Stock())
    assert lowered(program, Stock()) == stock, "stock lowering is not deterministic: the comparison shows nothing"
    ours = ecp.XnnpackPartitioner()
    pte = lowered(program, ours)
    assert pte == stock
    assert fates(ours) == [("kept", "keep_dynamic_int4")] * 2
    assert error(output(pte, x), model(x)) < DYNAMIC_ERROR_ROUNDED_SCALES


def test_8da4w_is_exact_with_scales_that_need_no_rounding() -> None:
    model = mlp(dynamic(weight_scale_dtype=EXACT_SCALES))
    assert through(ecp.XnnpackPartitioner(), model, example(5, IN)) < DYNAMIC_ERROR


def test_8da4w_in_fp16_is_correct() -> None:
    model, x = one(dynamic(weight_scale_dtype=EXACT_SCALES), torch.float16), example(5, IN, dtype=torch.float16)
    assert through(ecp.XnnpackPartitioner(), model, x) < DYNAMIC_ERROR_ROUNDED_SCALES


class Mixed(nn.Module):
    """Three linears for three schemes."""

    def __init__(self) -> None:
        super().__init__()
        self.dynamic4 = nn.Linear(IN, HIDDEN)
        self.only4 = nn.Linear(HIDDEN, HIDDEN)
        self.only8 = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.only8(torch.relu(self.only4(torch.relu(self.dynamic4(x)))))
        return result


def test_model_with_three_schemes_has_an_outcome_for_each() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    schemes = {
        "dynamic4": dynamic(weight_scale_dtype=EXACT_SCALES),
        "only4": weight_only(4, 32),
        "only8": weight_only(8, None),
    }
    for name, config in schemes.items():
        quantize_(model, config, filter_fn=lambda _, fqn, name=name: fqn == name)
    ours = ecp.XnnpackPartitioner()
    assert through(ours, model, example(5, IN)) < DYNAMIC_ERROR
    assert {outcome.fqn.removesuffix(".weight"): outcome.status for outcome in ours.report.outcomes} == {
        "dynamic4": "kept",
        "only4": "rewritten",
        "only8": "rewritten",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_folded_16_bit_model_equals_the_float_model(dtype: torch.dtype) -> None:
    # bf16 linears are not delegated. ExecuTorch's portable addmm accumulates in bf16, with an error of about 2e-2. The
    # float model runs the same kernels, so the comparison with it is exact.
    model, x = mlp(weight_only(4, 32), dtype), example(5, IN, dtype=dtype)
    plain = Mlp().to(dtype).eval()
    for name in ("up", "down"):
        quantized, linear = model.get_submodule(name), plain.get_submodule(name)
        assert isinstance(quantized, nn.Linear) and isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(quantized.weight.dequantize())
        linear.bias = nn.Parameter(quantized.bias.detach().clone())
    wanted = output(lowered(torch.export.export(plain, (x,)), Stock()), x)
    found = output(lowered(torch.export.export(model, (x,)), ecp.XnnpackPartitioner()), x)
    assert torch.equal(found, wanted)
    assert error(found, model(x)) < {torch.bfloat16: 3e-2, torch.float16: 1e-3}[dtype]


def test_bf16_model_is_delegated_with_enable_bf16() -> None:
    model, x = mlp(weight_only(4, 32), torch.bfloat16), example(5, IN, dtype=torch.bfloat16)
    try:
        stock = through(Stock(enable_bf16=True), Mlp().to(torch.bfloat16).eval(), x)
    except RuntimeError:
        pytest.skip("this CPU has no XNNPACK kernel for bf16")
    assert stock < 1e-2
    assert through(ecp.XnnpackPartitioner(enable_bf16=True), model, x) < 1e-2


def test_8da4w_in_bf16_is_kept_with_enable_bf16() -> None:
    model, x = mlp(dynamic(), torch.bfloat16), example(5, IN, dtype=torch.bfloat16)
    ours = ecp.XnnpackPartitioner(enable_bf16=True, expect={"keep_dynamic_int4": 2})
    pte = lowered(torch.export.export(model, (x,)), ours)
    try:
        found = output(pte, x)
    except RuntimeError:
        pytest.skip("this CPU has no XNNPACK kernel for bf16")
    assert error(found, model(x)) < 2e-2


def test_8da8w_in_bf16_is_refused_because_the_runtime_does_not_load_it() -> None:
    model, x = mlp(dynamic(8, None, weight_scale_dtype=torch.float32), torch.bfloat16), example(5, IN).bfloat16()
    program = torch.export.export(model, (x,))
    stock = lowered(program, Stock(enable_bf16=True))
    with pytest.raises(RuntimeError):
        output(stock, x)
    reason = "keep_dynamic_int8 wanted activations .* found bfloat16; export in float32"
    for enable_bf16 in (False, True):
        with pytest.raises(ValueError, match=reason):
            lowered(program, ecp.XnnpackPartitioner(enable_bf16=enable_bf16))


def test_8da8w_in_fp16_is_correct_with_scales_in_float32() -> None:
    x = example(5, IN, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16 scales, .* quantize with weight_scale_dtype=torch.float32"):
        lowered(torch.export.export(mlp(dynamic(8, None), torch.float16), (x,)), ecp.XnnpackPartitioner())
    model = mlp(dynamic(8, None, weight_scale_dtype=torch.float32), torch.float16)
    assert through(ecp.XnnpackPartitioner(expect={"keep_dynamic_int8": 2}), model, x) < DYNAMIC_ERROR_ROUNDED_SCALES


class ByHand(nn.Module):
    """linear(fake-quantized x, dequantized int4 weight [OUT, IN]) with arguments that can be changed.

    Args:
        activation: (quant_min, quant_max) of the activation; None leaves x as it is.
        scale: returns another scale tensor with the values of the scales.
        again: a second linear reads the same integers with other scales.
    """

    def __init__(
        self,
        activation: tuple[int, int] | None = (-128, 127),
        scale: Callable[[Tensor], Tensor] = lambda scale: scale,
        again: bool = False,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.activation, self.again = activation, again
        self.q: Tensor
        self.scale: Tensor
        self.other_scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("q", torch.randint(-8, 8, (OUT, IN), generator=random).to(torch.int8))
        scales = (torch.rand(OUT, IN // 32, generator=random) * 0.02 + 0.01).to(EXACT_SCALES)
        self.register_buffer("scale", scale(scales))
        self.register_buffer("other_scale", scales.flip(0) * 3)
        self.register_buffer("zero_point", torch.zeros(OUT, IN // 32, dtype=torch.int8))

    def weight(self, scale: Tensor) -> Tensor:
        weight: Tensor = torch.ops.torchao.dequantize_affine(
            self.q, [1, 32], scale, self.zero_point, torch.int8, -8, 7, torch.float32
        )
        return weight

    @staticmethod
    def quantized(x: Tensor, low: int, high: int) -> Tensor:
        """``x`` per token, asymmetric, to integers and back."""
        block, torchao = [1] * (x.dim() - 1) + [IN], torch.ops.torchao
        scale, zero_point = torchao.choose_qparams_affine(
            x, "ASYMMETRIC", block, torch.int8, low, high, None, torch.float32, torch.int8
        )
        q = torchao.quantize_affine(x, block, scale, zero_point, torch.int8, low, high)
        result: Tensor = torchao.dequantize_affine(q, block, scale, zero_point, torch.int8, low, high, torch.float32)
        return result

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            x = self.quantized(x, *self.activation)
        result = F.linear(x, self.weight(self.scale))
        return result + F.linear(x, self.weight(self.other_scale)) if self.again else result


def test_integers_with_two_scales_fold_to_two_weights() -> None:
    ours = ecp.XnnpackPartitioner()
    assert through(ours, ByHand(activation=None, again=True).eval(), example(5, IN)) < FLOAT_ERROR
    assert fates(ours) == [("rewritten", "fold_dequantize")] * 2


def inside_a_larger_tensor(scale: Tensor) -> Tensor:
    """The same values as the contiguous second half of a larger storage."""
    return torch.cat([scale * 7, scale])[len(scale) :]


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """In core ATen, linear and dequantize too: the weight is then a product of constants."""
    result: ExportedProgram = program.run_decompositions()
    return result


def linear_decomposed(program: ExportedProgram) -> ExportedProgram:
    """With addmm for linear, and dequantize as it was."""

    def as_addmm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight.t())

    result: ExportedProgram = program.run_decompositions({torch.ops.aten.linear.default: as_addmm})
    return result


def as_exported(program: ExportedProgram) -> ExportedProgram:
    return program


DECOMPOSED = "dequantize was decomposed; rewrite before run_decompositions"
SILENTLY_WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[ExportedProgram], ExportedProgram], str]] = {
    "8da4w with zero points": (
        lambda: one(dynamic(weight_scale_dtype=EXACT_SCALES, weight_mapping_type=MappingType.ASYMMETRIC)),
        as_exported,
        "keep_dynamic_int4 wanted zero points that are all 0, found ",
    ),
    "8da8w with zero points": (
        lambda: one(dynamic(8, None, weight_mapping_type=MappingType.ASYMMETRIC)),
        as_exported,
        "keep_dynamic_int8 wanted zero points that are all 0, found ",
    ),
    "weight-only, decomposed": (lambda: one(weight_only(4, 32)), decomposed, DECOMPOSED),
    "8da4w, decomposed": (lambda: one(dynamic(weight_scale_dtype=EXACT_SCALES)), decomposed, DECOMPOSED),
    "8da4w, linear decomposed": (
        lambda: one(dynamic(weight_scale_dtype=EXACT_SCALES)),
        linear_decomposed,
        "fold_dequantize wanted readers of float activations, found aten.addmm (addmm)",
    ),
    "4-bit activation": (
        lambda: ByHand(activation=(-8, 7)),
        as_exported,
        "keep_dynamic_int4 wanted activations quantized per token, asymmetric, in -128..127, found ASYMMETRIC, -8..7",
    ),
    "two scales for the same integers": (
        lambda: ByHand(again=True),
        as_exported,
        "keep_dynamic_int4 wanted one scale and one zero point for these integers, found dequantize_affine",
    ),
    "scales inside a larger tensor": (
        lambda: ByHand(scale=inside_a_larger_tensor),
        as_exported,
        "keep_dynamic_int4 wanted integers and scales that own their memory, found b_scale",
    ),
}


@pytest.mark.parametrize("prepare", [as_exported, decomposed, linear_decomposed])
def test_cases_are_computed_wrongly_by_the_stock_partitioner_without_an_error(prepare: Any) -> None:
    """Otherwise the refusals below have no reason."""
    models = {case: make().eval() for case, (make, how, _) in SILENTLY_WRONG.items() if how is prepare}
    given = [(example(5, IN) + number,) for number in range(len(models))]
    program = prepare(torch.export.export(Together(models.values()), (given,)))
    pte = lowered(program, Stock())
    found = Runtime.get().load_program(pte).load_method("forward").execute([x for (x,) in given])
    for (case, model), (x,), got in zip(models.items(), given, found, strict=True):
        assert error(got, model(x)) > 0.01, case


@pytest.mark.parametrize("case", SILENTLY_WRONG)
def test_program_that_the_delegate_computes_wrongly_is_refused(case: str) -> None:
    make, prepare, reason = SILENTLY_WRONG[case]
    program = prepare(torch.export.export(make().eval(), (example(5, IN),)))
    with pytest.raises(ValueError, match=re.escape(reason)):
        lowered(program, ecp.XnnpackPartitioner())


LOUD: dict[str, tuple[Any, torch.dtype, str]] = {
    "8da8w in groups": (dynamic(8, 32), torch.float32, "group size 32, where int8 is per-axis only"),
    "8da4w in groups of 16": (dynamic(4, 16), torch.float32, "group size 16, no multiple of 32"),
    "8da4w in bf16": (dynamic(4, 32), torch.bfloat16, "export in float32, or lower with enable_bf16=True"),
}


@pytest.mark.parametrize("case", LOUD)
def test_program_that_the_stock_partitioner_fails_on_is_refused_with_the_cause(case: str) -> None:
    config, dtype, reason = LOUD[case]
    program = torch.export.export(one(config, dtype), (example(5, IN, dtype=dtype),))
    with pytest.raises((AssertionError, RuntimeError)):
        lowered(program, Stock())
    assert_misses(program, reason, "xnnpack")
    with pytest.raises(ValueError, match=f"XNNPACK cannot compute .*{re.escape(reason)}"):
        lowered(program, ecp.XnnpackPartitioner())


def test_8da8w_per_axis_is_correct() -> None:
    assert through(ecp.XnnpackPartitioner(), one(dynamic(8, None)), example(5, IN)) < DYNAMIC_ERROR


class Within(nn.Module):
    """Two linears, one quantized, whose weight and biases are buffers inside of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.quantized = nn.Linear(IN, OUT)
        quantize_(self.quantized, dynamic(weight_scale_dtype=EXACT_SCALES))
        del self.quantized.bias
        numbers = example(3 * OUT, IN)
        self.quantized.register_buffer("bias", numbers[0, OUT:])
        self.register_buffer("weight", numbers[OUT : 2 * OUT])
        self.register_buffer("bias", numbers[1, OUT:])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.quantized(x) + F.linear(x, self.weight, self.bias)
        return result


def test_constants_inside_larger_tensors_are_correct() -> None:
    model, x = Within(), example(4, IN)
    # The delegate writes a constant from the start of its storage.
    assert through(Stock(), model, x) > 0.1
    assert through(ecp.XnnpackPartitioner(expect={"kept": 1}), model, x) < DYNAMIC_ERROR
    assert model.weight.storage_offset() and model.bias.storage_offset()


def test_float8_linear_with_a_bias_runs_from_a_mapped_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(IN, OUT)).eval(), example(4, IN)
    quantize_(model, Float8WeightOnlyConfig())
    ours = ecp.XnnpackPartitioner(expect={"fold_dequantize": 1, "missed": 0})
    # The weight is readable after the load only where the linear copied it: a wrong lowering ends the process here.
    path = tmp_path / "model.pte"
    path.write_bytes(lowered(torch.export.export(model, (x,)), ours))
    (found,) = Runtime.get().load_program(path).load_method("forward").execute([x])
    assert error(found, model(x)) < FLOAT_ERROR
