"""Control flow: the graphs that a program's nodes call, and what each call hands into them.

``torch.export`` keeps the body of a ``cond``, ``map``, ``scan`` or ``while_loop``, and what stands under ``no_grad`` or
``autocast``, as a graph of its own. Whatever that body reads, weights too, is an operand of the call and a placeholder
of each graph that it calls, in the same order.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from et_cuda_passes.graph.aliasing import alias_source
from et_cuda_passes.graph.operators import Target

_flow = torch.ops.higher_order

# Each call that is understood: the place of its first operands, then that of those which every run of a graph gets as
# they are. The operands before are other values in each run (a loop's state), or parts of them (what a map goes over).
_OPERAND_LIST_OPS: dict[Target, tuple[int, int]] = {
    _flow.cond: (3, 3),
    _flow.map_impl: (1, 2),
    _flow.scan: (1, 3),
    _flow.while_loop: (2, 3),
}
# The same where the operands follow each other as arguments: these run one graph once, and its results are theirs.
_VARIADIC_OPS: dict[Target, int] = {_flow.wrap_with_set_grad_enabled: 2, _flow.wrap_with_autocast: 5}


class Subgraphs:
    """The graphs of a program, its own and those that control flow calls, at any depth."""

    def __init__(self, root: torch.nn.Module, graph: Graph) -> None:
        self.graph = graph
        self.views: dict[Node, Node] = {}
        """In whose memory a placeholder of a branch may lie, or a result: an operand's, or a node's of the branch."""
        self._modules: dict[Graph, GraphModule] = {}
        self._callers: dict[Graph, Node] = {}
        self._paths: dict[Graph, str] = {graph: ""}
        self._outer: dict[Node, Node] = {}
        self._handed: dict[tuple[Graph, Node], Node] = {}
        self._added: dict[Node, list[Node]] = defaultdict(list)
        self._unread: dict[Node, None] = {}
        self._last: dict[Graph, Node] = {}
        self.bodies: dict[Node, list[Graph]] = {}
        """The graphs that each call of control flow runs, understood or not."""
        calls = self.bodies
        self._find(root, graph, calls)
        uses = Counter(child for children in calls.values() for child in children)
        for caller, children in calls.items():
            # A graph that is called from two places has not one set of operands.
            if all(uses[child] == 1 for child in children):
                self._enter(caller, children)

    def _find(self, module: torch.nn.Module, graph: Graph, calls: dict[Node, list[Graph]]) -> None:
        modules = dict(module.named_modules())
        for node in graph.find_nodes(op="get_attr"):
            child = modules.get(node.target)
            if not isinstance(child, GraphModule):
                continue
            for caller in node.users:
                calls.setdefault(caller, []).append(child.graph)
            if child.graph not in self._modules:
                self._modules[child.graph] = child
                self._paths[child.graph] = ".".join(filter(None, (self._paths[graph], node.target)))
                self._find(child, child.graph, calls)

    def _enter(self, caller: Node, graphs: list[Graph]) -> None:
        same, changing = _operands(caller), _operands(caller, changing=True)
        inputs = [graph.find_nodes(op="placeholder") for graph in graphs]
        if same is None or changing is None or any(len(found) != len(changing) + len(same) for found in inputs):
            return
        for graph, placeholders in zip(graphs, inputs, strict=True):
            self._callers[graph] = caller
            pairs = list(zip(placeholders, [*changing, *same], strict=True))
            self.views.update((inner, outer) for inner, outer in pairs if isinstance(outer, Node))
            for inner, outer in pairs[len(changing) :]:
                if isinstance(outer, Node):
                    self._outer[inner] = outer
                    self._handed[graph, outer] = inner
        results = graphs[0].output_node().args[0]
        for user in caller.users:
            if (
                caller.target in _VARIADIC_OPS
                and user.target is operator.getitem
                and isinstance(results, (tuple, list))
            ):
                result = results[cast(int, user.args[1])]
                self.views.update({user: result} if isinstance(result, Node) else {})

    # Reading ---------------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """All nodes that rules may act on, in the order of execution: a branch's own just before the call."""
        yield from self._nodes(self.graph)

    def _nodes(self, graph: Graph) -> Iterator[Node]:
        inside: dict[Node, list[Graph]] = defaultdict(list)
        for branch, caller in self._callers.items():
            if caller.graph is graph:
                inside[caller].append(branch)
        for node in graph.nodes:
            for branch in inside.get(node, ()):
                yield from self._nodes(branch)
            yield node

    def opaque_graphs(self) -> Iterator[Graph]:
        """The graphs into which nothing can be handed: of calls that are not understood, or called from two places."""
        yield from (graph for graph in self._modules if not self._is_open(graph))

    def _is_open(self, graph: Graph) -> bool:
        while graph is not self.graph and graph in self._callers:
            graph = self._callers[graph].graph
        return graph is self.graph

    def captured_operand(self, node: Node) -> Node | None:
        """The operand that placeholder ``node`` of a branch is in every run; None for any other node."""
        return self._outer.get(node)

    def in_control_flow(self, node: Node) -> bool:
        """Whether ``node`` is in the body of a cond or a loop. ``no_grad`` and ``autocast`` are none: both dissolve."""
        graph = node.graph
        while (caller := self._callers.get(graph)) is not None and caller.target in _VARIADIC_OPS:
            graph = caller.graph
        return graph is not self.graph

    def captured_operands(self, caller: Node) -> set[Node]:
        """The operands that ``caller`` only hands on: what becomes of them is up to its branches."""
        operands = _operands(caller)
        if operands is None or caller not in self._callers.values():
            return set()
        return {*operands} - {*(_operands(caller, changing=True) or ())}

    def is_input(self, node: Node) -> bool:
        """Whether ``node`` is a placeholder of a branch, whatever it stands for."""
        return node.op == "placeholder" and node.graph is not self.graph

    def escapes(self, node: Node) -> bool:
        """Whether ``node``, or a view of it, is a result of a branch."""
        return node.graph is not self.graph and any(
            user.op == "output" or (alias_source(user) is node and self.escapes(user)) for user in node.users
        )

    def path(self, node: Node) -> str:
        """Where ``node`` stands and its name, unique in the program: ``true_graph_0.linear``."""
        return ".".join(filter(None, (self._paths.get(node.graph, ""), node.name)))

    # Changing --------------------------------------------------------------------------------------------------------

    def thread_through(self, node: Node, graph: Graph) -> Node:
        """What ``node`` of the program's own graph is called in ``graph``; handed in at every level where it is not."""
        if graph is self.graph:
            return node
        caller = self._callers[graph]
        operand = self.thread_through(node, caller.graph)
        handed = self._handed.get((graph, operand))
        if handed is None or handed not in self._outer:
            for branch in [branch for branch, called_by in self._callers.items() if called_by is caller]:
                # All placeholders are listed once, and not for each that is added.
                last = self._last.get(branch) or next(iter(branch.find_nodes(op="placeholder")[-1:]), None)
                with branch.inserting_after(last) if last else branch.inserting_before():
                    self._last[branch] = inner = branch.placeholder(node.name)
                inner.target, inner.meta = inner.name, {"val": node.meta["val"]}
                self._handed[branch, operand] = inner
                self._outer[inner] = self.views[inner] = operand
            self._added[caller].append(operand)
        return self._handed[graph, operand]

    def mark_unused(self, placeholder: Node) -> None:
        """Note that nothing reads ``placeholder`` any more; :meth:`flush` drops it once that is so in every branch."""
        if placeholder in self._outer:
            self._unread[placeholder] = None

    def flush(self) -> list[Node]:
        """Write what was handed in and what is no longer read into the calls; returns the operands that lost a reader.

        Once for many changes, since each writes all operands of a call.
        """
        callers = dict.fromkeys([*self._added, *(self._callers[node.graph] for node in self._unread)])
        lost: list[Node] = []
        for caller in callers:
            operands = [*(_operands(caller) or ()), *self._added.pop(caller, ())]
            branches = [graph for graph, called_by in self._callers.items() if called_by is caller]
            columns = zip(*(graph.find_nodes(op="placeholder")[-len(operands) :] for graph in branches), strict=True)
            left = []
            for operand, column in zip(operands, columns, strict=True):
                if self._unread.keys().isdisjoint(column) or any(inner.users for inner in column):
                    left.append(operand)
                    continue
                lost.append(operand)
                for inner in column:
                    inner.graph.erase_node(inner)
                    del self._outer[inner], self.views[inner]
            _set_operands(caller, left)
        self._unread.clear()
        self._last.clear()
        return lost

    def recompile(self) -> None:
        """Make the modules run what their graphs say."""
        for module in self._modules.values():
            module.recompile()


def _operands(caller: Node, changing: bool = False) -> list[Any] | None:
    """What ``caller`` hands in, the same in each run of a graph or ``changing``; None for a call not understood."""
    if caller.target in _VARIADIC_OPS:
        return [] if changing else list(caller.args[_VARIADIC_OPS[caller.target] :])
    if caller.target not in _OPERAND_LIST_OPS:
        return None
    first, same = _OPERAND_LIST_OPS[caller.target]
    if caller.kwargs or len(caller.args) != same + 1:
        return None
    if not changing:
        return list(cast(tuple[Any, ...], caller.args[same]))
    return [operand for group in caller.args[first:same] for operand in cast(tuple[Any, ...], group)]


def _set_operands(caller: Node, operands: list[Any]) -> None:
    if caller.target in _VARIADIC_OPS:
        caller.args = (*caller.args[: _VARIADIC_OPS[caller.target]], *operands)
    else:
        caller.args = (*caller.args[: _OPERAND_LIST_OPS[caller.target][1]], tuple(operands))
