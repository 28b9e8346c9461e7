"""The GPU that a rewritten program names, and what a report says about it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

import et_cuda_passes as ecp
from et_cuda_passes.graph.report import Report
from et_cuda_passes.kernels.choose import Weight, describe
from et_cuda_passes.kernels.gpus import GPUS, gpu_arch
from et_cuda_passes.ops.registry import TRITON_OPERATORS
from et_cuda_passes.targets.gpu import gpu_named_in
from et_cuda_passes.testing import Quantized

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")


def program() -> ExportedProgram:
    return torch.export.export(Quantized(16, 64, seed=0), (torch.randn(2, 64).bfloat16(),))


def named(exported: ExportedProgram) -> list[Any]:
    """The keyword ``gpu`` of every operator with tilings, None where it is absent."""
    modules = [module for module in exported.graph_module.modules() if isinstance(module, GraphModule)]
    nodes = [node for module in modules for node in module.graph.nodes if node.target in TRITON_OPERATORS]
    return [node.kwargs.get("gpu") for node in nodes]


@pytest.mark.parametrize("name", [*GPUS, "sm_90:66"])
def test_operators_name_the_gpu_and_compute_the_same(name: str) -> None:
    given, x = program(), torch.randn(2, 64).bfloat16()
    rewritten, report = ecp.rewrite(given, "cuda", gpu=name)
    assert named(rewritten) == [name] and gpu_named_in(rewritten) == name
    assert torch.equal(rewritten.module()(x), ecp.rewrite(given, "cuda")[0].module()(x))
    described = describe(gpu_arch(name), Weight(16, 64, 32), 2)
    assert report.outcomes[0].explanation == f"tilings on {name} for 16 x 64, group size 32: {described}"


def test_program_without_a_gpu_names_none() -> None:
    rewritten, report = ecp.rewrite(program(), "cuda")
    assert named(rewritten) == [None] and gpu_named_in(rewritten) is None
    assert report.notes == []


def test_report_says_once_whether_tilings_were_measured_and_what_runs_the_program() -> None:
    two = torch.nn.Sequential(Quantized(64, 64, seed=0), Quantized(64, 64, seed=1))
    given = torch.export.export(two, (torch.randn(2, 64).bfloat16(),))
    notes = {name: ecp.rewrite(given, "cuda", gpu=name)[1].notes for name in ("sm_80", "sm_86:28", "sm_90:114")}
    assert notes == {
        "sm_80": ["tilings predicted, not measured, for sm_80; once lowered, the program runs on sm_80 (8.0) only"],
        "sm_86:28": [
            "tilings predicted, not measured, for sm_86:28; once lowered, the program runs on sm_86 (8.6), sm_89 (8.9)"
        ],
        "sm_90:114": [
            "tilings calibrated on NVIDIA H200, for sm_90:114; once lowered, the program runs on sm_90 (9.0) only"
        ],
    }
    _, report = ecp.rewrite(given, "cuda", gpu="sm_89")
    assert str(report).count("predicted, not measured, for sm_89") == 1
    assert report.to_dict()["notes"] == Report.merge([report, report]).notes == report.notes


def test_program_without_tilings_has_no_note() -> None:
    passes = [ecp.LinearInt4(kernel="tinygemm")]
    rewritten, report = ecp.rewrite(program(), "cuda", passes, gpu="sm_89")
    assert named(rewritten) == [] and report.notes == []


class Branches(torch.nn.Module):
    """Two quantized linears in the branches of a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Quantized(64, 64, seed=0), Quantized(64, 64, seed=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.cond(x.sum() > 0, self.first, self.second, (x,))
        return result


def test_operators_in_branches_name_the_gpu() -> None:
    given = torch.export.export(Branches(), (torch.randn(2, 64).bfloat16(),))
    rewritten, _ = ecp.rewrite(given, "cuda", gpu="sm_89", expect={"linear_int4": 2})
    assert named(rewritten) == ["sm_89"] * 2
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(rewritten.module()(x), ecp.rewrite(given, "cuda")[0].module()(x))


def test_saved_program_keeps_the_gpu_through_a_second_rewrite(tmp_path: Path) -> None:
    torch.export.save(ecp.rewrite(program(), "cuda", gpu="sm_89")[0], tmp_path / "packed.pt2")
    loaded = ecp.load(tmp_path / "packed.pt2")
    again, report = ecp.rewrite(loaded, "cuda")
    assert named(loaded) == named(again) == ["sm_89"]
    assert "predicted, not measured, for sm_89" in str(report)
    assert named(ecp.rewrite(loaded, "cuda", gpu="sm_90:66")[0]) == ["sm_90:66"]
    assert named(loaded) == ["sm_89"], "the given program is not changed"


def test_fused_operators_of_a_second_rewrite_name_the_gpu_too() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Quantized(64, 64, seed=0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.nn.functional.silu(self.linear(x))

    given = torch.export.export(Block(), (torch.randn(2, 64).bfloat16(),))
    packed, _ = ecp.rewrite(given, "cuda", [ecp.LinearInt4()], gpu="sm_89")
    fused, _ = ecp.rewrite(packed, "cuda", expect={"fuse_activation": 1, "fuse_add": 1})
    assert named(fused) == ["sm_89"]


def test_program_that_names_several_gpus_is_an_error() -> None:
    two = torch.nn.Sequential(Quantized(64, 64, seed=0), Quantized(64, 64, seed=1))
    rewritten, _ = ecp.rewrite(torch.export.export(two, (torch.randn(2, 64).bfloat16(),)), "cuda", gpu="sm_89")
    last = [node for node in rewritten.graph.nodes if node.target in TRITON_OPERATORS][-1]
    last.kwargs = {"gpu": "sm_86"}
    with pytest.raises(ValueError, match=re.escape("several GPUs, sm_86, sm_89: rewrite it with one gpu=")):
        ecp.rewrite(rewritten, "cuda")
    assert set(named(ecp.rewrite(rewritten, "cuda", gpu="sm_80")[0])) == {"sm_80"}


def test_gpu_that_is_unknown_or_for_another_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="'h100' names no known GPU: use one of sm_80"):
        ecp.rewrite(program(), "cuda", gpu="h100")
    with pytest.raises(ValueError, match="gpu='sm_90' selects the tilings of target cuda; target cpu has none"):
        ecp.rewrite(program(), "cpu", gpu="sm_90")
