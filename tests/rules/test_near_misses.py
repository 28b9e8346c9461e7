"""A near miss of every requirement of every rule: a program that this requirement rejects, and no other."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.rules.attention import CastAttention
from et_cuda_passes.rules.epilogue import FuseActivation, FuseAdd, FuseMultiply
from et_cuda_passes.rules.split import ReplaceSplit
from et_cuda_passes.rules.xnnpack import SplitBroadcastBias
from et_cuda_passes.rules.xnnpack_activations import QuantizeActivation, ShareActivation
from et_cuda_passes.rules.xnnpack_attention import AttentionOfGroups
from et_cuda_passes.rules.xnnpack_operators import ExpandTanhGelu, LargestAlone, ProductAsLinear
from et_cuda_passes.testing import Experts, NearMiss, Quantized, Sketch, assert_near_misses, export, floats
from tests.experts import IDS, OFFS, E, K, N
from tests.rules import form_near_misses, keep_near_misses
from tests.rules.linear_models import Convolution, EightBitActivations, quantized_to_8_bits
from tests.rules.xnnpack_models import CalibratedConvolution, Decomposed, Dynamic, InBranch, Siblings, WeightOnly

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
aten = torch.ops.aten

NearMisses = Mapping[str, Callable[[], ExportedProgram] | NearMiss]
Make = Callable[..., nn.Module]
CASES: dict[str, tuple[ecp.Rule, str, NearMisses]] = {}
"""For each rule by name: the rule, its target, and its near misses."""


def case(rule: ecp.Rule, near_misses: NearMisses, target: str = "cuda") -> None:
    CASES[rule.name] = (rule, target, near_misses)


class Autocast(nn.Module):
    """``inner`` under autocast to bf16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return self.inner(*inputs)


class Branch(nn.Module):
    """``inner`` in one branch of a cond, and zeros like its result in the other."""

    def __init__(self, inner: nn.Module, *inputs: Tensor) -> None:
        super().__init__()
        self.inner, self.size = inner, inner(*inputs).shape

    def forward(self, *inputs: Tensor) -> Any:
        size = tuple(self.size)
        return torch.cond(
            inputs[0].sum() > 0, lambda *given: self.inner(*given), lambda *given: given[0].new_zeros(size), inputs
        )


def outside_of_the_range(model: Any) -> Any:
    model.data.view(-1)[0] = model.high + 1
    return model


def without_bias(model: Any) -> Any:
    model.bias = None
    return model


def infinite(model: Any) -> Any:
    model.scale.view(-1)[0] = float("inf")
    return model


def without_data(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    return export(model.to("meta"), *(each.to("meta") for each in inputs))


# Linears and pointwise convolutions -----------------------------------------------------------------------------------

DROP = {"drop_activation_quantization": True}


def packed_linear(rule: ecp.Rule, make: Make, x: Callable[..., Tensor], dropped: Make) -> dict[str, Any]:
    """Near misses of the requirements that all rules of linears share.

    ``make`` builds a layer from the options of :class:`Quantized`, ``x`` its input of K columns, and ``dropped`` a
    layer whose activations are quantized with the scale of another tensor.
    """
    return {
        "weight_has_data": lambda: without_data(make(), x()),
        "integers_are_in_range": lambda: export(outside_of_the_range(make()), x()),
        "same_dtype": lambda: export(Autocast(without_bias(make())), x(dtype=FP16)),
        "activation_quantization_can_be_dropped": NearMiss(
            lambda: export(dropped(), x()),
            rule=replace(rule, **DROP),  # type: ignore[type-var]
        ),
        "kernel_has_activation_dtype": lambda: export(make(dtype=FP32), x(dtype=FP32)),
        "scales_are_finite": lambda: export(infinite(make()), x()),
    }


_CPU = ecp.get_target("cpu")
KERNEL_ONLY = replace(
    _CPU,
    name="kernel_only",
    lowered_as="cpu",
    kernels={name: each for name, each in _CPU.kernels.items() if name != "int4_plain"},
)
"""The CPU without plain operators for int4, which run in control flow."""


def packed_int4(rule: ecp.Rule, make: Make, x: Callable[..., Tensor], dropped: Make) -> dict[str, Any]:
    """Those of the rules for int4."""
    return packed_linear(rule, make, x, dropped) | {
        "weight_fits_4_bits": lambda: export(make(low=-128, high=127), x()),
        "kernel_has_group_size": lambda: export(make(group=8), x()),
        "kernel_tiles_divide_k": NearMiss(lambda: export(make(k=40, group=40), x(40)), also=("kernel_has_group_size",)),
        "kernel_runs_in_control_flow": NearMiss(lambda: export(Branch(make(), x()), x()), KERNEL_ONLY),
    }


def packed_int8(rule: ecp.Rule, make: Make, x: Callable[..., Tensor], dropped: Make) -> dict[str, Any]:
    """Those of the rules for int8; ``make`` builds a layer with one scale per row by default."""
    return packed_linear(rule, make, x, dropped) | {
        "integers_are_in_range": lambda: export(outside_of_the_range(make(low=-64, high=63)), x()),
        "target_has_int8_kernel": NearMiss(lambda: export(make(), x()), "metal"),
        "weight_fits_8_bits": lambda: export(make(low=-1000, high=1000, storage=torch.int16), x()),
        "kernel_has_group_size": lambda: export(make(group=8), x()),
        "kernel_tiles_divide_k": lambda: export(make(k=40, group=40), x(40)),
        "kernel_adds_zeros_or_weight_is_symmetric": NearMiss(
            lambda: export(make(zero_points="random"), x()),
            "cpu",
            replace(rule, kernel="int8pack_cpu"),  # type: ignore[type-var]
        ),
    }


def linear(n: int = 16, k: int = 64, **options: Any) -> nn.Module:
    return Quantized(n, k, **options)


def rows(k: int = 64, dtype: torch.dtype = BF16) -> Tensor:
    return floats(2, k, dtype=dtype)


def vector_weight(**options: Any) -> nn.Module:
    """A linear whose weight is a vector: F.linear then sums over it."""
    model = Quantized(1, 64, form=lambda x, w, b: F.linear(x, w), **options)
    group = model.block[1]
    model.data, model.block = model.data.view(64), [group]
    model.scale, model.zero_point = model.scale.view(-1), None
    return model


def per_row(make: Make) -> Make:
    """``make`` with 8 bits and one scale per row by default."""
    return lambda k=64, **options: make(**{"k": k, "group": k, "low": -128, "high": 127, **options})


def other_scale(**options: Any) -> nn.Module:
    return EightBitActivations(other_scale=True, **options)


INT8_ROWS = {"low": -128, "high": 127, "group": 64}


LINEAR4, LINEAR8, FUSED = ecp.LinearInt4(), ecp.LinearInt8(), ecp.FusedLinearInt4()
VECTOR = NearMiss(lambda: export(vector_weight(), rows()), also=("kernel_tiles_divide_k",))
case(LINEAR4, packed_int4(LINEAR4, linear, rows, other_scale) | {"weight_is_grouped_along_k": VECTOR})
case(
    FUSED,
    packed_int4(FUSED, linear, rows, other_scale)
    | {
        "weight_is_grouped_along_k": VECTOR,
        "within_max_out_features": NearMiss(
            lambda: export(linear(), rows()), rule=ecp.FusedLinearInt4(max_out_features=8)
        ),
        "no_epilogue_is_lost": NearMiss(
            lambda: export(linear(form=lambda x, w, b: F.linear(x, w, b).relu()), rows()),
            rule=ecp.FusedLinearInt4(leave_epilogues=True),
        ),
        "weight_has_one_reader": lambda: export(linear(form=lambda x, w, b: (F.linear(x, w, b), w.sum())), rows()),
        "bias_is_constant_vector": lambda: export(linear(form=lambda x, w, b: F.linear(x, w, b * 2)), rows()),
    },
)
case(
    LINEAR8,
    packed_int8(LINEAR8, per_row(linear), rows, lambda: other_scale(**INT8_ROWS))
    | {
        "weight_is_grouped_along_k": NearMiss(
            lambda: export(vector_weight(**INT8_ROWS), rows()), also=("kernel_tiles_divide_k",)
        )
    },
)


def convolution(k: int = 64, **options: Any) -> nn.Module:
    return Convolution(k=k, **options)


def channels(k: int = 64, dtype: torch.dtype = BF16) -> Tensor:
    return floats(2, k, 5, dtype=dtype)


def other_scale_of_channels(**options: Any) -> nn.Module:
    return Convolution(**options, before=lambda x: quantized_to_8_bits(x, x + 1))


CONV4, CONV8 = ecp.ConvInt4(), ecp.ConvInt8()
CONV_MISSES = {
    "weight_is_grouped_along_k": NearMiss(
        lambda: export(Convolution(kernel=3), channels()), also=("convolution_is_pointwise",)
    ),
    "convolution_is_pointwise": NearMiss(
        lambda: export(Convolution(kernel=3), channels()), also=("weight_is_grouped_along_k",)
    ),
    "convolution_is_plain": lambda: export(Convolution(stride=2), channels()),
}
case(CONV4, packed_int4(CONV4, convolution, channels, other_scale_of_channels) | CONV_MISSES)
case(
    CONV8,
    packed_int8(CONV8, per_row(convolution), channels, lambda: other_scale_of_channels(**INT8_ROWS))
    | {
        "weight_is_grouped_along_k": NearMiss(
            lambda: export(Convolution(kernel=3, **INT8_ROWS), channels()), also=("convolution_is_pointwise",)
        ),
        "convolution_is_pointwise": NearMiss(
            lambda: export(Convolution(kernel=3, **INT8_ROWS), channels()), also=("weight_is_grouped_along_k",)
        ),
        "convolution_is_plain": lambda: export(Convolution(stride=2, **INT8_ROWS), channels()),
    },
)

# Embeddings -----------------------------------------------------------------------------------------------------------

ROW_IDS = torch.tensor([1, 2])


def table(k: int = 64, group: int = 32, low: int = -8, high: int = 7, **options: Any) -> nn.Module:
    return Quantized(16, k, group, low, high, form=lambda ids, w, b: F.embedding(ids, w), **options)


def with_minimums(kind: str = "q4_k", size: int = 144) -> ExportedProgram:
    """A table of GGUF's type Q4_K, whose blocks hold 256 weights in 144 bytes; or of Q5_K, in 176."""
    from executorch.extension.llm.export.gguf import ExportableGGUFTensor

    embedding = nn.Embedding(16, 256)
    blocks = ExportableGGUFTensor.from_raw(torch.zeros(16, size, dtype=torch.uint8), kind, FP32)
    embedding.weight = nn.Parameter(blocks, requires_grad=False)
    return export(nn.Sequential(embedding), ROW_IDS)


def with_too_many_scales() -> ExportedProgram:
    """2**31 scales, on the meta device, for the values of which nothing is checked."""

    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("data", torch.empty(1 << 27, 32, dtype=INT8, device="meta"))
            self.register_buffer("scale", torch.empty(1 << 27, 16, device="meta"))

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, ecp.DEQUANTIZE(self.data, [1, 2], self.scale, None, INT8, -8, 7, FP32))

    return export(Huge(), ROW_IDS.to("meta"))


def large_zero_points() -> nn.Module:
    model = table()
    model.zero_point = torch.full((16, 2), 301, dtype=torch.int32)
    return model


EMBEDDING_MISSES: dict[str, Any] = {
    "weight_has_data": lambda: without_data(table(), ROW_IDS),
    "integers_are_in_range": lambda: export(outside_of_the_range(table()), ROW_IDS),
    "scales_are_finite": lambda: export(infinite(table()), ROW_IDS),
}
INT16 = {"low": -1000, "high": 1000, "storage": torch.int16}
case(
    ecp.EmbeddingInt4(),
    EMBEDDING_MISSES
    | {
        "weight_fits_4_bits": lambda: export(table(low=-128, high=127), ROW_IDS),
        "kernel_has_group_size": lambda: export(table(group=8), ROW_IDS),
        "kernel_tiles_divide_k": NearMiss(lambda: export(table(40, 40), ROW_IDS), also=("kernel_has_group_size",)),
        "kernel_has_result_dtype": lambda: export(table(dtype=FP32), ROW_IDS),
    },
)
case(
    ecp.EmbeddingInt8(),
    EMBEDDING_MISSES | {"weight_fits_8_bits": lambda: export(table(**INT16), ROW_IDS)},
)
case(
    ecp.QuantizedEmbedding(),
    EMBEDDING_MISSES
    | {
        "table_fits_8_bits": lambda: export(table(**INT16), ROW_IDS),
        "groups_have_several_weights": lambda: export(table(group=1), ROW_IDS),
        "scales_can_be_counted": NearMiss(with_too_many_scales, also=("weight_has_data",)),
        "executorch_has_dtypes": lambda: export(table(scale_dtype=torch.float64), ROW_IDS),
        "weight_has_no_minimum": with_minimums,
        "zero_points_are_exact": lambda: export(large_zero_points(), ROW_IDS),
    },
    "xnnpack",
)

# Experts --------------------------------------------------------------------------------------------------------------

FORM = Callable[..., Tensor]


def outside_of_branches() -> ecp.Target:
    """The CPU, with no kernel in control flow."""
    cpu = ecp.get_target("cpu")
    kernels = {
        family: tuple(replace(kernel, in_control_flow=False) for kernel in each) for family, each in cpu.kernels.items()
    }
    return replace(cpu, name="outside_of_branches", kernels=kernels)


def stacked(form: FORM, *inputs: Tensor, block: tuple[int, ...] = (1, 8, 1)) -> dict[str, Any]:
    """Near misses of the requirements that all rules of experts share; the first of the inputs is x [..., K]."""
    x, *others = inputs

    def made(**options: Any) -> Callable[[], ExportedProgram]:
        return lambda: export(Experts(form, **options), x.to(options.get("dtype", BF16)), *others)

    narrow = x[..., :48]
    return {
        "weight_has_data": lambda: without_data(Experts(form), *inputs),
        "target_multiplies_experts": NearMiss(made(), "metal"),
        "stack_is_grouped_along_k": NearMiss(made(block=block), also=("kernel_has_group_size",)),
        "weight_fits_4_bits": made(low=-128, high=127),
        "kernel_has_group_size": made(block=(1, 1, 16)),
        "kernel_tiles_divide_k": NearMiss(
            lambda: export(Experts(form, (1, 1, 48), shape=(E, N, 48)), narrow, *others),
            also=("kernel_has_group_size",),
        ),
        "kernel_runs_in_control_flow": NearMiss(
            lambda: export(Branch(Experts(form), *inputs), *inputs), outside_of_branches()
        ),
        "kernel_has_activation_dtype": made(dtype=FP32),
        "same_dtype": lambda: export(Autocast(Experts(form)), x.to(FP16), *others),
        "integers_are_in_range": lambda: export(outside_of_the_range(Experts(form)), *inputs),
        "scales_are_finite": lambda: export(infinite(Experts(form)), *inputs),
    }


def all_experts(w: Tensor, x: Tensor) -> Tensor:
    return x @ w.mT


def selected(w: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return torch.matmul(x, w[ids].mT)


def by_expert(w: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(-2, -1), offs=offs)


def einsum(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("tk,enk->ten", x, w)


def experts_of(form: FORM, *inputs: Tensor, **options: Any) -> Callable[[], ExportedProgram]:
    return lambda: export(Experts(form), *inputs, **options)


def grouped(
    x: tuple[int, ...] = (11,), offs: int = E, view: bool = False, dtype: torch.dtype = BF16, result: torch.dtype = BF16
) -> ExportedProgram:
    """Written node by node: torch's operator refuses these shapes, and that of transformers might accept them."""
    sketch = Sketch()
    data = sketch.buffer("data", torch.zeros(E, N, K, dtype=INT8))
    scale = sketch.buffer("scale", torch.ones(E, N, K // 32, dtype=dtype))
    weight = sketch.call(ecp.DEQUANTIZE, data, [1, 1, 32], scale, None, INT8, -8, 7, dtype)
    stack = sketch.call(aten.transpose.int, weight, 1, 2)
    if view:
        stack = sketch.call(aten.expand.default, stack, [1, E, K, N])
        stack = sketch.call(aten.view.default, stack, [E, K, N])
    given = sketch.input("x", *x, K, dtype=dtype), sketch.input("offs", offs, dtype=torch.int32)
    y = torch.empty(*x, N, dtype=result)
    return sketch.program(sketch.raw(aten._grouped_mm.default, given[0], stack, given[1], val=y))


case(
    ecp.BmmInt4(),
    stacked(all_experts, floats(E, 5, K))
    | {
        "stack_keeps_its_shape": experts_of(all_experts, floats(1, E, 5, K), decompose=True),
        "x_has_rows_for_all_experts": experts_of(all_experts, floats(2, 1, 5, K)),
    },
)
case(
    ecp.IndexedBmmInt4(),
    stacked(selected, floats(6, 5, K), IDS)
    | {
        "stack_keeps_its_shape": experts_of(selected, floats(1, 6, 5, K), IDS, decompose=True),
        "ids_are_a_vector": NearMiss(
            experts_of(selected, floats(3, 2, 1, K), IDS.view(3, 2)), also=("x_has_rows_for_each_id",)
        ),
        "x_has_rows_for_each_id": experts_of(selected, floats(4, 5, K), IDS[:1]),
    },
)
case(
    ecp.GroupedMmInt4(),
    stacked(by_expert, floats(11, K), OFFS)
    | {
        "kernel_has_activation_dtype": lambda: grouped(dtype=FP32, result=FP32),
        "same_dtype": lambda: grouped(dtype=FP16),
        "stack_keeps_its_shape": lambda: grouped(view=True),
        "rows_are_sorted_by_expert": lambda: grouped((E, 5)),
    },
)
TOKENS, ROWS = Dim("tokens", min=2, max=64), Dim("rows", min=2, max=64)
case(
    ecp.EinsumInt4(),
    stacked(einsum, floats(5, K))
    | {
        "ids_are_integers": experts_of(
            lambda w, x, mask: torch.einsum("sk,snk->sn", x, w[mask]),
            floats(2, K),
            torch.tensor([True, False, True, False]),
        ),
        "axes_match": experts_of(lambda w, x: torch.einsum("etk,enk->etn", x, w), floats(1, 5, K)),
        "one_dynamic_axis": experts_of(
            lambda w, x, ids: torch.einsum("tarsk,tank->tarsn", x, w[ids]),
            floats(3, 2, 5, 2, K),
            IDS.view(3, 2),
            dynamic=({0: TOKENS, 2: ROWS}, {0: TOKENS}),
        ),
    },
)

# What follows a linear ------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """``use(first, second, x)`` of two int4 linears [n, 64], with a bias each if ``bias``."""

    def __init__(self, use: Callable[..., Any], n: int = 48, bias: bool = False) -> None:
        super().__init__()
        form = None if bias else (lambda x, w, b: F.linear(x, w))
        given = {} if form is None else {"form": form}
        self.first, self.second = (Quantized(n, 64, seed=seed, **given) for seed in (1, 2))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.first, self.second, x)


def pair(use: Callable[..., Any], **options: Any) -> Callable[[], ExportedProgram]:
    return lambda: export(Pair(use, **options), rows())


def rewritten(use: Callable[..., Any]) -> Callable[[], ExportedProgram]:
    """The program after a rewrite, which fused the first operand."""
    return lambda: ecp.rewrite(pair(use)(), "cuda")[0]


def viewed(use: Callable[..., Any]) -> Callable[[], ExportedProgram]:
    return lambda: export(Quantized(48, 64, form=use), floats(6, 1, 64))


case(
    ecp.RemoveLinearViews(),
    {
        "nothing_fused_yet": lambda: fused_before_views(),
        "views_keep_rows": viewed(lambda x, w, b: F.linear(x.view(6, 64), w, b).view(3, 2, 48)),
    },
)


def fused_before_views() -> ExportedProgram:
    """A program that was rewritten before: its linear between views has an activation already."""
    program = viewed(lambda x, w, b: F.silu(F.linear(x.view(6, 64), w, b)).view(6, 1, 48))()
    return ecp.rewrite(program, "cuda")[0]


def twice_activated() -> ExportedProgram:
    program = export(Quantized(48, 64, form=lambda x, w, b: F.relu(F.silu(F.linear(x, w, b)))), rows())
    return ecp.rewrite(program, "cuda")[0]


case(FuseActivation(), {"nothing_fused_yet": twice_activated})
case(
    ecp.FuseGate(),
    {
        "linears_differ": pair(lambda a, b, x: (y := a(x)) * y),
        "only_activation_fused": pair(lambda a, b, x: F.silu(a(x)) * F.silu(b(x))),
        "weights_can_interleave": pair(lambda a, b, x: F.silu(a(x)) * b(x), n=44),
        "constants_are_private": pair(lambda a, b, x: F.silu(a(x)) * b(x) + a(x + 1)),
    },
)
case(
    FuseMultiply(),
    {
        "same_shape_and_dtype": pair(lambda a, b, x: a(x) * x[:1, :48]),
        "operand_is_free": rewritten(lambda a, b, x: (a(x) + x[:, :48]) * x[:, 8:56]),
    },
)
case(
    FuseAdd(),
    {
        "same_shape_and_dtype": pair(lambda a, b, x: a(x) + x[:1, :48]),
        "operand_is_free": rewritten(lambda a, b, x: a(x) + x[:, :48] + x[:, 8:56]),
    },
)

# Rows of experts ------------------------------------------------------------------------------------------------------


class Histogram(nn.Module):
    def __init__(self, bins: int, low: float, high: float) -> None:
        super().__init__()
        self.range = bins, low, high

    def forward(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), *self.range)


case(
    ecp.CountExperts(),
    {
        "counts_whole_numbers": lambda: export(Histogram(4, 0, 3), floats(9)),
        "bins_are_integers": lambda: export(Histogram(4, 0, 4), IDS),
    },
)

# Attention ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with any options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def qkv(
    *shape: int, keys: int = 7, dtype: torch.dtype = BF16, inner: Make = nn.Identity, **options: Any
) -> Callable[[], ExportedProgram]:
    batch = shape or (2, 4, 5, 16)
    others = (*batch[:-2], keys, batch[-1])
    inputs = [floats(*size, dtype=dtype, seed=seed) for seed, size in enumerate((batch, others, others))]
    model = Attention(**options)
    return lambda: export(model if inner is nn.Identity else inner(model), *inputs)


BACKEND = ecp.UnmaskedAttention(kernel="backend")
BOOLS, NUMBERS = torch.ones(1, 1, 5, 7, dtype=torch.bool), torch.zeros(1, 1, 5, 7)
case(
    ecp.UnmaskedAttention(),
    {
        "attention_is_unmasked": qkv(is_causal=True),
        "same_dtype": qkv(dtype=FP16, inner=Autocast),
        "head_dimension_is_power_of_two": qkv(2, 4, 5, 24),
        "last_block_is_partial": NearMiss(qkv(keys=256), rule=BACKEND),
    },
)
case(
    CastAttention(),
    {
        "same_dtype": qkv(dtype=FP32, inner=Autocast),
        "attention_is_not_in_bf16": qkv(),
        "mask_is_boolean": qkv(dtype=FP32, attn_mask=NUMBERS),
    },
)
case(ecp.FuseAttentionTranspose(), {})
case(
    AttentionOfGroups(),
    {
        "attention_is_plain": qkv(dtype=FP32, is_causal=True),
        "same_dtype": qkv(dtype=FP32, inner=Autocast),
        "attention_is_fp32": qkv(),
        "mask_is_boolean": qkv(dtype=FP32, attn_mask=NUMBERS),
        "heads_are_static": qkv(4, 5, 16, dtype=FP32),
    },
    "xnnpack",
)

# Parts of a tensor ----------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self, split: Callable[..., Any]) -> None:
        super().__init__()
        self.split = split

    def forward(self, *inputs: Tensor) -> Tensor:
        first, second, *_ = self.split(*inputs)
        return first.sum() + second.sum()


case(
    ReplaceSplit(),
    {
        "axis_is_static": lambda: export(Parts(lambda x: x.chunk(2)), floats(4, 12), dynamic=({0: 2 * Dim("half")},)),
        "sizes_are_static": lambda: export(
            Parts(lambda x, y: x.split([y.shape[0], 12 - y.shape[0]], 1)),
            floats(4, 12),
            floats(5),
            dynamic=(None, {0: Dim("rows", min=2, max=10)}),
        ),
    },
)

# XNNPACK --------------------------------------------------------------------------------------------------------------

OUT, IN = 32, 64


def x_of(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return floats(*(shape or (4, IN)), dtype=dtype)


def dynamic_linear(form: dict[str, Any]) -> dict[str, Any]:
    """Near misses that the rules of dynamically quantized activations share."""

    def made(*shape: int, inner: Make = nn.Identity, **options: Any) -> Callable[[], ExportedProgram]:
        dtype = options.get("dtype", FP32)
        return lambda: export(
            Dynamic(**{**form, **options}) if inner is nn.Identity else inner(Dynamic(**{**form, **options})),
            x_of(*shape, dtype=dtype),
        )

    return {
        "weight_has_data": lambda: without_data(Dynamic(**form), x_of()),
        "is_outside_control_flow": made(inner=InBranch),
        "activation_is_per_token": made(activation={"mapping": "SYMMETRIC"}),
        "activation_has_no_other_reader": made(reader="dequantized"),
        "activation_has_two_dimensions": made(IN),
        "same_dtype": made(inner=Autocast),
        "bias_is_constant": made(bias="computed"),
        "integers_have_one_scale": made(reader="weight"),
        "constants_own_their_memory": made(within=True),
        "zero_points_are_zero": made(zero_point=3),
        "scales_are_normal": made(scale=0.0),
    }


def made_dynamic(**options: Any) -> Callable[[], ExportedProgram]:
    return lambda: export(Dynamic(**options), x_of(dtype=options.get("dtype", FP32)))


INT8_FORM: dict[str, Any] = {"low": -128, "high": 127, "group": IN}
case(
    ecp.KeepDynamicInt4(),
    dynamic_linear({})
    | {
        "activation_is_fp32_fp16_or_enabled_bf16": made_dynamic(dtype=BF16),
        "int4_storage_is_readable": made_dynamic(group=16),
        "weight_is_4_bit": made_dynamic(low=-4, high=3),
        "integers_are_in_range": made_dynamic(integer=8),
    },
    "xnnpack",
)
case(
    ecp.KeepDynamicInt8(),
    dynamic_linear(INT8_FORM)
    | {
        "activation_is_fp32_or_fp16": made_dynamic(**INT8_FORM, dtype=BF16),
        "int8_storage_is_readable": made_dynamic(low=-128, high=127, group=32),
        "weight_is_not_4_bit": made_dynamic(group=IN),
    },
    "xnnpack",
)


def made_static(
    form: dict[str, Any], *shape: int, inner: Make = nn.Identity, **options: Any
) -> Callable[[], ExportedProgram]:
    model = lambda: Decomposed(**{**form, **options})  # noqa: E731
    return lambda: export(model() if inner is nn.Identity else inner(model()), x_of(*(shape or (1, IN))))


def decomposed(form: dict[str, Any]) -> dict[str, Any]:
    """Near misses that the rules of PT2E's quantizers share."""
    return {
        "weight_has_data": lambda: without_data(Decomposed(**form), x_of(1, IN)),
        "is_outside_control_flow": made_static(form, inner=InBranch),
        "activation_is_int8": made_static(form, ends=(-127, 127, INT8)),
        "weight_is_int8_and_activation_fp32": made_static(form, storage=torch.uint8),
        "zero_points_are_zero": made_static(form, zero_point=5),
        "scales_are_normal": made_static(form, scale=0.0),
        "scales_are_fp32": made_static(form, scale_dtype=torch.float64),
        "integers_have_one_scale": made_static(form, reader="weight"),
        "constants_own_their_memory": made_static(form, within=True),
    }


TENSOR_FORM: dict[str, Any] = {"activation": "dynamic", "result": ""}
case(
    ecp.KeepDynamicPerTensor(),
    decomposed(TENSOR_FORM)
    | {
        "activation_has_one_row": made_static(TENSOR_FORM, 4, IN),
        "weight_is_per_axis": made_static(TENSOR_FORM, per_tensor=True),
        "least_scale_is_small": made_static(TENSOR_FORM, eps=1e-3),
        "activation_has_no_other_reader": made_static(TENSOR_FORM, reader="activation"),
    },
    "xnnpack",
)
case(
    ecp.KeepStaticInt8(),
    decomposed({})
    | {
        "result_is_quantized": made_static({}, result=""),
        "weight_has_scales_of_outputs": made_static({}, axis=1),
        "convolution_bias_is_constant": lambda: export(CalibratedConvolution(F.conv2d, computed=True), x_of(1, IN)),
    },
    "xnnpack",
)
case(
    ecp.FoldDequantize(),
    {
        "weight_has_data": lambda: without_data(WeightOnly(), x_of()),
        "readers_have_float_activations": made_dynamic(zero_point=3),
        "scales_are_finite": lambda: export(WeightOnly(scale=float("inf")), x_of()),
        "backend_has_dtype": NearMiss(lambda: export(WeightOnly(dtype=BF16), x_of(dtype=BF16)), "vulkan"),
    },
    "xnnpack",
)


class Biased(nn.Module):
    """A linear with a bias of any shape."""

    def __init__(self, *shape: int, computed: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(floats(OUT, IN, dtype=FP32)), nn.Parameter(floats(*shape, dtype=FP32))
        self.computed = computed

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * x.sum() if self.computed else self.bias)


case(
    SplitBroadcastBias(),
    {
        "bias_is_constant": lambda: export(Biased(4, OUT, computed=True), x_of()),
        "bias_broadcasts": lambda: export(Biased(OUT), x_of()),
    },
    "xnnpack",
)


def siblings(config: Any, other: str = "") -> ExportedProgram:
    model = Siblings(other)
    quantize_(model, config)
    return export(model, x_of())


DYNAMIC = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
WEIGHT_ONLY = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
case(
    ShareActivation(),
    {"quantized_before": lambda: siblings(DYNAMIC)},
    "xnnpack",
)


class WeightOnlyLinear(Dynamic):
    """:class:`Dynamic` without the quantization of its activations."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias * x.sum() if self.bias_form == "computed" else self.bias
        y = F.linear(x, self.weight(self.scale), bias)
        return y + F.linear(x, self.weight(self.other_scale)) if self.reader == "weight" else y


def weight_only(*shape: int, inner: Make = nn.Identity, **options: Any) -> Callable[[], ExportedProgram]:
    model = lambda: WeightOnlyLinear(**options)  # noqa: E731
    x = x_of(*shape, dtype=options.get("dtype", FP32))
    return lambda: export(model() if inner is nn.Identity else inner(model()), x)


case(
    QuantizeActivation(),
    {
        "weight_has_data": lambda: without_data(WeightOnlyLinear(), x_of()),
        "is_outside_control_flow": weight_only(inner=InBranch),
        "activation_is_not_quantized": lambda: siblings(DYNAMIC),
        "activation_has_two_dimensions": weight_only(IN),
        "activation_is_fp32_or_fp16": weight_only(dtype=BF16),
        "same_dtype": weight_only(inner=Autocast),
        "bias_is_constant": weight_only(bias="computed"),
        "int4_storage_is_readable": weight_only(group=16),
        "integers_have_one_scale": weight_only(reader="weight"),
        "constants_own_their_memory": weight_only(within=True),
        "zero_points_are_zero": weight_only(zero_point=3),
        "scales_are_normal": weight_only(scale=0.0),
        "weight_is_4_bit": weight_only(low=-4, high=3),
        "integers_are_in_range": weight_only(integer=8),
    },
    "xnnpack",
)
case(ExpandTanhGelu(), {}, "xnnpack")


class LargestPlace(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = x.max(dim=-1)
        return values + 1, places


case(LargestAlone(), {"indices_are_not_read": lambda: export(LargestPlace(), x_of())}, "xnnpack")


class Product(nn.Module):
    def __init__(self, computed: bool = False) -> None:
        super().__init__()
        self.weight, self.computed = nn.Parameter(floats(OUT, IN, dtype=FP32)), computed

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * 2 if self.computed else self.weight).t()


case(
    ProductAsLinear(),
    {
        "matrix_is_constant": lambda: export(Product(computed=True), x_of()),
        "product_has_rows": lambda: export(Product(), x_of(IN)),
    },
    "xnnpack",
)


# Forms of weights -----------------------------------------------------------------------------------------------------

CASES.update(form_near_misses.CASES)
CASES.update(keep_near_misses.cases(with_minimums, lambda: with_minimums("q5_k", 176)))


@pytest.mark.parametrize("name", CASES)
def test_rule_has_a_near_miss_of_each_requirement(name: str) -> None:
    rule, target, near_misses = CASES[name]
    assert_near_misses(rule, near_misses, target)


def test_near_misses_are_there_for_every_rule() -> None:
    folder = Path(ecp.__file__).parent / "rules"
    modules = [import_module(f"et_cuda_passes.rules.{path.stem}") for path in folder.glob("[a-z]*.py")]
    rules = {
        value.name
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ecp.Rule) and value.__module__ == module.__name__
    }
    assert rules == CASES.keys()
