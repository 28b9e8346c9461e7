"""The int4 operators that a program already contains, and the targets that run them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.layouts import LAYOUTS
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT4_EXPERTS, INT4_LINEARS
from et_cuda_passes.targets import get_target, own_targets
from et_cuda_passes.targets.target import Target

# The families whose kernels read each operator, and the operator's layout. A table tied to a linear is packed like it.
_OPERATORS: Mapping[Any, tuple[str, tuple[str, ...]]] = {
    **{linear.op: (layout, ("int4_linear",)) for layout, linear in INT4_LINEARS.items()},
    **{operator: (layout, ("int4_linear", "int4_table")) for layout, operator in INT4_EMBEDDINGS.items()},
    **{experts.grouped_mm: (layout, ("int4_experts",)) for layout, experts in INT4_EXPERTS.items()},
    **{experts.bmm: (layout, ("int4_experts", "int4_indexed_experts")) for layout, experts in INT4_EXPERTS.items()},
}


def packed_layouts(program: ExportedProgram) -> Counter[str]:
    """Count the operators of ``program`` that read packed int4 weights, by layout, subgraphs included."""
    return Counter(_OPERATORS[operator][0] for operator in _packed(program))


def is_host_specific(layouts: Iterable[str]) -> bool:
    """Whether one of the layouts depends on the instruction set of the host that packed."""
    return any(LAYOUTS[name].host_specific for name in layouts)


def unsupported_layouts(program: ExportedProgram, target: Target) -> Counter[str]:
    """The part of :func:`packed_layouts` that ``target`` does not run."""
    return Counter(_OPERATORS[operator][0] for operator in _packed(program) if not _runs(target, operator))


def targets_supporting(program: ExportedProgram) -> list[str]:
    """The names of the targets that run every packed operator of ``program``."""
    return [name for name in own_targets() if not unsupported_layouts(program, get_target(name))]


def packed_warnings(program: ExportedProgram, target: Target, nothing_else: bool) -> list[str]:
    """The warnings for a program that was rewritten before.

    Args:
        program: as it was given to ``rewrite``.
        target: the target of this rewrite.
        nothing_else: whether the rewrite found no quantized weight in it.
    """
    unsupported = unsupported_layouts(program, target)
    if unsupported:
        others = " or ".join(targets_supporting(program))
        return [
            f"the program is packed already{others and ' for target '}{others} ({_counted(unsupported)}), which target "
            f"{target.name} does not run: rewrite the program as it was exported"
        ]
    packed = packed_layouts(program)
    return [f"the program is packed already: {_counted(packed)}"] if packed and nothing_else else []


def _packed(program: ExportedProgram) -> Iterator[Any]:
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    return (operator for graph in graphs for operator in map(op_of, graph.nodes) if operator in _OPERATORS)


def _runs(target: Target, operator: Any) -> bool:
    layout, families = _OPERATORS[operator]
    return any(kernel.layout == layout for family in families for kernel in target.kernels.get(family, ()))


def _counted(layouts: Counter[str]) -> str:
    return ", ".join(f"{count} x {layout}" for layout, count in layouts.items())
