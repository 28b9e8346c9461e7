"""Shared by tests of the driver: a chain of linears, passes that do nothing, and a rewrite with other candidates."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.driver import FindCandidates, apply_passes
from et_cuda_passes.graph.finish import finish_program
from et_cuda_passes.graph.operators import op_name, op_of
from et_cuda_passes.graph.outcomes import Candidate, OutcomeTracker
from et_cuda_passes.graph.passes import group_rules
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import Report
from et_cuda_passes.rewrite import parse_passes
from et_cuda_passes.targets import Target
from et_cuda_passes.testing import Sketch, export, floats
from et_cuda_passes.testing.sketch import DEQUANTIZE

aten = torch.ops.aten
NO_DEVICE = "CUDA|NVIDIA driver"
"""The error of a lowering without a GPU, with a torch built for CPUs or for GPUs."""


def chain(n: int, size: int = 32) -> ExportedProgram:
    """``n`` quantized linears [size, size] in a row, each with its own weight and no bias."""
    sketch = Sketch()
    data = torch.zeros(size, size, dtype=torch.int8)
    scale = torch.ones(size, size // 32, dtype=torch.bfloat16)
    held = [(sketch.buffer(f"l{i}.data", data.clone()), sketch.buffer(f"l{i}.scale", scale.clone())) for i in range(n)]
    x = sketch.input("x", 1, size, dtype=torch.bfloat16)
    like = sketch.mode.from_tensor(torch.empty(size, size, dtype=torch.bfloat16), static_shapes=True)
    for q, s in held:
        weight = sketch.graph.call_function(DEQUANTIZE, (q, [1, 32], s, None, torch.int8, -8, 7, torch.bfloat16))
        # All calls share one fake value, since computing thousands takes seconds.
        weight.meta["val"] = like
        x, val = sketch.graph.call_function(aten.linear.default, (x, weight)), x.meta["val"]
        x.meta["val"] = val
    return sketch.program(x)


class Together(nn.Module):
    """Modules that are exported as one program, each with its own inputs.

    Exporting, decomposing and lowering take most of their time whatever the program contains. The inputs must be
    distinct tensors: ``torch.export`` makes one input of equal objects.
    """

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, given: list[tuple[Tensor, ...]]) -> list[Any]:
        return [part(*each) for part, each in zip(self.parts, given, strict=True)]


def export_with_rows(model: nn.Module, *shape: int, dtype: torch.dtype = torch.bfloat16) -> ExportedProgram:
    """``model``, exported with one random input of ``shape``."""
    return export(model, floats(*shape, dtype=dtype, seed=3))


TARGET = Target("test", "no kernels", kernels={}, passes=list)
"""A target for rules that need no kernel."""


def calls_of(*targets: Any) -> Callable[[Program], list[Candidate]]:
    """A function that finds every call of ``targets`` as a candidate."""
    return lambda program: [Candidate(n, (), n.name) for n in program.graph.nodes if op_of(n) in targets]


def exported_only(find_candidates: Callable[[Program], list[Candidate]]) -> FindCandidates:
    """A search that finds no candidate among the nodes that rules build."""
    return lambda program, among: find_candidates(program) if among is None else []


def apply_with(
    program: ExportedProgram,
    passes: Iterable[Any],
    find_candidates: Callable[[Program], list[Candidate]],
    pool: ConstantCache | None = None,
) -> tuple[ExportedProgram, Report]:
    """Run ``passes`` for :data:`TARGET` as ``rewrite`` does, with other candidates."""
    entries = parse_passes(passes)
    copy = Program(program, pool)
    tracker = OutcomeTracker(find_candidates(copy), group_rules(entries))
    copy = apply_passes(copy, entries, TARGET, tracker, exported_only(find_candidates))
    return finish_program(copy), tracker.report(TARGET.name, [entry.name for entry in entries])


def apply(
    program: ExportedProgram, passes: Iterable[Any], *candidates: Any, **options: Any
) -> tuple[ExportedProgram, Report]:
    """:func:`apply_with` where the candidates are all calls of ``candidates``."""
    return apply_with(program, passes, calls_of(*candidates), **options)


def idle(module: GraphModule) -> None:
    """A callable pass that changes nothing."""


def idle_program_pass() -> Any:
    """An ExecuTorch pass that changes nothing."""
    from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult

    class Idle(ExportedProgramPassBase):  # type: ignore[misc]
        def call(self, exported_program: ExportedProgram) -> Any:
            return ExportedProgramPassResult(exported_program, False)

    return Idle()


def names(program: ExportedProgram) -> list[str]:
    """The short names of the operators that ``program`` calls, in graph order."""
    return [op_name(node.target) for node in program.graph.nodes if node.op == "call_function"]
