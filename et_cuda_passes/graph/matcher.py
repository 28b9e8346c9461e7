"""Match a pattern at a node. The matcher changes nothing and reads no tensor."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from et_cuda_passes.graph.aliasing import alias_source, mutated_operands
from et_cuda_passes.graph.operators import Target, argument_names, arguments, op_name, op_of, schema_of
from et_cuda_passes.graph.pattern import AnyOf, Call, Capture, ListOf, Literal, Pattern, Wildcard


@dataclass(frozen=True)
class MatchResult:
    """The nodes of a match.

    Attributes:
        root: the node of the pattern's outermost call.
        bindings: nodes and constants by the names of captures and calls; None for an absent optional capture.
        owned: the nodes that only this match reads, root first. A rewrite replaces them.
        shared: matched nodes that other nodes may read too. They stay as long as one does.
    """

    root: Node
    bindings: Mapping[str, Any]
    owned: tuple[Node, ...]
    shared: tuple[Node, ...]


@dataclass(frozen=True)
class Miss:
    """The end of the attempt that matched the most nodes. Its texts are computed when they are read.

    Attributes:
        root: the node where the attempt started.
        node: the node or constant that does not fit.
        pattern: the part of the pattern that it does not fit.
        progress: the number of nodes that fit.
        why: what was wanted, where the pattern alone does not say it.
        reached: the nodes that fit and that a match would own, root first.
        reader_of: the node whose reader ``node`` is, if a reader does not fit.
    """

    root: Node
    node: Any
    pattern: Pattern
    progress: int
    why: str = ""
    reached: tuple[Node, ...] = ()
    reader_of: Node | None = None

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
        """Text: what to change; empty if the pattern has no hint for what was found."""
        hint = self.pattern.hint if isinstance(self.pattern, Call) and not self.why else None
        return hint(self.node) if hint is not None else ""


@dataclass(frozen=True)
class _State:
    bindings: Mapping[str, Any] = field(default_factory=dict)
    owned: tuple[Node, ...] = ()
    shared: tuple[Node, ...] = ()

    def bind(self, name: str | None, value: Any) -> "_State | None":
        if name is None:
            return self
        if name in self.bindings:
            return self if self.bindings[name] is value or self.bindings[name] == value else None
        return _State({**self.bindings, name: value}, self.owned, self.shared)


class _Matcher:
    def __init__(self, root: Node, mutated: Container[Node]) -> None:
        self.root = root
        self.mutated = mutated
        self.miss: Miss | None = None

    def fail(self, node: Any, pattern: Pattern, state: _State, why: str = "") -> None:
        progress = len(state.owned) + len(state.shared)
        if self.miss is None or progress > self.miss.progress:
            self.miss = Miss(self.root, node, pattern, progress, why, state.owned)

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
            return self.fail(node, pattern, state, f"{pattern} whose result is not mutated")
        if node is self.root and node in self.mutated and alias_source(node) is not None and not mutated_operands(node):
            # Its replacement would not share memory with the source of the view, so the mutation would be lost.
            return self.fail(node, pattern, state, f"{pattern}, a view of memory that is not mutated")
        if node is not self.root and not pattern.shared and len(node.users) != 1:
            return self.fail(node, pattern, state, f"{pattern} with this one user")
        bound = state.bind(pattern.name, node)
        if bound is None:
            return self.fail(node, pattern, state, f"the same {pattern.name} in both places")
        owned, shared = (bound.owned, (*bound.shared, node)) if pattern.shared else ((*bound.owned, node), bound.shared)
        states = [_State(bound.bindings, owned, shared)]
        for name, child, value in self.pair(pattern, node):
            if isinstance(child, Wildcard):
                continue
            if not states:
                return
            if isinstance(child, Literal) and (isinstance(value, Node) or value != child.value):
                argument = "" if name.isdigit() else f"{pattern}({name}={child})"
                return self.fail(value, child, states[0], argument)
            for part, item in _items(child, value):
                if isinstance(part, Capture) and node is not self.root and item in self.mutated:
                    # A rewrite reads the capture at the root, possibly after the mutation.
                    return self.fail(item, part, bound, f"{part}, which is not mutated")
            states = [after for before in states for after in self.match(child, value, before)]
        if node is not self.root and not pattern.shared:
            # A rewrite reads inputs without a name in the pattern at the root too; for a shared node, constants.
            for source in node.all_input_nodes:
                if source in self.mutated:
                    return self.fail(source, pattern, bound, f"{pattern} of inputs that are not mutated")
        yield from states

    def pair(self, pattern: Call, node: Node) -> Iterator[tuple[str, Pattern, Any]]:
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
        return MatchResult(root, state.bindings, state.owned, state.shared)
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
    progress = len(found.owned) + len(found.shared)
    readers = [reader for reader in node.users if op_of(reader) in chain[1].targets]
    if not readers:
        return Miss(node, next(iter(node.users), None), chain[1], progress, reader_of=node)
    misses = [_match_outwards(chain[1:], reader, mutated) for reader in readers]
    if None in misses:
        return None
    return max(filter(None, misses), key=lambda miss: miss.progress)
