"""Near misses of the rules that keep or prepare a weight for the kernel of a backend."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.rules.coreml import KeepCoremlWeight
from et_cuda_passes.rules.fold import DropActivationQuantization
from et_cuda_passes.rules.mlx import KeepMlxWeight
from et_cuda_passes.rules.openvino import DecompressInt4, DecompressInt8
from et_cuda_passes.rules.tensorrt import KeepTensorrtWeight
from et_cuda_passes.rules.vulkan import CopyTiedWeight, KeepVulkanDynamicLinear, KeepVulkanEmbedding, KeepVulkanLinear
from et_cuda_passes.testing import NearMiss, Quantized, export, floats
from tests.rules.linear_models import EightBitActivations
from tests.rules.xnnpack_models import Dynamic

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OUT, IN = 32, 64
IDS = torch.tensor([[1, 5, 0], [2, 2, 7]])
INT8: dict[str, Any] = {"low": -128, "high": 127}

NearMisses = Mapping[str, Callable[[], ExportedProgram] | NearMiss]
Change = Callable[[Any], Any]


class Branch(nn.Module):
    """``inner`` in one branch of a cond, and ones like its result in the other."""

    def __init__(self, inner: nn.Module, x: Tensor) -> None:
        super().__init__()
        value = inner(x)
        self.inner, self.size, self.dtype = inner, tuple(value.shape), value.dtype

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, self.inner, lambda given: torch.ones(self.size, dtype=self.dtype), (x,))


class Autocast(nn.Module):
    """``inner`` under autocast to bf16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return self.inner(x)


class Twice(Quantized):
    """A weight that is dequantized once for each of two linears."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight()) + F.linear(x, self.weight())


class BothRead(Dynamic):
    """Two linears that read one dequantized weight."""

    def forward(self, x: Tensor) -> Tensor:
        block = [1] * (x.dim() - 1) + [IN]
        ao = torch.ops.torchao
        scale, zero = ao.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, -128, 127, None, FP32, torch.int8)
        integers = ao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
        y = ao.dequantize_affine(integers, block, scale, zero, torch.int8, -128, 127, output_dtype=FP32)
        weight = self.weight(self.scale)
        return F.linear(y, weight) + F.linear(y, weight, self.bias)


def lookup(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.embedding(x, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def unchanged(model: Any) -> Any:
    return model


def with_integer(value: int) -> Change:
    def change(model: Any) -> Any:
        model.data.view(-1)[0] = value
        return model

    return change


def with_scale(value: float) -> Change:
    def change(model: Any) -> Any:
        model.scale.view(-1)[0] = value
        return model

    return change


def shared_by_rows(model: Any) -> Any:
    """One scale for two rows."""
    model.block = [2, model.block[1]]
    model.scale = model.scale[: len(model.scale) // 2].clone()
    if model.zero_point is not None:
        model.zero_point = model.zero_point[: len(model.zero_point) // 2].clone()
    return model


class WithoutRange(Quantized):
    """The range of int8 by the operator's defaults."""

    def weight(self) -> Tensor:
        weight: Tensor = torch.ops.torchao.dequantize_affine(
            self.data, self.block, self.scale, self.zero_point, self.data.dtype, output_dtype=self.dtype
        )
        return weight


class SharedZeroPoints(Quantized):
    """Two weights with one tensor of zero points, and scales of their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("other_scale", self.scale * 3)

    def forward(self, x: Tensor) -> Tensor:
        scheme = (self.zero_point, self.data.dtype, self.low, self.high)
        other = torch.ops.torchao.dequantize_affine(
            self.data, self.block, self.other_scale, *scheme, output_dtype=self.dtype
        )
        return F.linear(x, self.weight()) + F.linear(x, other)


def flat_scales(model: Any) -> Any:
    model.scale = model.scale.view(-1)
    return model


def as_vector(model: Any) -> Any:
    model.data, model.block = model.data.view(-1), [model.block[1]]
    model.scale, model.zero_point = model.scale.view(-1), None
    return model


def far_zero_points(model: Any) -> Any:
    model.zero_point += 100
    return model


def made(
    *shape: int, change: Change = unchanged, cls: type[Quantized] = Quantized, inner: Any = None, **options: Any
) -> Callable[[], ExportedProgram]:
    """A program of one weight; ``inner`` wraps the model."""

    def make() -> ExportedProgram:
        given = {"n": OUT, "k": IN, "dtype": FP32, "form": linear, **options}
        x = IDS if given["form"] is lookup else floats(*(shape or (4, given["k"])), dtype=given["dtype"])
        model = change(cls(**given))
        if inner is Branch:
            model = Branch(model, x)
        elif inner is not None:
            model = inner(model)
        return export(model, x)

    return make


def without_data(model: nn.Module, x: Tensor) -> Callable[[], ExportedProgram]:
    return lambda: export(model.to("meta"), x.to("meta"))


def dynamic(
    *shape: int, change: Change = unchanged, inner: Any = None, **options: Any
) -> Callable[[], ExportedProgram]:
    """A linear of dynamically quantized activations."""

    def make() -> ExportedProgram:
        x = floats(*(shape or (4, IN)), dtype=options.get("dtype", FP32))
        model = change(Dynamic(**options))
        if inner is Branch:
            model = Branch(model, x)
        elif inner is not None:
            model = inner(model)
        return export(model, x)

    return make


def of_torchao(n: int, k: int, group: int) -> Callable[[], ExportedProgram]:
    """The same, as torchao writes it, for any size."""

    def make() -> ExportedProgram:
        model = nn.Sequential(nn.Linear(k, n)).eval()
        quantize_(model, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(group)))
        return export(model, floats(4, k, dtype=FP32))

    return make


def dynamic_shared_by_rows() -> ExportedProgram:
    return export(Dynamic(rows=2), floats(4, IN, dtype=FP32))


TABLE: dict[str, Any] = {"form": lookup}
ALSO_TABLE = ("scales_are_a_table",)

VULKAN_WEIGHT: dict[str, dict[str, Any]] = {
    "stands_in_main_graph": {"inner": Branch},
    "backend_has_dtype": {"dtype": BF16},
    "storage_is_int8": {"storage": torch.int32},
    "scales_are_a_table": {"change": flat_scales},
    "zero_points_are_all_zero": {"zero_points": "random"},
    "scales_fit": {"change": with_scale(0.0)},
}


def vulkan_weight(**base: Any) -> dict[str, Any]:
    """Near misses of the requirements of a weight for Vulkan."""
    given = {"n": OUT, "k": IN, "dtype": FP32, "form": linear, **base}
    cls = given.pop("cls", Quantized)
    x = IDS if given["form"] is lookup else floats(4, IN, dtype=FP32)
    return {
        "weight_has_data": without_data(cls(**given), x),
        **{name: made(**{**base, **options}) for name, options in VULKAN_WEIGHT.items()},
        "each_row_has_its_scales": NearMiss(made(change=shared_by_rows, **base), also=ALSO_TABLE),
        "integers_are_4_bit": made(change=with_integer(100), **base),
        "n_is_a_multiple_of_4": made(n=30, **base),
    }


def read_twice(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, weight, bias), weight.sum()


def found_twice(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.embedding(x, weight), weight.sum()


def of_found_twice() -> ExportedProgram:
    return export(Quantized(OUT, IN, dtype=FP32, form=found_twice), IDS)


COREML: dict[str, dict[str, Any]] = {
    "range_is_given": {"cls": WithoutRange, **INT8},
    "stands_in_main_graph": {"inner": Branch},
    "backend_has_dtype": {"dtype": BF16, "scale_dtype": FP32},
    "storage_is_int8_or_int32": {"storage": torch.int16},
    "each_row_has_its_scales": {"change": shared_by_rows},
    "range_is_int4_or_int8": {"low": -4, "high": 3},
    "scales_are_fp32_or_fp16": {"scale_dtype": BF16},
    "integers_are_in_range": {"change": with_integer(100)},
    "zero_points_fit_the_integers": {"change": far_zero_points},
    "scales_fit": {"change": with_scale(1e-9)},
}
OPENVINO: dict[str, dict[str, Any]] = {
    "stands_in_main_graph": {"inner": Branch},
    "backend_has_dtype": {"dtype": BF16},
    "openvino_has_group_size": {"k": 36, "group": 12},
    "weight_has_rows": {"n": 1},
    "scales_are_finite_in_output_dtype": {"dtype": FP16, "scale_dtype": FP32, "change": with_scale(1e6)},
}
MLX: dict[str, dict[str, Any]] = {
    "range_is_given": {"cls": WithoutRange, **INT8},
    "zero_points_are_of_one_weight": {"cls": SharedZeroPoints},
    "stands_in_main_graph": {"inner": Branch},
    "storage_is_int8": {"storage": torch.int32},
    "zero_points_are_a_tensor": {"zero_points": None},
    "each_row_has_its_scales": {"change": shared_by_rows},
    "group_is_a_multiple_of_16": {"group": 8},
    "range_is_signed_and_whole": {"low": -4, "high": 3},
    "row_fills_words": {"low": -16, "high": 15, "k": 16, "group": 16},
    "scales_have_the_dtype_of_the_weight": {"scale_dtype": BF16},
    "integers_are_in_range": {"change": with_integer(100)},
    "scales_are_finite": {"change": with_scale(float("inf"))},
}
TENSORRT: dict[str, dict[str, Any]] = {
    "stands_in_main_graph": {"inner": Branch},
    "storage_is_int8": {"storage": torch.int32},
    "each_row_has_its_scales": {"change": shared_by_rows},
    "scheme_is_int4_group_or_int8_axis": INT8,
    "zero_points_are_all_zero": {"zero_points": "random"},
    "integers_are_in_range": {"change": with_integer(100)},
    "scales_are_finite": {"change": with_scale(float("inf"))},
}


def plain(listed: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    x = floats(4, IN, dtype=FP32)
    return {
        "weight_has_data": without_data(Quantized(OUT, IN, dtype=FP32, form=linear), x),
        **{name: made(**options) for name, options in listed.items()},
    }


def in_half(target: str) -> NearMiss:
    """A float32 weight for a target that has float16 alone: torchao writes no dtype that these targets lack."""
    return NearMiss(made(), replace(ecp.get_target(target), name="half", dtypes=(FP16,)))


def vector_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight)


def openvino(base: dict[str, Any], with_minimums: Callable[[], ExportedProgram]) -> dict[str, Any]:
    x = floats(4, IN, dtype=FP32)
    return {
        "weight_has_data": without_data(Quantized(OUT, IN, dtype=FP32, form=linear, **base), x),
        **{name: made(**{**base, **options}) for name, options in OPENVINO.items()},
        "weight_is_a_matrix": made(n=1, form=vector_product, change=as_vector, **base),
        "weight_has_no_minimum": with_minimums,
        "integers_are_in_range": made(change=with_integer(100), **{**base, "high": base.get("high", 7) // 2}),
    }


def cases(
    with_minimums: Callable[[], ExportedProgram], with_5_bits: Callable[[], ExportedProgram]
) -> dict[str, tuple[ecp.Rule, str, NearMisses]]:
    """The near misses of each rule by name, with its target.

    ``with_minimums`` and ``with_5_bits`` export weights of GGUF blocks, of 4 and 5 bits with minimums.
    """
    listed: list[tuple[ecp.Rule, str, NearMisses]] = [
        (
            KeepVulkanLinear(),
            "vulkan",
            vulkan_weight()
            | {
                "zero_points_are_a_tensor": made(zero_points=None),
                "k_is_a_multiple_of_8": made(k=36, group=12),
                "group_is_a_multiple_of_4": made(k=40, group=10),
                "weight_has_one_reader": made(form=read_twice),
                "same_dtype": made(inner=Autocast),
                "bias_is_a_constant_vector": made(form=lambda x, w, b: F.linear(x, w, b * 2)),
                "rows_are_one_axis": made(2, 3, IN),
                "view_keeps_rows": made(4, 4, IN // 4, form=lambda x, w, b: F.linear(x.flatten(1), w, b)),
            },
        ),
        (
            KeepVulkanDynamicLinear(),
            "vulkan",
            {
                "weight_has_data": without_data(Dynamic(), floats(4, IN, dtype=FP32)),
                "stands_in_main_graph": dynamic(inner=Branch),
                "backend_has_dtype": dynamic(dtype=BF16),
                "storage_is_int8": dynamic(storage=torch.int32),
                "each_row_has_its_scales": NearMiss(dynamic_shared_by_rows, also=ALSO_TABLE),
                "group_is_a_multiple_of_4": of_torchao(OUT, 40, 10),
                "scales_are_a_table": dynamic(change=flat_scales),
                "zero_points_are_all_zero": dynamic(zero_point=3),
                "integers_are_4_bit": dynamic(low=-128, high=127),
                "scales_fit": dynamic(scale=0.0),
                "zero_points_are_a_tensor": dynamic(zero_point=None),
                "k_is_a_multiple_of_8": of_torchao(OUT, 36, 12),
                "n_is_a_multiple_of_4": of_torchao(30, IN, 32),
                "weight_has_one_reader": lambda: export(BothRead(), floats(4, IN, dtype=FP32)),
                "activation_is_per_token": dynamic(activation={"mapping": "SYMMETRIC"}),
                "activation_has_no_other_reader": dynamic(reader="dequantized"),
                "activation_has_two_dimensions": dynamic(IN),
                "same_dtype": dynamic(inner=Autocast),
                "bias_is_a_constant_vector": dynamic(bias="computed"),
                "rows_are_one_axis": dynamic(2, 3, IN),
            },
        ),
        (
            KeepVulkanEmbedding(),
            "vulkan",
            vulkan_weight(**TABLE)
            | {
                "table_is_declared_4_bit": made(low=-4, high=3, **TABLE),
                "row_is_a_multiple_of_32": made(k=48, group=16, **TABLE),
                "group_is_a_multiple_of_4": made(group=2, **TABLE),
                "weight_has_one_reader": of_found_twice,
            },
        ),
        (
            CopyTiedWeight(),
            "vulkan",
            vulkan_weight(cls=Twice)
            | {
                "weight_is_dequantized_before": made(),
                "zero_points_are_a_tensor": made(zero_points=None, cls=Twice),
                "group_is_a_multiple_of_4": made(k=40, group=10, cls=Twice),
            },
        ),
        (KeepCoremlWeight(), "coreml", plain(COREML)),
        (KeepMlxWeight(), "mlx", plain(MLX) | {"backend_has_dtype": in_half("mlx")}),
        (KeepTensorrtWeight(), "tensorrt", plain(TENSORRT) | {"backend_has_dtype": in_half("tensorrt")}),
        (DecompressInt4(), "openvino", openvino({}, with_minimums) | {"weight_fits_4_bits": made(**INT8)}),
        (
            DecompressInt8(),
            "openvino",
            openvino(INT8, with_5_bits) | {"weight_fits_8_bits": made(low=-1000, high=1000, storage=torch.int16)},
        ),
        (
            DropActivationQuantization(),
            "coreml",
            {
                "quantization_can_be_dropped": lambda: export(
                    EightBitActivations(other_scale=True), floats(2, IN, dtype=BF16)
                ),
                "has_a_reader_that_is_not_kept": NearMiss(of_torchao(OUT, IN, 32), target="vulkan"),
            },
        ),
    ]
    return {rule.name: (rule, target, near_misses) for rule, target, near_misses in listed}
