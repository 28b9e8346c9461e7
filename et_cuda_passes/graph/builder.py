"""The builder that a rule's ``rewrite`` gets: calls with fake values and provenance, and constants by FQN."""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.fx import Node
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils import _pytree as pytree

from et_cuda_passes.graph.constants import Decoded, Planned
from et_cuda_passes.graph.errors import NameTaken
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import Target, op_name, require_overload, to_edge
from et_cuda_passes.graph.program import Program, forbid_new_guards

# Entries of ``meta`` that a new node inherits from the node that it replaces: source line and module.
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr")


class Builder:
    """Builds the nodes of one rewrite, directly before the first node that they replace."""

    def __init__(self, program: Program, roots: Sequence[Node], rule: str) -> None:
        self.program = program
        self.roots = roots
        self.rule = rule
        self.created: dict[Node, Sequence[Node]] = {}
        """Each new node, with the roots that it stands for."""
        self._before = roots[0]

    def for_match(self, m: Match) -> "Builder":
        """A builder of nodes that stand for ``m`` alone, directly before its root, in a rewrite of several matches.

        The nodes of a module must stay side by side: ``torch.export.unflatten`` reads a second run of them as a second
        call of the module.
        """
        other = copy.copy(self)
        other.roots, other._before = (m.root,), m.root
        return other

    def call(self, target: Target, *args: Any, **kwargs: Any) -> Node:
        """A call of ``target``. Its value is computed on fake tensors and stored in ``meta["val"]``.

        Args:
            target: an operator overload.
            *args: nodes before the first root, numbers, and lists of these. Use :meth:`size` for a dynamic size and
                :meth:`constant` for a new tensor.
            **kwargs: the same, by the names of the operator's schema.

        Raises:
            TypeError: ``target`` is not an overload, or an argument is a tensor or a symbolic number.
            ValueError: an argument is a node that is not computed before the new one, or the operator accepts only some
                of the program's dynamic sizes.
            RuntimeError: the operator has no fake implementation, or rejects the arguments.
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

        # The dispatcher's Python kernels, because the compiled kernels of some operators (slice_copy) replace a dynamic
        # size by its value in the example of the export.
        mode = self.program.fake_mode
        with forbid_new_guards(self.program, op_name(target)), mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = _value(target, torch.fx.map_arg(args, fake), torch.fx.map_arg(kwargs, fake))
        for key in _INHERITED:
            if key in self.roots[0].meta:
                node.meta[key] = self.roots[0].meta[key]
        sources = [NodeSource(root, self.rule, NodeSourceAction.REPLACE) for root in self.roots]
        for source in sources:
            assert source.node_info is not None
            # torch stores an address here, so two saved rewrites of one program would differ.
            source.node_info.graph_id = 0
        node.meta["from_node"] = sources
        return node

    def _check(self, argument: Any) -> None:
        """Check that ``argument`` can be an argument of a new node."""
        if isinstance(argument, torch.Tensor):
            raise TypeError("b.call accepts nodes, not tensors; b.constant adds a tensor to the program")
        if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise TypeError(
                f"b.call accepts no symbolic number ({argument}); write b.size(node, dim) for a dynamic size"
            )
        if not isinstance(argument, Node):
            return
        if argument in self.roots:
            raise ValueError(
                f"{argument.name} is being replaced, so a new node cannot read it; build its operator again"
            )
        if argument.graph is not self._before.graph or argument.prev.next is not argument:
            raise ValueError(f"{argument.name} is not in the graph of {self._before.name}, or was removed")
        if not argument < self._before:
            raise ValueError(f"{argument.name} is computed after {self._before.name}, before which the new nodes stand")

    def size(self, node: Node, dim: int) -> int | Node:
        """The size of axis ``dim`` of ``node``: a number, or for a dynamic size the node that computes it."""
        size = Match.val(node).shape[dim]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, dim)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """``node`` converted to ``dtype``, by the operator of the program's dialect."""
        if not self.program.is_edge:
            return self.call(torch.ops.aten._to_copy.default, node, dtype=dtype)
        # ExecuTorch registered this operator before it converted the program to edge form.
        return self.call(torch.ops.dim_order_ops._to_dim_order_copy.default, node, dtype=dtype)

    def slice_last_axis(self, node: Node, start: int, end: int) -> Node:
        """Elements ``start`` to ``end`` of the last axis of ``node``, as a contiguous copy."""
        if self.program.is_edge:
            return self.call(torch.ops.aten.slice_copy.Tensor, node, -1, start, end)
        # Inductor has no lowering of slice_copy, but of these two.
        part = self.call(torch.ops.aten.slice.Tensor, node, -1, start, end)
        return self.call(torch.ops.aten.clone.default, part, memory_format=torch.contiguous_format)

    def constant(
        self,
        fqn: str,
        sources: Decoded | Iterable[Node | Decoded],
        layout: Hashable,
        make: Callable[[], torch.Tensor] | Planned,
    ) -> Node:
        """The node of a new parameter ``fqn`` that ``make`` computes, one for equal ``sources`` and ``layout``.

        Args:
            fqn: the FQN of the weight, and a suffix.
            sources: everything that ``make`` reads: a decoded weight, or a list of decoded weights and of nodes of
                constants. For a node alone, ``layout`` must contain everything else that determines its values.
            layout: every other value that ``make`` depends on.
            make: computes the tensor; or its plan, which is carried out when the rewrite ends.

        Raises:
            TypeError: there are no sources, one of them is not a constant, or ``make`` returns no tensor.
            ValueError: no module can hold a constant with this FQN beside the program's others.
        """
        nodes: list[Node] = []
        keys: list[Hashable] = []
        given: Any = [sources] if isinstance(sources, (Node, Decoded)) else sources
        for source in given if isinstance(given, Iterable) else [given]:
            if isinstance(source, Decoded):
                nodes += source.sources
                keys.append(source.values_key)
            elif isinstance(source, Node):
                nodes.append(source)
            else:
                raise TypeError(
                    f"the sources of {fqn} contain {source!r}; pass a decoded weight, or a list of decoded weights "
                    "and of nodes of constants"
                )
        if not isinstance(layout, Hashable) or not (isinstance(make, Planned) or callable(make)):
            raise TypeError(
                f"{fqn} needs a layout that can be hashed, such as a tuple, and a function that computes it"
            )
        try:
            return self.program.add_constant(fqn, nodes, (layout, *keys), make, self._before.graph)
        except NameTaken as error:
            raise NameTaken(f"rule {self.rule}: {error}") from None


def _value(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``target`` on fake tensors, with an error that names the operator."""
    try:
        return target(*args, **kwargs)
    except UnsupportedOperatorException as error:
        name = target.name() if isinstance(target, torch._ops.OpOverload) else op_name(target)
        raise RuntimeError(
            f"the operator {name} has no fake implementation, which computes the shape and dtype of its result; "
            f'register one with torch.library.register_fake("{name}") where the operator is registered'
        ) from error
    except Exception as error:
        raise RuntimeError(f"the call of {op_name(target)} failed: {str(error) or type(error).__name__}") from error
