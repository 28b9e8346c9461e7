"""Pass lists: the values that one may contain, their names, and their order."""

import difflib
import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType
from typing import Any

from et_cuda_passes.graph.report import STATUSES
from et_cuda_passes.graph.rule import CompiledRule, GroupRule, Rule, compile_rule

ACCEPTED = (
    "rules (instances of et_cuda_passes.Rule), ExecuTorch ExportedProgramPassBase passes, "
    "and callables that take a torch.fx.GraphModule"
)


class PassList(list[Any]):
    """A list of passes in the order in which they run, which can also be edited by the names of the passes.

    The methods below leave the list as it is and return a new one.
    """

    renamed: Mapping[str, str] = MappingProxyType({})
    """Former names of passes with their present names, for error messages."""

    def replace(self, name: str, value: Any) -> "PassList":
        """The list with ``value`` in place of the pass called ``name``.

        Raises:
            ValueError: no pass has that name. The same holds for the other methods.
        """
        at = self._index(name)
        return type(self)([*self[:at], value, *self[at + 1 :]])

    def without(self, name: str) -> "PassList":
        """The list without the pass called ``name``."""
        at = self._index(name)
        return type(self)([*self[:at], *self[at + 1 :]])

    def insert_before(self, name: str, value: Any) -> "PassList":
        """The list with ``value`` directly before the pass called ``name``."""
        at = self._index(name)
        return type(self)([*self[:at], value, *self[at:]])

    def insert_after(self, name: str, value: Any) -> "PassList":
        """The list with ``value`` directly after the pass called ``name``."""
        at = self._index(name) + 1
        return type(self)([*self[:at], value, *self[at:]])

    def _index(self, name: str) -> int:
        names = [pass_name(value) for value in self]
        if name not in names:
            raise ValueError(f"the list has no pass named {name!r}; {nearest_names(name, names, self.renamed)}")
        return names.index(name)


@dataclass(frozen=True)
class Pass:
    """One entry of a pass list: a rule, or a pass that changes the whole program."""

    name: str
    value: Any
    rule: CompiledRule | None = None
    on_program: bool = False

    @property
    def before(self) -> tuple[str, ...]:
        """Names of passes that must run after this one."""
        return _constraint(self.value, "before")

    @property
    def after(self) -> tuple[str, ...]:
        """Names of passes that must run before this one."""
        return _constraint(self.value, "after")


def _constraint(value: Any, attribute: str) -> tuple[str, ...]:
    names = getattr(value, attribute, None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def pass_name(value: Any) -> str:
    """The name of a pass: its ``name``, or that of its function or class."""
    if isinstance(value, Rule):
        return value.name
    return str(getattr(value, "name", "") or getattr(value, "__name__", "") or type(value).__name__)


def nearest_names(name: str, known: Iterable[str], renamed: Mapping[str, str] = MappingProxyType({})) -> str:
    """The end of an error message on an unknown ``name``: its new name, or known names that resemble it, or all."""
    if name in renamed:
        return f"{name} is now {renamed[name]}"
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names)
    return f"the nearest names are {', '.join(near)}" if near else f"the names are {', '.join(names) or 'none'}"


def parse(
    passes: Iterable[Any],
    is_program_pass: Callable[[Any], bool],
    known_names: Collection[str] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> list[Pass]:
    """Check a pass list and put it into its order.

    That is the order as written, except that passes with ``before`` or ``after`` move as far as these demand.

    Args:
        passes: rules, program passes and callables on a GraphModule.
        is_program_pass: recognises a pass that changes a whole ExportedProgram (this room does not import ExecuTorch).
        known_names: names that ``before`` and ``after`` may contain although the list has no pass of that name.
        renamed: former names of passes with their present names, for error messages.

    Raises:
        TypeError: an entry is not one of these, or a rule lacks a method.
        ValueError: two passes have the same name, a pass has the name of a status, ``before`` or ``after`` contains an
            unknown name, or they form a cycle.
    """
    if isinstance(passes, (str, bytes)) or not isinstance(passes, Iterable):
        raise TypeError(f"passes must be a list of {ACCEPTED}; got {passes!r}")
    entries = [_entry(value, is_program_pass) for value in passes]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"two passes are named {entry.name!r}; give each pass of a list its own name")
        if entry.name in STATUSES:
            raise ValueError(f"a pass is named {entry.name!r}, which is a status in reports; rename the pass")
        seen.add(entry.name)
    return _in_order(entries, known_names, renamed)


def _entry(value: Any, is_program_pass: Callable[[Any], bool]) -> Pass:
    if isinstance(value, type):
        raise TypeError(f"passes contains the class {value.__name__}; pass an instance, {value.__name__}()")
    name = pass_name(value)
    if isinstance(value, Rule):
        return Pass(name, value, rule=compile_rule(value))
    if is_program_pass(value):
        return Pass(name, value, on_program=True)
    if callable(value):
        return Pass(name, value)
    raise TypeError(f"passes contains {value!r}, a {type(value).__name__}; accepted are {ACCEPTED}")


def _in_order(entries: Sequence[Pass], known_names: Collection[str], renamed: Mapping[str, str]) -> list[Pass]:
    position = {entry.name: index for index, entry in enumerate(entries)}
    # Passes without constraints stay in the order in which they are written.
    fixed = [entry.name for entry in entries if not entry.before and not entry.after]
    demanded: set[tuple[str, str]] = set()
    for entry in entries:
        for name in (*entry.before, *entry.after):
            if name not in position and name not in known_names:
                nearest = nearest_names(name, [*position, *sorted(known_names)], renamed)
                raise ValueError(f"pass {entry.name} names {name!r} in before or after; {nearest}")
        demanded.update((entry.name, later) for later in entry.before if later in position)
        demanded.update((earlier, entry.name) for earlier in entry.after if earlier in position)
    sorter = TopologicalSorter(dict.fromkeys(position, ()))
    for earlier, later in (*itertools.pairwise(fixed), *sorted(demanded)):
        sorter.add(later, earlier)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        # The message leaves out passes that only their places in the list make members of the cycle.
        ends = {name for edge in itertools.pairwise(cycle) if edge in demanded for name in edge}
        members = [name for name in cycle[1:] if name in ends]
        raise ValueError(
            f"before and after of the passes form a cycle: {' -> '.join([*members, members[0]])}; remove one of them, "
            "or change the order of the list"
        ) from None
    ordered: list[Pass] = []
    ready: list[int] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, position[name])
        # The earliest of the passes that may be next, as they are written.
        ordered.append(entries[heapq.heappop(ready)])
        sorter.done(ordered[-1].name)
    return ordered


def group_rules(entries: Iterable[Pass]) -> set[str]:
    """The names of the rules that rewrite several matches together."""
    return {entry.name for entry in entries if isinstance(entry.value, GroupRule)}
