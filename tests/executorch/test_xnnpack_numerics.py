"""XNNPACK's numbers: what the stock partitioner computes wrongly without an error, and what ours makes of it.

Every lowered program is run by ExecuTorch's own runtime, and compared with the quantized model in eager.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp

IN, HIDDEN, OUT = 64, 128, 32

# The delegate rounds group scales to bf16. With scales that are bf16 already, what is left is the rounding of one
# activation to the next integer: far below the 6e-3 by which dropping the activation's quantization would show.
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


def example(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def lowered(program: ExportedProgram, partitioner: Stock) -> bytes:
    buffer: bytes = to_edge_transform_and_lower(program, partitioner=[partitioner]).to_executorch().buffer
    return buffer


def lowered_unless_refused(program: ExportedProgram) -> bytes | None:
    """What our partitioner makes of ``program``; None where it refuses, and names the cause."""
    try:
        return lowered(program, ecp.XnnpackPartitioner())
    except ValueError as refusal:
        if not any(cause in str(refusal) for cause in ("XNNPACK", "its dequantize was", "their dequantize was")):
            raise
        return None


def output(pte: bytes, *inputs: Tensor) -> Tensor:
    result: Tensor = Runtime.get().load_program(pte).load_method("forward").execute(list(inputs))[0]
    return result


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, in the Euclidean norm."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def through(partitioner: Stock, model: nn.Module, x: Tensor) -> float:
    """The error of ``model``, exported and lowered with ``partitioner``, against itself in eager."""
    return error(output(lowered(torch.export.export(model, (x,)), partitioner), x), model(x))


def fates(partitioner: Any) -> list[tuple[str, str | None]]:
    return [(outcome.status, outcome.rule) for outcome in partitioner.report.outcomes]


WEIGHT_ONLY = [
    pytest.param(weight_only(4, 32), id="4w-group32"),
    pytest.param(weight_only(8, None), id="8w-axis"),
]


@pytest.mark.parametrize("config", WEIGHT_ONLY)
def test_weight_only_is_silently_wrong_with_the_stock_partitioner_and_right_with_ours(config: Any) -> None:
    model, x = mlp(config), example(5, IN)
    ours = ecp.XnnpackPartitioner()
    assert through(ours, model, x) < FLOAT_ERROR
    assert fates(ours) == [("rewritten", "fold_dequantize")] * 2
    for outcome in ours.report.outcomes:
        assert "Int8DynamicActivationIntxWeightConfig" in " ".join(map(str, outcome.reasons))

    lift = f"executorch {version('executorch')} no longer needs fold_dequantize for this: see whether it can be kept"
    try:
        stock = through(Stock(), model, x)
    except Exception as refusal:
        pytest.fail(
            f"the stock partitioner now refuses weight-only, and does not compute it wrongly: {refusal}. {lift}"
        )
    if stock < 0.01:
        pytest.fail(f"the stock partitioner now computes weight-only rightly (relative error {stock:.1e}). {lift}")
    # Not a little wrong: the weights went in as raw integers, without their scales.
    assert stock > 1


def test_a_folded_weight_with_zero_points_and_a_dynamic_number_of_rows_is_right() -> None:
    model = mlp(weight_only(4, 32, MappingType.ASYMMETRIC))
    x = example(2, 3, IN)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("rows", min=1, max=64)},))
    pte = lowered(program, ecp.XnnpackPartitioner())
    for rows in (1, 3, 64):
        x = example(2, rows, IN)
        assert error(output(pte, x), model(x)) < FLOAT_ERROR


def test_8da4w_is_byte_for_byte_the_stock_partitioners() -> None:
    model, x = mlp(dynamic(4, 32)), example(5, IN)
    program = torch.export.export(model, (x,))
    stock = lowered(program, Stock())
    assert lowered(program, Stock()) == stock, "stock lowering is not deterministic: this comparison means nothing"
    ours = ecp.XnnpackPartitioner()
    pte = lowered(program, ours)
    assert pte == stock
    assert fates(ours) == [("kept", "keep_dynamic_int4")] * 2
    assert error(output(pte, x), model(x)) < DYNAMIC_ERROR_ROUNDED_SCALES


def test_8da4w_keeps_its_numbers_where_scales_need_no_rounding() -> None:
    model = mlp(dynamic(weight_scale_dtype=EXACT_SCALES))
    assert through(ecp.XnnpackPartitioner(), model, example(5, IN)) < DYNAMIC_ERROR


def test_8da4w_in_fp16_is_right() -> None:
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


def test_three_schemes_in_one_model_are_each_treated_as_they_need() -> None:
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
def test_a_folded_16_bit_model_is_the_float_model_to_the_last_bit(dtype: torch.dtype) -> None:
    # bf16 linears are not delegated, and ExecuTorch's portable addmm accumulates in bf16: no closer to eager than 2e-2.
    # The float model that stands for the quantized one has the same kernels, so there the comparison is exact.
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


def test_a_bf16_model_is_delegated_and_as_exact_as_eager_where_the_caller_enables_bf16() -> None:
    model, x = mlp(weight_only(4, 32), torch.bfloat16), example(5, IN, dtype=torch.bfloat16)
    try:
        stock = through(Stock(enable_bf16=True), Mlp().to(torch.bfloat16).eval(), x)
    except RuntimeError:
        pytest.skip("this CPU has no XNNPACK kernel for bf16")
    assert stock < 1e-2
    assert through(ecp.XnnpackPartitioner(enable_bf16=True), model, x) < 1e-2


def test_8da4w_in_bf16_is_kept_where_the_caller_enables_bf16() -> None:
    model, x = mlp(dynamic(), torch.bfloat16), example(5, IN, dtype=torch.bfloat16)
    ours = ecp.XnnpackPartitioner(enable_bf16=True, expect={"keep_dynamic_int4": 2})
    pte = lowered(torch.export.export(model, (x,)), ours)
    try:
        found = output(pte, x)
    except RuntimeError:
        pytest.skip("this CPU has no XNNPACK kernel for bf16")
    assert error(found, model(x)) < 2e-2


@pytest.mark.parametrize("enable_bf16", [False, True])
def test_8da8w_in_bf16_which_the_runtime_does_not_load_is_refused(enable_bf16: bool) -> None:
    model, x = mlp(dynamic(8, None, weight_scale_dtype=torch.float32), torch.bfloat16), example(5, IN).bfloat16()
    program, partitioner = torch.export.export(model, (x,)), ecp.XnnpackPartitioner(enable_bf16=enable_bf16)
    stock = lowered(program, Stock(enable_bf16=True))
    with pytest.raises(RuntimeError):
        output(stock, x)
    with pytest.raises(ValueError, match="keep_dynamic_int8 wanted activations .* found bfloat16; export in float32"):
        lowered(program, partitioner)


def test_8da8w_in_fp16_is_right_with_scales_in_float32() -> None:
    x = example(5, IN, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16 scales, .* quantize with weight_scale_dtype=torch.float32"):
        lowered(torch.export.export(mlp(dynamic(8, None), torch.float16), (x,)), ecp.XnnpackPartitioner())
    model = mlp(dynamic(8, None, weight_scale_dtype=torch.float32), torch.float16)
    assert through(ecp.XnnpackPartitioner(expect={"keep_dynamic_int8": 2}), model, x) < DYNAMIC_ERROR_ROUNDED_SCALES


class ByHand(nn.Module):
    """linear(fake-quantized x, dequantized int4 weight [OUT, IN]), written out: every argument can be made unusual.

    Args:
        activation: (quant_min, quant_max) of the activation; None leaves x as it is.
        scale: makes another scale tensor, of the same values, from the scales.
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


def test_two_scales_for_the_same_integers_are_folded_to_two_weights() -> None:
    ours = ecp.XnnpackPartitioner()
    assert through(ours, ByHand(activation=None, again=True).eval(), example(5, IN)) < FLOAT_ERROR
    assert fates(ours) == [("rewritten", "fold_dequantize")] * 2


def inside_a_larger_tensor(scale: Tensor) -> Tensor:
    """The same values, as the contiguous second half of a storage whose first half is something else."""
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


SILENTLY_WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[ExportedProgram], ExportedProgram]]] = {
    "8da4w with zero points": (
        lambda: one(dynamic(weight_scale_dtype=EXACT_SCALES, weight_mapping_type=MappingType.ASYMMETRIC)),
        as_exported,
    ),
    "8da8w with zero points": (lambda: one(dynamic(8, None, weight_mapping_type=MappingType.ASYMMETRIC)), as_exported),
    "weight-only, decomposed": (lambda: one(weight_only(4, 32)), decomposed),
    "8da4w, decomposed": (lambda: one(dynamic(weight_scale_dtype=EXACT_SCALES)), decomposed),
    "8da4w, linear decomposed": (lambda: one(dynamic(weight_scale_dtype=EXACT_SCALES)), linear_decomposed),
    "4-bit activation": (lambda: ByHand(activation=(-8, 7)), as_exported),
    "two scales for the same integers": (lambda: ByHand(again=True), as_exported),
    "scales inside a larger tensor": (lambda: ByHand(scale=inside_a_larger_tensor), as_exported),
}


@pytest.mark.parametrize("case", SILENTLY_WRONG)
def test_what_the_delegate_computes_wrongly_is_made_right_or_refused(case: str) -> None:
    make, prepare = SILENTLY_WRONG[case]
    model, x = make().eval(), example(5, IN)
    program = prepare(torch.export.export(model, (x,)))
    # Otherwise the case shows nothing: the stock partitioner must be wrong here, and say nothing.
    assert error(output(lowered(program, Stock()), x), model(x)) > 0.01
    pte = lowered_unless_refused(program)
    assert pte is None or error(output(pte, x), model(x)) < DYNAMIC_ERROR


LOUD: dict[str, tuple[Any, torch.dtype]] = {
    "8da8w in groups": (dynamic(8, 32), torch.float32),
    "8da4w in groups of 16": (dynamic(4, 16), torch.float32),
    "8da4w in bf16": (dynamic(4, 32), torch.bfloat16),
}


@pytest.mark.parametrize("case", LOUD)
def test_what_the_delegate_cannot_lower_is_made_right_or_refused_with_the_cause(case: str) -> None:
    config, dtype = LOUD[case]
    model, x = one(config, dtype), example(5, IN, dtype=dtype)
    pte = lowered_unless_refused(torch.export.export(model, (x,)))
    assert pte is None or error(output(pte, x), model(x)) < (3e-2 if dtype == torch.bfloat16 else DYNAMIC_ERROR)


def test_8da8w_per_axis_which_the_stock_partitioner_lowers_rightly_stays_right() -> None:
    assert through(ecp.XnnpackPartitioner(), one(dynamic(8, None)), example(5, IN)) < DYNAMIC_ERROR
