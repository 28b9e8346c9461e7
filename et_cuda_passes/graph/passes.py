"""A pass list: what may stand in it, its names, and its order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from et_cuda_passes.graph.report import STATUSES
from et_cuda_passes.graph.rule import GroupRule, Rule

ACCEPTED = (
    "rules (instances of et_cuda_passes.Rule), ExecuTorch ExportedProgramPassBase passes, "
    "and callables that take a torch.fx.GraphModule"
)


@dataclass(frozen=True)
class Pass:
    """One entry of a pass list: a rule, or something run on the whole program."""

    name: str
    value: Any
    rule: Rule | None = None
    on_program: bool = False

    @property
    def before(self) -> tuple[str, ...]:
        """Names of passes that run after this one."""
        return _names(self.value, "before")

    @property
    def after(self) -> tuple[str, ...]:
        """Names of passes that run before this one."""
        return _names(self.value, "after")


def _names(value: Any, attribute: str) -> tuple[str, ...]:
    names = getattr(value, attribute, None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def parse(passes: Iterable[Any], is_program_pass: Callable[[Any], bool]) -> list[Pass]:
    """Check a pass list and give it its order: as written, moved only where ``before`` and ``after`` demand it.

    Args:
        passes: rules, program passes and callables on a GraphModule.
        is_program_pass: tells a pass that takes a whole ExportedProgram (this room knows no ExecuTorch).

    Raises:
        TypeError: an entry is none of what is accepted.
        ValueError: two passes have one name, one has that of a status, or the constraints form a cycle.
    """
    if isinstance(passes, (str, bytes)) or not isinstance(passes, Iterable):
        raise TypeError(f"passes must be a list of {ACCEPTED}; got {passes!r}")
    entries = [_entry(value, is_program_pass) for value in passes]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"two passes are named {entry.name!r}; give each pass of a list its own name")
        if entry.name in STATUSES:
            raise ValueError(f"a pass is named {entry.name!r}, which is what reports call an outcome; rename it")
        seen.add(entry.name)
    return _sorted(entries)


def _entry(value: Any, is_program_pass: Callable[[Any], bool]) -> Pass:
    if isinstance(value, type):
        raise TypeError(f"passes holds the class {value.__name__}; pass an instance, {value.__name__}()")
    if isinstance(value, Rule):
        return Pass(value.name, value, rule=value)
    name = str(getattr(value, "name", "") or getattr(value, "__name__", "") or type(value).__name__)
    if is_program_pass(value):
        return Pass(name, value, on_program=True)
    if callable(value):
        return Pass(name, value)
    raise TypeError(f"passes holds {value!r}, a {type(value).__name__}; accepted are {ACCEPTED}")


def _sorted(entries: Sequence[Pass]) -> list[Pass]:
    position = {entry.name: index for index, entry in enumerate(entries)}
    order = nx.DiGraph()
    order.add_nodes_from(position)
    for entry in entries:
        order.add_edges_from((entry.name, later) for later in entry.before if later in position)
        order.add_edges_from((earlier, entry.name) for earlier in entry.after if earlier in position)
    try:
        names = list(nx.lexicographical_topological_sort(order, key=position.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = [edge[0] for edge in nx.find_cycle(order)]
        raise ValueError(
            f"the passes' before/after constraints form a cycle: {' -> '.join([*cycle, cycle[0]])}; drop one of them"
        ) from None
    return [entries[position[name]] for name in names]


def stages(entries: Sequence[Pass]) -> list[list[Pass]]:
    """Consecutive rules that match against one graph together; a rule that must follow another starts a new stage.

    A joint rule stands alone, and so does anything that is not a rule, since it may change the whole graph.
    """
    result: list[list[Pass]] = []
    for entry in entries:
        current = result[-1] if result else []
        together = bool(current) and entry.rule is not None and current[0].rule is not None
        # One that takes matches together chooses among what the others left, or it would lose all of them to one.
        together = together and not any(isinstance(e.rule, GroupRule) for e in (entry, *current))
        for other in current if together else []:
            if other.name in entry.after or entry.name in other.before:
                together = False
        if together:
            current.append(entry)
        else:
            result.append([entry])
    return result


def quiet_rules(entries: Sequence[Pass]) -> set[str]:
    """The rules whose misses nobody is told, or that another rule of the list tells."""
    names = {entry.name for entry in entries}
    alone = {entry.name for entry in entries if isinstance(entry.rule, GroupRule) and entry.rule.alone in names}
    return alone | {entry.name for entry in entries if entry.rule is not None and not entry.rule.reports_misses}
