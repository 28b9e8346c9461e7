"""XnnpackPartitioner: ExecuTorch's partitioner with a pass list, and with an error instead of a wrong result."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, cast

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as _Stock
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from torch._export.utils import is_buffer, is_lifted_tensor_constant, is_param
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.partitioner import Partition
from torch.fx.passes.infra.pass_base import PassResult

from et_cuda_passes.executorch.partitioner import RewritingPartitioner
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.subgraphs import CONTROL_FLOW
from et_cuda_passes.rules.xnnpack import KeepDynamicInt4, SplitBroadcastBias
from et_cuda_passes.rules.xnnpack_operators import ExpandTanhGelu
from et_cuda_passes.targets import default_passes

_edge = exir_ops.edge.aten
_READS_WEIGHT = frozenset(
    {
        exir_ops.edge.torchao.dequantize_affine.default,
        exir_ops.edge.quantized_decomposed.dequantize_per_channel.default,
    }
)
_UNCHANGED = _READS_WEIGHT | frozenset(
    {
        _edge.linear.default,
        _edge.bmm.default,
        _edge._softmax.default,
        _edge.add.Tensor,
        _edge.sub.Tensor,
        _edge.mul.Tensor,
        _edge.div.Tensor,
        _edge.neg.default,
        _edge.pow.Tensor_Scalar,
        _edge.rsqrt.default,
        _edge.sqrt.default,
        _edge.sigmoid.default,
        _edge.tanh.default,
        _edge.gelu.default,
        _edge.exp.default,
        _edge.sin.default,
        _edge.cos.default,
        _edge.view_copy.default,
        _edge.permute_copy.default,
        _edge.slice_copy.Tensor,
        _edge.unsqueeze_copy.default,
        _edge.cat.default,
        exir_ops.edge.torchao.choose_qparams_affine.default,
        exir_ops.edge.torchao.quantize_affine.default,
        operator.getitem,
    }
)
"""No pass of the delegate changes these. Each pass traces its partition again, which took a third of a lowering."""

_CAT_LIMIT = 5
"""The delegate splits a concatenation of more tensors."""

# The delegate then runs only the pass that converts matrix products to linears.
_ONE_PASS = [CompileSpec("dqlinear_partitioner", b"")]


class XnnpackPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # ExecuTorch's class is untyped
    """ExecuTorch's ``XnnpackPartitioner`` that first runs ``passes`` over every method.

    The stock partitioner treats every ``dequantize_affine`` as its own quantization. For a weight-only scheme the
    delegate then computes with the raw integers and reports no error. This partitioner folds such a weight to floats,
    and raises an error if that is not possible either.

    Args:
        *args: as for the stock partitioner.
        passes: see :func:`et_cuda_passes.rewrite`; None for ``default_passes("xnnpack")``. A list without
            ``SplitBroadcastBias`` or ``ExpandTanhGelu`` gets it as a first pass, because the delegate computes wrongly
            without.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        **kwargs: as for the stock partitioner.
    """

    rewrite_target = "xnnpack"
    _computes_only_outcomes = "XNNPACK"

    def __init__(
        self,
        *args: Any,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if passes is None and kwargs.get("enable_bf16"):
            passes = [
                dataclasses.replace(rule, bf16=True) if isinstance(rule, KeepDynamicInt4) else rule
                for rule in default_passes(self.rewrite_target)
            ]
        listed = default_passes(self.rewrite_target) if passes is None else list(passes)
        always = (SplitBroadcastBias(), ExpandTanhGelu())
        listed = [rule for rule in always if not any(isinstance(each, type(rule)) for each in listed)] + listed
        super().__init__(*args, passes=listed, expect=expect, **kwargs)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """ExecuTorch's hook: control flow reads its own copies of constants that operators outside of it read too."""
        return _with_constants_of_control_flow(super().transform_for_pre_decomposition(exported_program), self._pool)

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        """ExecuTorch's hook.

        The stock partitioner returns a filter of nodes, for which ExecuTorch decomposes the program twice. Where all
        nodes of an operator have the same answer, no filter is necessary, and one decomposition does.
        """
        operators, supported = super().ops_to_not_decompose(ep)

        def in_delegate(node: Node) -> bool:
            # No partition contains nodes of a branch, and the lowering fails for a linear that remains there.
            return node.graph is ep.graph and supported(node)

        answers: dict[Any, set[bool]] = {}
        for module in (each for each in ep.graph_module.modules() if isinstance(each, torch.fx.GraphModule)):
            for node in module.graph.nodes:
                found = node.target._op if isinstance(node.target, EdgeOpOverload) else node.target
                if node.op == "call_function" and found in operators:
                    answers.setdefault(found, set()).add(in_delegate(node))
        if all(len(each) == 1 for each in answers.values()):
            return [found for found, answer in answers.items() if answer == {True}], None
        return operators, in_delegate

    def get_matched_nodes_from_configs(self, ep: ExportedProgram) -> list[list[Node]]:
        """ExecuTorch's hook, without the groups that would read freed memory.

        When a program is loaded, a linear copies its weight and bias into its own layout, and executorch 1.5.1 then
        frees both. An operator such as an addition does not copy. In the delegate it would read freed memory, which
        ends the process if the file is mapped into memory.
        """
        groups: list[list[Node]] = super().get_matched_nodes_from_configs(ep)
        claimed = {node for group in groups for node in group if _is_constant(ep, node)}
        shared = {node for node in claimed if len(node.users) > 1}
        return [group for group in groups if self._constants_read(group, shared) <= self._constants_copied(group, ep)]

    def _constants_read(self, group: list[Node], shared: set[Node]) -> set[Node]:
        return {each for node in group for each in node.all_input_nodes if each in shared}

    def _constants_copied(self, group: list[Node], ep: ExportedProgram) -> set[Node]:
        """The constants that the configurations of the group's operators claim; another group may hold them."""
        configs = self.target_partitioner_configs
        names = {
            node: format_target_name(cast(Any, node.target).__name__) for node in group if node.op == "call_function"
        }
        return {
            each for node, name in names.items() if name in configs for each in configs[name].get_partition(node, ep)
        }

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """ExecuTorch's hook: a partition holds all that the delegate can compute before it needs a value from outside.

        Each partition costs the lowering a copy of the whole graph. The stock partitioner makes more of them, and
        compares all of them with each other.
        """
        if self.per_op_mode:
            return super().generate_partitions(ep)  # type: ignore[no-any-return]
        groups = self.get_matched_nodes_from_configs(ep)
        stages = _stages(ep, groups)
        if stages is None:
            return super().generate_partitions(ep)  # type: ignore[no-any-return]
        members: dict[int, list[Node]] = {}
        for group, stage in zip(groups, stages, strict=True):
            members.setdefault(stage, []).extend(group)
        return [Partition(id=stage, nodes=nodes) for stage, nodes in members.items()]

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """ExecuTorch's hook: the delegate runs one pass only over a partition that the others leave as it is."""
        result = super().partition(exported_program)
        nodes: dict[str, list[Node]] = {}
        for node in exported_program.graph.nodes:
            if tag := node.meta.get("delegation_tag"):
                nodes.setdefault(tag, []).append(node)
        for tag, members in nodes.items():
            if all(_is_unchanged(node, exported_program) for node in members):
                result.partition_tags[tag] = DelegationSpec(self.delegation_spec.backend_id, _ONE_PASS)
        return result


def _with_constants_of_control_flow(exported: ExportedProgram, pool: ConstantCache) -> ExportedProgram:
    """The program with a copy of each constant that control flow shares with other operators, for the control flow.

    A delegate cannot hold a shared constant. ExecuTorch copies those that are arguments of an operator, and fails for
    those in a list of arguments.
    """
    program = Program(exported, pool)
    for node in program.graph.find_nodes(op="placeholder"):
        calls = [user for user in node.users if user.target in CONTROL_FLOW]
        value = None if program.is_mutated(node) else program.constant(node)
        if not calls or len(calls) == len(node.users) or value is None:
            continue
        name = f"{program.fqn_key(node)}_in_control_flow"
        copy = program.add_constant(name, [node], "copy", value.clone, program.graph)
        for call in calls:
            call.replace_input_with(node, copy)
    return program.to_exported() if program.added else exported


def simplify_views(graph_module: torch.fx.GraphModule) -> PassResult:
    """A pass of the edge dialect, in place: views that the delegate takes instead of those that it does not.

    An expansion to the same shape is removed. The one dynamic size of a view becomes -1: the delegate reshapes to a
    single inferred size, and skips a view with a computed size.
    """
    modified = False
    for node in graph_module.graph.find_nodes(op="call_function", target=_edge.expand_copy.default):
        source, value = node.args[0], node.meta["val"]
        if source.op == "call_function" and _same_shape(source.meta["val"], value):
            node.replace_all_uses_with(source)
            modified = True
    for node in graph_module.graph.find_nodes(op="call_function", target=_edge.view_copy.default):
        sizes = node.meta["val"].shape
        fixed = [size for size in sizes if isinstance(size, int)]
        computed = any(isinstance(size, Node) for size in node.args[1])
        if computed and len(fixed) == len(sizes) - 1 and 0 not in fixed:
            node.args = (node.args[0], [size if isinstance(size, int) else -1 for size in sizes])
            modified = True
    if modified:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return PassResult(graph_module, modified)


def _same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the shapes are equal for all dynamic sizes."""
    return len(one.shape) == len(other.shape) and all(
        statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True)
    )


def _stages(ep: ExportedProgram, groups: list[list[Node]]) -> list[int] | None:
    """The stage of each group: how often a path from an input to it enters the delegate.

    Groups of one stage can run together. A path from one of them to another that leaves the delegate enters it again,
    and so ends in a later stage.

    Returns:
        None if a group has an input that depends on the group itself.
    """
    group_of = {node: index for index, group in enumerate(groups) for node in group if node.op == "call_function"}
    nodes: dict[Node | int, list[Node]] = {index: [] for index in range(len(groups))}
    for node in ep.graph.nodes:
        nodes.setdefault(group_of.get(node, node), []).append(node)

    def inputs(unit: Node | int) -> set[Node | int]:
        return {group_of.get(each, each) for node in nodes[unit] for each in node.all_input_nodes} - {unit}

    # A unit is a group, or a node outside of all groups.
    try:
        order = list(TopologicalSorter({unit: inputs(unit) for unit in nodes}).static_order())
    except CycleError:
        return None
    stages: dict[Node | int, int] = {}
    for unit in order:
        inside = isinstance(unit, int)
        stages[unit] = max(
            (stages[each] + (inside and not isinstance(each, int)) for each in inputs(unit)), default=int(inside)
        )
    return [stages[index] for index in range(len(groups))]


def _is_unchanged(node: Node, program: ExportedProgram) -> bool:
    """Whether no pass of the delegate changes the node."""
    if node.op != "call_function":
        return True
    if node.target not in _UNCHANGED:
        return False
    if node.target is _edge.cat.default and len(cast(list[Node], node.args[0])) > _CAT_LIMIT:
        return False
    # The delegate folds what it can compute from constants, except for quantized weights.
    inputs = node.all_input_nodes
    return node.target in _READS_WEIGHT or not inputs or not all(_is_constant(program, each) for each in inputs)


def _is_constant(program: ExportedProgram, node: Node) -> bool:
    return bool(is_param(program, node) or is_buffer(program, node) or is_lifted_tensor_constant(program, node))
