"""Subgraphs of control flow, and the operands that their calls pass to them.

``torch.export`` makes a subgraph of each body of a ``cond``, ``map``, ``scan`` or ``while_loop``, and of code under
``no_grad`` or ``autocast``. Everything that a subgraph reads, weights included, is an operand of the call and a
placeholder of each subgraph that it calls, in the same order.
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

# For each supported operator: the index of its first operands, and that of its captured operands, which are the same in
# every run of a subgraph. The operands before these change from run to run: the state of a loop, slices of a map.
_OPERAND_LIST_OPS: dict[Target, tuple[int, int]] = {
    _flow.cond: (3, 3),
    _flow.map_impl: (1, 2),
    _flow.scan: (1, 3),
    _flow.while_loop: (2, 3),
}
CONTROL_FLOW = frozenset(_OPERAND_LIST_OPS)
"""Operators whose subgraphs stay subgraphs; those of other operators are inlined by a decomposition."""
# The same for operators whose operands are single arguments. They run one subgraph once and return its results.
_VARIADIC_OPS: dict[Target, int] = {_flow.wrap_with_set_grad_enabled: 2, _flow.wrap_with_autocast: 5}


class Subgraphs:
    """The graph of a program and its subgraphs, at any depth."""

    def __init__(self, root: torch.nn.Module, graph: Graph) -> None:
        self.graph = graph
        self.views: dict[Node, Node] = {}
        """Pairs of nodes that may share memory: a placeholder and its operand, a result of a call and the node of the
        subgraph that it returns."""
        self._modules: dict[Graph, GraphModule] = {}
        self._callers: dict[Graph, Node] = {}
        self._paths: dict[Graph, str] = {graph: ""}
        self._captured: dict[Node, Node] = {}
        self._placeholders: dict[tuple[Graph, Node], Node] = {}
        self._added: dict[Node, list[Node]] = defaultdict(list)
        self._unused: dict[Node, None] = {}
        self._last: dict[Graph, Node] = {}
        self.bodies: dict[Node, list[Graph]] = {}
        """The subgraphs that each higher-order call runs, supported or not."""
        calls = self.bodies
        self._find(root, graph, calls)
        uses = Counter(child for children in calls.values() for child in children)
        for caller, children in calls.items():
            # A subgraph that is called from two places has two sets of operands.
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
                    self._captured[inner] = outer
                    self._placeholders[graph, outer] = inner
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
        """All nodes that rules may match, in the order of execution: those of a subgraph directly before its call."""
        yield from self._nodes(self.graph)

    def _nodes(self, graph: Graph) -> Iterator[Node]:
        inside: dict[Node, list[Graph]] = defaultdict(list)
        for subgraph, caller in self._callers.items():
            if caller.graph is graph:
                inside[caller].append(subgraph)
        for node in graph.nodes:
            for subgraph in inside.get(node, ()):
                yield from self._nodes(subgraph)
            yield node

    def opaque_graphs(self) -> Iterator[Graph]:
        """The subgraphs that rules cannot change: of unsupported operators, or called from two places."""
        yield from (graph for graph in self._modules if not self._is_open(graph))

    def _is_open(self, graph: Graph) -> bool:
        while graph is not self.graph and graph in self._callers:
            graph = self._callers[graph].graph
        return graph is self.graph

    def captured_operand(self, node: Node) -> Node | None:
        """The operand that placeholder ``node`` of a subgraph is in every run; None for any other node."""
        return self._captured.get(node)

    def in_control_flow(self, node: Node) -> bool:
        """Whether ``node`` is in a subgraph of a cond or a loop. Those of ``no_grad`` and ``autocast`` are inlined."""
        graph = node.graph
        while (caller := self._callers.get(graph)) is not None and caller.target in _VARIADIC_OPS:
            graph = caller.graph
        return graph is not self.graph

    def captured_operands(self, caller: Node) -> set[Node]:
        """The operands that ``caller`` passes to its subgraphs unchanged; only the subgraphs read them."""
        operands = _operands(caller)
        if operands is None or caller not in self._callers.values():
            return set()
        return {*operands} - {*(_operands(caller, changing=True) or ())}

    def is_input(self, node: Node) -> bool:
        """Whether ``node`` is a placeholder of a subgraph."""
        return node.op == "placeholder" and node.graph is not self.graph

    def escapes(self, node: Node) -> bool:
        """Whether ``node``, or a view of it, is a result of a subgraph."""
        return node.graph is not self.graph and any(
            user.op == "output" or (alias_source(user) is node and self.escapes(user)) for user in node.users
        )

    def path(self, node: Node) -> str:
        """The name of ``node`` after those of its subgraphs, unique in the program: ``true_graph_0.linear``."""
        return ".".join(filter(None, (self._paths.get(node.graph, ""), node.name)))

    # Changing --------------------------------------------------------------------------------------------------------

    def thread_through(self, node: Node, graph: Graph) -> Node:
        """The placeholder of ``node`` in subgraph ``graph``. Calls on the way that lack the operand get it."""
        if graph is self.graph:
            return node
        caller = self._callers[graph]
        operand = self.thread_through(node, caller.graph)
        known = self._placeholders.get((graph, operand))
        if known is None or known not in self._captured:
            for subgraph in [subgraph for subgraph, called_by in self._callers.items() if called_by is caller]:
                # Finding all placeholders is slow, so the last one is remembered.
                last = self._last.get(subgraph) or next(iter(subgraph.find_nodes(op="placeholder")[-1:]), None)
                with subgraph.inserting_after(last) if last else subgraph.inserting_before():
                    self._last[subgraph] = inner = subgraph.placeholder(node.name)
                inner.target, inner.meta = inner.name, {"val": node.meta["val"]}
                self._placeholders[subgraph, operand] = inner
                self._captured[inner] = self.views[inner] = operand
            self._added[caller].append(operand)
        return self._placeholders[graph, operand]

    def mark_unused(self, placeholder: Node) -> None:
        """Record that nothing reads ``placeholder``; :meth:`flush` removes an operand that no subgraph reads."""
        if placeholder in self._captured:
            self._unused[placeholder] = None

    def flush(self) -> list[Node]:
        """Add new operands to the calls and remove unused ones; returns the removed operands.

        One call of this method covers many changes, since each change rewrites all operands of a call.
        """
        callers = dict.fromkeys([*self._added, *(self._callers[node.graph] for node in self._unused)])
        lost: list[Node] = []
        for caller in callers:
            operands = [*(_operands(caller) or ()), *self._added.pop(caller, ())]
            subgraphs = [graph for graph, called_by in self._callers.items() if called_by is caller]
            columns = zip(*(graph.find_nodes(op="placeholder")[-len(operands) :] for graph in subgraphs), strict=True)
            left = []
            for operand, column in zip(operands, columns, strict=True):
                if self._unused.keys().isdisjoint(column) or any(inner.users for inner in column):
                    left.append(operand)
                    continue
                lost.append(operand)
                for inner in column:
                    inner.graph.erase_node(inner)
                    del self._captured[inner], self.views[inner]
            _set_operands(caller, left)
        self._unused.clear()
        self._last.clear()
        return lost

    def recompile(self) -> None:
        """Generate the code of the subgraphs' modules again."""
        for module in self._modules.values():
            module.recompile()


def _operands(caller: Node, changing: bool = False) -> list[Any] | None:
    """The captured operands of ``caller``, or the ``changing`` ones; None for an unsupported call."""
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
