"""Random models, lowered: those of targets that execute here are run and compared with eager, and the predictions for
others are compared with what their backends write. ``make nightly`` takes 200 models for each target.
"""

import copy
import dataclasses
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor
from torch._inductor import aoti_load_package
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.executorch.lower import lower, missing_requirement
from et_cuda_passes.rules.fold import DropActivationQuantization
from et_cuda_passes.targets import get_target
from tests.generated import BRANCHES, Plan, Step, Weight, exported, inputs, plans

MODELS = int(os.environ.get("EXECUTED", "0"))
"""How many models a target gets; 0 is a few."""
FLOAT32 = ("xnnpack", "openvino", "vulkan", "coreml")
"""The targets of ExecuTorch, without bfloat16."""
NO_DYNAMIC_SIZES = ("openvino",)
# Three layers one after the other at most. Folded weights change the order of additions, a kernel in bf16 rounds, and
# OpenVINO computes in bf16 on some CPUs. Activations near the middle of two integers may be quantized to either.
FLOAT, BF16, QUANTIZED = 2.0**-14, 2.0**-6, 2.0**-5


def indices(few: int) -> range:
    return range(MODELS or few)


@cache
def drawn(count: int) -> list[Plan]:
    """``count`` plans that differ."""
    found: dict[Plan, None] = {}

    @hypothesis.seed(int(os.environ["TEST_SEED"]))
    @hypothesis.settings(
        max_examples=20 * count,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(plans())
    def collect(plan: Plan) -> None:
        found[dataclasses.replace(plan, target="", fused=False, seed=0)] = None

    collect()
    # hypothesis varies an earlier plan several times in a row: these are spread.
    return list(found)[:: max(1, len(found) // count)][:count]


def program_of(index: int, target: str) -> tuple[Plan, bool, ExportedProgram]:
    """A model for ``target``, whether it quantizes activations, and its program."""
    plan = drawn(max(MODELS, 20))[index]

    def suited(step: Step) -> Step:
        # torch decomposes a dropout in eval mode into a copy, and a write to its result no longer changes its input.
        after = "" if step.after == "dropout" else step.after
        # executorch 1.5.1 computes other numbers for a buffer that is read, written and read, without a delegate too.
        # It does not store the first values of a buffer that a program writes, and row 2 keeps its one in "cache rows".
        after = "cache slice" if target in FLOAT32 and after in ("read, write, read", "cache rows") else after
        # OpenVINO does not convert amax over all axes, which branches, stored values and tanh have.
        kind = "linear" if target == "openvino" and step.kind in BRANCHES else step.kind
        after = "" if target == "openvino" and after in ("store", "tanh") else after
        # A lowering removes a layer whose result nothing reads.
        unused = step.unused and target not in ("vulkan", "coreml")
        return dataclasses.replace(step, kind=kind, after=after, unused=unused)

    plan = dataclasses.replace(
        plan,
        target=target,
        steps=tuple(map(suited, plan.steps)),
        dtype=torch.float32 if target in FLOAT32 else plan.dtype,
        dynamic=plan.dynamic and target not in NO_DYNAMIC_SIZES,
    )
    activations = index % 2 == 0
    if activations and target == "xnnpack":
        plan = with_kernels_of_xnnpack(plan)
    try:
        return plan, activations, exported(plan, activations)[0]
    except UnsatisfiedAssumption:
        pytest.skip(f"torch does not export {plan}")


def with_kernels_of_xnnpack(plan: Plan) -> Plan:
    """The plan with weights for which XNNPACK has kernels of quantized activations; it refuses others."""

    def suited(weight: Weight) -> Weight:
        low, high = (-128, 127) if weight.high == 127 else (-8, 7)
        group = weight.k if weight.high == 127 else 32
        return dataclasses.replace(weight, group=group, low=low, high=high, zero_points="zero", tied_to=None)

    shape = plan.shape if len(plan.shape) > 1 else (2, *plan.shape)
    return dataclasses.replace(plan, weights=tuple(map(suited, plan.weights)), shape=shape)


Call = Callable[[tuple[Tensor, ...]], list[Tensor]]
"""Outputs of a call. The input that a program mutates has its new value afterwards."""


def loaded(target: str, path: Path, results: int) -> Call:
    """The program in a file, which returns so many tensors. Buffers keep their values from call to call."""
    if target == "cpu":
        package = aoti_load_package(str(path))
        return lambda given: list(package(*given))
    import executorch.kernels.quantized  # noqa: F401  (the kernels of quantized_embedding)
    from executorch.runtime import Runtime

    # A file is mapped into memory, and its constants are unmapped after XNNPACK copied them: bytes would stay readable.
    method = Runtime.get().load_program(path).load_method("forward")

    def call(given: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = [each.clone() for each in method.execute(list(given))]
        if len(outputs) > results:  # the new value of the mutated input comes first
            given[1].copy_(outputs.pop(0))
        return outputs

    return call


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.isfinite(found).all()
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp_min(1e-12))


@pytest.mark.parametrize(
    ("target", "index"),
    [(target, index) for target, few in (("xnnpack", 2), ("cpu", 1), ("openvino", 2)) for index in indices(few)],
)
def test_random_model_runs_as_in_eager(target: str, index: int, tmp_path: Path) -> None:
    if lacking := missing_requirement(target):
        pytest.skip(f"needs {lacking}")
    plan, activations, program = program_of(index, target)
    # A program shares its buffers with the module that runs it, which mutates them.
    eager = copy.deepcopy(program).module()
    rewritten, report = ecp.rewrite(program, target)
    if report.counts()["missed"] and get_target(target).refuses_misses:
        with pytest.raises(ValueError, match="cannot compute these quantized weights correctly"):
            lower(rewritten, target, tmp_path, "model")
        return
    (path,) = lower(rewritten, target, tmp_path, "model")
    rounded = target == "openvino" or plan.dtype is torch.bfloat16
    limit = QUANTIZED if activations else BF16 if rounded else FLOAT
    call: Call | None = None
    for given in (inputs(plan), inputs(plan, seed=1, rows=5, sign=-1)):
        own = tuple(each.clone() for each in given)
        with torch.no_grad():
            wanted = list(eager(*given))
            call = call or loaded(target, path, len(wanted))
            found = call(own)
        assert len(found) == len(wanted)
        errors = list(map(error, [*found, own[1]], [*wanted, given[1]]))
        assert max(errors) < limit, f"{errors}\n{plan}\n{report}"


def weights_of(program: ExportedProgram, target: str) -> dict[str, Tensor]:
    """The quantized weights as the program dequantizes them, by the FQN of the folded weight."""
    folded, _ = ecp.rewrite(program, target, passes=[DropActivationQuantization(), ecp.FoldDequantize()])
    held = {**folded.state_dict, **folded.constants}
    return {name: each for name, each in held.items() if name.endswith(".dequantized")}


@pytest.mark.parametrize("index", indices(1))
def test_vulkan_computes_the_weights_that_are_kept(index: int) -> None:
    from tests.vulkan import KERNELS, VulkanPartitioner, lowered, weight_in

    plan, _, program = program_of(index, "vulkan")
    partitioner = VulkanPartitioner()
    if ecp.rewrite(program, "vulkan")[1].counts()["missed"]:
        with pytest.raises(ValueError, match="Vulkan cannot compute these quantized weights correctly"):
            lowered(program, partitioner)
        return
    found = lowered(program, partitioner)
    outcomes = partitioner.report.outcomes
    predicted = [f"{each.detail.rpartition(' ')[2]}.default" for each in outcomes if each.status == "kept"]
    calls = [(name, args) for name, args in found.calls if name in KERNELS]
    assert sorted(name for name, _ in calls) == sorted(predicted), f"{plan}\n{partitioner.report}"
    assert not [each for each in (*found.names, *found.outside) if "dequantize" in each]
    weights = list(weights_of(program, "vulkan").values())
    for name, args in calls:
        stored = weight_in(name, args)
        assert any(each.shape == stored.shape and torch.equal(stored.to(each.dtype), each) for each in weights), plan


@pytest.mark.parametrize("index", indices(1))
def test_core_ml_holds_the_weights_that_are_kept(index: int) -> None:
    pytest.importorskip("coremltools")
    from tests.coreml import CoreMLPartitioner, decompressed, lowered

    plan, _, program = program_of(index, "coreml")
    partitioner = CoreMLPartitioner()
    if ecp.rewrite(program, "coreml")[1].counts()["missed"]:
        with pytest.raises(ValueError, match="Core ML cannot compute these quantized weights correctly"):
            lowered(program, partitioner)
        return
    outside, delegates = lowered(program, partitioner)
    kept = {each.fqn for each in partitioner.report.outcomes if each.status == "kept"}
    stored = [each for delegate in delegates for each in decompressed(delegate)]
    assert bool(stored) == bool(kept) and not [each for each in outside if "dequantize" in each], plan
    weights = list(weights_of(program, "coreml").values())
    for each in stored:
        alike = (other.double() for other in weights if other.shape == each.shape)
        # Core ML computes in float16.
        assert any(bool(((each - other).abs() <= other.abs() * 2**-10).all()) for other in alike), plan
