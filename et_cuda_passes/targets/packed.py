"""What a program holds packed already, and which targets run that."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.kernels.int4 import Int4Kernel
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT4_EXPERTS, INT4_LINEARS
from et_cuda_passes.targets import get_target, targets
from et_cuda_passes.targets.target import Target

_LAYOUT_OF = {
    **{form.op: layout for layout, form in INT4_LINEARS.items()},
    **{operator: layout for layout, operator in INT4_EMBEDDINGS.items()},
    **{operator: layout for layout, form in INT4_EXPERTS.items() for operator in (form.bmm, form.grouped_mm)},
}


def packed_layouts(program: ExportedProgram) -> Counter[str]:
    """How many operators of ``program`` read int4 weights packed before, by layout, in branches of control flow too."""
    return Counter(_LAYOUT_OF[operator] for operator in _packed(program))


def foreign_layouts(program: ExportedProgram, target: Target) -> Counter[str]:
    """Of :func:`packed_layouts`, what ``target`` does not run."""
    own = _operators(target)
    return Counter(_LAYOUT_OF[operator] for operator in _packed(program) if operator not in own)


def packed_for(program: ExportedProgram) -> list[str]:
    """The names of the targets that run all that is packed in ``program``."""
    return [name for name in targets() if not foreign_layouts(program, get_target(name))]


def packed_warnings(program: ExportedProgram, target: Target, nothing_else: bool) -> list[str]:
    """What to tell where ``program`` was rewritten before; ``nothing_else`` if ``target`` found nothing else in it."""
    foreign = foreign_layouts(program, target)
    if foreign:
        others = " or ".join(packed_for(program))
        return [
            f"the program is packed already{others and ' for target '}{others} ({_counted(foreign)}), which target "
            f"{target.name} does not run: rewrite the program as it was exported"
        ]
    packed = packed_layouts(program)
    return [f"the program is packed already: {_counted(packed)}"] if packed and nothing_else else []


def _packed(program: ExportedProgram) -> Iterator[Any]:
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    return (operator for graph in graphs for operator in map(op_of, graph.nodes) if operator in _LAYOUT_OF)


def _operators(target: Target) -> set[Any]:
    """The operators that stand for the target's int4 kernels."""
    linears = {kernel.layout for kernel in target.int4_kernels}
    # A table tied to a linear is packed as that is.
    tables = {*linears, *_layouts(target.int4_table)}
    experts, chosen = _layouts(target.int4_experts), _layouts(target.int4_chosen_experts)
    return {
        *(form.op for layout, form in INT4_LINEARS.items() if layout in linears),
        *(operator for layout, operator in INT4_EMBEDDINGS.items() if layout in tables),
        *(form.grouped_mm for layout, form in INT4_EXPERTS.items() if layout in experts),
        *(form.bmm for layout, form in INT4_EXPERTS.items() if layout in experts | chosen),
    }


def _layouts(kernel: Int4Kernel | None) -> set[str]:
    return set() if kernel is None else {kernel.layout}


def _counted(layouts: Counter[str]) -> str:
    return ", ".join(f"{count} x {layout}" for layout, count in layouts.items())
