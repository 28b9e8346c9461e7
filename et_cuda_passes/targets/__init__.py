"""The targets of this package by name, and those of other packages by their entry points."""

import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from et_cuda_passes.graph.passes import PassList
from et_cuda_passes.targets.coreml import COREML
from et_cuda_passes.targets.cpu import CPU
from et_cuda_passes.targets.cuda import CUDA
from et_cuda_passes.targets.metal import METAL
from et_cuda_passes.targets.mlx import MLX
from et_cuda_passes.targets.openvino import OPENVINO
from et_cuda_passes.targets.target import Target
from et_cuda_passes.targets.tensorrt import TENSORRT
from et_cuda_passes.targets.vulkan import VULKAN
from et_cuda_passes.targets.xnnpack import XNNPACK

__all__ = ["Target", "default_passes", "get_target", "targets"]

RENAMED_PASSES: Mapping[str, str] = {
    "attention_views": "fuse_attention_transpose",
    "bias_apart": "split_broadcast_bias",
    "chosen_experts_int4": "indexed_bmm_int4",
    "int4_activation": "fuse_activation",
    "int4_gate": "fuse_gate",
    "int4_product": "fuse_multiply",
    "int4_sum": "fuse_add",
    "linear_views": "remove_linear_views",
}
"""Former names of rules with their present names, for error messages."""

_TARGETS = {target.name: target for target in (CUDA, METAL, XNNPACK, CPU, VULKAN, COREML, OPENVINO, MLX, TENSORRT)}


GROUP = "et_cuda_passes.targets"
"""The group of entry points by which another package gives its targets a name."""


def targets() -> tuple[str, ...]:
    """The names of the targets of this package, "cuda" and "cpu" among them."""
    return tuple(_TARGETS)


def get_target(name: str | Target) -> Target:
    """The target with that name; a :class:`Target` is returned as it is.

    Args:
        name: a name of :func:`targets`; a name that an installed package gives its target, by an entry point in the
            group ``et_cuda_passes.targets``; or ``MODULE:NAME``, the place of a target in a module that Python can
            import. A package is imported when its target is requested.

    Raises:
        ValueError: there is no such target, or its package cannot be imported.
    """
    if isinstance(name, Target):
        return name
    if isinstance(name, str) and name in _TARGETS:
        return _TARGETS[name]
    installed = entry_points(group=GROUP)
    if isinstance(name, str) and name in installed.names:
        return _load(installed[name])
    if isinstance(name, str) and re.fullmatch(r"[\w.]+:[\w.]+", name):
        return _load(EntryPoint(name, name, GROUP))
    known = ", ".join([*targets(), *sorted(installed.names)])
    raise ValueError(f"unknown target {name!r}; known targets are {known}, and MODULE:NAME is one of your own package")


def _load(entry: EntryPoint) -> Target:
    try:
        target = entry.load()
    except Exception as error:  # the import of another package raises anything
        fix = "; install its package, or put the folder of the package on PYTHONPATH"
        raise ValueError(
            f"target {entry.name!r} cannot be imported from {entry.value} ({type(error).__name__}: {error})"
            f"{fix if isinstance(error, ImportError) else ''}"
        ) from error
    if not isinstance(target, Target):
        raise ValueError(f"{entry.value} is {target!r}, not an et_cuda_passes.Target")
    return target


def import_installed_targets() -> None:
    """Import the packages that give their targets a name, which registers their operators.

    Raises:
        ValueError: one of them cannot be imported.
    """
    for entry in entry_points(group=GROUP):
        _load(entry)


class _DefaultPasses(PassList):
    renamed = RENAMED_PASSES


def default_passes(target: str | Target) -> PassList:
    """A new list of the target's rules, in their order; edit it and pass it as ``passes=``.

    Raises:
        ValueError: there is no such target.
    """
    return _DefaultPasses(get_target(target).passes())
