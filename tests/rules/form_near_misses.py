"""Near misses of the rules that restore a dequantize, and of those for weights in floats."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import executorch.extension.llm.export.mx  # noqa: F401  (registers dequantize_mx)
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.layouts import scale_and_zero, tile_packed_to_4d
from et_cuda_passes.rules.float_linear import LinearFloat4, LinearFloat8
from et_cuda_passes.rules.fold import FoldFloats
from et_cuda_passes.rules.mlx import KeepMlxForm
from et_cuda_passes.rules.restore import (
    CompileFloatDequantize,
    RestoreFloat8,
    RestoreInt4Nested,
    RestoreInt8,
    UnpackLinear,
)
from et_cuda_passes.testing import NearMiss, export, floats
from tests.rules.keep_near_misses import Branch
from tests.rules.linear_models import quantized_to_8_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
ops = torch.ops.et_cuda_passes
NearMisses = Mapping[str, Callable[[], ExportedProgram] | NearMiss]


def rows(k: int = 64, dtype: torch.dtype = BF16) -> Tensor:
    return floats(3, k, dtype=dtype)


class Holding(nn.Module):
    """``form(x, parts)`` of tensors in buffers."""

    def __init__(self, form: Callable[..., Tensor], **parts: Tensor) -> None:
        super().__init__()
        self.form = form
        for name, part in parts.items():
            self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, dict(self.named_buffers()))


# Floats of 8 and 4 bits


def float8_parts(n: int = 16, k: int = 64, groups: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    data = (torch.randn(n, k, generator=random) * 50).to(E4M3)
    return {"data": data, "scale": torch.rand(n, groups, generator=random) * 0.01 + 0.001}


def float4_parts(n: int = 16, k: int = 64, group: int = 16) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (n, k // 2), generator=random).to(torch.uint8)
    return {"data": data, "scale": torch.rand(n, k // group, generator=random).to(E4M3)}


def times(weight: Callable[[Tensor, dict[str, Tensor]], Tensor], bias: torch.dtype | None = None) -> Any:
    def form(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        added = None if bias is None else torch.ones(parts["data"].shape[0], dtype=bias)
        return torch.nn.functional.linear(x, weight(x, parts), added)

    return form


def float8(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    return ops.dequantize_float8(parts["data"], parts["scale"], x.dtype)


def float4(group: int = 16) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    return lambda x, parts: ops.dequantize_float4(parts["data"], parts["scale"], None, group, x.dtype)


class Autocast(nn.Module):
    """``inner`` and a bias in fp32 under autocast to bf16."""

    def __init__(self, inner: Holding, n: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("bias", torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            weight = self.inner.form(x, dict(self.inner.named_buffers()))
            return torch.nn.functional.linear(x, weight, self.bias)


def on_meta(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    return torch.export.export(model.to("meta"), tuple(x.to("meta") for x in inputs))


def float_linear(
    rule: ecp.Rule, parts: Callable[..., dict[str, Tensor]], weight: Callable[[Tensor, dict[str, Tensor]], Tensor]
) -> dict[str, Any]:
    """Near misses of the requirements that both rules have."""
    return {
        "weight_has_data": lambda: on_meta(Holding(times(weight), **parts()), rows()),
        "same_dtype": lambda: export(Autocast(Holding(weight, **parts()), 16), rows()),
        "kernel_has_activation_dtype": lambda: export(Holding(times(weight), **parts()), rows(dtype=FP32)),
    }


def nan(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    parts["data"].view(torch.int8)[0, 0] = 127
    return parts


def tiny(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**parts, "scale": parts["scale"] * 1e-4}


LINEAR8 = LinearFloat8()
FLOAT8: NearMisses = float_linear(LINEAR8, float8_parts, float8) | {
    "weight_is_grouped_along_k": NearMiss(
        lambda: export(Holding(times(float8), data=torch.ones(64).to(E4M3), scale=torch.ones(1)), rows()),
        also=("kernel_tiles_divide_k",),
    ),
    "kernel_has_group_size": lambda: export(Holding(times(float8), **float8_parts(groups=8)), rows()),
    "kernel_tiles_divide_k": lambda: export(Holding(times(float8), **float8_parts(k=40)), rows(40)),
    "numbers_are_finite": lambda: export(Holding(times(float8), **nan(float8_parts())), rows()),
    "scales_keep_their_precision": lambda: export(Holding(times(float8), **tiny(float8_parts())), rows(dtype=FP16)),
}
LINEAR4 = LinearFloat4()
FLOAT4: NearMisses = float_linear(LINEAR4, float4_parts, float4()) | {
    "kernel_has_group_size": lambda: export(Holding(times(float4(8)), **float4_parts(group=8)), rows()),
    "kernel_tiles_divide_k": NearMiss(
        lambda: export(Holding(times(float4(40)), **float4_parts(k=40, group=40)), rows(40)),
        also=("kernel_has_group_size",),
    ),
    "scales_keep_their_precision": lambda: export(
        Holding(
            times(lambda x, parts: ops.dequantize_float4(parts["data"], parts["scale"], parts["all"], 16, x.dtype)),
            **float4_parts(),
            all=torch.tensor(1e-6),
        ),
        rows(dtype=FP16),
    ),
}

# Packed for a product


def tile_parts(n: int = 16, k: int = 64) -> dict[str, Tensor]:
    q = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pairs = scale_and_zero.pack(torch.full((n, k // 32), 0.1), torch.zeros(n, k // 32))
    return {"data": tile_packed_to_4d.pack(q, 4), "pairs": pairs}


def product(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, parts["data"], 32, parts["pairs"])


def infinite_pairs(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    parts["pairs"][0, 0, 0] = float("inf")
    return parts


# Arithmetic


def converted(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    return (parts["data"].float() * parts["scale"]).to(x.dtype)


def int8_arithmetic(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    groups = parts["data"].to(x.dtype).reshape(16, 2, 32)
    scale, zero = (parts[name].to(x.dtype).reshape(16, 2, 1) for name in ("scale", "zero"))
    return ((groups - zero) * scale).reshape(16, 64)


def int8_parts(dtype: torch.dtype) -> dict[str, Tensor]:
    zero = torch.zeros(16, 2, dtype=torch.int8)
    return {"data": torch.ones(16, 64).to(dtype), "scale": torch.ones(16, 2), "zero": zero}


def nested_arithmetic(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    packed = parts["data"].reshape(16, 8, 16)
    both = [(packed & 15).to(x.dtype), ((packed >> 4) & 15).to(x.dtype)]
    data = torch.stack(both, dim=-1).reshape(16, 8, 32)
    scale, zero = (
        (parts[name].to(x.dtype) * parts[f"{name}_step"].to(x.dtype).repeat_interleave(8, dim=1)).unsqueeze(-1)
        for name in ("scale", "zero")
    )
    return ((data - zero) * scale).reshape(16, 256)


def nested_parts(scales: int) -> dict[str, Tensor]:
    """One scale a row is repeated by the arithmetic, and by no operator."""
    codes = torch.ones(16, 8, dtype=torch.uint8)
    step = torch.ones(16, 1, dtype=FP16)
    data = torch.ones(16, 128, dtype=torch.uint8)
    return {
        "data": data,
        "scale": codes[:, :scales],
        "scale_step": step,
        "zero": codes.clone(),
        "zero_step": step.clone(),
    }


def case(rule: ecp.Rule, near_misses: NearMisses, target: str = "cuda") -> tuple[ecp.Rule, str, NearMisses]:
    return rule, target, near_misses


def under_8_bit_activations(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.linear(quantized_to_8_bits(x, x), float8(x, parts))


def with_another_type(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    return torch.ops.torchao.dequantize_mx(parts["data"], parts["scale"], torch.float8_e5m2, 32, x.dtype)


def mx_parts(scale: int = 120, dtype: torch.dtype = E4M3) -> dict[str, Tensor]:
    data = float8_parts()["data"].to(dtype)
    return {"data": data, "scale": torch.full((16, 2), scale, dtype=torch.uint8).view(torch.float8_e8m0fnu)}


def mx(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    weight: Tensor = torch.ops.torchao.dequantize_mx(parts["data"], parts["scale"], parts["data"].dtype, 32, x.dtype)
    return weight


def read_twice(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    weight = mx(x, parts)
    return torch.nn.functional.linear(x, weight) + torch.nn.functional.linear(x, weight)


FOLDED: NearMisses = {
    "backend_has_dtype": NearMiss(lambda: export(Holding(times(float8), **float8_parts()), rows()), target="vulkan"),
    "readers_have_float_activations": lambda: export(Holding(under_8_bit_activations, **float8_parts()), rows()),
    "weight_has_data": lambda: on_meta(Holding(times(float8), **float8_parts()), rows()),
    "scales_are_finite": lambda: export(
        Holding(times(float8), **{**float8_parts(), "scale": torch.full((16, 1), float("inf"))}), rows()
    ),
}
RULES = {
    LINEAR8: (FLOAT8, "cuda"),
    LINEAR4: (FLOAT4, "cuda"),
}
CASES: dict[str, tuple[ecp.Rule, str, NearMisses]] = {
    rule.name: case(rule, near_misses, target) for rule, (near_misses, target) in RULES.items()
}
CASES["unpack_linear"] = case(
    UnpackLinear(),
    {
        "packed_weight_has_data": lambda: on_meta(Holding(product, **tile_parts()), rows()),
        "packed_scales_are_finite": lambda: export(Holding(product, **infinite_pairs(tile_parts())), rows()),
    },
)
CASES["restore_float8"] = case(
    RestoreFloat8(),
    {
        "product_is_the_weight": lambda: export(Holding(times(converted), **float8_parts()), rows()),
        "float8_parts_fit": lambda: export(
            Holding(times(converted), **{**float8_parts(), "scale": torch.ones(64)}), rows()
        ),
    },
)
CASES["restore_int4_nested"] = case(
    RestoreInt4Nested(),
    {"nested_parts_fit": lambda: export(Holding(times(nested_arithmetic), **nested_parts(1)), rows(256))},
)
CASES["restore_int8"] = case(
    RestoreInt8(),
    {"int8_parts_fit": lambda: export(Holding(times(int8_arithmetic), **int8_parts(torch.uint8)), rows())},
)
CASES["fold_floats"] = case(FoldFloats(), FOLDED, "cpu")
CASES["compile_float_dequantize"] = case(
    CompileFloatDequantize(),
    {"weight_is_decoded": lambda: export(Holding(times(with_another_type), **float8_parts(groups=2)), rows())},
)
CASES["keep_mlx_form"] = case(
    KeepMlxForm(),
    {
        "weight_has_data": lambda: on_meta(Holding(times(mx), **mx_parts()), rows()),
        "stands_in_main_graph": lambda: export(Branch(Holding(times(mx), **mx_parts()), rows()), rows()),
        "backend_has_dtype": NearMiss(
            lambda: export(Holding(times(mx), **mx_parts()), rows()),
            replace(ecp.get_target("mlx"), name="half", dtypes=(FP16,)),
        ),
        "weight_has_one_reader": lambda: export(Holding(read_twice, **mx_parts()), rows()),
        "form_has_a_kernel": lambda: export(Holding(times(mx), **mx_parts(dtype=torch.float8_e5m2)), rows()),
        "scales_are_finite": lambda: export(Holding(times(mx), **mx_parts(scale=255)), rows()),
    },
    "mlx",
)
