"""The targets of this package by name, and those of other packages by their entry points."""

import dataclasses
import re
from collections.abc import Mapping

from et_cuda_passes.graph.passes import PassList
from et_cuda_passes.plugins import RULES, TARGETS, Plugin, installed, mode, report_fault
from et_cuda_passes.targets.coreml import COREML
from et_cuda_passes.targets.cpu import CPU
from et_cuda_passes.targets.cuda import CUDA
from et_cuda_passes.targets.joining import remember_origin, with_plugins
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


def own_targets() -> tuple[str, ...]:
    """The names of the targets of this package, "cuda" and "cpu" among them."""
    return tuple(_TARGETS)


def targets() -> tuple[str, ...]:
    """The names of the targets: those of this package, and then those of installed packages.

    Another package gives a target its name by an entry point in the group ``et_cuda_passes.targets``.
    """
    return (*_TARGETS, *_installed_targets())


def _installed_targets() -> dict[str, Plugin]:
    """The targets of plugins by name. No package is imported."""
    found: dict[str, Plugin] = {}
    for plugin in installed(TARGETS):
        if plugin.name in _TARGETS:
            report_fault(plugin, f"this package has the target {plugin.name}", "rename the entry point")
        elif plugin.name in found:
            report_fault(plugin, f"{found[plugin.name].origin} has a target of that name", "rename the entry point")
        else:
            found[plugin.name] = plugin
    return found


def get_target(name: str | Target) -> Target:
    """The target with that name; a :class:`Target` is returned as it is.

    Args:
        name: a name of :func:`targets`, or ``MODULE:NAME``, the place of a target in a module that Python can import.
            A package is imported when its target is requested.

    Raises:
        ValueError: there is no such target, its package cannot be imported, or a :class:`Target` that is not of this
            package has the name of one that is.
    """
    if isinstance(name, Target):
        return _check_name(name)
    if isinstance(name, str) and name in _TARGETS:
        return _TARGETS[name]
    found = _installed_targets()
    if isinstance(name, str) and name in found:
        plugin = found[name]
        target = _load(plugin)
        if target.name != name:
            raise ValueError(
                f"target {name!r}: {plugin.value} has the name {target.name!r}, which reports and files would show; "
                "give the Target and its entry point the same name"
            )
        for rule in target.rules():
            remember_origin(rule, plugin)
        return target
    if isinstance(name, str) and re.fullmatch(r"[\w.]+:[\w.]+", name):
        return _load(Plugin(name, name, TARGETS, "", ""))
    if isinstance(name, str) and ":" in name:
        raise ValueError(
            f"target {name!r} is not of the form MODULE:NAME: write the module, a colon, and the name of the Target in "
            "it, as in my_npu:npu"
        )
    if isinstance(name, str) and "," in name:
        raise ValueError(f"target {name!r} names several targets, and one is needed: run this once for each")
    known = ", ".join(targets())
    off = "; plugins are switched off" if mode() == "0" else ""
    raise ValueError(
        f"unknown target {name!r}; known targets are {known}, and MODULE:NAME is one of your own package{off}"
    )


def _check_name(target: Target) -> Target:
    """Refuse another target under the name of one of this package: a report would say that this one was used."""
    own = _TARGETS.get(target.name)
    if own is None or target is own:
        return target
    alike = dataclasses.replace(target, gpu=own.gpu)
    if alike == own and (target.passes, target.partitioner) == (own.passes, own.partitioner):
        return target
    raise ValueError(
        f"this Target has the name of the target {target.name!r} of the package, and other kernels, passes or "
        f"lowering: give it a name of its own, with lowered_as={own.lowering!r} to lower it in the same way"
    )


def _load(plugin: Plugin) -> Target:
    try:
        target = plugin.load()
    except Exception as error:  # the import of another package raises anything
        fix = "; install its package, or put the folder of the package on PYTHONPATH"
        raise ValueError(
            f"target {plugin.name!r} cannot be imported from {plugin.value} ({type(error).__name__}: {error})"
            f"{fix if isinstance(error, ImportError) else ''}"
        ) from error
    if not isinstance(target, Target):
        raise ValueError(f"{plugin.value} is {target!r}, not an et_cuda_passes.Target")
    return _check_name(target)


def import_plugins() -> None:
    """Import the packages of all plugins, which registers their operators.

    Raises:
        ValueError: one of them cannot be imported.
    """
    failed = []
    for plugin in (*installed(TARGETS), *installed(RULES)):
        try:
            plugin.load()
        except Exception as error:  # the import of another package raises anything
            failed.append(f"{plugin.value} of {plugin.origin} cannot be imported ({type(error).__name__}: {error})")
    if failed:
        raise ValueError("; ".join(failed))


class _DefaultPasses(PassList):
    renamed = RENAMED_PASSES


def default_passes(target: str | Target) -> PassList:
    """A new list of the target's rules, in their order; edit it and pass it as ``passes=``.

    The rules of installed packages that join the list of the target are in it.

    Raises:
        ValueError: there is no such target.
    """
    chosen = get_target(target)
    own = {name: each.passes() for name, each in _TARGETS.items()}
    return _DefaultPasses(with_plugins(chosen.name, chosen.rules(), own, _installed_targets(), RENAMED_PASSES))


def known_passes() -> set[str]:
    """The names of all rules that the default list of some target has; plugins are a part of it."""
    return {rule.name for name in own_targets() for rule in default_passes(name)}
