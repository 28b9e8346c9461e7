"""``accuracy``: its ratios against independent computations, its memory, and what is not measured."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.accuracy import Accuracy, MeasuredLayer, Ratio
from et_cuda_passes.comparison import rounding_limit
from et_cuda_passes.executorch.packed import read_report
from et_cuda_passes.graph.report import LayerAccuracy
from et_cuda_passes.testing import Experts, Quantized
from et_cuda_passes.testing import export as export_small
from tests import experts
from tests.generated import Plan, exported, inputs, plans

FOUR = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
DYNAMIC = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Gated(nn.Module):
    """q and k read one input; gate and up become one operator on cuda."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x) - torch.tanh(self.k(x))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def export(model: nn.Module, *args: Tensor, dynamic: Any = None) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model.eval(), args, dynamic_shapes=dynamic)


def quantized(model: nn.Module, config: Any = FOUR, filter_fn: Any = None) -> nn.Module:
    copied = copy.deepcopy(model)
    quantize_(copied, config, filter_fn=filter_fn)
    return copied


def decibels(wanted: Tensor, got: Tensor) -> float:
    """The definition, in numpy and fp64."""
    a, b = (each.detach().double().numpy() for each in (wanted, got))
    noise = np.square(b - a).sum()
    return float(10 * np.log10(np.square(a).sum() / noise)) if noise else math.inf


def recorded(model: nn.Module, *args: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The input and the output of each linear and each embedding of a model."""
    given: dict[str, Tensor] = {}
    results: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            given[name], results[name] = args[0].clone(), result.clone()

        return record

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    ]
    with torch.no_grad():
        model(*args)
    for each in hooks:
        each.remove()
    return given, results


def of(result: Accuracy, layer: str) -> MeasuredLayer:
    (found,) = [each for each in result.layers if each.layer == f"{layer}.weight"]
    return found


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FOUR, DYNAMIC], ids=["4w", "8da4w"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_layer_is_compared_on_the_inputs_of_the_float_layer(config: Any, dtype: torch.dtype) -> None:
    model, x = Gated().to(dtype), torch.randn(7, 64).to(dtype)
    narrow = quantized(model, config)
    result = ecp.accuracy(export(narrow, x), float_program=export(model, x))
    given, wanted = recorded(model, x)
    assert len(result.layers) == 5
    for name in ("q", "k", "gate", "up", "down"):
        with torch.no_grad():
            got = narrow.get_submodule(name)(given[name])
        layer = of(result, name)
        assert layer.quantized_db == pytest.approx(decibels(wanted[name], got), abs=1e-3), name
        assert (layer.rewritten_db, layer.limit_db, layer.why) == (None, None, "")
    (output,) = result.outputs
    with torch.no_grad():
        assert output.quantized_db == pytest.approx(decibels(model(x), narrow(x)), abs=1e-3)
    assert output.rewritten_db is None
    assert result.notes == ()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_rewritten_layer_is_compared_on_the_inputs_of_the_exported_layer(target: str) -> None:
    narrow, x = quantized(Mlp().bfloat16()), torch.randn(7, 64).bfloat16()
    result = ecp.accuracy(export(narrow, x), target)
    given, wanted = recorded(narrow, x)
    for name in ("up", "down"):
        # The layer alone, in a program of its own.
        alone, _ = ecp.rewrite(export(narrow.get_submodule(name), given[name]), target, expect={"linear_int4": 1})
        with torch.no_grad():
            got = alone.module()(given[name])
        layer = of(result, name)
        if layer.at == layer.node:
            assert layer.rewritten_db == pytest.approx(decibels(wanted[name], got), abs=1e-6)
        else:
            assert (target, name, layer.at) == ("cuda", "up", "relu")
            assert layer.rewritten_db == pytest.approx(decibels(wanted[name].relu(), got.relu()), abs=1e-6)
        assert 41 < layer.limit_db < layer.rewritten_db
        assert layer.quantized_db is None
    program, report = ecp.rewrite(export(narrow, x), target)
    with torch.no_grad():
        assert result.outputs[0].rewritten_db == pytest.approx(decibels(narrow(x), program.module()(x)), abs=1e-3)
    assert result.report is not None
    assert result.report.counts() == report.counts()


def test_layers_fused_into_one_operator_are_compared_at_its_result() -> None:
    narrow, x = quantized(Gated().bfloat16()), torch.randn(7, 64).bfloat16()
    program = export(narrow, x)
    result = ecp.accuracy(program, "cuda")
    gate, up = of(result, "gate"), of(result, "up")
    assert result.report is not None and result.report.applied["fuse_gate"] == 1
    assert (gate.at, up.at) == ("mul", "mul")
    assert gate.rewritten_db == up.rewritten_db
    # One operator more for each step that the exported program rounds, silu and the product.
    assert gate.limit_db == pytest.approx(rounding_limit([torch.bfloat16], 2, 64))
    # q and k have one packed weight, and stay two results.
    assert [of(result, name).at for name in ("q", "k")] == ["linear", "linear_1"]
    assert result.report.applied["fused_linear_int4"] == 2
    assert not any(layer.is_beyond_rounding for layer in result.layers)


def test_progress_counts_the_comparisons_of_all_input_sets() -> None:
    model, x = Gated(), torch.randn(3, 64)
    program = export(quantized(model), x)
    seen: list[tuple[int, int]] = []
    inputs = [(x,), (torch.randn(3, 64),)]
    result = ecp.accuracy(
        program, "cpu", dict(model.named_parameters()), inputs, progress=lambda *each: seen.append(each)
    )
    measured = sum((each.quantized_db is not None) + (each.rewritten_db is not None) for each in result.layers)
    assert seen == [(done, 2 * measured) for done in range(1, 2 * measured + 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_without_finite_values_are_no_error_of_the_rewrite(value: float) -> None:
    model, x = Gated(), torch.randn(3, 64)
    program = export(quantized(model), x)
    result = ecp.accuracy(program, "cpu", None, [(torch.full((3, 64), value),)])
    layer = of(result, "up")
    assert layer.rewritten_db is not None and math.isnan(layer.rewritten_db)
    assert not layer.is_beyond_rounding
    assert layer.why == "its output is infinite or NaN everywhere, as exported too"
    assert layer in result.below(40)  # a check does not pass on it
    assert "BEYOND ROUNDING" not in str(result)


def test_note_on_weights_of_another_checkpoint() -> None:
    model, other, x = Gated(), Gated(), torch.randn(3, 64)
    program = export(quantized(model), x)
    assert ecp.accuracy(program, None, export(model, x)).notes == ()
    note = ecp.accuracy(program, None, export(other, x)).notes[-1]
    assert "quantized layers differ from the float one by more than its signal" in note
    assert "give the float program of the same checkpoint" in note


def test_powers_of_several_input_sets_add_up() -> None:
    model = Mlp()
    narrow, x = quantized(model), torch.randn(3, 64)
    dynamic = ({0: Dim("rows", min=1, max=64)},)
    programs = (export(narrow, x, dynamic=dynamic), export(model, x, dynamic=dynamic))
    sets = [torch.randn(5, 64), 100 * torch.randn(17, 64)]
    result = ecp.accuracy(programs[0], None, programs[1], [(each,) for each in sets])
    assert result.input_sets == 2
    both = torch.cat(sets)
    with torch.no_grad():
        assert of(result, "up").quantized_db == pytest.approx(decibels(model.up(both), narrow.up(both)), abs=1e-3)
        assert result.outputs[0].quantized_db == pytest.approx(decibels(model(both), narrow(both)), abs=1e-3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("target", ["cuda", "cpu", "xnnpack"])
def test_readers_of_a_shared_weight_are_measured_each(target: str) -> None:
    model, ids = Tied(), torch.arange(8)[None]
    plain = export(model, ids)
    given, wanted = recorded(model, ids)
    ecp.quantize_model_(model, qlinear="8w", qembedding="8w")
    assert model.head.weight is model.embed.weight
    result = ecp.accuracy(export(model, ids), target, plain)
    found = {layer.op: layer for layer in result.layers}
    assert {layer.layer for layer in result.layers} == {"embed.weight"}
    with torch.no_grad():
        for op, module, name in (("aten.embedding", model.embed, "embed"), ("aten.linear", model.head, "head")):
            db = decibels(wanted[name], module(given[name]))
            assert found[op].quantized_db == pytest.approx(db, abs=1e-3)
            assert 30 < db < 60


@pytest.mark.parametrize("form", ["bmm", "grouped mm", "index", "einsum of all", "select", "unbind"])
def test_experts_are_measured_in_every_form(form: str) -> None:
    _, product, _, args = experts.FORMS[form]
    model = Experts(product)
    plain = {"data": model.exact().float()}
    result = ecp.accuracy(export_small(model, *args), "cuda", plain)
    assert all(layer.layer == "data" for layer in result.layers)
    for layer in result.layers:
        assert layer.rewritten_db is not None and layer.rewritten_db >= layer.limit_db
        # The weights are exact, so the only noise is that of their rounding to bf16.
        assert layer.quantized_db is not None and layer.quantized_db > 40


def test_convolution_is_measured_as_a_linear_is() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(64, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x)

    model, x = Conv().bfloat16(), torch.randn(2, 64, 5, 5).bfloat16()
    plain = export(model, x)
    weight = model.mix.weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True) / 7
    integers = (weight / scale).round().clamp(-8, 7).to(torch.int8)

    class Narrow(Conv):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Module()
            self.mix.bias = model.mix.bias
            self.mix.register_buffer("weight", integers)
            self.mix.register_buffer("scale", scale)

        def forward(self, x: Tensor) -> Tensor:
            w = torch.ops.torchao.dequantize_affine(
                self.mix.weight, [1, 64, 1, 1], self.mix.scale, None, torch.int8, -8, 7, torch.bfloat16
            )
            return F.conv2d(x, w, self.mix.bias)

    narrow = Narrow()
    (layer,) = ecp.accuracy(export(narrow, x), "cuda", plain).layers
    with torch.no_grad():
        assert layer.quantized_db == pytest.approx(decibels(model(x), narrow(x)), abs=1e-3)
    assert layer.rewritten_db >= layer.limit_db


def test_folded_weight_is_exact() -> None:
    narrow, x = quantized(Mlp()), torch.randn(3, 64)
    result = ecp.accuracy(export(narrow, x), "xnnpack")
    assert result.report is not None and result.report.applied == {"fold_dequantize": 2}
    assert [layer.rewritten_db for layer in result.layers] == [math.inf, math.inf]
    assert result.outputs[0].rewritten_db == math.inf


# One seed, and no shrinking: each example takes a second.
@settings(max_examples=25, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans())
def test_rewrite_of_random_models_stays_within_rounding(plan: Plan) -> None:
    program, _ = exported(plan)
    _, report = ecp.rewrite(program, plan.target)
    if not report.outcomes:
        return
    result = ecp.accuracy(program, plan.target, inputs=[inputs(plan), inputs(plan, seed=1, rows=5, sign=-1)])
    assert sorted(layer.node for layer in result.layers) == sorted(outcome.node for outcome in report.outcomes)
    statuses = {outcome.node: outcome.status for outcome in report.outcomes}
    for layer in result.layers:
        assert not layer.is_beyond_rounding, layer
        assert (layer.rewritten_db is None) == bool(layer.why), layer
        if statuses[layer.node] == "rewritten" and layer.rewritten_db is None:
            assert "control flow" in layer.why or "depends on it" in layer.why, layer


# The float program ----------------------------------------------------------------------------------------------------


def test_weights_by_name_serve_as_the_float_program() -> None:
    model, x = Mlp(), torch.randn(3, 64)
    program = export(quantized(model), x)
    by_program = ecp.accuracy(program, None, export(model, x))
    by_name = ecp.accuracy(program, None, dict(model.named_parameters()))
    assert by_name.to_dict() == by_program.to_dict()


def test_float_program_may_have_another_graph() -> None:
    model, x = Mlp(), torch.randn(3, 64)
    program = export(quantized(model), x, dynamic=({0: Dim("rows", min=1, max=64)},))
    other = export(model, x).run_decompositions()
    assert not {node.target for node in other.graph.nodes} & {torch.ops.aten.linear.default}
    found, same = (ecp.accuracy(program, None, each) for each in (other, dict(model.named_parameters())))
    assert [layer.layer for layer in found.layers] == [layer.layer for layer in same.layers]
    for one, two in zip(found.layers, same.layers, strict=True):
        assert one.quantized_db == pytest.approx(two.quantized_db, abs=1e-3)
    assert found.outputs[0].quantized_db == pytest.approx(same.outputs[0].quantized_db, abs=1e-3)
    assert found.notes == ()


def test_float_program_in_another_precision_serves_too() -> None:
    model, x = Mlp(), torch.randn(3, 64).bfloat16()
    narrow = quantized(copy.deepcopy(model).bfloat16())
    result = ecp.accuracy(export(narrow, x), None, export(model, x.float()))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("the float program takes other inputs (input 0 (x) is torch.bfloat16 [3, 64]")
    same = ecp.accuracy(export(narrow, x), None, export(copy.deepcopy(model).bfloat16(), x))
    assert [layer.quantized_db for layer in result.layers] == [layer.quantized_db for layer in same.layers]


def test_square_weight_that_the_float_program_stores_transposed_is_turned() -> None:
    class Conv1D(nn.Module):
        """The linear of GPT-2."""

        def __init__(self, weight: Tensor, bias: Tensor) -> None:
            super().__init__()
            self.mix = nn.Module()
            self.mix.weight, self.mix.bias = nn.Parameter(weight), nn.Parameter(bias)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.mix.bias, x, self.mix.weight)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x)

    model, x = Linear(), torch.randn(3, 64)
    plain = Conv1D(model.mix.weight.detach().t().contiguous(), model.mix.bias.detach())
    turned = ecp.accuracy(export(quantized(model), x), None, export(plain, x))
    straight = ecp.accuracy(export(quantized(model), x), None, export(model, x))
    assert turned.layers[0].quantized_db == pytest.approx(straight.layers[0].quantized_db, abs=1e-3)
    assert turned.notes == ()


def test_layer_without_a_float_weight_is_listed_with_the_reason() -> None:
    model, x = Gated(), torch.randn(3, 64)
    program = export(quantized(model), x)
    weights = dict(model.named_parameters())
    del weights["up.weight"]
    weights["down.weight"] = nn.Parameter(torch.randn(64, 64))
    weights["q.weight"] = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    result = ecp.accuracy(program, None, weights)
    assert len(result.layers) == 5
    assert of(result, "up").why == "the float program has no weight up.weight"
    assert of(result, "down").why == "down.weight is [64, 64] in the float program and [64, 128] in this one"
    assert of(result, "q").why == "q.weight of the float program is Parameter in torch.int8, not floating-point"
    assert [of(result, name).quantized_db for name in ("up", "down", "q")] == [None, None, None]
    assert of(result, "gate").quantized_db is not None
    text = str(result)
    assert result.notes == ("weights that stay quantized in the float run: q.weight, up.weight, down.weight",)
    for name in ("up", "down", "q"):
        assert (
            f"not measured: {name}.weight: {of(result, name).why.replace('weight up.weight', 'weight of that name')}"
            in text
        )


def test_float_program_of_another_model_is_noticed() -> None:
    model, x = Mlp(), torch.randn(3, 64)
    program = export(quantized(model), x)
    other = copy.deepcopy(model)
    nn.init.constant_(other.up.bias, 3.0)
    (note,) = ecp.accuracy(program, None, export(other, x)).notes
    assert "more than their quantized weights differs" in note


def test_programs_with_other_outputs_are_compared_with_the_float_run() -> None:
    class Two(Mlp):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    model, x = Two(), torch.randn(3, 64)
    plain = Mlp()
    plain.load_state_dict(model.state_dict())
    result = ecp.accuracy(export(quantized(model), x), None, export(plain, x))
    assert result.notes == (
        "the float program has other outputs: the output is compared with that of this program with floating-point "
        "weights",
    )
    with torch.no_grad():
        wanted = decibels(model(x)[0], quantized(model)(x)[0])
    assert [output.quantized_db for output in result.outputs] == [pytest.approx(wanted, abs=1e-3), math.inf]


# What is not measured, and what is beyond rounding --------------------------------------------------------------------


def test_layer_in_control_flow_is_listed() -> None:
    def branch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, F.linear, lambda x, w, b: F.linear(x, w) - b, (x, weight, bias))

    model, x = Quantized(64, 64, form=branch), torch.ones(3, 64).bfloat16()
    weight = model.weight() + 0.01 * torch.randn(64, 64).bfloat16()
    result = ecp.accuracy(export(model, x), "cuda", {"data": weight})
    why = "it is inside control flow, of which only the whole output is measured"
    assert [(each.quantized_db, each.rewritten_db, each.why) for each in result.layers] == [(None, None, why)] * 2
    (output,) = result.outputs
    with torch.no_grad():
        wanted = decibels(F.linear(x, weight, model.bias), model(x))
    assert output.quantized_db == pytest.approx(wanted, abs=1e-3)
    assert output.rewritten_db is not None and output.rewritten_db > 40


def test_missed_and_kept_layers_are_as_exported() -> None:
    x = torch.randn(3, 64)
    missed = ecp.accuracy(export(quantized(Mlp()), x), "cuda")
    assert [layer.why for layer in missed.layers] == ["missed, so it is as exported"] * 2
    assert missed.outputs[0].rewritten_db == math.inf
    kept = ecp.accuracy(export(quantized(Mlp(), DYNAMIC), x), "xnnpack")
    assert [layer.why for layer in kept.layers] == ["kept, so it is as exported"] * 2


class Louder(ecp.Rule):
    """linear(x, dequantize(w), bias) -> linear(x, dequantize(w), bias) * 1.1"""

    factor = 1.1

    def pattern(self, x: Any, bias: Any = None) -> Any:
        return ecp.op(torch.ops.aten.linear.default)(x, ecp.dequantized(..., name="w", shared=True), bias)

    def rewrite(self, b: Any, m: Any) -> Any:
        y = b.call(torch.ops.aten.linear.default, m.x, m.w, m.bias)
        return b.call(torch.ops.aten.mul.Scalar, y, self.factor)


def test_rewrite_beyond_rounding_is_marked_and_comes_first() -> None:
    model, x = Mlp().bfloat16(), torch.randn(3, 64).bfloat16()
    program = export(quantized(model), x)
    wrong = ecp.accuracy(program, "cpu", passes=[Louder()])
    assert all(layer.is_beyond_rounding for layer in wrong.layers)
    for layer in wrong.layers:
        assert layer.rewritten_db == pytest.approx(20.0, abs=0.2)
    assert str(wrong).count("BEYOND ROUNDING, limit 42.1") == 2
    assert wrong.below(19) == []
    assert len(wrong.below(25)) == 2
    assert all(layer["beyond_rounding"] for layer in wrong.to_dict()["layers"])
    assert not any(layer.is_beyond_rounding for layer in ecp.accuracy(program, "cpu").layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_limit_lies_between_rounding_and_a_wrong_weight(dtype: torch.dtype) -> None:
    k = 512
    x, weight = torch.randn(64, k, dtype=torch.float64), torch.randn(256, k, dtype=torch.float64)
    rounded = (x.to(dtype) @ weight.to(dtype).t()).double()
    exact = x.to(dtype).double() @ weight.to(dtype).double().t()
    limit = rounding_limit([dtype], 0, k)
    assert decibels(exact, rounded) > limit + 3
    broken = weight.clone()
    broken[3] *= 1.5
    assert decibels(exact, x.to(dtype).double() @ broken.t()) < limit


def test_layers_are_sorted_worst_first() -> None:
    model, x = Gated(), torch.randn(7, 64)
    narrow = quantized(model, filter_fn=lambda module, name: name in ("gate", "down"))
    quantize_(
        narrow,
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32)),
        filter_fn=lambda module, name: name in ("q", "k", "up"),
    )
    weights = dict(model.named_parameters())
    del weights["k.weight"]
    names = [layer.layer for layer in ecp.accuracy(export(narrow, x), None, weights).layers]
    assert set(names[:2]) == {"gate.weight", "down.weight"}
    assert set(names[2:4]) == {"q.weight", "up.weight"}
    assert names[4] == "k.weight"


# Numbers without a finite ratio ---------------------------------------------------------------------------------------


def ratio(wanted: list[float], got: list[float]) -> float | None:
    found = Ratio()
    found.add(torch.tensor(wanted), torch.tensor(got))
    return found.decibels


def test_ratio_without_noise_or_signal_or_with_nan_is_defined() -> None:
    inf, nan = math.inf, math.nan
    assert ratio([3.0, 4.0], [3.0, 4.5]) == pytest.approx(20.0)
    assert ratio([1.0, 2.0], [1.0, 2.0]) == inf
    assert ratio([0.0, 0.0], [0.0, 0.0]) == inf
    assert ratio([0.0, 0.0], [0.0, 1.0]) == -inf
    assert ratio([], []) is None
    # A mask of -inf is the same in both.
    assert ratio([-inf, 3.0, 4.0], [-inf, 3.0, 4.5]) == pytest.approx(20.0)
    assert ratio([nan, 1.0], [nan, 1.0]) == inf
    for wanted, got in (([1.0, 2.0], [1.0, nan]), ([inf, 2.0], [-inf, 2.0]), ([1.0], [inf]), ([nan], [nan])):
        found = ratio(wanted, got)
        assert found is not None and math.isnan(found), (wanted, got)


def test_ratio_of_huge_and_tiny_values_does_not_overflow() -> None:
    assert ratio([3e30, 4e30], [3e30, 4.5e30]) == pytest.approx(20.0, abs=1e-4)
    assert ratio([3e-30, 4e-30], [3e-30, 4.5e-30]) == pytest.approx(20.0, abs=1e-4)


def test_ratios_without_a_number_are_words_in_text_and_json() -> None:
    model = Mlp()
    nn.init.zeros_(model.up.weight)
    nn.init.zeros_(model.up.bias)
    program = export(quantized(model), torch.randn(3, 64))
    result = ecp.accuracy(program, "xnnpack", export(model, torch.randn(3, 64)))
    # No signal and no noise behind a weight of zeros.
    assert {layer.quantized_db for layer in result.layers} == {math.inf}

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(result.to_json(), parse_constant=refuse)
    assert [layer["quantized_db"] for layer in found["layers"]] == ["exact", "exact"]
    assert "exact" in str(result)

    broken = copy.deepcopy(model)
    broken.down.weight.data[0, 0] = math.nan
    odd = ecp.accuracy(program, None, dict(broken.named_parameters()))
    assert odd.layers[0].layer == "down.weight"
    assert json.loads(odd.to_json(), parse_constant=refuse)["layers"][0]["quantized_db"] == "not finite"


def test_report_with_ratios_is_read_back_from_json() -> None:
    program = export(quantized(Mlp().bfloat16()), torch.randn(3, 64).bfloat16())
    report = ecp.accuracy(program, "cpu").report
    assert report is not None
    assert [type(layer) for layer in report.accuracy] == [LayerAccuracy, LayerAccuracy]
    assert {layer.node for layer in report.accuracy} == {outcome.node for outcome in report.outcomes}
    report.accuracy += tuple(LayerAccuracy("w", "n", value, None) for value in (math.inf, -math.inf, 20.0, None))
    again = read_report(json.loads(report.to_json()))
    assert again.accuracy == report.accuracy
    assert ecp.Report.merge([report, again]).accuracy == report.accuracy * 2


# Memory, and the caller's program -------------------------------------------------------------------------------------


@contextmanager
def peak_bytes() -> Iterator[Callable[[], int]]:
    """The most bytes of new memory that were alive at one time."""
    alive: dict[StorageWeakRef, int] = {}
    most = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    alive[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
            for ref in [ref for ref in alive if ref.expired()]:
                del alive[ref]
            most = max(most, sum(alive.values()))
            return result

    with Count():
        yield lambda: most


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*(module for _ in range(layers) for module in (nn.Linear(64, 64), nn.ReLU())))


def test_memory_is_that_of_one_layer_whatever_the_depth() -> None:
    rows = 4096
    x = torch.randn(rows, 64)
    activation = rows * 64 * 4
    peaks = {}
    for layers in (3, 12):
        model = deep(layers)
        programs = export(quantized(model), x), export(model, x)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        with peak_bytes() as peak:
            ecp.accuracy(programs[0], "xnnpack", programs[1], [(x,)])
        peaks[layers] = peak() - weights
        # A run without freeing holds an activation for each operator.
        assert peaks[layers] > 2 * activation
    assert peaks[12] < peaks[3] + activation / 2
    assert peaks[12] < 9 * activation


class Cache(nn.Module):
    """Adds each result to a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.register_buffer("total", torch.zeros(3, 64))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(self.up(x))
        return self.total * 2


def test_programs_and_their_buffers_are_unchanged() -> None:
    model, x = Cache(), torch.randn(3, 64)
    programs = export(quantized(model), x), export(model, x)
    before = [(str(program.graph), copy.deepcopy(program.state_dict), set(program.state_dict)) for program in programs]
    first = ecp.accuracy(programs[0], "cpu", programs[1], [(x,), (x,)])
    again = ecp.accuracy(programs[0], "cpu", programs[1], [(x,), (x,)])
    assert first.to_dict() == again.to_dict()
    for program, (graph, state, names) in zip(programs, before, strict=True):
        assert str(program.graph) == graph
        assert set(program.state_dict) == names
        assert torch.equal(program.state_dict["total"], state["total"])
    # The buffer starts with zeros in every run.
    with torch.no_grad():
        wanted = decibels(model.up(x), quantized(model).up(x))
    assert first.outputs[0].quantized_db == pytest.approx(wanted, abs=1e-3)


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_random_inputs_have_the_shapes_and_the_range_of_the_example() -> None:
    model, ids = Tied(), torch.tensor([[3, 5, 5, 90]])
    plain = export(model, ids)
    ecp.quantize_model_(model, qlinear="4w", qembedding="4w")
    program = export(model, ids)
    first, same, other = (ecp.accuracy(program, None, plain, seed=seed).to_dict() for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert first != ecp.accuracy(program, None, plain).to_dict()


def test_invalid_arguments_are_errors_with_the_fix() -> None:
    model, x = Mlp(), torch.randn(3, 64)
    program = export(quantized(model), x, dynamic=({0: Dim("rows", min=2, max=8)},))
    plain = dict(model.named_parameters())

    def refused(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ecp.accuracy(*args, **options)

    refused("nothing to compare with: give a target, a float program, or both", program)
    refused("no quantized weight that an operator reads", export(model, x), "cpu")
    refused("there is no target|unknown target", program, "gpu")
    for sets, match in (
        ([(x[:1],)], r"input 0 \(x\) is torch.float32 \[1, 64\], .*, with s\d+ from 2 to 8"),
        ([(torch.randn(9, 64),)], "from 2 to 8"),
        ([(torch.randn(3, 63),)], r"is torch.float32 \[3, 63\], the program takes torch.float32 \[s\d+, 64\]"),
        ([(x.double(),)], "is torch.float64"),
        ([(3,)], r"input 0 \(x\) is 3, the program takes"),
        ([(x, x)], r"an input set has 2 values, the program takes 1: .* \(torch.float32 \[s\d+, 64\]\)"),
        ([()], "an input set has 0 values"),
        ([], "inputs is empty"),
        ((x,), "a list with one tuple of arguments for each call"),
        (x, "a list with one tuple of arguments for each call"),
    ):
        refused(match, program, "cpu", plain, sets)
    refused("give one of them", program, "cpu", None, [(x,)], 3)
    no_weight = "no quantized weight has a floating-point one: the float program has no weight up.weight; its weights"
    refused(f"{no_weight} are a", program, None, {"a": x})
    unsaved = copy.copy(program)
    unsaved._example_inputs = None
    refused("without example inputs: give inputs", unsaved, "cpu")
    refused("without example inputs: give inputs", unsaved, "cpu", seed=1)
    with pytest.raises(TypeError, match="not Mlp; export the model"):
        ecp.accuracy(model, "cpu")  # type: ignore[arg-type]


def test_operator_that_refuses_the_inputs_is_an_error() -> None:
    model, ids = Tied(), torch.arange(4)[None]
    plain = export(model, ids)
    ecp.quantize_model_(model, qlinear="4w", qembedding="4w")
    with pytest.raises(ValueError, match="the program does not run with these inputs: embedding: index out of range"):
        ecp.accuracy(export(model, ids), None, plain, [(torch.full((1, 4), 96),)])


def test_sizes_that_must_be_equal_are_checked() -> None:
    class Sum(Mlp):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    rows = Dim("rows", min=2, max=8)
    x = torch.randn(3, 64)
    program = export(quantized(Sum()), x, x, dynamic=({0: rows}, {0: rows}))
    assert ecp.accuracy(program, "cpu", inputs=[(torch.randn(5, 64), torch.randn(5, 64))]).input_sets == 1
    with pytest.raises(ValueError, match=r"input 1 \(y\) is torch.float32 \[1, 64\], .*, and s\d+ is 5"):
        ecp.accuracy(program, "cpu", inputs=[(torch.randn(5, 64), torch.randn(1, 64))])
