"""The GPU that the operators of a program name: its kernels have the tilings for this GPU."""

from collections.abc import Iterator

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.kernels.choose import costs_of
from et_cuda_passes.kernels.device import named_gpu, present_gpu
from et_cuda_passes.kernels.gpus import GPUS, HOPPER, GpuArch, cards_of, gpu_arch
from et_cuda_passes.ops import INT8_LINEAR
from et_cuda_passes.ops.registry import TRITON_OPERATORS
from et_cuda_passes.targets.target import Target


def check_gpu(gpu: str | None, target: Target) -> None:
    """Check that ``gpu`` is the name of a GPU, and that kernels of ``target`` have tilings for it.

    Raises:
        ValueError: it is not, or they have none.
    """
    if gpu is None:
        return
    if target.gpu is None:
        raise UsageError(f"gpu={gpu!r} selects the tilings of target cuda; target {target.name} has none: leave it out")
    gpu_arch(gpu)


def gpu_named_in(program: ExportedProgram) -> str | None:
    """The GPU that the operators of a rewritten program name; None if they name none.

    Raises:
        ValueError: they name several.
    """
    names = sorted({str(arguments(node)["gpu"]) for _, node in _operators(program)} - {""})
    if len(names) > 1:
        raise UsageError(f"operators of the program name several GPUs, {', '.join(names)}: rewrite it with one gpu=")
    return names[0] if names else None


def name_gpu(program: ExportedProgram, gpu: str) -> None:
    """Make the operators of ``program`` name ``gpu``; the program is changed."""
    name = str(gpu_arch(gpu))
    changed: dict[GraphModule, None] = {}
    for module, node in list(_operators(program)):
        node.kwargs = {**node.kwargs, "gpu": name}
        changed[module] = None
    for module in changed:
        module.recompile()


def described_gpu(gpu: str | None) -> GpuArch | None:
    """The GPU that a report describes: the named one, or the one that is present."""
    if gpu is not None:
        return named_gpu(gpu)
    try:
        return present_gpu()
    except ValueError:  # too old for the kernels; a rewrite still works, for another machine
        return None


def gpu_notes(program: ExportedProgram, gpu: GpuArch) -> list[str]:
    """Remarks on the tilings of a rewritten program for ``gpu``, and on the GPUs that will run it."""
    operators = {op_of(node) for _, node in _operators(program)}
    if not operators:
        return []
    costs = [costs_of(gpu, bits) for bits in (4, 8) if bits == 4 or INT8_LINEAR in operators]
    measured = all(each.measured for each in costs)
    source = f"{costs[-1].source}, for {gpu}" if measured else f"predicted, not measured, for {gpu}"
    cards = cards_of(gpu)
    listed = ", ".join(f"{name} ({'.'.join(map(str, GPUS[name].capability))})" for name in cards)
    only = " only" if len(cards) == 1 else ""
    return [f"tilings {source}; once lowered, the program runs on {listed}{only}"]


def unnamed_gpu_text(program: ExportedProgram) -> str:
    """Where the tilings of a program come from for which no GPU is known; empty if it has none."""
    if not any(_operators(program)):
        return ""
    return f"tilings: no GPU is named, so they are shown for {HOPPER}; the lowering chooses those of its own GPU"


def _operators(program: ExportedProgram) -> Iterator[tuple[GraphModule, Node]]:
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            yield from ((module, node) for node in module.graph.nodes if op_of(node) in TRITON_OPERATORS)
