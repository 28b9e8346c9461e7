"""A pattern as a tree in text, with a mark at each part that an attempt to match it reached."""

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from et_cuda_passes.graph.matcher import MatchResult, Miss, pair
from et_cuda_passes.graph.operators import schema_argument_names
from et_cuda_passes.graph.pattern import AnyOf, Call, ListOf, Literal, Pattern, Wildcard

FITS, STOPPED, NOT_REACHED = "✓", "✗", "·"
"""The marks: a part that fits, the part at which the attempt stopped, and a part that it did not reach."""

_UNKNOWN = object()
"""Stands for the value of a part that the attempt did not reach."""
_INDENT = {"": "", "├─ ": "│  ", "└─ ": "   "}


def draw(pattern: Pattern, result: MatchResult | Miss) -> list[str]:
    """The lines of the tree of ``pattern``, as ``result`` of an attempt to match it leaves it.

    If the pattern has alternatives, the tree shows the one that the attempt followed.
    """
    return list(_Drawing(result).lines(pattern, _start(result)))


def draw_unmatched(pattern: Pattern) -> list[str]:
    """The lines of the tree of a pattern that was tried nowhere."""
    return list(_Drawing(None).lines(pattern, _UNKNOWN))


def _start(result: MatchResult | Miss) -> Any:
    """The value of the whole pattern; an attempt that began at an inner call has none."""
    return _UNKNOWN if isinstance(result, Miss) and result.reader_of is not None else result.root


class _Drawing:
    """Visits the parts of a pattern in the order of the matcher, beside the calls that fit."""

    def __init__(self, result: MatchResult | Miss | None) -> None:
        self._calls = [] if result is None else list(result.calls)
        self._miss = result if isinstance(result, Miss) else None
        self._ended = False
        # Such an attempt goes from a call to its reader, so that what it stops at is around the parts that fit.
        self._began_inside = self._miss is not None and self._miss.reader_of is not None

    def lines(self, pattern: Pattern, value: Any, label: str = "", indent: str = "", branch: str = "") -> Iterator[str]:
        """The lines of one part, whose value in the graph is ``value``."""
        pattern = self._followed(pattern)
        node = self._fitting(pattern)
        if node is not None:
            mark, text = FITS, f"{pattern} {node.name}"
        elif self._stops(pattern, value):
            assert self._miss is not None
            self._ended = True
            mark, text = STOPPED, f"wanted {self._miss.wanted}, found {self._miss.found}"
        elif value is _UNKNOWN or isinstance(pattern, Call) or (self._ended and not self._began_inside):
            mark, text, value = NOT_REACHED, str(pattern), _UNKNOWN
        else:
            shown = value.name if isinstance(value, Node) else repr(value)
            mark, text = FITS, str(pattern) if isinstance(pattern, Literal) else f"{pattern} = {shown}"
        named = f" as {pattern.name}" if isinstance(pattern, Call) and pattern.name and mark != STOPPED else ""
        yield f"{indent}{branch}{mark} {label}{text}{named}"
        children = list(self._children(pattern, node, value))
        for index, (name, child, part) in enumerate(children):
            label = "" if name.isdigit() else f"{name}: "
            yield from self.lines(
                child, part, label, indent + _INDENT[branch], "└─ " if index == len(children) - 1 else "├─ "
            )

    def _followed(self, pattern: Pattern) -> Pattern:
        """``pattern``, or the one of its alternatives that the attempt followed."""
        while isinstance(pattern, AnyOf):
            followed = next(filter(self._is_followed, pattern.alternatives), None)
            if followed is None:
                return pattern
            pattern = followed
        return pattern

    def _is_followed(self, pattern: Pattern) -> bool:
        """Whether ``pattern`` contains the next call, and the reader at which an attempt from within stopped."""
        wanted: list[Pattern] = [self._calls[0][0]] if self._calls else []
        if self._miss is not None and self._began_inside and not self._ended:
            wanted.append(self._miss.pattern)
        return bool(wanted) and all(_contains(pattern, part) for part in wanted)

    def _fitting(self, pattern: Pattern) -> Node | None:
        """The node of a call that fits."""
        if not self._calls or self._calls[0][0] is not pattern:
            return None
        return self._calls.pop(0)[1]

    def _stops(self, pattern: Pattern, value: Any) -> bool:
        miss = self._miss
        if miss is None or self._ended:
            return False
        if self._began_inside:
            return pattern is miss.pattern
        parts = pattern.alternatives if isinstance(pattern, AnyOf) else (pattern,)
        return not self._calls and value is miss.node and any(part == miss.pattern for part in parts)

    def _children(self, pattern: Pattern, node: Node | None, value: Any) -> Iterator[tuple[str, Pattern, Any]]:
        if isinstance(pattern, ListOf):
            items = value if isinstance(value, (list, tuple)) and len(value) == len(pattern.patterns) else None
            for index, child in enumerate(pattern.patterns):
                yield str(index), child, _UNKNOWN if items is None else items[index]
        elif isinstance(pattern, Call) and node is None:
            yield from ((name, child, _UNKNOWN) for name, child in _arguments(pattern))
        elif isinstance(pattern, Call) and node is not None:
            written = {name for name, _ in _arguments(pattern)}
            for name, child, argument in pair(pattern, node):
                # An argument that the pattern leaves out is shown only where its value is the reason.
                omitted = name not in written and isinstance(child, Literal)
                if not isinstance(child, Wildcard) and not (omitted and not self._is_reason(child, argument)):
                    yield name, child, argument

    def _is_reason(self, pattern: Pattern, value: Any) -> bool:
        """Whether the attempt stopped at the argument ``value``."""
        return self._miss is not None and value is self._miss.node and pattern == self._miss.pattern


def _arguments(pattern: Call) -> list[tuple[str, Pattern]]:
    """The parts of a call with the names of their arguments."""
    schema = getattr(pattern.targets[0], "_schema", None)
    names = schema_argument_names(schema, pattern.targets[0]) if schema is not None else []
    names += [str(index) for index in range(len(names), len(pattern.args))]
    listed = [*zip(names, pattern.args, strict=False), *pattern.kwargs]
    return [(name, child) for name, child in listed if not isinstance(child, Wildcard)]


def _contains(pattern: Pattern, part: Pattern) -> bool:
    if pattern is part:
        return True
    parts: tuple[Pattern, ...] = ()
    if isinstance(pattern, AnyOf):
        parts = pattern.alternatives
    elif isinstance(pattern, ListOf):
        parts = pattern.patterns
    elif isinstance(pattern, Call):
        parts = (*pattern.args, *(child for _, child in pattern.kwargs))
    return any(_contains(each, part) for each in parts)
