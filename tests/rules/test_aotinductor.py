"""Rewritten programs executed by AOTInductor, which has the kernels of the cpu.

All parts are one program, since AOTInductor compiles five seconds for any program.
"""

from typing import Any

import numpy as np
import pytest
import torch
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from executorch.extension.llm.export.nvfp4 import ExportableNVFP4Config
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim
from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerGroup, PerRow

import et_cuda_passes as ecp
from et_cuda_passes.quant.decoders import is_dequantize
from et_cuda_passes.testing import Quantized
from tests.hf.checkpoints import blocks
from tests.rules.linear_models import exact_weight, five_schemes, no_bias

pytestmark = pytest.mark.compiled

BF16 = torch.bfloat16
ROWS = {0: Dim("rows", min=2, max=64)}


class Groups(nn.Module):
    """Linears over int8 weights in groups or with zero points, then int4 ones, each on one row and on several."""

    forms: tuple[tuple[int, str | None], ...] = (
        (32, None),
        (32, "random"),
        (128, "random"),
        (256, "random"),
        (256, None),
    )
    narrow: tuple[tuple[int, str | None], ...] = ((16, "random"), (8, None))  # plain operators on two integers a byte

    def __init__(self) -> None:
        super().__init__()
        weights = [Quantized(24, 256, group, -128, 127, BF16, None, points, no_bias) for group, points in self.forms]
        weights += [Quantized(24, 256, group, -8, 7, BF16, None, points, no_bias) for group, points in self.narrow]
        self.weights = nn.ModuleList(weights)

    def forward(self, one: Tensor, several: Tensor) -> list[Tensor]:
        return [weight(x) for weight in self.weights for x in (one, several)]


class Tables(nn.Module):
    """An int4 and an int8 embedding [48, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.eight = nn.Embedding(48, 64), nn.Embedding(48, 64)
        self.bfloat16()
        for name, config in (
            ("four", IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.ASYMMETRIC)),
            ("eight", IntxWeightOnlyConfig(torch.int8, PerGroup(16), mapping_type=MappingType.ASYMMETRIC)),
        ):
            quantize_(self, config, filter_fn=lambda _, fqn, name=name: fqn == name)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.four(ids), self.eight(ids)


def floats(config: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(128, 48)).bfloat16().eval()
    quantize_(model, config)
    return model


def gguf_blocks() -> nn.Module:
    raw = torch.from_numpy(blocks("Q6_K", 32, 512, np.random.default_rng(0)))
    model = nn.Sequential(nn.Linear(512, 32, bias=False)).bfloat16().eval()
    model[0].weight = nn.Parameter(ExportableGGUFTensor.from_raw(raw, "q6_k", BF16), requires_grad=False)
    return model


class Parts(nn.Module):
    """Modules that are compiled as one; each has its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        modules = {
            "groups": Groups(),
            "five_schemes": five_schemes(),
            "tables": Tables(),
            "nvfp4": floats(ExportableNVFP4Config()),
            "fp8_per_row": floats(Float8WeightOnlyConfig(granularity=PerRow())),
            "q6_k": gguf_blocks(),
        }
        self.parts = nn.ModuleDict({name: module.eval() for name, module in modules.items()})

    def forward(self, given: dict[str, tuple[Tensor, ...]]) -> dict[str, Any]:
        return {name: part(*given[name]) for name, part in self.parts.items()}


def inputs(rows: int) -> dict[str, tuple[Tensor, ...]]:
    """The inputs of :class:`Parts` with a dynamic number of rows."""
    random = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(BF16)

    return {
        "groups": (draw(1, 256), draw(rows, 256)),
        "five_schemes": (draw(2, 3, 5, 64),),
        "tables": (torch.arange(rows)[None].flip(1),),
        "nvfp4": (draw(rows, 128),),
        "fp8_per_row": (draw(rows, 128),),
        "q6_k": (draw(16, 512),),
    }


class Executed:
    """The parts, what each computes in eager, as rewritten and as compiled, and the rewritten program."""

    def __init__(self, path: str) -> None:
        self.model, self.given = Parts(), inputs(48)
        shapes = {
            "groups": (None, ROWS),
            "five_schemes": (None,),
            "tables": ({1: Dim("length", max=64)},),
            "nvfp4": (ROWS,),
            "fp8_per_row": (ROWS,),
            "q6_k": (None,),
        }
        program = torch.export.export(self.model, (inputs(3),), dynamic_shapes=(shapes,))
        passes = ecp.default_passes("cpu").without("fold_floats")
        self.program, self.report = ecp.rewrite(program, "cpu", passes)
        with torch.no_grad():
            library = aoti_load_package(aoti_compile_and_package(self.program, package_path=path))
            self.compiled, self.eager = library(self.given), self.model(self.given)
            self.rewritten = self.program.module()(self.given)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return Executed(str(tmp_path_factory.mktemp("parts") / "model.pt2"))


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_groups_and_zero_points_are_executed_by_aotinductor(executed: Executed) -> None:
    """A product of one row is a fused loop, and one of a dynamic number of rows a matrix product."""
    kernels = [outcome.kernel for outcome in executed.report.outcomes if outcome.fqn.startswith("parts.groups.")]
    assert kernels == ["plain operators"] * 8 + ["int8pack_cpu"] * 2 + ["plain operators"] * 4
    found = executed.compiled["groups"]
    assert len(found) == 14
    for number, got in enumerate(found):
        rows = executed.given["groups"][number % 2].double().numpy()
        model = executed.model.parts["groups"].weights[number // 2]
        weight = exact_weight(model)
        wanted = rows @ weight.T
        # One rounding of the result; with several rows and plain operators each weight is rounded too.
        allowed = np.abs(wanted) * 2.0**-8 + np.abs(rows) @ np.abs(weight).T * (2.0**-8 if number % 2 else 0)
        if model.high == 7 and model.zero_point is not None:  # int4's zeros, of up to 16 steps, are rounded
            steps = model.scale.double().numpy().repeat(model.block[1], axis=1)
            allowed += np.abs(rows) @ steps.T * 16 * 2.0**-8
        assert bool((np.abs(got.double().numpy() - wanted) <= allowed + 1e-4).all())


def test_five_schemes_are_executed_by_aotinductor(executed: Executed) -> None:
    got, wanted = executed.compiled["five_schemes"], executed.eager["five_schemes"]
    assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
    assert off(got, wanted) < 2e-2


def test_tables_are_executed_by_aotinductor(executed: Executed) -> None:
    results = (each["tables"] for each in (executed.compiled, executed.rewritten, executed.eager))
    for got, rewritten, wanted in zip(*results, strict=True):
        assert torch.equal(got, rewritten)
        assert off(got, wanted) < 6e-3


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_per_row"])
def test_dequantize_that_no_rule_replaces_is_executed_by_aotinductor(scheme: str, executed: Executed) -> None:
    (outcome,) = (each for each in executed.report.outcomes if each.fqn.startswith(f"parts.{scheme}."))
    assert outcome.status == "missed"
    assert sum(is_dequantize(node) for node in executed.program.graph.nodes) == 2
    torch.testing.assert_close(executed.compiled[scheme], executed.eager[scheme], rtol=2e-2, atol=2e-2)


def test_gguf_blocks_are_executed_by_aotinductor(executed: Executed) -> None:
    torch.testing.assert_close(executed.compiled["q6_k"], executed.rewritten["q6_k"], rtol=2e-2, atol=2e-2)
