"""pattern x node -> Match | Miss, from the graph alone: nothing is changed, no tensor is read."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from et_cuda_passes.graph.aliasing import alias_source, mutated_operands
from et_cuda_passes.graph.operators import argument_names, arguments, op_name, op_of, schema_of
from et_cuda_passes.graph.pattern import AnyOf, Call, Capture, ListOf, Literal, Pattern, Wildcard


@dataclass(frozen=True)
class MatchResult:
    """Where a pattern was found.

    ``bindings`` maps capture and call names to what stands there (nodes, constants, None for an absent optional).
    ``owned`` are the nodes that only this match reads, root first: a rewrite replaces them.
    ``shared`` are matched nodes that others may read as well: they stay as long as anybody does.
    """

    root: Node
    bindings: Mapping[str, Any]
    owned: tuple[Node, ...]
    shared: tuple[Node, ...]


@dataclass(frozen=True)
class Miss:
    """Where the attempt that matched most nodes came to its end; the text is made only when somebody reads it.

    ``reached`` are the nodes that a match would have owned, of those that fitted, root first.
    """

    root: Node
    node: Any
    pattern: Pattern
    progress: int
    why: str = ""
    reached: tuple[Node, ...] = ()

    @property
    def expects_rewritten_op(self) -> bool:
        """Whether an operator was asked for that only rewrites make: what was exported cannot have it."""
        targets = self.pattern.targets if isinstance(self.pattern, Call) and not self.why else ()
        return bool(targets) and all(op_name(target).startswith("et_cuda_passes.") for target in targets)

    @property
    def wanted(self) -> str:
        """What the pattern asked for."""
        if self.why:
            return self.why
        return "an operator that can be matched" if isinstance(self.pattern, Wildcard) else str(self.pattern)

    @property
    def found(self) -> str:
        """What stands there instead."""
        if not isinstance(self.node, Node):
            return repr(self.node)
        if self.node.op != "call_function":
            return f"{self.node.op} {self.node.name}"
        users = len(self.node.users)
        return f"{op_name(self.node.target)} ({self.node.name}" + (f", {users} users)" if users != 1 else ")")


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
    def __init__(self, root: Node, written: Container[Node]) -> None:
        self.root = root
        self.mutated = written
        self.miss: Miss | None = None

    def fail(self, node: Any, pattern: Pattern, state: _State, why: str = "") -> None:
        progress = len(state.owned) + len(state.shared)
        if self.miss is None or progress > self.miss.progress:
            self.miss = Miss(self.root, node, pattern, progress, why, state.owned)

    def match(self, pattern: Pattern, value: Any, state: _State) -> Iterator[_State]:
        """All the ways in which ``value`` fits, the preferred first; usually one or none."""
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
            return self.fail(node, pattern, state, f"{pattern} whose result nothing writes in place")
        if node is self.root and node in self.mutated and alias_source(node) is not None and not mutated_operands(node):
            # What replaces it would have memory of its own, in which the mutation is not seen.
            return self.fail(node, pattern, state, f"{pattern}, a view of memory that nothing mutates")
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
                    # Read here, it would be read at the root instead, after it may have been written.
                    return self.fail(item, part, bound, f"{part}, which nothing writes in place")
            states = [after for before in states for after in self.match(child, value, before)]
        if node is not self.root and not pattern.shared:
            # What the pattern does not name is read at the root as well. Of a weight a rule reads the constants.
            for source in node.all_input_nodes:
                if source in self.mutated:
                    return self.fail(source, pattern, bound, f"{pattern} of what nothing writes in place")
        yield from states

    def pair(self, pattern: Call, node: Node) -> Iterator[tuple[str, Pattern, Any]]:
        """Each argument's name and pattern, and the value there; a default that nobody named is a literal."""
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
    """An argument's pattern with what stands there; of a list, each item's."""
    if isinstance(pattern, ListOf) and isinstance(value, (list, tuple)):
        return list(zip(pattern.patterns, value, strict=False))
    return [(pattern, value)]


def match(pattern: Pattern, root: Node, written: Container[Node] = frozenset()) -> MatchResult | Miss:
    """Match ``pattern`` with its root at ``root``.

    Inner nodes must have one user, unless their pattern is ``shared``; nothing is matched across a write in place. The
    root's own result may be written afterwards: what replaces it stands in the same place.

    Args:
        pattern: what to look for.
        root: the node that the pattern's outermost call must be.
        written: nodes whose memory is written in place (:func:`~et_cuda_passes.graph.aliasing.all_mutated_nodes`).

    Returns:
        The first :class:`Match`, or the :class:`Miss` that got furthest.
    """
    matcher = _Matcher(root, written)
    for state in matcher.match(pattern, root, _State()):
        return MatchResult(root, state.bindings, state.owned, state.shared)
    return matcher.miss or Miss(root, root, pattern, 0)
