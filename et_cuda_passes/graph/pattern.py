"""Patterns as immutable data: calls of operators, captures, literals and alternatives.

A pattern is written like the model code that it matches::

    def pattern(self, x, bias=None):
        return op(aten.linear.default)(x, op(DEQUANTIZE)(..., name="weight"), bias)
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import EllipsisType
from typing import Any, TypeAlias

from et_cuda_passes.graph.operators import Target, canonical, op_name, require_overload, schema_argument_names


@dataclass(frozen=True)
class Capture:
    """Matches anything and binds it to a name. The same name must match the same thing everywhere."""

    name: str
    optional: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Literal:
    """Matches an equal constant argument; ``Literal(1)`` also matches ``1.0``."""

    value: Any

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Wildcard:
    """Matches anything and binds nothing."""

    def __str__(self) -> str:
        return "..."


@dataclass(frozen=True)
class Call:
    """A call of one of ``targets``.

    Attributes:
        targets: canonical operators.
        args: patterns of arguments by schema position.
        kwargs: patterns of arguments by schema name.
        name: binds the node of the call to this name.
        open: allows any value for arguments without a pattern. Otherwise such an argument must have its default value:
            a pattern that leaves out ``alpha`` must not match ``alpha=2``.
        shared: allows users outside the match. A weight's dequantize has some if the weight is tied.
        label: what a miss calls it; by default the operators' names.
        hint: for the node or constant that stands in place of the call, what to change; empty if there is nothing.
    """

    targets: tuple[Target, ...]
    args: tuple["Pattern", ...] = ()
    kwargs: tuple[tuple[str, "Pattern"], ...] = ()
    name: str | None = None
    open: bool = False
    shared: bool = False
    label: str = ""
    hint: Callable[[Any], str] | None = None

    def __str__(self) -> str:
        return self.label or " or ".join(dict.fromkeys(op_name(target) for target in self.targets))


@dataclass(frozen=True)
class AnyOf:
    """Matches one of several alternatives; the first that fits is preferred."""

    alternatives: tuple["Pattern", ...]

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(str(alternative) for alternative in self.alternatives))


@dataclass(frozen=True)
class ListOf:
    """Matches a list argument of the same length, item by item."""

    patterns: tuple["Pattern", ...]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.patterns))}]"


Pattern: TypeAlias = Capture | Literal | Wildcard | Call | AnyOf | ListOf


def _lift(value: Any) -> Pattern:
    if isinstance(value, (Capture, Literal, Wildcard, Call, AnyOf, ListOf)):
        return value
    if isinstance(value, EllipsisType):
        return Wildcard()
    if isinstance(value, (list, tuple)) and any(not isinstance(item, (int, float)) for item in value):
        return ListOf(tuple(_lift(item) for item in value))
    return Literal(value)


def op(*targets: Target) -> Callable[..., Call]:
    """``op(aten.linear.default)(x, w, bias)``: the pattern of a call of any of ``targets``.

    Keywords are names of schema arguments, except ``name`` (binds the node) and ``shared`` (see :class:`Call`). The
    argument ``...`` matches anything; as the last positional argument it also allows any value for the arguments that
    are not written. A list of patterns matches a list argument item by item.

    Raises:
        TypeError: a target is not an overload, or an argument is in no target's schema.
        ValueError: ``targets`` is empty.
    """
    if not targets:
        raise ValueError("op() needs at least one operator")
    forms, lengths, known = _forms(tuple(map(require_overload, targets)))

    def call(*args: Any, name: str | None = None, shared: bool = False, **kwargs: Any) -> Call:
        rest = bool(args) and isinstance(args[-1], EllipsisType)
        positional = args[:-1] if rest else args
        for form, length in lengths.items():
            if len(positional) > length:
                raise TypeError(f"{op_name(form)} has {length} arguments, not {len(positional)}")
        for key in kwargs:
            if known is not None and key not in known:
                raise TypeError(
                    f"{op_name(forms[0])} has no argument called {key!r}; it has {', '.join(sorted(known))}"
                )
        return Call(
            forms,
            tuple(_lift(arg) for arg in positional),
            tuple((key, _lift(value)) for key, value in kwargs.items()),
            name,
            open=rest,
            shared=shared,
        )

    return call


# Each rewrite builds its patterns anew, from the same operators.
@cache
def _forms(targets: tuple[Target, ...]) -> tuple[tuple[Target, ...], dict[Target, int], frozenset[str] | None]:
    """The canonical operators, the number of arguments of each with a schema, and the names of all arguments.

    The names are None if an operator has no schema, such as that of control flow.
    """
    forms = tuple(dict.fromkeys(map(canonical, targets)))
    schemas = {form: schema for form in forms if (schema := getattr(form, "_schema", None)) is not None}
    names = frozenset(name for schema in schemas.values() for name in schema_argument_names(schema))
    lengths = {form: len(schema.arguments) for form, schema in schemas.items()}
    return forms, lengths, names if len(schemas) == len(forms) else None


def any_of(*alternatives: Pattern) -> AnyOf:
    """Alternatives in the order of preference."""
    flat: list[Pattern] = []
    for alternative in alternatives:
        flat.extend(alternative.alternatives if isinstance(alternative, AnyOf) else (alternative,))
    return AnyOf(tuple(flat))


def parse_captures(function: Callable[..., Any]) -> dict[str, Capture]:
    """The captures that are the parameters of a ``pattern`` method. A parameter with the default None is optional."""
    captures: dict[str, Capture] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"pattern parameters are captures and cannot be variadic: {parameter}")
        if parameter.default not in (parameter.empty, None):
            raise TypeError(f"a capture's only default is None (it makes it optional): {parameter}")
        captures[parameter.name] = Capture(parameter.name, optional=parameter.default is None)
    return captures


def _children(pattern: Pattern) -> Iterable[Pattern]:
    if isinstance(pattern, AnyOf):
        return pattern.alternatives
    if isinstance(pattern, ListOf):
        return pattern.patterns
    if isinstance(pattern, Call):
        return (*pattern.args, *(child for _, child in pattern.kwargs))
    return ()


def _parts(patterns: Iterable[Pattern]) -> Iterable[Pattern]:
    """``patterns`` and all that they contain but literals. A part in several places, such as a weight, comes once."""
    found: dict[int, Pattern] = {}
    rest = list(patterns)
    while rest:
        part = rest.pop()
        if not isinstance(part, (Literal, Wildcard)) and id(part) not in found:
            found[id(part)] = part
            rest.extend(_children(part))
    return found.values()


def bound_names(pattern: Pattern) -> set[str]:
    """Every name that a match of ``pattern`` may bind."""
    return {part.name for part in _parts([pattern]) if isinstance(part, (Capture, Call)) and part.name is not None}


def always_bound(pattern: Pattern) -> set[str]:
    """The names that every match of ``pattern`` binds, whichever alternatives match."""
    return set(_always_bound(pattern, {}))


def _always_bound(pattern: Pattern, known: dict[int, frozenset[str]]) -> frozenset[str]:
    """``known`` has the names of parts by identity, since an alternative often repeats the parts of another one."""
    if isinstance(pattern, (Literal, Wildcard)):
        return frozenset()
    if id(pattern) not in known:
        parts = [_always_bound(child, known) for child in _children(pattern)]
        own = pattern.name if isinstance(pattern, (Capture, Call)) else None
        found = frozenset.intersection(*parts) if isinstance(pattern, AnyOf) else frozenset[str]().union(*parts)
        known[id(pattern)] = found if own is None else found | {own}
    return known[id(pattern)]


def root_ops(pattern: Pattern) -> Iterator[Target]:
    """The operators of the roots of all matches of ``pattern``.

    Raises:
        TypeError: the pattern is not rooted in a call, so it would match everywhere.
    """
    if isinstance(pattern, Call):
        yield from pattern.targets
    elif isinstance(pattern, AnyOf):
        for alternative in pattern.alternatives:
            yield from root_ops(alternative)
    else:
        raise TypeError(f"a pattern must be rooted in a call of an operator, not in {pattern!r}")


def inner_operators(pattern: Pattern) -> set[Target]:
    """The operators of the calls inside the outermost call of ``pattern``."""
    if isinstance(pattern, AnyOf):
        return set().union(*map(inner_operators, pattern.alternatives))
    inside = _parts(_children(pattern))
    return {target for part in inside if isinstance(part, Call) for target in part.targets}


def inner_calls(pattern: Pattern, around: tuple[Call, ...] = ()) -> Iterator[tuple[Call, ...]]:
    """Each call inside another one, with the calls around it, innermost first."""
    if isinstance(pattern, (AnyOf, ListOf)):
        for part in pattern.alternatives if isinstance(pattern, AnyOf) else pattern.patterns:
            yield from inner_calls(part, around)
    elif isinstance(pattern, Call):
        if around:
            yield (pattern, *around)
        for _, child in (*enumerate(pattern.args), *pattern.kwargs):
            yield from inner_calls(child, (pattern, *around))
