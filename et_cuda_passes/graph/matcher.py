"""Match a pattern at a node. The matcher changes nothing and reads no tensor."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from et_cuda_passes.graph.aliasing import alias_source, mutated_operands
from et_cuda_passes.graph.operators import (
    Target,
    argument_names,
    arguments,
    functional_of,
    op_name,
    op_of,
    schema_of,
)
from et_cuda_passes.graph.pattern import AnyOf, Call, Capture, ListOf, Literal, Pattern, Wildcard

aten = torch.ops.aten


@dataclass(frozen=True)
class MatchResult:
    """The nodes of a match.

    Attributes:
        root: the node of the pattern's outermost call.
        bindings: nodes and constants by the names of captures and calls; None for an absent optional capture.
        owned: the nodes that only this match reads, root first. A rewrite replaces them.
        shared: matched nodes that other nodes may read too. They stay as long as one does.
        calls: the calls of the pattern with their nodes, in the order in which they matched.
    """

    root: Node
    bindings: Mapping[str, Any]
    owned: tuple[Node, ...]
    shared: tuple[Node, ...]
    calls: "Calls" = ()


@dataclass(frozen=True)
class Miss:
    """The end of the attempt that matched the most nodes. Its texts are computed when they are read.

    Attributes:
        root: the node where the attempt started.
        node: the node or constant that does not fit.
        pattern: the part of the pattern that it does not fit.
        progress: the number of nodes that fit, or that would with the operands in the other order.
        why: what was wanted, where the pattern alone does not say it.
        calls: the calls of the pattern that fit with their nodes, in the order in which they matched.
        reader_of: the node whose reader ``node`` is, if a reader does not fit.
        fix: computes the hint from ``node``, where the pattern's own hint does not apply.
    """

    root: Node
    node: Any
    pattern: Pattern
    progress: int
    why: str = ""
    calls: "Calls" = ()
    reader_of: Node | None = None
    fix: "Fix | None" = None

    @property
    def reached(self) -> tuple[Node, ...]:
        """The nodes that fit and that a match would own, root first."""
        return _owned(self.calls)

    @property
    def operator_fits(self) -> bool:
        """Whether ``node`` is a call of an operator that the pattern has in its place, and another thing is wrong."""
        node, pattern = self.node, self.pattern
        return isinstance(node, Node) and isinstance(pattern, Call) and op_of(node) in pattern.targets

    @property
    def wanted_ops(self) -> tuple[Target, ...]:
        """The operators that would fit; empty if the attempt did not end at an operator."""
        return self.pattern.targets if isinstance(self.pattern, Call) and not self.why else ()

    @property
    def wanted(self) -> str:
        """Text: the wanted form."""
        if self.why:
            return self.why
        if self.reader_of is not None:
            return f"{self.pattern} as the reader of {self.reader_of.name}"
        return "an operator that can be matched" if isinstance(self.pattern, Wildcard) else str(self.pattern)

    @property
    def found(self) -> str:
        """Text: the node or constant in its place."""
        if self.node is None and self.reader_of is not None:
            return "no reader"
        if not isinstance(self.node, Node):
            return repr(self.node)
        if self.node.op == "output":
            return "the output of the graph"
        if self.node.op != "call_function":
            return f"{self.node.op} {self.node.name}"
        users = len(self.node.users)
        return f"{op_name(self.node.target)} ({self.node.name}" + (f", {users} users)" if users != 1 else ")")

    @property
    def hint(self) -> str:
        """Text: what to change; empty if that is not known for what was found."""
        if self.fix is not None:
            return self.fix(self.node)
        if not isinstance(self.pattern, Call) or self.why:
            return ""
        hint = self.pattern.hint(self.node) if self.pattern.hint is not None else ""
        return hint or _functional_hint(self.pattern, self.node)


Calls: TypeAlias = tuple[tuple[Call, Node], ...]
Fix: TypeAlias = Callable[[Any], str]

_COMMUTATIVE = frozenset((aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default))
"""Operators whose two operands may be swapped. The matcher does not swap them; a miss says where that is the reason."""


def _owned(calls: Calls) -> tuple[Node, ...]:
    return tuple(node for call, node in calls if not call.shared)


def _functional_hint(pattern: Call, node: Any) -> str:
    """The fix for the in-place form of an operator that the pattern contains."""
    functional = functional_of(node) if isinstance(node, Node) else None
    if functional is None or functional not in pattern.targets:
        return ""
    return (
        f"the in-place form is not matched: write {op_name(functional)} in the model, or call "
        "run_decompositions({}) on the program first"
    )


def _out_of_place(node: Any) -> str:
    return "write the mutation out of place in the model, or call run_decompositions({}) on the program first"


def _any_of_both_orders(node: Any) -> str:
    return "it fits with its two operands swapped: write both orders in the pattern, with any_of"


def _other_readers(node: Any) -> str:
    readers = [user.name for user in node.users]
    if not readers:
        return ""
    return f"it is read by {', '.join(readers)}: give each a result of its own, or write shared=True in the pattern"


@dataclass(frozen=True)
class _State:
    bindings: Mapping[str, Any] = field(default_factory=dict)
    calls: Calls = ()

    def bind(self, name: str | None, value: Any) -> "_State | None":
        if name is None:
            return self
        if name in self.bindings:
            return self if self.bindings[name] is value or self.bindings[name] == value else None
        return _State({**self.bindings, name: value}, self.calls)


class _Matcher:
    def __init__(self, root: Node, mutated: Container[Node]) -> None:
        self.root = root
        self.mutated = mutated
        self.miss: Miss | None = None
        self.swapping = False

    def fail(
        self, node: Any, pattern: Pattern, state: _State, why: str = "", fix: Fix | None = None, progress: int = 0
    ) -> None:
        progress = max(progress, len(state.calls))
        if self.miss is None or progress > self.miss.progress:
            self.miss = Miss(self.root, node, pattern, progress, why, state.calls, fix=fix)

    def match(self, pattern: Pattern, value: Any, state: _State) -> Iterator[_State]:
        """Every way in which ``value`` fits, the preferred one first; usually one or none."""
        match pattern:
            case Wildcard():
                yield state
            case Capture():
                bound = state.bind(pattern.name, value) if value is not None or pattern.optional else None
                if bound is None:
                    self.fail(value, pattern, state, f"the same {pattern.name} in both places" if value else "")
                else:
                    yield bound
            case Literal():
                if isinstance(value, Node) or value != pattern.value:
                    self.fail(value, pattern, state)
                else:
                    yield state
            case AnyOf():
                for alternative in pattern.alternatives:
                    yield from self.match(alternative, value, state)
            case ListOf():
                yield from self.match_items(pattern, value, state)
            case Call():
                yield from self.match_call(pattern, value, state)

    def match_items(self, pattern: ListOf, value: Any, state: _State) -> Iterator[_State]:
        if not isinstance(value, (list, tuple)) or len(value) != len(pattern.patterns):
            return self.fail(value, pattern, state)
        states = [state]
        for child, item in zip(pattern.patterns, value, strict=True):
            states = [after for before in states for after in self.match(child, item, before)]
        yield from states

    def match_call(self, pattern: Call, node: Any, state: _State) -> Iterator[_State]:
        if not isinstance(node, Node) or op_of(node) not in pattern.targets:
            return self.fail(node, pattern, state)
        if node in self.mutated and node is not self.root:
            return self.fail(node, pattern, state, f"{pattern} whose result is not mutated", _out_of_place)
        if node is self.root and node in self.mutated and alias_source(node) is not None and not mutated_operands(node):
            # Its replacement would not share memory with the source of the view, so the mutation would be lost.
            return self.fail(node, pattern, state, f"{pattern}, a view of memory that is not mutated", _out_of_place)
        if node is not self.root and not pattern.shared and len(node.users) != 1:
            return self.fail(node, pattern, state, f"{pattern} with this one user", _other_readers)
        bound = state.bind(pattern.name, node)
        if bound is None:
            return self.fail(node, pattern, state, f"the same {pattern.name} in both places")
        states = [_State(bound.bindings, (*bound.calls, (pattern, node)))]
        for name, child, value in pair(pattern, node):
            if isinstance(child, Wildcard):
                continue
            if not states:
                break
            if isinstance(child, Literal) and (isinstance(value, Node) or value != child.value):
                argument = "" if name.isdigit() else f"{pattern}({name}={child})"
                return self.fail(value, child, states[0], argument, partial(_argument_hint, name, child))
            for part, item in _items(child, value):
                if isinstance(part, Capture) and node is not self.root and item in self.mutated:
                    # A rewrite reads the capture at the root, possibly after the mutation.
                    return self.fail(item, part, bound, f"{part}, which is not mutated", _out_of_place)
            states = [after for before in states for after in self.match(child, value, before)]
        if not states:
            self.try_swapped(pattern, node, state)
        elif node is not self.root and not pattern.shared:
            # A rewrite reads inputs without a name in the pattern at the root too; for a shared node, constants.
            for source in node.all_input_nodes:
                if source in self.mutated:
                    return self.fail(source, pattern, bound, f"{pattern} of inputs that are not mutated", _out_of_place)
        yield from states

    def try_swapped(self, pattern: Call, node: Node, state: _State) -> None:
        """Say that a sum or a product fits with its operands in the other order, if that is the reason of the miss."""
        if self.swapping or len(pattern.args) < 2 or not _COMMUTATIVE.issuperset(pattern.targets):
            return
        first, second, *others = pattern.args
        before, self.swapping = self.miss, True
        swapped = next(self.match_call(replace(pattern, args=(second, first, *others)), node, state), None)
        self.miss, self.swapping = before, False
        if swapped is not None:
            why = f"{pattern} with its operands in the order of the pattern"
            self.fail(node, pattern, state, why, _any_of_both_orders, len(swapped.calls))


def _argument_hint(name: str, pattern: Literal, value: Any) -> str:
    if name.isdigit() or isinstance(value, Node):
        return ""
    return f"write the call with {name}={pattern}, or write this value in the pattern"


def pair(pattern: Call, node: Node) -> Iterator[tuple[str, Pattern, Any]]:
    """Name, pattern and value of each argument; an argument without a pattern must have its default."""
    actual, schema = arguments(node), schema_of(node)
    names = list(actual) if schema is None else argument_names(node)
    defaults = {} if schema is None else dict(zip(names, (a.default_value for a in schema.arguments), strict=True))
    wanted = dict(zip(names, pattern.args, strict=False)) | dict(pattern.kwargs)
    for name in sorted(wanted.keys() - set(names)):
        yield name, Literal(f"an argument called {name}"), None
    for name in names:
        if name in wanted:
            yield name, wanted[name], actual.get(name)
        elif not pattern.open:
            yield name, Literal(defaults.get(name)), actual.get(name)


def _items(pattern: Pattern, value: Any) -> list[tuple[Pattern, Any]]:
    """Pairs of pattern and value: the items of a list, or the argument itself."""
    if isinstance(pattern, ListOf) and isinstance(value, (list, tuple)):
        return list(zip(pattern.patterns, value, strict=False))
    return [(pattern, value)]


def match(pattern: Pattern, root: Node, mutated: Container[Node] = frozenset()) -> MatchResult | Miss:
    """Match ``pattern`` with its root at ``root``.

    Inner nodes must have one user, unless their pattern is ``shared``. No match crosses a mutation; the result of the
    root may be mutated later, since its replacement stands in the same place.

    Args:
        pattern: the pattern.
        root: the node that the pattern's outermost call must match.
        mutated: nodes whose memory is mutated (:func:`~et_cuda_passes.graph.aliasing.all_mutated_nodes`).

    Returns:
        The first match, or the miss that matched the most nodes.
    """
    matcher = _Matcher(root, mutated)
    for state in matcher.match(pattern, root, _State()):
        shared = tuple(node for call, node in state.calls if call.shared)
        return MatchResult(root, state.bindings, _owned(state.calls), shared, state.calls)
    return matcher.miss or Miss(root, root, pattern, 0)


def match_inner(chains: Iterable[tuple[Call, ...]], node: Node, mutated: Container[Node] = frozenset()) -> Miss | None:
    """Why no match of a pattern contains ``node`` as one of its inner calls: the deepest miss.

    Args:
        chains: an inner call of the pattern and the calls around it, innermost first
            (:func:`~et_cuda_passes.graph.pattern.inner_calls`).
        node: the node that an inner call must match.
        mutated: as for :func:`match`.

    Returns:
        The miss that matched the most nodes; None if no inner call is one of the operator of ``node``, or all match.
    """
    deepest: Miss | None = None
    for chain in chains:
        if op_of(node) in chain[0].targets:
            miss = _match_outwards(chain, node, mutated)
            if miss is not None and (deepest is None or miss.progress > deepest.progress):
                deepest = miss
    return deepest


def _match_outwards(chain: Sequence[Call], node: Node, mutated: Container[Node]) -> Miss | None:
    """Match the first call of ``chain`` at ``node``, the next one at a reader of it, and so on."""
    found = match(chain[0], node, mutated)
    if isinstance(found, Miss):
        return found
    if len(chain) == 1:
        return None
    progress = len(found.calls)
    readers = [reader for reader in node.users if op_of(reader) in chain[1].targets]
    if not readers:
        # An assertion on the value reads it too, and has no reader itself. Name another reader if there is one.
        reader = next((user for user in node.users if user.users or user.op == "output"), next(iter(node.users), None))
        return Miss(node, reader, chain[1], progress, calls=found.calls, reader_of=node)
    misses = [_match_outwards(chain[1:], reader, mutated) for reader in readers]
    if None in misses:
        return None
    return max(filter(None, misses), key=lambda miss: miss.progress)
