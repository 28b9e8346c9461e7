"""Dead code elimination, repair of strides and names, and the verified ExportedProgram."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.aliasing import alias_source, has_effect
from et_cuda_passes.graph.constants import module_names, tensor_identity
from et_cuda_passes.graph.errors import RuleError
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.program import Program

aten = torch.ops.aten


def finish_program(program: Program) -> ExportedProgram:
    """The changed program, with its signature updated, its graph linted, and verified by the dialect's verifier."""
    repair_strides(program)
    drop_unused_aliases(program, program.dropped)
    merge_mutated_names(program)
    separate_colliding_names(program, program.added)
    return program.to_exported()


def eliminate_dead_nodes(program: Program, stays: Callable[[Node], bool] = lambda node: False) -> None:
    """Erase the dead nodes of ``program`` that nothing reads, and then their inputs that nothing else reads.

    A node with an effect (:func:`~et_cuda_passes.graph.aliasing.has_effect`) stays unless a rule replaced it: then the
    replacement has that effect. An assertion on the metadata of a node that nothing else reads is erased with it. The
    cost is linear in the number of erased nodes.

    Args:
        program: it is changed.
        stays: true for nodes that must not be erased: candidates without an outcome.
    """
    subgraphs = program.subgraphs
    work = [*subgraphs.flush(), *program.dead]
    gone: set[Node] = set()
    while work := work or subgraphs.flush():
        node = work.pop()
        if node in gone:
            continue
        if node.users and all(op_of(user) is aten._assert_tensor_metadata.default for user in node.users):
            for user in list(node.users):
                gone.add(user)
                user.graph.erase_node(user)
        if node.users or stays(node):
            continue
        if subgraphs.is_input(node):
            subgraphs.mark_unused(node)
            continue
        if node in program.boundary_nodes and program.replacement_of(node) is node:
            continue  # a preserved module's signature names it
        if node.op == "placeholder":
            if program.fqn_key(node) is None or program.is_mutated_buffer(node):
                continue
            program.remove_constant(node)
        elif node.op != "call_function" or (
            program.replacement_of(node) is node and has_effect(node, subgraphs.bodies)
        ):
            continue
        gone.add(node)
        work.extend(node.all_input_nodes)
        node.graph.erase_node(node)
        program.transfer_name(node)
    program.dead.clear()


def separate_colliding_names(program: Program, added: Iterable[str]) -> None:
    """Rename each ``w`` that is still read beside a new ``w.packed``: no module can hold both.

    A plain tensor becomes ``w.original``. A subclass parameter becomes its inner tensors, with the names that
    ``run_decompositions`` would give them.
    """
    crowded = module_names(added)
    for node in [node for node in program.graph.nodes if node.op == "placeholder"]:
        target = program.fqn_key(node)
        if target is None or target not in crowded:
            continue
        whole = cast(torch.Tensor, program.held(node))
        if type(whole) in (torch.Tensor, torch.nn.Parameter):
            name = f"{target}.original"
            while name in program.state_dict or name in program.constants:
                name += "_"
            program.rename_constant(node, name)
        else:
            _split_subclass_parameter(program, node, target, whole)


def _split_subclass_parameter(program: Program, node: Node, target: str, whole: torch.Tensor) -> None:
    """Replace subclass parameter ``node`` by one plain parameter for each inner tensor that is still read."""
    attributes, _ = whole.__tensor_flatten__()  # type: ignore[attr-defined]
    parent, _, field = target.rpartition(".")
    stem = f"{parent}.parametrizations.{field}" if parent else f"parametrizations.{field}"
    parts: dict[str, Node] = {}
    readers = list(node.users)
    for reader in readers:
        if op_of(reader) is not ACCESS_SUBCLASS_TENSOR:
            raise ValueError(
                f"{reader.name} reads the tensor subclass {target} itself, and another reader gets it packed; unwrap "
                "it first, with ep.run_decompositions({})"
            )
        attribute = cast(str, reader.args[1])
        if attribute not in parts:
            name = f"{stem}.original{attributes.index(attribute)}"
            parts[attribute] = program.insert_parameter(name, getattr(whole, attribute), before=node)
        reader.replace_all_uses_with(parts[attribute])
    # The readers have no users now, and so the parameter has none; a tied one may have had none before.
    program.mark_dead([*readers, node])
    eliminate_dead_nodes(program)


def drop_unused_aliases(program: Program, dropped: Iterable[torch.Tensor]) -> None:
    """Drop the other names of dropped tensors: ``torch.export`` lists all names of a tied weight, but reads one."""
    gone = {tensor_identity(tensor) for tensor in dropped}
    for node in program.graph.find_nodes(op="placeholder"):
        held = program.held(node)
        if held is not None and not node.users and tensor_identity(held) in gone:
            program.remove_constant(node)
            program.graph.erase_node(node)


def merge_mutated_names(program: Program) -> None:
    """Keep one name of each constant that has several names and that the program mutates.

    ``torch.export`` in its non-strict mode gives a buffer that the model also reaches as a plain attribute, such as the
    static cache of ``TorchExportableModuleForDecoderOnlyLM``, a second name as a lifted constant.
    ``run_decompositions`` refuses two names of a mutated tensor ("expected compiled_fn to be GraphModule").
    All names have the same memory, so the readers of one name also see what is written under another.
    """
    groups: dict[Hashable, list[Node]] = defaultdict(list)
    for node in program.graph.find_nodes(op="placeholder"):
        held = program.held(node)
        if held is not None and held.numel() and program.is_mutated(node):
            groups[tensor_identity(held)].append(node)
    for nodes in groups.values():
        # A buffer rather than a lifted constant: only a buffer's mutation can be in the signature.
        kept = max(nodes, key=lambda node: (program.is_mutated_buffer(node), program.is_buffer(node)))
        for node in nodes:
            if node is not kept and not program.is_mutated_buffer(node):
                node.replace_all_uses_with(kept)
                program.remove_constant(node)
                program.graph.erase_node(node)


def repair_strides(program: Program) -> None:
    """Update the strides that depend on a replacement, and insert copies where more than strides would change.

    A replacement may have other strides than the value that it replaced. Fake values computed from it are updated. A
    copy with the former strides is inserted:

    - after a value that the program mutates, under any alias: ``contiguous`` and ``reshape`` return a view or a copy,
      depending on the strides of their input, and a mutation would reach other memory;
    - before an operator that reads strides, draws random numbers in the order of its input, or is control flow;
    - before a ``view`` that the new strides do not allow. A decomposed ``reshape`` is a ``view`` if the strides at
      export allowed that.

    A program in edge form has no views and no mutations.

    Raises:
        RuleError: a mutated value cannot be copied into its former strides.
    """
    former: dict[Node, Any] = {}
    for old, new in program.replaced.items():
        # In a chain of replacements, the first value counts.
        former[new] = former.get(old, old.meta.get("val"))
    former = {new: value for new, value in former.items() if program.replacement_of(new) is new}
    if program.is_edge or not any(_differ(value, new.meta.get("val")) for new, value in former.items()):
        return
    program.refresh()
    stale: set[Node] = set()
    for node in list(program.subgraphs.nodes()):
        before = former.get(node, node.meta.get("val"))
        if not stale.isdisjoint(node.all_input_nodes):
            if _reads_strides(node, program):
                for source in [source for source in node.all_input_nodes if source in stale]:
                    node.replace_input_with(source, _in_order(program, source, former[source], before=node))
                continue
            _update_value(program, node)
        after = node.meta.get("val")
        if not _differ(before, after):
            continue
        if node in program.mutated and alias_source(node) is None:
            copied = _in_order(program, node, before, before=node.next)
            if _differ(before, copied.meta["val"]):
                raise RuleError(
                    f"{node.name} has other strides than the value that it replaced, and the program mutates it; the "
                    "rule must build it with the same strides"
                )
            node.replace_all_uses_with(copied, delete_user_cb=partial(_is_none_of, set(_chain(copied, node))))
        else:
            former.setdefault(node, before)
            stale.add(node)


_STRIDES = {
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
    aten.sym_stride.default,
    aten.sym_stride.int,
    aten.stride.int,
}
_EXACT = {
    getattr(torch.Tag, name)
    for name in ("nondeterministic_seeded", "needs_exact_strides", "needs_fixed_stride_order")
    if hasattr(torch.Tag, name)
}


def _reads_strides(node: Node, program: Program) -> bool:
    """Whether the result of ``node`` depends on the strides of its inputs."""
    if node.op == "output":
        return node.graph is not program.graph  # the result of a subgraph
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return node.target in _STRIDES or not _EXACT.isdisjoint(getattr(node.target, "tags", ()))


def _in_order(program: Program, source: Node, like: Any, before: Node) -> Node:
    """A copy of ``source`` before ``before``, with its axes in memory in the order of ``like``."""
    assert isinstance(like, torch.Tensor)
    order = sorted(range(like.dim()), key=lambda dim: -_hint(like.stride(dim)))
    back = [order.index(dim) for dim in range(like.dim())]

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        with before.graph.inserting_before(before):
            node = before.graph.call_function(target, args, kwargs)
        node.meta = {key: value for key, value in source.meta.items() if key != "val"}
        node.meta["val"] = _value(program, node)
        return node

    # Behind `alias` no rule matches the permutation as a reader of `source`: a second rewrite would undo the copy.
    permuted = call(aten.permute.default, call(aten.alias.default, source), order)
    return call(aten.permute.default, call(aten.clone.default, permuted, memory_format=torch.contiguous_format), back)


def _chain(last: Node, first: Node) -> Iterator[Node]:
    """The nodes from ``last`` back to ``first``, which is left out; each has one input."""
    while last is not first:
        yield last
        (last,) = last.all_input_nodes


def _is_none_of(nodes: set[Node], node: Node) -> bool:
    return node not in nodes


def _hint(size: Any) -> int:
    """A number to sort strides by; for a dynamic stride its value at export."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _update_value(program: Program, node: Node) -> None:
    """Compute the value of ``node`` again; a ``view`` that is not possible gets a contiguous copy of its input."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
        return
    after = _value(program, node)
    if after is None and node.target in (aten.view.default, aten._unsafe_view.default):
        source = cast(Node, node.args[0])
        with node.graph.inserting_before(node):
            copied = node.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        copied.meta = {key: value for key, value in node.meta.items() if key != "val"}
        copied.meta["val"] = _value(program, copied)
        node.update_arg(0, copied)
        after = _value(program, node)
    if after is not None:
        node.meta["val"] = after


def _value(program: Program, node: Node) -> Any:
    """The value of ``node``, computed again; None if that fails."""
    if any("val" not in source.meta for source in node.all_input_nodes):
        return None  # the node comes from a pass that did not set its value
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
    """Whether two tensors have different strides, or two tensors at the same index of two lists."""
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return any(map(_differ, before, after))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dim() != after.dim():
        return False
    pairs = zip(before.stride(), after.stride(), before.shape, strict=True)
    return any(_number(a) != _number(b) for a, b, size in pairs if not isinstance(size, int) or size > 1)


def _number(size: Any) -> Any:
    """A stride that can be compared without a guard: a number, or the expression of a dynamic stride."""
    return size if isinstance(size, int) else size.node.expr
