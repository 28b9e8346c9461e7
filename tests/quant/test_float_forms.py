"""Weights in 8-bit and 4-bit floats: decoded as torchao dequantizes them, packed on cuda and folded elsewhere."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.extension.llm.export.mx import ExportableMXConfig
from executorch.extension.llm.export.nvfp4 import ExportableNVFP4Config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import Float8WeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerRow, PerTensor

import et_cuda_passes as ecp
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.program import Program
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import DEQUANTIZE_FLOAT4, DEQUANTIZE_FLOAT8, FLOAT8_LINEAR
from et_cuda_passes.quant.decoders import decode, is_dequantize
from et_cuda_passes.quant.float_forms import TWICE_FLOAT4, as_codes
from et_cuda_passes.quant.weight import weight_values
from et_cuda_passes.rules.restore import normalised, unwrap_nvfp4
from et_cuda_passes.testing import Sketch, assert_misses, assert_rewrites

N, K = 48, 128
CONFIGS: dict[str, tuple[Any, str, str]] = {
    "fp8 per row": (Float8WeightOnlyConfig(granularity=PerRow()), "linear_float8", "float8_e4m3fn per-axis"),
    "fp8 per tensor": (Float8WeightOnlyConfig(granularity=PerTensor()), "linear_float8", "float8_e4m3fn per-tensor"),
    "e5m2": (Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2), "linear_float8", "float8_e5m2 per-axis"),
    "mx": (ExportableMXConfig(), "linear_float8", "float8_e4m3fn group 32"),
    "nvfp4": (ExportableNVFP4Config(), "linear_float4", "float4_e2m1fn group 16"),
    "torchao's nvfp4": (NVFP4WeightOnlyConfig(), "linear_float4", "float4_e2m1fn group 16"),
    "nvfp4 without a scale of all": (
        NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False), "linear_float4", "float4_e2m1fn group 16",
    ),
}  # fmt: skip
KEPT_FOR_MLX = ("mx", "nvfp4")
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
exports_nvfp4_in_a_branch = pytest.mark.skipif(TORCH < (2, 13), reason="torch 2.13 is the first that exports it")


def quantized(config: Any, dtype: torch.dtype = torch.bfloat16, n: int = N, k: int = K) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n)).to(dtype).eval()
    quantize_(model, config)
    return model


def exported(model: nn.Module, dtype: torch.dtype = torch.bfloat16, k: int = K) -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", min=2, max=512)},)), x


@cache
def with_parts(scheme: str) -> tuple[nn.Module, ExportedProgram, Tensor]:
    """A model, and its program with the parts of a wrapped weight in the graph: a rewrite for any target begins so."""
    model = quantized(CONFIGS[scheme][0])
    program, x = exported(model)
    return model, normalised(program)[0], x


def off(program: ExportedProgram, x: Tensor, model: nn.Module) -> float:
    found = program.module()(x).detach()
    weight, bias = model[0].weight.dequantize().double(), model[0].bias.detach().double()
    wanted = F.linear(x.double(), weight, bias)
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("scheme", CONFIGS)
def test_floats_are_packed_on_cuda(scheme: str, decomposed: bool) -> None:
    config, rule, described = CONFIGS[scheme]
    model = quantized(config)
    program, x = exported(model)
    if decomposed:
        program = unwrap_nvfp4(program).run_decompositions({})
    rewritten, report = ecp.rewrite(program, "cuda", expect={rule: 1, "missed": 0})
    (outcome,) = report.outcomes
    assert outcome.fqn == "0.weight" and outcome.detail.startswith(f"{described} -> triton")
    # The scales, and with blocks the weights, are rounded to bf16.
    assert off(rewritten, x, model) < 4e-3
    bits = 4.5 if rule == "linear_float4" else 8.5
    assert report.outcomes[0].bytes_after < N * K * bits / 8 + N * 40


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        (scheme, target)
        for scheme in CONFIGS
        for target in ("cpu", "metal", "xnnpack", "mlx", "tensorrt")
        if target != "mlx" or scheme not in KEPT_FOR_MLX
    ],
)
def test_floats_are_folded_where_there_is_no_kernel(scheme: str, target: str) -> None:
    _, _, described = CONFIGS[scheme]
    model, program, x = with_parts(scheme)
    rule = "fold_floats" if target in ("cpu", "metal") else "fold_dequantize"
    rewritten, report = ecp.rewrite(program, target, expect={rule: 1, "missed": 0})
    assert f"target {target} has no kernel for this {described} weight: folded to bfloat16" in str(report)
    assert torch.equal(rewritten.state_dict["0.weight.dequantized"], model[0].weight.dequantize())
    assert off(rewritten, x, model) < 4e-3


@pytest.mark.parametrize("scheme", KEPT_FOR_MLX)
def test_floats_are_kept_for_mlx_as_executorch_exports_them(scheme: str) -> None:
    program, x = exported(quantized(CONFIGS[scheme][0]))
    rewritten, report = ecp.rewrite(program, "mlx", expect={"keep_mlx_form": 1, "kept": 1})
    assert f"{CONFIGS[scheme][2]} for MLX's quantized_matmul" in str(report)
    assert torch.equal(rewritten.module()(x), program.module()(x))


@pytest.mark.parametrize("target", ["vulkan", "coreml", "openvino"])
@pytest.mark.parametrize("scheme", CONFIGS)
def test_floats_of_a_float32_model_are_right_on_other_targets(scheme: str, target: str) -> None:
    model = quantized(CONFIGS[scheme][0], torch.float32)
    program, x = exported(model, torch.float32)
    rewritten, _ = ecp.rewrite(program, target, expect={"missed": 0})
    assert off(rewritten, x, model) < 1e-6


def test_weight_of_nvfp4_has_the_codes_and_scales_of_torchao() -> None:
    model = quantized(NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False))
    program, _ = exported(model)
    rewritten, _ = ecp.rewrite(program, "cuda")
    data = model[0].weight.qdata.view(torch.uint8)
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)
    assert torch.equal(rewritten.state_dict["0.weight.packed"], mma_tiled.pack(codes))
    # Scales of e4m3 are exact in bf16, so each weight is that of torchao.
    identity = rewritten.module()(torch.eye(K).bfloat16()) - model[0].bias
    assert torch.equal(
        rewritten.state_dict["0.weight.scale_and_zero"][0, :, : K // 16].float(), model[0].weight.get_hp_scales()
    )
    assert identity.shape == (K, N)


def weight_in(program: ExportedProgram) -> tuple[Program, Any]:
    found = Program(normalised(program)[0])
    (node,) = (node for node in found.graph.nodes if is_dequantize(node))
    return found, decode(found, node)


@pytest.mark.parametrize("scheme", ["mx", "nvfp4", "torchao's nvfp4"])
def test_floats_decode_as_torchao_dequantizes_them(scheme: str) -> None:
    model = quantized(CONFIGS[scheme][0], torch.float32)
    program, weight = weight_in(exported(model, torch.float32)[0])
    values = weight_values(program, weight)
    group = weight.group_size
    dense = values.data.float() * values.scale.repeat_interleave(group, dim=1)
    assert torch.equal(dense, model[0].weight.dequantize())
    if scheme != "mx":
        assert set(values.data.unique().tolist()) <= set(TWICE_FLOAT4)
        coded = weight_values(program, as_codes(weight))
        numbers = torch.tensor(TWICE_FLOAT4)[coded.data.int()] / 2
        assert torch.equal(numbers * coded.scale.repeat_interleave(group, dim=1), dense)


class Mxfp4(nn.Module):
    """A linear with the parts of torchao's ``MXTensor`` in 4 bits, which torchao 0.18 itself does not multiply."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = MXTensor.to_mx(torch.randn(N, K).bfloat16() * 0.1, torch.float4_e2m1fn_x2, 32)
        self.dense = weight.dequantize(torch.bfloat16)
        self.register_buffer("weight", weight.qdata)
        self.register_buffer("scale", weight.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.ops.et_cuda_passes.dequantize_float4(self.weight, self.scale, None, 32, x.dtype))


def test_mxfp4_is_packed_exactly() -> None:
    model = Mxfp4()
    program, _ = exported(model)
    assert_rewrites(program, "cuda", expect={"linear_float4": 1, "missed": 0})
    rewritten, report = ecp.rewrite(program, "cuda")
    assert report.outcomes[0].scheme == "float4_e2m1fn group 32"
    got = rewritten.module()(torch.eye(K).bfloat16())
    assert torch.equal(got.T, model.dense)
    assert torch.equal(DEQUANTIZE_FLOAT4(model.weight, model.scale, None, 32, torch.bfloat16), model.dense)


def blocks_of_float8() -> tuple[ExportedProgram, Tensor]:
    """A weight [256, 384] with a scale for each block of 128 x 128, as deepseek's, and the weight."""
    torch.manual_seed(0)
    numbers = (torch.randn(256, 384) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) * 0.01 + 0.001
    dense = numbers.float() * scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    sketch = Sketch()
    weight, table = sketch.buffer("weight", numbers), sketch.buffer("scale", scale)
    x = sketch.input("x", 384, 384, dtype=torch.bfloat16)
    dequantized = sketch.call(DEQUANTIZE_FLOAT8, weight, table, torch.bfloat16)
    return sketch.program(sketch.call(torch.ops.aten.linear.default, x, dequantized)), dense


def test_blocks_of_float8_are_packed_with_a_scale_for_each_row_and_group() -> None:
    program, dense = blocks_of_float8()
    rewritten, report = ecp.rewrite(program, "cuda", expect={"linear_float8": 1, "missed": 0})
    assert report.outcomes[0].detail == "float8_e4m3fn blocks of 128 x 128 -> triton"
    got = rewritten.module()(torch.eye(384).bfloat16()).T.float()
    assert bool(((got - dense).abs() <= dense.abs() * 2.0**-7).all())
    folded, _ = ecp.rewrite(program, "cpu", expect={"fold_floats": 1})
    assert torch.equal(folded.state_dict["weight.dequantized"], dense.bfloat16())


def test_number_that_is_not_finite_is_missed() -> None:
    model = quantized(Float8WeightOnlyConfig())
    model[0].weight.qdata.view(torch.int8)[3, 5] = 127
    program, _ = exported(model)
    assert_misses_of_float8(program, "numbers that are finite, found 1 that are NaN")


def test_scales_that_float16_cannot_hold_are_missed_with_the_fix() -> None:
    model = quantized(Float8WeightOnlyConfig(), torch.float16)
    model[0].weight.scale.mul_(1e-4)
    program, _ = exported(model, torch.float16)
    assert_misses_of_float8(program, f"found {N} that it does not, in float16; quantize the weight again, or export")


def assert_misses_of_float8(program: ExportedProgram, reason: str) -> None:
    _, report = ecp.rewrite(program, "cuda", expect={"missed": 1})
    assert reason in str(report)


@pytest.mark.parametrize(
    ("scheme", "rule"), [("fp8 per row", "linear_float8"), ("nvfp4", "linear_float4"), ("mx", "linear_float8")]
)
def test_float32_model_computes_in_bf16_if_that_is_accepted(scheme: str, rule: str) -> None:
    model = quantized(CONFIGS[scheme][0], torch.float32)
    program, x = exported(model, torch.float32)
    assert_misses(program, f"accept bf16 arithmetic with {rule.title().replace('_', '')}(cast_to_bf16=True)", rule=rule)
    casting = {"linear_float8": ecp.LinearFloat8, "linear_float4": ecp.LinearFloat4}[rule](cast_to_bf16=True)
    passes = [casting if each.name == rule else each for each in ecp.default_passes("cuda")]
    rewritten, _ = ecp.rewrite(program, "cuda", passes, expect={rule: 1, "missed": 0})
    assert off(rewritten, x, model) < 8e-3


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(K, 64), nn.Linear(K, 64), nn.Linear(64, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_operators_are_fused_into_the_kernel_of_4_bit_floats() -> None:
    model = Gated().bfloat16().eval()
    quantize_(model, ExportableNVFP4Config())
    program, x = exported(model)
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_float4": 3, "fuse_gate": 1, "fuse_add": 1, "missed": 0})
    wanted = model(x).float()
    assert (rewritten.module()(x).float() - wanted).norm() / wanted.norm() < 1e-2
    calls = [node for node in rewritten.graph.nodes if "int4_linear_mma_tiled" in str(node.target)]
    assert len(calls) == 2 and all(node.kwargs["float4"] is True for node in calls)


def test_gate_of_integers_is_not_joined_with_one_of_floats() -> None:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    model = Gated().bfloat16().eval()
    quantize_(model, ExportableNVFP4Config(), filter_fn=lambda _, fqn: fqn == "gate")
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(16)), filter_fn=lambda _, fqn: fqn == "up")
    program, x = exported(model)
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_float4": 1, "linear_int4": 1, "fuse_gate": 0})
    wanted = model(x).float()
    assert (rewritten.module()(x).float() - wanted).norm() / wanted.norm() < 1e-2


class Shared(nn.Module):
    """One wrapped weight with two readers: a product of its transpose, and a linear in a branch."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        linear = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
        quantize_(linear, NVFP4WeightOnlyConfig())
        if buffer:
            self.register_buffer("weight", linear[0].weight.data, persistent=False)
        else:
            self.weight = linear[0].weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def yes(x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

        return x @ self.weight.t(), torch.cond(x.sum() > 0, yes, torch.sin, (x,))


@exports_nvfp4_in_a_branch
@pytest.mark.parametrize("buffer", [False, True])
def test_readers_of_a_weight_of_nvfp4_share_the_packed_weight(buffer: bool) -> None:
    model, x = Shared(buffer), torch.randn(3, 64).bfloat16()
    program = torch.export.export(model, (x,))
    rewritten, report = ecp.rewrite(program, "cuda", expect={"linear_float4": 2, "missed": 0})
    assert {outcome.fqn for outcome in report.outcomes} == {"weight"}
    assert sorted(rewritten.state_dict) == ["weight.packed", "weight.scale_and_zero"]
    wanted = F.linear(x.float(), model.weight.dequantize().float())
    assert all(
        (got.float() - wanted).norm() / wanted.norm() < 8e-3 for got in rewritten.module()(x.abs() * x.sign())[:1]
    )


def test_embedding_in_4_bit_floats_is_packed_in_8_bits() -> None:
    model = nn.Sequential(nn.Embedding(64, K)).bfloat16().eval()
    quantize_(model, ExportableNVFP4Config(), filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    ids = torch.arange(64)
    program = torch.export.export(model, (ids,))
    for target in ("cuda", "cpu", "metal"):
        rewritten, _ = ecp.rewrite(program, target, expect={"embedding_int8": 1, "missed": 0})
        found, wanted = rewritten.module()(ids).float(), program.module()(ids).float()
        assert (found - wanted).norm() / wanted.norm() < 4e-3


def test_decoder_rejects_scales_that_do_not_fit() -> None:
    sketch = Sketch()
    numbers = torch.randn(8, 64).to(torch.float8_e4m3fn)
    data, scale = sketch.buffer("data", numbers), sketch.buffer("scale", torch.ones(3, 2))
    node = sketch.raw(DEQUANTIZE_FLOAT8, data, scale, torch.float32, val=torch.empty(8, 64))
    program = Program(sketch.program(node))
    (dequantize,) = (each for each in program.graph.nodes if is_dequantize(each))
    with pytest.raises(Unmet, match=r"scales \[3, 2\] for a weight \[8, 64\]"):
        decode(program, dequantize)


def test_operators_reject_parts_that_do_not_fit() -> None:
    numbers = torch.zeros(8, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="dequantize_float8: .* do not fit each other"):
        DEQUANTIZE_FLOAT8(numbers, torch.ones(3, 2), torch.float32)
    with pytest.raises(ValueError, match="dequantize_float4: .* do not fit each other"):
        DEQUANTIZE_FLOAT4(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 3), None, 16, torch.float32)
    x, packed = torch.ones(2, 64), numbers.view(torch.int8)
    with pytest.raises(ValueError, match="float8_linear: .* do not fit each other"):
        FLOAT8_LINEAR(x, packed, torch.ones(8, 3), None, 32, 4)
    with pytest.raises(ValueError, match="wanted int8"):
        FLOAT8_LINEAR(x, packed, torch.ones(8, 2), None, 32, 3)
    with pytest.raises(ValueError, match="for a weight of K = 64"):
        FLOAT8_LINEAR(x[:, :32], packed, torch.ones(8, 2), None, 32, 4)


@pytest.mark.parametrize("target", ["cuda", "cpu", "xnnpack"])
def test_products_with_numbers_are_no_weights(target: str) -> None:
    class Numbers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(8, 8).to(torch.float8_e4m3fn))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (
                (self.weight.float() * 0.5) @ x.float(),
                (x.float() * 3).to(x.dtype),
                (x.to(torch.int8) - 2).to(x.dtype),
            )

    x = torch.randn(8, 2, dtype=torch.bfloat16)
    program, report = ecp.rewrite(torch.export.export(Numbers(), (x,)), target)
    assert report.counts()["rewritten"] == 0
    for found, wanted in zip(program.module()(x), Numbers()(x), strict=True):
        torch.testing.assert_close(found, wanted)
