"""Random models, lowered: those of targets that execute here are run and compared with eager, and the predictions for
others are compared with what their backends write. ``make nightly`` takes 200 models for each target.
"""

import copy
import dataclasses
import os
import re
import tempfile
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor, nn
from torch._inductor import aoti_load_package
from torch.export import Dim, ExportedProgram

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
TOGETHER = 10
"""So many models for the CPU are compiled as one: the C++ of one alone takes half as long."""
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
        # ExecuTorch makes a dynamic size of a map a constant, which the lowering refuses. AOTInductor declares the
        # result of such a map twice in its C++. Neither compiles such a program if it is not rewritten.
        lacks = BRANCHES if target == "openvino" else ["map"] if plan.dynamic else []
        kind = "linear" if step.kind in lacks else step.kind
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


@dataclasses.dataclass(frozen=True)
class Model:
    """A rewritten model."""

    plan: Plan
    activations: bool
    eager: nn.Module
    rewritten: ExportedProgram
    report: ecp.Report

    def given(self) -> list[tuple[Tensor, ...]]:
        """The inputs of two calls. The program may mutate each second one."""
        return [inputs(self.plan), inputs(self.plan, seed=1, rows=5, sign=-1)]

    def wanted(self) -> list[list[Tensor]]:
        """The outputs of eager, and last the input that the program may mutate."""
        with torch.no_grad():
            return [[*self.eager(*given), given[1]] for given in self.given()]


def model_of(index: int, target: str) -> Model:
    plan, activations, program = program_of(index, target)
    print(plan)  # pytest shows it with a failure
    # A program shares its buffers with the module that runs it, which mutates them.
    eager = copy.deepcopy(program).module()
    return Model(plan, activations, eager, *ecp.rewrite(program, target))


def results(model: Model, path: Path, outputs: int) -> list[list[Tensor]]:
    """As :meth:`Model.wanted`, from a .pte. Buffers keep their values from call to call."""
    import executorch.kernels.quantized  # noqa: F401  (the kernels of quantized_embedding)
    from executorch.runtime import Runtime

    # A file is mapped into memory, and its constants are unmapped after XNNPACK copied them: bytes would stay readable.
    method = Runtime.get().load_program(path).load_method("forward")

    def call(x: Tensor, out: Tensor) -> list[Tensor]:
        found = [each.clone() for each in method.execute([x, out])]
        # The new value of a mutated input comes first.
        return [*found[1:], found[0]] if len(found) > outputs else [*found, out]

    return [call(*given) for given in model.given()]


class Together(nn.Module):
    """Programs that are compiled as one."""

    def __init__(self, models: list[Model]) -> None:
        super().__init__()
        self.programs = nn.ModuleList([model.rewritten.module(check_guards=False) for model in models])

    def forward(self, given: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
        """The outputs of each program for its inputs."""
        return [list(program(*each)) for program, each in zip(self.programs, given, strict=True)]


def results_on_cpu(models: list[Model], folder: Path) -> list[list[list[Tensor]] | Exception]:
    """As :func:`results` for each model, or why it does not compile."""
    rows = [({0: Dim(f"rows{i}", min=2, max=16)} if model.plan.dynamic else None) for i, model in enumerate(models)]
    example = (list(map(inputs, [model.plan for model in models])),)
    try:
        program = torch.export.export(Together(models), example, dynamic_shapes=([(each, None) for each in rows],))
        (path,) = lower(program, "cpu", folder, "models")
    except Exception as problem:
        if len(models) == 1:
            return [problem]
        half = len(models) // 2
        return results_on_cpu(models[:half], folder) + results_on_cpu(models[half:], folder)
    package = aoti_load_package(str(path))
    calls = []
    for given in map(list, zip(*(model.given() for model in models), strict=True)):
        outputs = package(given)
        calls.append([[*found, each[1]] for found, each in zip(outputs, given, strict=True)])
    return list(map(list, zip(*calls, strict=True)))


@cache
def group_on_cpu(group: int) -> dict[int, tuple[Model, list[list[Tensor]] | Exception]]:
    """The models of a group with their results, by index."""
    models = {}
    for index in indices(1)[group * TOGETHER : (group + 1) * TOGETHER]:
        try:
            models[index] = model_of(index, "cpu")
        except pytest.skip.Exception:
            continue
    with tempfile.TemporaryDirectory() as folder:
        found = results_on_cpu(list(models.values()), Path(folder))
    return dict(zip(models, zip(models.values(), found, strict=True), strict=True))


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.isfinite(found).all()
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp_min(1e-12))


def assert_as_in_eager(model: Model, wanted: list[list[Tensor]], found: list[list[Tensor]]) -> None:
    rounded = model.plan.target == "openvino" or model.plan.dtype is torch.bfloat16
    limit = QUANTIZED if model.activations else BF16 if rounded else FLOAT
    for one, other in zip(found, wanted, strict=True):
        assert len(one) == len(other)
        errors = list(map(error, one, other))
        assert max(errors) < limit, f"{errors}\n{model.plan}\n{model.report}"


@pytest.mark.parametrize(
    ("target", "index"), [(target, index) for target in ("xnnpack", "openvino") for index in indices(2)]
)
def test_random_model_runs_as_in_eager(target: str, index: int, tmp_path: Path) -> None:
    if lacking := missing_requirement(target):
        pytest.skip(f"needs {lacking}")
    model = model_of(index, target)
    if model.report.counts()["missed"] and get_target(target).refuses_misses:
        with pytest.raises(ValueError, match="cannot compute these quantized weights correctly"):
            lower(model.rewritten, target, tmp_path, "model")
        return
    (path,) = lower(model.rewritten, target, tmp_path, "model")
    wanted = model.wanted()
    assert_as_in_eager(model, wanted, results(model, path, len(wanted[0]) - 1))


@pytest.mark.compiled
@pytest.mark.parametrize("index", indices(1))
def test_random_model_on_the_cpu_runs_as_in_eager(index: int) -> None:
    if lacking := missing_requirement("cpu"):
        pytest.skip(f"needs {lacking}")
    if index not in (group := group_on_cpu(index // TOGETHER)):
        pytest.skip("torch does not export this model")
    model, found = group[index]
    if isinstance(found, Exception):
        raise found
    assert_as_in_eager(model, model.wanted(), found)


def folded(program: ExportedProgram, target: str) -> ExportedProgram:
    """The program in floats."""
    return ecp.rewrite(program, target, passes=[DropActivationQuantization(), ecp.FoldDequantize()])[0]


def weights_of(program: ExportedProgram, target: str) -> dict[str, Tensor]:
    """The quantized weights as the program dequantizes them, by the FQN of the folded weight."""
    float_program = folded(program, target)
    held = {**float_program.state_dict, **float_program.constants}
    return {name: each for name, each in held.items() if name.endswith(".dequantized")}


@pytest.mark.parametrize("index", indices(1))
def test_vulkan_computes_the_weights_that_are_kept(index: int) -> None:
    from tests.vulkan import KERNELS, VulkanPartitioner, _Stock, lowered, weight_in

    plan, _, program = program_of(index, "vulkan")
    partitioner = VulkanPartitioner()
    if ecp.rewrite(program, "vulkan")[1].counts()["missed"]:
        with pytest.raises(ValueError, match="Vulkan cannot compute these quantized weights correctly"):
            lowered(program, partitioner)
        return
    try:
        found = lowered(program, partitioner)
    except Exception as problem:
        # Some float models with dynamic sizes fail too.
        with pytest.raises(type(problem), match=re.escape(str(problem))):
            lowered(folded(program, "vulkan"), _Stock({"require_dynamic_shapes": plan.dynamic}))
        pytest.skip(f"ExecuTorch does not lower the float model for Vulkan: {problem}")
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
