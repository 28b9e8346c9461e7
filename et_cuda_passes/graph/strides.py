"""A replacement may lie in memory in another order than what it replaced; views that cannot be made of it any more."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node

if TYPE_CHECKING:
    from et_cuda_passes.graph.program import Program

aten = torch.ops.aten


def settle_strides(program: "Program", replaced: Mapping[Node, Node]) -> None:
    """Bring the values behind replacements up to date, and copy what a ``view`` behind them could not be made of.

    A decomposed ``reshape`` is a ``view`` where the strides at export allowed that.

    Args:
        program: to be changed; one in edge form has no views.
        replaced: each node that was replaced with what it was replaced by, in the order in which that was done.
    """
    stale: set[Node] = set()
    for old, new in replaced.items():
        if old in stale or _differ(old.meta.get("val"), new.meta.get("val")):
            stale.add(new)
    if not stale or program.is_edge:
        return
    for node in list(program.branches.nodes()):
        if node.op != "call_function" or stale.isdisjoint(node.all_input_nodes):
            continue
        before = node.meta.get("val")
        if not isinstance(before, torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        after = _value(program, node)
        if after is None and node.target is aten.view.default:
            source = node.args[0]
            assert isinstance(source, Node)
            with node.graph.inserting_before(node):
                copied = node.graph.call_function(
                    aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
                )
            copied.meta = {key: value for key, value in node.meta.items() if key != "val"}
            copied.meta["val"] = _value(program, copied)
            node.update_arg(0, copied)
            after = _value(program, node)
        if after is not None and _differ(before, after):
            node.meta["val"] = after
            stale.add(node)


def _value(program: "Program", node: Node) -> Any:
    """What ``node`` gives, computed again; None where it cannot be."""
    if any("val" not in source.meta for source in node.all_input_nodes):
        return None  # a pass of the caller's made it and did not say
    shapes = program.fake_mode.shape_env
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    known = None if shapes is None else len(shapes.guards)
    try:
        with program.fake_mode, enable_python_dispatcher(), torch.no_grad():
            if shapes is None:
                return node.target(*args, **kwargs)  # type: ignore[operator]
            with shapes.suppress_guards():
                return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError):
        return None
    finally:
        assert shapes is None or len(shapes.guards) == known


def _differ(before: object, after: object) -> bool:
    """Whether two tensors, or what else a node gives, lie in memory in different orders."""
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dim() != after.dim():
        return False
    pairs = zip(before.stride(), after.stride(), before.shape, strict=True)
    return any(_number(a) != _number(b) for a, b, size in pairs if not isinstance(size, int) or size > 1)


def _number(size: Any) -> Any:
    """A stride to compare without a guard: a number, or the expression of one that is dynamic."""
    return size if isinstance(size, int) else size.node.expr
