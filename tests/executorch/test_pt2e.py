"""Weights of a PT2E flow: decoded like torchao's, packed for the CPU, kept for XNNPACK where its result is correct.

torchao's PT2E flow with executorch's XNNPACKQuantizer writes most of the graphs; the others are written by hand.
ExecuTorch's own runtime runs the lowered programs. The results are compared with the quantized model in eager.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.helpers import Together
from tests.processes import outcome
from tests.xnnpack import Stock, error, example, lower_and_run, lowered, output

qd = torch.ops.quantized_decomposed
STEP = 0.05


@cache
def quantized(make: Callable[[], nn.Module], *shape: int, **options: Any) -> tuple[nn.Module, ExportedProgram]:
    """The model as the PT2E flow converts it, calibrated on an example, and its program."""
    model, x = make(), example(*shape)
    torch.manual_seed(0)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))
    prepared = prepare_pt2e(torch.export.export(model.eval(), (x,)).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    return converted, torch.export.export(converted, (x,))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))


def convs() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1))


def through(partitioner: Stock, program: ExportedProgram, x: Tensor) -> Tensor:
    return output(lowered(program, partitioner), x)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_cpu_packs_weights_and_keeps_quantized_activations(per_channel: bool, dynamic: bool) -> None:
    model, program = quantized(mlp, 4, 64, is_per_channel=per_channel, is_dynamic=dynamic)
    rewritten, report = ecp.rewrite(program, "cpu", expect={"linear_int8": 2, "missed": 0})
    scheme = "int8 per-axis" if per_channel else "int8 per-tensor"
    assert [outcome.detail for outcome in report.outcomes] == [f"{scheme} -> plain operators"] * 2
    assert sum("quantize_per_tensor" in str(node.target) for node in rewritten.graph.nodes) >= 4
    assert not any("dequantize_per_channel" in str(node.target) for node in rewritten.graph.nodes)
    x = example(4, 64)
    wanted = model(x)
    # fp32 sums in another order move a few quantized results by one step.
    assert error(rewritten.module()(x), wanted) < 5e-3


def test_convolution_of_kernel_size_1_is_packed_and_the_other_missed() -> None:
    _, program = quantized(convs, 2, 16, 6, 6, is_per_channel=True, is_dynamic=False)
    _, report = assert_rewrites(program, "cpu", expect={"conv_int8": 1, "missed": 1}, rtol=5e-3)
    assert "kernels of 3 x 3" in str(report)


def test_4_bit_weight_per_channel_is_packed_in_4_bits() -> None:
    _, program = quantized(mlp, 4, 64, is_per_channel=True, weight_qmin=-7, weight_qmax=7)
    _, report = assert_rewrites(program, "cpu", expect={"linear_int4": 2}, rtol=5e-3)
    assert {outcome.detail for outcome in report.outcomes} == {"int4 per-axis -> plain operators (by_row)"}


@pytest.mark.parametrize(
    "case", ["mlp per channel", pytest.param("mlp per tensor", marks=pytest.mark.slow), "convolutions"]
)
def test_calibrated_model_is_kept_and_correct_to_a_step(case: str) -> None:
    make, shape = (convs, (2, 16, 6, 6)) if case == "convolutions" else (mlp, (4, 64))
    model, program = quantized(make, *shape, is_per_channel=case != "mlp per tensor", is_dynamic=False)
    x = example(*shape)
    ours = ecp.XnnpackPartitioner(expect={"keep_static_int8": 2, "missed": 0})
    found, wanted = through(ours, program, x), model(x)
    step = wanted.unique().diff().min()
    assert (found - wanted).abs().max() < 1.01 * step
    assert (found != wanted).float().mean() < 0.05


def test_dynamic_activation_is_kept_for_one_row_and_missed_for_more() -> None:
    model, program = quantized(mlp, 1, 64, is_per_channel=True, is_dynamic=True)
    ours = ecp.XnnpackPartitioner(expect={"keep_dynamic_per_tensor": 2, "missed": 0})
    x = example(1, 64)
    found, wanted = through(ours, program, x), model(x)
    assert error(found, wanted) < 1e-5

    x = example(4, 64)
    model, program = quantized(mlp, 4, 64, is_per_channel=True, is_dynamic=True)
    assert_misses(program, "wanted activations of one row, found rows 4", "xnnpack", rule="keep_dynamic_per_tensor")
    with pytest.raises(ValueError, match="per_row=True"):
        through(ecp.XnnpackPartitioner(), program, x)
    stock = through(Stock(), program, x)
    # The option accepts another result than the graph's, which is closer to that of the unquantized model.
    assert error(stock, model(x)) > 2e-3
    accepted = ecp.XnnpackPartitioner(passes=[ecp.KeepDynamicPerTensor(per_row=True)])
    assert torch.equal(through(accepted, program, x), stock)
    plain = mlp()(x)
    assert (stock - plain).norm() < (model(x) - plain).norm()


class ByHand(nn.Module):
    """A linear over int8 weights [32, 64] with a scale for each row, or one if ``scale`` is given.

    ``activation`` is "static", "dynamic" or None, and ``eps`` is the least scale of a dynamic one. ``result`` quantizes
    the result; ``point`` is the zero point. ``within``: the integers are a part of a larger tensor. ``reader``: a
    second linear reads them with another scale.
    """

    def __init__(
        self,
        activation: str | None = None,
        result: bool = False,
        point: int = 0,
        scale: float | None = None,
        eps: float = 1e-5,
        within: bool = False,
        reader: bool = False,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.activation, self.result, self.point, self.one = activation, result, point, scale
        self.eps, self.reader = eps, reader
        integers = torch.randint(-127, 128, (32, 64), generator=random).to(torch.int8)
        self.register_buffer("q", torch.cat([integers.flip(0), integers])[32:] if within else integers)
        self.register_buffer("scale", torch.rand(32, generator=random) * 0.01 + 0.002)
        self.register_buffer("other_scale", self.scale * 3)
        self.register_buffer("zero", torch.full((32,), point))

    def weight(self, scale: Tensor | None = None) -> Tensor:
        if self.one is not None:
            return qd.dequantize_per_tensor(self.q, self.one, self.point, -127, 127, torch.int8)
        scale = self.scale if scale is None else scale
        return qd.dequantize_per_channel(self.q, scale, self.zero, 0, -127, 127, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        ends = (-128, 127, torch.int8)
        if self.activation == "static":
            x = qd.dequantize_per_tensor(qd.quantize_per_tensor(x, 0.02, 3, *ends), 0.02, 3, *ends)
        elif self.activation == "dynamic":
            scale, zero = qd.choose_qparams.tensor(x, -128, 127, self.eps, torch.int8)
            x = qd.dequantize_per_tensor.tensor(
                qd.quantize_per_tensor.tensor(x, scale, zero, *ends), scale, zero, *ends
            )

        def read(weight: Tensor) -> Tensor:
            y = F.linear(x, weight)
            if not self.result:
                return y
            z: Tensor = qd.dequantize_per_tensor(qd.quantize_per_tensor(y, STEP, -4, *ends), STEP, -4, *ends)
            return z

        y = read(self.weight())
        return y + read(self.weight(self.other_scale)) if self.reader else y


@pytest.mark.parametrize("scale", [None, 0.007])
@pytest.mark.parametrize("point", [0, 5])
def test_weight_under_float_activations_is_folded_and_correct(scale: float | None, point: int) -> None:
    model, x = ByHand(scale=scale, point=point), example(4, 64)
    ours = ecp.XnnpackPartitioner(expect={"fold_dequantize": 1, "missed": 0})
    found, wanted = through(ours, torch.export.export(model, (x,)), x), model(x)
    assert error(found, wanted) < 1e-5


WRONG = {
    "calibrated, with zero points": ({"activation": "static", "result": True, "point": 5}, "found 32 that are not"),
    "on the fly, with zero points": ({"activation": "dynamic", "point": 5}, "found 32 that are not"),
    "on the fly, with a large least scale": ({"activation": "dynamic", "eps": 0.2}, "at most 2^-12, found 0.2"),
    "calibrated, part of a tensor": ({"activation": "static", "result": True, "within": True}, "found b_q, a view"),
    "on the fly, part of a tensor": ({"activation": "dynamic", "within": True}, "found b_q, a view"),
    "calibrated, two scales": ({"activation": "static", "result": True, "reader": True}, "with another scale"),
    "on the fly, two scales": ({"activation": "dynamic", "reader": True}, "with another scale"),
}


def test_cases_are_computed_wrongly_by_the_stock_partitioner_without_an_error() -> None:
    """Otherwise the refusals below have no reason."""
    models = {case: ByHand(**options) for case, (options, _) in WRONG.items()}
    given = [(example(1, 64) * (1 + number / 8),) for number in range(len(models))]
    pte = lowered(torch.export.export(Together(models.values()), (given,)), Stock())
    found = Runtime.get().load_program(pte).load_method("forward").execute([x for (x,) in given])
    for (case, model), (x,), got in zip(models.items(), given, found, strict=True):
        assert error(got, model(x)) > 0.02, case


@pytest.mark.parametrize("case", WRONG)
def test_program_that_the_delegate_computes_wrongly_is_refused(case: str) -> None:
    options, reason = WRONG[case]
    x = example(1, 64)
    program = torch.export.export(ByHand(**options), (x,))
    assert_misses(program, reason, "xnnpack")
    with pytest.raises(ValueError, match="XNNPACK cannot compute"):
        through(ecp.XnnpackPartitioner(), program, x)


LATE = {
    "a result that is not quantized": ({"activation": "static"}, "wanted a result that is quantized"),
    "one zero point for all": ({"activation": "static", "result": True, "point": 5, "scale": 0.007}, "found 5"),
    "one scale, on the fly": ({"activation": "dynamic", "scale": 0.007}, "wanted one scale for each output"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if number else ()) for number, case in enumerate(LATE)]
)
def test_program_that_would_fail_late_is_refused_with_the_cause(case: str, tmp_path: Path) -> None:
    options, reason = LATE[case]
    x = example(1, 64)
    program = torch.export.export(ByHand(**options), (x,))
    assert_misses(program, reason, "xnnpack")
    # The program runs in a new process: another test may have loaded the missing kernels into this one.
    torch.export.save(program, tmp_path / "program.pt2")
    code, said = outcome(lower_and_run, tmp_path / "program.pt2", 1, 64, folder=tmp_path)
    assert code == 1 and "RuntimeError" in said.splitlines()[-1], said


def test_quantized_activation_is_no_candidate() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            ends = (-128, 127, torch.int8)
            q = qd.quantize_per_tensor(x, 0.02, 3, *ends)
            result: Tensor = self.linear(qd.dequantize_per_tensor(q, 0.02, 3, *ends))
            return result

    for target in ecp.targets():
        _, report = ecp.rewrite(torch.export.export(Plain(), (example(2, 64),)), target)
        assert report.outcomes == []
