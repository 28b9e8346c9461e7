"""What a rule's rewrite builds nodes with: calls with fake values and provenance, constants by FQN."""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils import _pytree as pytree

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import Target, op_name, require_overload, to_edge
from et_cuda_passes.graph.program import Program, forbid_new_guards

# What a new node has from the one it replaces: where the user wrote it, and which module it stood in.
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr")


class Builder:
    """Builds the nodes of one rewrite, just before the first of the nodes that they replace."""

    def __init__(self, program: Program, roots: Sequence[Node], rule: str) -> None:
        self.program = program
        self.roots = roots
        self.rule = rule
        self.created: dict[Node, Sequence[Node]] = {}
        """Each node that was built, with those of ``roots`` that it stands for."""
        self._before = roots[0]

    def for_match(self, m: Match) -> "Builder":
        """Builds what stands for ``m`` alone, of several matches that are rewritten together, just before its root.

        There a module's nodes stay side by side: ``torch.export.unflatten`` takes a module's second stretch for another
        call of it.
        """
        other = copy.copy(self)
        other.roots, other._before = (m.root,), m.root
        return other

    def call(self, target: Target, *args: Any, **kwargs: Any) -> Node:
        """A call of ``target``, its value computed on fake tensors and put into ``meta["val"]``.

        Args:
            target: an operator's overload, as an exported graph calls it.
            *args: nodes that stand before the match's first root, numbers and lists of these; a dynamic size is
                :meth:`size`, a new tensor :meth:`constant`.
            **kwargs: the same, by the names of the operator's schema.

        Raises:
            TypeError: ``target`` is no overload, or an argument is a tensor or a symbolic number.
            ValueError: an argument is a node that is not computed where the new one stands, or the operator holds for
                some of the program's dynamic sizes alone.
        """
        form = to_edge(require_overload(target)) if self.program.is_edge else require_overload(target)
        for argument in pytree.tree_leaves((args, kwargs)):
            self._check(argument)
        graph = self._before.graph
        with graph.inserting_before(self._before):
            node = graph.call_function(form, args, kwargs)
        self.created[node] = self.roots

        def fake(argument: Any) -> Any:
            return argument.meta["val"] if isinstance(argument, Node) else argument

        # With the dispatcher's Python kernels: the compiled ones of some operators (slice_copy) take a dynamic size for
        # what it is in the export's example.
        mode = self.program.fake_mode
        with forbid_new_guards(self.program, op_name(target)), mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = target(*torch.fx.map_arg(args, fake), **torch.fx.map_arg(kwargs, fake))
        for key in _INHERITED:
            if key in self.roots[0].meta:
                node.meta[key] = self.roots[0].meta[key]
        sources = [NodeSource(root, self.rule, NodeSourceAction.REPLACE) for root in self.roots]
        for source in sources:
            assert source.node_info is not None
            # An address, as torch sets it: two saved rewrites of one program would differ.
            source.node_info.graph_id = 0
        node.meta["from_node"] = sources
        return node

    def _check(self, argument: Any) -> None:
        """Look that a new node may have ``argument``."""
        if isinstance(argument, torch.Tensor):
            raise TypeError("b.call takes nodes; a new tensor is made a constant of the program with b.constant")
        if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise TypeError(
                f"b.call takes no symbolic number ({argument}); the size of a node's axis is b.size(node, dim)"
            )
        if not isinstance(argument, Node):
            return
        if argument in self.roots:
            raise ValueError(
                f"{argument.name} is what rewrite replaces, and cannot be read by it: build its operator again"
            )
        if argument.graph is not self._before.graph or argument.prev.next is not argument:
            raise ValueError(f"{argument.name} is not in the graph that {self._before.name} stands in, or was removed")
        if not argument < self._before:
            raise ValueError(f"{argument.name} is computed behind {self._before.name}, where the new nodes stand")

    def size(self, node: Node, dim: int) -> int | Node:
        """The size of an axis of ``node``: a number, or the node that computes one which is dynamic."""
        size = Match.val(node).shape[dim]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, dim)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """``node`` in ``dtype``; the edge dialect has a conversion of its own for it."""
        if not self.program.is_edge:
            return self.call(torch.ops.aten._to_copy.default, node, dtype=dtype)
        # Registered by ExecuTorch, without which there would be no program in edge form.
        return self.call(torch.ops.dim_order_ops._to_dim_order_copy.default, node, dtype=dtype)

    def slice_last_axis(self, node: Node, start: int, end: int) -> Node:
        """Elements ``start`` to ``end`` of ``node``'s last axis, as a tensor of its own and contiguous."""
        if self.program.is_edge:
            return self.call(torch.ops.aten.slice_copy.Tensor, node, -1, start, end)
        # Outside of that dialect slice_copy has no lowering in Inductor, and these two have.
        part = self.call(torch.ops.aten.slice.Tensor, node, -1, start, end)
        return self.call(torch.ops.aten.clone.default, part, memory_format=torch.contiguous_format)

    def constant(self, fqn: str, sources: Iterable[Node], layout: Hashable, make: Callable[[], torch.Tensor]) -> Node:
        """The node of a new parameter ``fqn`` that holds ``make()``, once for each ``sources`` and ``layout``.

        See :meth:`Program.add_constant`.
        """
        return self.program.add_constant(fqn, sources, layout, make, self._before.graph)
