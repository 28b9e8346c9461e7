"""The registry of targets."""

from collections.abc import Mapping

from et_cuda_passes.graph.passes import PassList
from et_cuda_passes.targets.cpu import CPU
from et_cuda_passes.targets.cuda import CUDA
from et_cuda_passes.targets.metal import METAL
from et_cuda_passes.targets.target import Target
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

_TARGETS = {target.name: target for target in (CUDA, METAL, XNNPACK, CPU)}


def targets() -> tuple[str, ...]:
    """The names of all targets: "cuda", "metal", "xnnpack", "cpu"."""
    return tuple(_TARGETS)


def get_target(name: str | Target) -> Target:
    """The target with that name; a :class:`Target` is returned as it is.

    Raises:
        ValueError: there is no such target; the message lists the known ones.
    """
    if isinstance(name, Target):
        return name
    if not isinstance(name, str) or name not in _TARGETS:
        raise ValueError(f"unknown target {name!r}; known targets are {', '.join(targets())}")
    return _TARGETS[name]


class _DefaultPasses(PassList):
    renamed = RENAMED_PASSES


def default_passes(target: str | Target) -> PassList:
    """A new list of the target's rules, in their order; edit it and pass it as ``passes=``.

    Raises:
        ValueError: there is no such target.
    """
    return _DefaultPasses(get_target(target).passes())
