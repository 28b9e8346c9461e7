"""Schemes by name: what they compute, what each target does with them, and what is refused."""

import copy
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.hf.schemes import (
    QuantizationOptions,
    check_schemes,
    expected_counts,
    parse_scheme,
    passes_for,
    promised_targets,
)
from et_cuda_passes.hf.support import SCHEMES, Status, usual_support
from et_cuda_passes.targets.compatibility import packed_layouts
from et_cuda_passes.testing import assert_rewrites
from tests.xnnpack import through

ROOT = Path(__file__).parent.parent.parent
BF16, FP32 = torch.bfloat16, torch.float32


class Mlp(nn.Module):
    """Two linears, 64 -> hidden -> 64."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.up = nn.Linear(64, hidden)
        self.down = nn.Linear(hidden, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Tied(nn.Module):
    """An embedding, a linear, and a head that reads the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.middle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(ids)))


def export(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs)


def ids() -> Tensor:
    return torch.randint(0, 64, (1, 5))


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def unchanged(model: nn.Module, call: Callable[[], Any], match: str) -> None:
    """``call`` raises a ValueError that matches, and every parameter of ``model`` is the object that it was."""
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=match):
        call()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


# Numbers --------------------------------------------------------------------------------------------------------------


def grouped(weight: Tensor, size: int) -> Tensor:
    return weight.double().reshape(weight.shape[0], -1, size or weight.shape[1])


def nearest_grid(weight: Tensor, size: int, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The values of the grid ``(q - zero) * scale``, low <= q <= high, that are nearest to the weight."""
    scale, zero = scale.double().unsqueeze(-1), zero.double().unsqueeze(-1)
    q = torch.round(grouped(weight, size) / scale + zero).clamp(low, high)
    return ((q - zero) * scale).reshape(weight.shape)


def smallest_error(weight: Tensor, size: int, low: int, high: int) -> float:
    """The error of the best of 300 scales for each group, found by trying them."""
    groups = grouped(weight, size)
    best = torch.full(groups.shape[:2], float("inf"), dtype=torch.float64)
    for factor in torch.linspace(0.6, 1.1, 300, dtype=torch.float64):
        scale = (groups.abs().amax(-1, keepdim=True) / -low) * factor
        off = ((groups / scale).round().clamp(low, high) * scale - groups).square().sum(-1)
        best = torch.minimum(best, off)
    return float((best.sum() / groups.square().sum()).sqrt())


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("name", ["4w", "4w_hqq", "8w", "8da4w", "8da8w"])
def test_hqq_weight_is_the_nearest_grid_with_nearly_the_best_scale(name: str, size: int) -> None:
    layer = nn.Linear(128, 48)
    weight = layer.weight.detach().clone()
    report = ecp.quantize_model_(layer, qlinear=name, qlinear_group_size=size)
    used = 0 if name == "8da8w" else size
    assert (report.layers[0].group_size, report.layers[0].algorithm) == (used, "hqq")
    low, high = (-8, 7) if SCHEMES[name].bits == 4 else (-128, 127)
    scale, got = layer.weight.scale, layer.weight.dequantize()
    assert scale.shape == (48, 128 // (used or 128))
    torch.testing.assert_close(
        got.double(), nearest_grid(weight, used, scale, 0 * scale, low, high), rtol=1e-5, atol=1e-7
    )
    # HQQ starts at the largest value and ends in a local optimum.
    start = grouped(weight, used).abs().amax(-1) / -low
    assert error(got, weight) < error(nearest_grid(weight, used, start, 0 * start, low, high), weight)
    if low == -8:
        assert error(got, weight) <= 1.1 * smallest_error(weight, used, low, high)


@pytest.mark.parametrize("name", ["4w", "8w", "8da4w", "8da8w"])
def test_affine_weight_uses_the_extreme_values_of_each_group(name: str) -> None:
    layer = nn.Linear(128, 48)
    weight = layer.weight.detach().clone()
    ecp.quantize_model_(layer, qlinear=name, algorithm="affine")
    size = 0 if name == "8da8w" else 32
    bits = SCHEMES[name].bits
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    scale = grouped(weight, size).abs().amax(-1) / ((high - low) / 2)
    wanted = nearest_grid(weight, size, scale, 0 * scale, low, high)
    off = (layer.weight.dequantize().double() - wanted).abs()
    step = scale.repeat_interleave(size or 128, 1)
    # A weight halfway between two values of the grid may be rounded to either. The largest of a group often is.
    halfway = ((weight.double() / step - 0.5) - (weight.double() / step - 0.5).round()).abs() < 1e-4
    assert bool((off[~halfway] <= 1e-4 * step[~halfway]).all())
    assert bool((off[halfway] <= 1.001 * step[halfway]).all()) and halfway.double().mean() < 0.05


@pytest.mark.parametrize("size", [0, 32])
def test_fpa4w_weight_is_the_nearest_grid_with_a_zero_per_group(size: int) -> None:
    layer = nn.Linear(128, 48)
    with torch.no_grad():
        layer.weight += 0.05
    weight = layer.weight.detach().clone()
    ecp.quantize_model_(layer, qlinear="fpa4w", qlinear_group_size=size)
    quantized = layer.weight
    got = quantized.dequantize()
    assert bool((quantized.zero_point != 0).all())
    wanted = nearest_grid(weight, size, quantized.scale, quantized.zero_point, -8, 7)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)
    groups = grouped(weight, size)
    scale = (groups.amax(-1) - groups.amin(-1)) / 15
    extremes = nearest_grid(weight, size, scale, -groups.amin(-1) / scale, 0, 15)
    assert error(got, weight) < error(extremes, weight)


def test_fpa4w_with_affine_uses_the_extreme_values_of_each_group() -> None:
    layer = nn.Linear(128, 48)
    with torch.no_grad():
        layer.weight += 0.05
    weight = layer.weight.detach().clone()
    ecp.quantize_model_(layer, qlinear="fpa4w", algorithm="affine")
    groups = grouped(weight, 32)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    step = ((high - low) / 15).repeat_interleave(32, 1)
    # The zero is an integer, so that the ends of the range can be off by half a step.
    assert bool(((layer.weight.dequantize() - weight).abs() <= 1.01 * step).all())
    assert bool((layer.weight.zero_point != 0).any())


def fake_quantized(x: Tensor) -> Tensor:
    """Each row of x rounded to 8 bits between its extreme values, which include 0."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale)
    return (torch.round(x / scale).add(zero).clamp(0, 255) - zero) * scale


@pytest.mark.parametrize("name", ["4w", "8w", "8da4w", "8da8w", "fpa4w"])
def test_quantized_linear_computes_with_the_dequantized_weight(name: str) -> None:
    layer = nn.Linear(128, 48)
    ecp.quantize_model_(layer, qlinear=name)
    x = torch.randn(7, 128)
    read = fake_quantized(x.double()) if SCHEMES[name].dynamic else x.double()
    assert layer.bias is not None
    wanted = read @ layer.weight.dequantize().double().T + layer.bias.double()
    # An activation halfway between two integers may be rounded to either: 1 / 255 of the range of one row.
    assert error(layer(x), wanted) < (2e-3 if SCHEMES[name].dynamic else 1e-6)


@pytest.mark.parametrize("name", ["4w", "8da4w", "8da8w", "8w"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_program_rewritten_for_the_cpu_equals_the_quantized_model(name: str, dtype: torch.dtype) -> None:
    model = Mlp().to(dtype)
    ecp.quantize_model_(model, qlinear=name, target="cpu")
    x = torch.randn(6, 64, dtype=dtype)
    eager = model(x)
    # A rounding in bf16 moves some activations to the next of their 8-bit values.
    rtol = 2.0**-6 if SCHEMES[name].dynamic and dtype is BF16 else 2.0**-7
    program, _ = assert_rewrites(export(model, x), "cpu", expect={"rewritten": 2, "missed": 0}, rtol=rtol)
    assert error(program.module()(x), eager) < rtol


@pytest.mark.slow
def test_compiled_program_equals_the_quantized_model(tmp_path: Path) -> None:
    model = Mlp().to(BF16)
    ecp.quantize_model_(model, qlinear="4w", target="cpu")
    x = torch.randn(6, 64, dtype=BF16)
    program, _ = ecp.rewrite(export(model, x), "cpu", expect={"rewritten": 2})
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "mlp.pt2"))
    got = torch._inductor.aoti_load_package(package)(x)
    # The kernel adds in bf16 on hosts without AVX-512.
    assert error(got, model(x)) < 2.0**-4


def test_signature_of_quantize_model_has_every_option_with_its_default() -> None:
    parameters = list(inspect.signature(ecp.quantize_model_).parameters.values())[1:]
    assert {each.name: each.default for each in parameters} == {
        field.name: field.default for field in dataclasses.fields(QuantizationOptions)
    }


@pytest.mark.parametrize(("scheme", "hidden"), [("8da4w,8da8w", 720), ("8da8w", 96), ("4w", 96), ("8w", 96)])
def test_program_in_executorchs_runtime_equals_the_quantized_model(scheme: str, hidden: int) -> None:
    model = Mlp(hidden).eval()
    ecp.quantize_model_(model, qlinear=scheme, target="xnnpack")
    # An activation between two 8-bit values may be rounded to either: about 1 / 255 of the range of its row.
    assert through(ecp.XnnpackPartitioner(), model, torch.randn(6, 64)) < (1e-2 if "da" in scheme else 1e-5)


def test_embedding_with_a_padding_index_is_quantized() -> None:
    table = nn.Embedding(64, 64, padding_idx=0)
    report = ecp.quantize_model_(table, qembedding="8w", target="cpu")
    assert report.layers[0].form == "8w per axis"
    x = torch.tensor([[0, 3, 63]])
    assert torch.equal(table(x), table.weight.dequantize()[x])
    assert_rewrites(export(table, x), "cpu", expect={"embedding_int8": 1})


def test_quantization_draws_no_random_numbers() -> None:
    layer = nn.Linear(64, 32)
    state = torch.get_rng_state()
    ecp.quantize_model_(layer, qlinear="4w", target="cpu,xnnpack")
    assert torch.equal(state, torch.get_rng_state())


# Targets --------------------------------------------------------------------------------------------------------------

PACKED, KEPT, FOLDED, IMPOSSIBLE = Status.PACKED, Status.KEPT, Status.FOLDED, Status.IMPOSSIBLE


@pytest.mark.parametrize(
    ("name", "cuda", "metal", "cpu", "xnnpack"),
    [
        ("4w", PACKED, PACKED, PACKED, FOLDED),
        ("8w", PACKED, IMPOSSIBLE, PACKED, FOLDED),
        ("8da4w", PACKED, PACKED, PACKED, KEPT),
        ("8da8w", PACKED, IMPOSSIBLE, PACKED, KEPT),
    ],
)
def test_support_of_a_scheme_is_as_documented(
    name: str, cuda: Status, metal: Status, cpu: Status, xnnpack: Status
) -> None:
    found = [usual_support(SCHEMES[name], target).status for target in ("cuda", "metal", "cpu", "xnnpack")]
    assert found == [cuda, metal, cpu, xnnpack]


@pytest.mark.parametrize("target", ecp.targets())
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_model_fares_as_the_support_table_says(name: str, target: str) -> None:
    scheme = SCHEMES[name]
    status = usual_support(scheme, target).status
    model = Mlp().to(FP32 if target in ("xnnpack", "vulkan", "coreml", "openvino") else BF16)
    if status is IMPOSSIBLE or scheme.only_for not in (None, target):
        unchanged(model, lambda: ecp.quantize_model_(model, qlinear=name, target=target), "has kernels for|promises")
        return
    ecp.quantize_model_(model, qlinear=name, target=target)
    x = torch.randn(6, 64, dtype=model.down.weight.dtype)
    _, report = ecp.rewrite(export(model, x), target)
    counts = report.counts()
    assert counts["kept" if status is KEPT else "rewritten"] == 2
    assert (counts.get("fold_dequantize", 0) == 2) is (status is FOLDED)


@pytest.mark.parametrize(
    ("target", "layout"),
    [("cuda", "mma_tiled"), ("cuda", "tile_packed_to_4d"), ("metal", "metal"), ("metal", "mps"), ("cpu", "cpu")],
)
def test_packing_format_selects_the_layout_and_not_the_quantization(target: str, layout: str) -> None:
    model = Mlp().to(BF16)
    plain = copy.deepcopy(model)
    options = {"qlinear": "4w", "target": target}
    ecp.quantize_model_(model, qlinear_packing_format=layout, **options)
    ecp.quantize_model_(plain, **options)
    assert torch.equal(model.up.weight.dequantize(), plain.up.weight.dequantize())
    chosen = QuantizationOptions(qlinear_packing_format=layout, **options)
    program, _ = ecp.rewrite(export(model, torch.randn(6, 64, dtype=BF16)), target, passes_for(chosen, target))
    assert packed_layouts(program) == {layout: 2}


def test_packing_format_of_one_target_leaves_the_others_alone() -> None:
    options = QuantizationOptions(qlinear="4w", qlinear_packing_format="cuda:tile_packed_to_4d", target="cuda,cpu")
    check_schemes(options)
    assert [options.packing_format(target) for target in options.targets] == ["tile_packed_to_4d", "auto"]


def test_options_survive_as_plain_data() -> None:
    recipe = {"layer": [{"pattern": "*.down", "scheme": "cuda:8w", "group_size": 0}, {"pattern": "re:x", "skip": True}]}
    options = QuantizationOptions(qlinear="4w", qembedding_encoder="8w", recipe=recipe, target=["cuda", "cpu"])
    data = json.loads(json.dumps(options.to_dict()))
    assert (data["target"], data["recipe"]) == ("cuda,cpu", recipe)
    assert QuantizationOptions(**data).to_dict() == data


def test_folded_weights_are_a_warning() -> None:
    report = ecp.quantize_model_(Mlp(), qlinear="4w", target="xnnpack")
    assert report.warnings == [
        "xnnpack has no kernel for 4w and computes with floating-point weights; xnnpack has kernels for 8da4w, 8da8w"
    ]


def test_dtype_of_the_packing_formats_kernel_counts() -> None:
    model = Mlp().half()
    options = {"qlinear": "4w", "target": "cuda"}
    unchanged(
        model,
        lambda: ecp.quantize_model_(model, qlinear_packing_format="tile_packed_to_4d", **options),
        r"no kernel of 4w in tile_packed_to_4d for a model in float16; convert it with model.to\(torch.bfloat16\), or "
        "give cast_to_bf16=True",
    )
    assert not ecp.quantize_model_(model, qlinear_packing_format="mma_tiled", **options).warnings


def test_group_size_of_a_tied_head_gives_way_to_one_scale_per_row() -> None:
    report = ecp.quantize_model_(Tied(), qlinear="8da8w", qembedding="8w", qembedding_group_size=64)
    assert (report["head"].form, report["head"].reason) == ("8da8w per axis", "8da8w has one scale per row")


def test_packing_format_of_the_encoder_is_its_own() -> None:
    options = QuantizationOptions(qlinear="4w", qlinear_packing_format_encoder="tile_packed_to_4d", target="cuda")
    kernels = {encoder: passes_for(options, "cuda", encoder) for encoder in (False, True)}
    assert [p.kernel for p in kernels[True] if p.name == "linear_int4"] == ["tinygemm"]
    assert [p.kernel for p in kernels[False] if p.name == "linear_int4"] == [None]


def test_promise_makes_a_missed_layer_an_error() -> None:
    options = QuantizationOptions(qlinear="cuda:4w", target="cuda,cpu")
    assert promised_targets(options) == {"cuda"}
    assert expected_counts(options, "cpu") is None
    model = Mlp()
    ecp.quantize_model_(model, qlinear="4w")  # in float32, which the target has no kernel for
    program = export(model, torch.randn(6, 64))
    ecp.rewrite(program, "cuda")
    with pytest.raises(ecp.ExpectationError, match="missed: expected 0, got 2"):
        ecp.rewrite(program, "cuda", passes_for(options, "cuda"), expect=expected_counts(options, "cuda"))


def test_promise_of_xnnpack_makes_a_folded_layer_an_error() -> None:
    options = QuantizationOptions(qlinear="xnnpack:8da4w")
    model = Mlp()
    ecp.quantize_model_(model, qlinear="4w")
    program = export(model, torch.randn(6, 64))
    with pytest.raises(ecp.ExpectationError, match="fold_dequantize: expected 0, got 2"):
        ecp.rewrite(program, "xnnpack", passes_for(options, "xnnpack"), expect=expected_counts(options, "xnnpack"))


def test_promise_is_refused_for_a_dtype_without_a_kernel() -> None:
    model = Mlp()
    unchanged(
        model,
        lambda: ecp.quantize_model_(model, qlinear="cuda:4w"),
        r"cuda has no kernel of 4w for a model in float32; convert it with model\.to\(torch\.bfloat16\)",
    )


def test_dtype_without_a_kernel_is_a_warning_where_nothing_is_promised() -> None:
    report = ecp.quantize_model_(Mlp(), qlinear="4w", target="cuda")
    assert report.warnings == [
        "cuda has no kernel of 4w for a model in float32; convert it with model.to(torch.bfloat16) or "
        "model.to(torch.float16), or give cast_to_bf16=True, which casts activations to bf16 for such kernels alone"
    ]


def test_dtype_without_a_kernel_is_refused_for_a_target_that_refuses_misses() -> None:
    model = Mlp().half()
    unchanged(
        model,
        lambda: ecp.quantize_model_(model, qlinear="8da8w", target="xnnpack"),
        r"xnnpack has no kernel of 8da8w for a model in float16; convert it with model\.to\(torch\.float32\)",
    )


@pytest.mark.parametrize("qlinear", ["4w", "cuda:4w", "8w", "8da4w"])
def test_cast_to_bf16_gives_a_float32_model_the_kernels_of_all_targets(qlinear: str) -> None:
    model = Mlp()
    options = QuantizationOptions(qlinear=qlinear, target="cuda,cpu,metal" if "4" in qlinear else "cuda,cpu")
    options = dataclasses.replace(options, cast_to_bf16=True)
    assert ecp.quantize_model_(model, **options.to_dict()).warnings == []
    x = torch.randn(6, 64)
    program = export(model, x)
    for target in options.targets:
        rewritten, report = ecp.rewrite(program, target, passes_for(options, target), expect={"missed": 0})
        y = rewritten.module()(x)
        # Nothing shows that the kernel of metal is slow in float32, which it has.
        cast = ["computed in bf16" in each.detail for each in report.outcomes]
        assert cast == [target != "metal"] * 2
        assert y.dtype == FP32
        assert error(y, model(x)) < (2.0**-6 if target != "metal" else 1e-5)


def test_cast_to_bf16_leaves_a_model_in_bf16_as_it_is() -> None:
    model = Mlp().bfloat16()
    ecp.quantize_model_(model, qlinear="4w")
    program = export(model, torch.randn(6, 64).bfloat16())
    for target in ("cuda", "cpu", "metal"):
        graphs = [
            str(ecp.rewrite(program, target, passes_for(QuantizationOptions(cast_to_bf16=cast), target))[0].graph)
            for cast in (False, True)
        ]
        assert graphs[0] == graphs[1]


def test_cast_to_bf16_shares_a_tied_table_of_a_float32_model() -> None:
    model = Tied()
    ecp.quantize_model_(model, qlinear="4w")
    program = export(model, ids())
    options = QuantizationOptions(cast_to_bf16=True)
    for target in ("cuda", "cpu"):
        rewritten, _ = ecp.rewrite(program, target, passes_for(options, target), expect={"missed": 0})
        x = ids()
        assert error(rewritten.module()(x), model(x)) < 2.0**-7
    # On cuda the rows are read from the packed weight of the head.
    rewritten, _ = ecp.rewrite(program, "cuda", passes_for(options, "cuda"), expect={"embedding_int4": 1})
    assert sum("packed" in name for name in rewritten.state_dict) == 2


def test_cast_to_bf16_for_a_target_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="cast_to_bf16=True is for kernels of cuda or metal or cpu, and the target is"):
        ecp.quantize_model_(Mlp(), qlinear="8da4w", target="xnnpack", cast_to_bf16=True)


def test_float32_is_computed_by_plain_operators_on_cpu_or_cast_for_the_kernel() -> None:
    model = Mlp()
    ecp.quantize_model_(model, qlinear="4w", target="cpu")
    program = export(model, torch.randn(6, 64))
    report = ecp.rewrite(program, "cpu", expect={"missed": 0})[1]
    assert {each.detail for each in report.outcomes} == {"int4 group 32 -> plain operators (by_row)"}
    cast = ecp.rewrite(program, "cpu", passes_for(QuantizationOptions(cast_to_bf16=True), "cpu"))[1]
    assert {each.detail for each in cast.outcomes} == {"int4 group 32 -> int4pack_cpu (cpu, computed in bf16)"}


@pytest.mark.parametrize(("capability", "noted"), [("AVX512", False), ("AVX2", True), ("DEFAULT", False)])
def test_host_without_avx512_is_named_where_the_kernel_was_measured(
    capability: str, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = Mlp().bfloat16()
    ecp.quantize_model_(model, qlinear="4w")
    program = export(model, torch.randn(6, 64).bfloat16())
    report = ecp.rewrite(program, "cpu", expect={"linear_int4": 2})[1]
    assert ("takes up to 1.4 times as long as with bf16 weights" in str(report)) == noted
    assert [len(each.reasons) for each in report.outcomes] == [int(noted)] * 2
    assert "AVX" not in str(ecp.rewrite(program, "cuda")[1])


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["4w", "8w", "8da4w", "8da8w", "fpa4w", "4w_hqq", "cuda:4w", "metal:4w", "8da4w,8da8w", "cpu:8da4w,8da8w"]
)
def test_scheme_is_spelled_as_it_was_parsed(text: str) -> None:
    assert str(parse_scheme(text)) == text


def test_scheme_of_the_second_part_has_the_promise_of_the_first() -> None:
    scheme = parse_scheme("xnnpack:8da4w, 8da8w")
    assert scheme.fallback is not None
    assert (scheme.promised, scheme.fallback.promised) == ("xnnpack", "xnnpack")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qlinear": "8da4"}, r"there is no scheme '8da4'; the nearest are 8da4w"),
        ({"qlinear": "4bit"}, r"there is no scheme '4bit'; known are 4w, 4w_hqq, 8w, 8da4w, 8da8w, fpa4w"),
        ({"qlinear": 4}, r"qlinear is the name of a scheme, such as 4w; got 4"),
        ({"qlinear": "cuad:4w"}, r"there is no target 'cuad'; the nearest is cuda"),
        ({"qlinear": "4w,8w,8w"}, r"names 3 schemes"),
        ({"qlinear": "cuda:4w,cpu:8w"}, r"names two targets; write cuda: once"),
        ({"qlinear": "cuda:fpa4w"}, r"fpa4w is for metal alone; cuda has kernels for 4w"),
        ({"qlinear": "fpa4w", "target": "cuda"}, r"promises kernels of metal, and the target is cuda"),
        ({"qlinear": "metal:4w", "target": "cuda"}, r"the target is cuda; write cuda:4w; cuda has kernels for 4w"),
        ({"qlinear": "xnnpack:4w"}, r"computes with floating-point weights; xnnpack has kernels for 8da4w, 8da8w"),
        (
            {"qlinear": "8w", "target": "cuda,metal"},
            r"metal has no kernel for 8w; metal has kernels for 4w, fpa4w, 8da4w",
        ),
        ({"qembedding": "8da4w"}, r"8da4w is for linears; an embedding has one of 4w, 8w, 4w_hqq"),
        ({"qlinear": "4w", "target": "cudda"}, r"there is no target 'cudda'; the nearest is cuda"),
        ({"algorithm": "hqqq"}, r"algorithm='hqqq' is unknown; the nearest is hqq"),
        ({"group_size_fallback": "adapt"}, r"group_size_fallback='adapt' is unknown; known are error, skip, adjust"),
        ({"qlinear_group_size": -32}, r"a positive multiple of 16; got -32"),
        ({"qlinear_group_size": 40}, r"a positive multiple of 16; got 40; the nearest are 32 and 48"),
        ({"qlinear_group_size": 32.0}, r"a positive multiple of 16; got 32.0"),
        ({"qlinear_group_size": True}, r"a positive multiple of 16; got True"),
        (
            {"qembedding_group_size_encoder": 7},
            r"qembedding_group_size_encoder must be 0.* got 7; the nearest are 6 and 8",
        ),
        ({"qlinear": "8da8w", "qlinear_group_size": 64}, r"8da8w has one scale per row; leave the group size out"),
        ({"qlinear": "4w", "qlinear_group_size": 16, "target": "cpu"}, r"the nearest that it has are 32, 64"),
        (
            {"qlinear": "4w", "qlinear_packing_format": "tile_packed_to_4d", "target": "xnnpack"},
            r"not for xnnpack, which has auto; write cuda:tile_packed_to_4d",
        ),
        (
            {"qlinear_packing_format": "tile_packed"},
            r"no packing format 'tile_packed'; the nearest is tile_packed_to_4d",
        ),
        ({"qlinear_packing_format": "cuda:mps"}, r"not for cuda, which has auto, mma_tiled, tile_packed_to_4d"),
        ({"qlinear_packing_format": "cud:mps"}, r"there is no target 'cud'"),
        ({"qlinear_packing_format": 4}, r"the name of a packing format; got 4"),
        (
            {"qlinear": "8w", "qlinear_packing_format": "mma_tiled", "target": "cuda"},
            r"holds 4-bit weights, and 8w has 8 bits; use one of 4w, 4w_hqq, 8da4w",
        ),
        (
            {
                "qlinear": "4w",
                "qlinear_group_size": 16,
                "qlinear_packing_format": "tile_packed_to_4d",
                "target": "cuda",
            },
            r"no kernel for groups of 16; it has one for groups of 256, 128, 64, 32",
        ),
        ({"qlinear": "4w", "qlinear_encoder": "8w"}, r"the model has no encoder beside other parts; use qlinear"),
        (
            {"qlinear": "4w", "qlinear_group_size": 256},
            r"divides the in_features of no linear \(64, 96\); valid are 64, 32",
        ),
    ],
)
def test_options_are_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    model = Mlp().to(BF16)
    unchanged(model, lambda: ecp.quantize_model_(model, **options), message)


def test_weight_that_is_not_finite_is_refused_by_name() -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        model = Mlp()
        with torch.no_grad():
            model.down.weight[3, 5] = value
        unchanged(
            model, lambda m=model: ecp.quantize_model_(m, qlinear="4w"), "down: the weight contains NaN or infinity"
        )


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = Mlp()
    unchanged(model, lambda: ecp.quantize_model_(model, qlinear="4w"), "load the weights before")


# Group sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "wanted", "size"),
    [
        (256, 32, 32),
        (256, 64, 64),
        (720, 32, 16),
        (4304, 32, 16),
        (4304, 128, 16),
        (96, 128, 32),
        (96, 64, 32),
        (192, 128, 64),
        (72, 64, 0),
        (100, 32, 0),
    ],
)
def test_group_size_is_adjusted_to_the_largest_that_divides(k: int, wanted: int, size: int) -> None:
    layer = nn.Linear(k, 16)
    (entry,) = ecp.quantize_model_(layer, qlinear="4w", qlinear_group_size=wanted).layers
    assert (entry.scheme, entry.group_size) == ("4w", size)
    assert layer.weight.block_size == (1, size or k)
    assert entry.adjusted_from == (None if wanted == size else wanted)
    assert entry.reason == ("" if wanted == size else f"in_features {k} is no multiple of {wanted}")


@pytest.mark.parametrize(("target", "size"), [("cuda", 16), ("cpu", 16), ("cuda,cpu", 16)])
def test_adjusted_group_size_has_a_kernel_on_each_target(target: str, size: int) -> None:
    model = Mlp(hidden=720).to(BF16)
    report = ecp.quantize_model_(model, qlinear="4w", target=target)
    assert report["down"].group_size == size
    program = export(model, torch.randn(6, 64, dtype=BF16))
    for name in target.split(","):
        ecp.rewrite(program, name, expect={"rewritten": 2, "missed": 0})


def test_layer_that_a_target_folds_in_every_group_size_is_quantized_for_the_others() -> None:
    model = Mlp(hidden=36).to(FP32)
    report = ecp.quantize_model_(model, qlinear="4w", target="vulkan,coreml")
    assert (report["down"].group_size, report["down"].adjusted_from) == (0, 32)
    program = export(model, torch.randn(6, 64))
    ecp.rewrite(program, "coreml", expect={"kept": 2, "missed": 0})
    # Vulkan has no kernel for in_features that 8 does not divide.
    ecp.rewrite(program, "vulkan", expect={"kept": 1, "fold_dequantize": 1, "missed": 0})


def test_layer_without_any_kernel_stays_float_with_the_reason() -> None:
    model = Mlp(hidden=720)
    report = ecp.quantize_model_(model, qlinear="8da4w", target="xnnpack")
    assert report["down"].scheme is None and type(model.down.weight) is nn.Parameter
    assert report["down"].reason == (
        "in_features 720 is no multiple of 32, and no smaller group size has a kernel on xnnpack; 8da4w,8da8w gives it "
        "8 bits"
    )
    assert "in_features 720 is no multiple of 32" in str(report)
    assert ecp.rewrite(export(model, torch.randn(6, 64)), "xnnpack")[1].counts()["kept"] == 1


def test_promise_is_refused_for_a_layer_without_any_kernel() -> None:
    model = Mlp(hidden=720)
    unchanged(
        model, lambda: ecp.quantize_model_(model, qlinear="xnnpack:8da4w"), "down: in_features 720 is no multiple"
    )


def test_second_scheme_is_for_layers_that_the_group_size_does_not_divide() -> None:
    model = Mlp(hidden=720)
    report = ecp.quantize_model_(model, qlinear="8da4w,8da8w", target="xnnpack")
    assert [(layer.form, layer.adjusted_from) for layer in report.layers] == [
        ("8da4w group 32", None),
        ("8da8w per axis", 32),
    ]
    expect = {"kept": 2, "missed": 0, "keep_dynamic_int4": 1, "keep_dynamic_int8": 1}
    ecp.rewrite(export(model, torch.randn(6, 64)), "xnnpack", expect=expect)


def test_eight_bits_have_one_scale_per_row_where_a_target_has_only_that() -> None:
    for target, size in (("cpu", 0), ("tensorrt", 0), ("cuda,tensorrt", 0), ("cuda", 32), (None, 32)):
        report = ecp.quantize_model_(Mlp().to(BF16), qlinear="8w", target=target)
        assert {layer.group_size for layer in report.layers} == {size}
        reason = f"{target.rpartition(',')[2]} has no kernel of 8w for groups of 32" if target and size == 0 else ""
        assert {layer.reason for layer in report.layers} == {reason}


def test_fallback_skip_leaves_the_layer_and_reports_it() -> None:
    model = Mlp(hidden=720)
    report = ecp.quantize_model_(model, qlinear="4w", group_size_fallback="skip")
    assert [layer.scheme for layer in report.layers] == ["4w", None]
    assert report["down"].reason == "in_features 720 is no multiple of 32"
    assert type(model.down.weight) is nn.Parameter


def test_group_size_that_divides_no_layer_is_refused_by_skip() -> None:
    model = nn.Linear(720, 16)
    unchanged(
        model,
        lambda: ecp.quantize_model_(model, qlinear="4w", group_size_fallback="skip"),
        r"qlinear_group_size=32 divides the in_features of no linear \(720\); valid are 16, 0",
    )


def test_group_size_that_divides_no_embedding_is_refused() -> None:
    model = Tied()
    unchanged(
        model,
        lambda: ecp.quantize_model_(model, qembedding="4w", qembedding_group_size=48),
        r"qembedding_group_size=48 divides the in_features of no embedding \(64\); valid are 64, 32, 16, 0",
    )


def test_fallback_error_lists_every_layer() -> None:
    model = nn.Sequential(nn.Linear(720, 64), nn.Linear(64, 72), nn.Linear(72, 64))
    with pytest.raises(ValueError, match="is no multiple of 32") as raised:
        ecp.quantize_model_(model, qlinear="4w", group_size_fallback="error")
    assert [line.partition(":")[0] for line in str(raised.value).splitlines()] == ["0", "2"]
    assert all(type(layer.weight) is nn.Parameter for layer in model)


# Layers ---------------------------------------------------------------------------------------------------------------


def test_model_that_is_one_linear_is_quantized() -> None:
    layer = nn.Linear(64, 32)
    (entry,) = ecp.quantize_model_(layer, qlinear="4w").layers
    assert (entry.fqn, entry.out_features, entry.in_features) == ("", 32, 64)
    assert type(layer.weight).__name__ == "IntxUnpackedToInt8Tensor"


def test_separate_head_follows_the_linears() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.randn(64, 64))
    report = ecp.quantize_model_(model, qlinear="4w", qembedding="8w")
    assert [report[name].form for name in ("embed", "middle", "head")] == ["8w per axis", "4w group 32", "4w group 32"]


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"qlinear": "4w"}, "4w group 32"),
        ({"qlinear": "4w", "qembedding": "8w"}, "8w per axis"),
        ({"qembedding": "4w", "qembedding_group_size": 32}, "4w group 32"),
        ({"qlinear": "8da4w", "qembedding": "4w", "qembedding_group_size": 64}, "8da4w group 64"),
        ({"qlinear": "8da4w", "qembedding": "8w"}, "8da8w per axis"),
        ({"qlinear": "fpa4w"}, "fpa4w group 32"),
    ],
)
def test_tied_weight_is_quantized_once_and_right_in_both_uses(options: dict[str, Any], form: str) -> None:
    target = "metal" if options.get("qlinear") == "fpa4w" else "cpu"
    model = Tied()
    table = model.embed.weight.detach().clone()
    report = ecp.quantize_model_(model, target=target, **options)
    assert model.head.weight is model.embed.weight
    assert (report["embed"].form, report["head"].form) == (form, form)
    assert (report["embed"].tied_to, report["head"].tied_to) == (("head",), ("embed",))
    # In both uses the numbers are those of the one weight, which is near the original.
    weight = model.embed.weight.dequantize()
    assert error(weight, table) < 0.12
    x = ids()
    assert torch.equal(model.embed(x), weight[x])
    h = torch.randn(3, 64)
    read = fake_quantized(h.double()) if "8da" in options.get("qlinear", "") else h.double()
    assert error(model.head(h), read @ weight.double().T) < 2e-3

    program = export(model, x)
    # Two names of one parameter; one of them has readers.
    assert program.state_dict["embed.weight"] is program.state_dict["head.weight"]
    rewritten, _ = assert_rewrites(program, target, expect={"missed": 0, "rewritten": 2 + ("qlinear" in options)})
    assert not any(name in rewritten.state_dict for name in ("embed.weight", "head.weight"))
    assert error(rewritten.module()(x), model(x)) < 2.0**-7


def test_tied_weight_of_dynamic_activations_is_kept_by_xnnpack() -> None:
    model = Tied()
    ecp.quantize_model_(model, qlinear="8da4w", qembedding="4w", qembedding_group_size=32, target="xnnpack")
    expect = {"kept": 2, "quantized_embedding": 1, "missed": 0, "fold_dequantize": 0}
    ecp.rewrite(export(model, ids()), "xnnpack", expect=expect)


def test_weights_that_are_one_memory_are_tied() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    assert model.head.weight is not model.embed.weight
    report = ecp.quantize_model_(model, qlinear="4w")
    assert report["head"].tied_to == ("embed",) and model.head.weight is model.embed.weight


def test_layer_without_a_scheme_names_the_option() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.randn(64, 64))
    report = ecp.quantize_model_(model, qlinear="4w")
    assert report["embed"].reason == "qembedding is not given"
    assert ecp.quantize_model_(Mlp())["up"].reason == "qlinear is not given"


def test_layer_that_is_quantized_already_stays_as_it_is() -> None:
    model = Mlp()
    ecp.quantize_model_(model, qlinear="8w", recipe={"layer": [{"pattern": "down", "skip": True}]})
    first = model.up.weight
    report = ecp.quantize_model_(model, qlinear="4w")
    assert model.up.weight is first
    assert report["up"].reason == "quantized before: its weight is a IntxUnpackedToInt8Tensor"
    assert report["down"].scheme == "4w"


def test_layers_that_torchao_cannot_quantize_are_reported() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "wide": nn.Linear(64, 64, dtype=torch.float64)})
    report = ecp.quantize_model_(model, qlinear="4w")
    assert {layer.fqn: layer.reason for layer in report.layers} == {
        "attention.in_proj_weight": "a matrix of MultiheadAttention, which is neither a linear nor an embedding",
        "attention.out_proj": "nn.MultiheadAttention reads this weight itself, past the linear",
        "wide": "a weight in float64, which torchao does not quantize",
    }
    x = torch.randn(3, 1, 64)
    assert torch.isfinite(model["attention"](x, x, x)[0]).all()


def test_report_is_plain_data_and_short_text() -> None:
    report = ecp.quantize_model_(Mlp(hidden=720), qlinear="4w")
    assert report.to_dict()["layers"][1] == {
        "fqn": "down",
        "kind": "linear",
        "out_features": 64,
        "in_features": 720,
        "encoder": False,
        "scheme": "4w",
        "group_size": 16,
        "algorithm": "hqq",
        "adjusted_from": 32,
        "reason": "in_features 720 is no multiple of 32",
        "pattern": None,
        "tied_to": [],
        "experts": 1,
    }
    assert str(report).splitlines()[0] == "quantized 2 of 2 layers (2 x linear)"
    with pytest.raises(KeyError):
        report["up.weight"]


def test_quantizing_loads_neither_executorch_nor_a_model_loader() -> None:
    program = (
        "import sys, torch, et_cuda_passes as ecp; ecp.quantize_model_(torch.nn.Linear(64, 32), qlinear='4w', "
        "target='xnnpack'); print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not set(loaded.stdout.split()) & {"executorch", "transformers", "gguf", "accelerate"}
