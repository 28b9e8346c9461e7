"""What a rule is: a pattern, the requires that each answer with what they found, and what is emitted where all hold."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Mistake, RuleError, Unmet
from et_cuda_passes.graph.match import MatchContext
from et_cuda_passes.graph.pattern import AnyOf, Call, Pattern, always, captures_of, names
from et_cuda_passes.graph.program import Program, no_guards

Stage = Literal["metadata", "values"]
Answer = tuple[bool, str] | tuple[bool, str, str]
Check = Callable[[Any, MatchContext], Answer]
_C = TypeVar("_C", bound=Check)
_T = TypeVar("_T")


# What a MatchContext itself has; a capture of the same name could not be reached.
RESERVED = frozenset({"match", "captures", "program", "target", "root", "val", "derive"})


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One condition of a rule: what is wanted, what to do about it, at which stage it is asked, and the question."""

    wanted: str
    hint: str
    stage: Stage
    check: Check


def require(wanted: str, hint: str = "", stage: Stage = "metadata") -> Callable[[_C], _C]:
    """Mark a method ``(self, m) -> (holds, found)`` or ``(holds, found, hint)`` as a condition of its rule.

    Args:
        wanted: the condition as a noun phrase, read after "wanted": ``"a group size that the kernel has"``.
        hint: what the user changes to meet it; the method may return a better one as its third value.
        stage: ``"metadata"`` reads shapes, dtypes and users only; ``"values"`` may read tensors and is asked after
            every metadata condition holds.

    Raises:
        TypeError: ``wanted`` is no text (``@require`` without its parentheses, say).
        ValueError: there is no such stage.
    """
    if not isinstance(wanted, str):
        raise TypeError("require is given what is wanted, as text: @require('...') above the method")
    if stage not in get_args(Stage):
        raise ValueError(f"a require is asked at one of the stages {get_args(Stage)}, not {stage!r}")

    def mark(check: _C) -> _C:
        check._requirement = Requirement(wanted, hint, stage, check)  # type: ignore[attr-defined]
        return check

    return mark


class Rule(ABC):
    """One rewrite. Subclasses are frozen dataclasses whose fields are the rule's options; they keep no other state.

    A subclass defines ``pattern`` (its parameters are the captures), any number of :func:`require` methods, and
    ``emit``. What matched and holds every require is rewritten: ``emit`` may not decline.
    """

    name: ClassVar[str] = ""
    """Unique in a pass list; by default the class name in snake case."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of passes that run after this one."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes that run before this one."""
    silent: ClassVar[bool] = False
    """Whether nobody is told where it does not act: it repairs what few programs have."""
    requires: ClassVar[tuple[Requirement, ...]] = ()
    """Every require of the class, in the order written, a base class's first."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        found: dict[str, Requirement] = {}
        for base in reversed(cls.__mro__):
            for attribute, value in vars(base).items():
                requirement = getattr(value, "_requirement", None)
                if isinstance(requirement, Requirement):
                    found[attribute] = requirement
                else:
                    found.pop(attribute, None)
        cls.requires = tuple(found.values())

    pattern: Callable[..., Pattern]
    """The graph form this rule is about, written with :func:`~et_cuda_passes.graph.pattern.op`."""

    @abstractmethod
    def emit(self, b: Builder, m: MatchContext) -> Node:
        """Build the nodes that take the match's place and return the one that replaces its root."""

    def takes(self, m: MatchContext) -> Sequence[Node]:
        """Nodes outside the match that become part of what this rule makes, and that it needs alone.

        Asked where every require that reads metadata holds.
        """
        return ()

    def note(self, m: MatchContext) -> str:
        """A remark for the report on a place this rule acted on; empty for none."""
        return ""

    def detail(self, m: MatchContext) -> str:
        """What this rule made of a place, in a few words for the report's table (``int4 group 32 -> ...``).

        Where it takes what earlier rules made, the outcomes that they wrote have it behind their own detail.
        """
        return ""

    def explain(self, *ms: MatchContext) -> str:
        """What there is to know of a place beyond ``detail``, or of the places that are taken together, ``ms``.

        Where it takes what earlier rules made, it stands in the outcomes that they wrote in place of theirs.
        """
        return ""


class JointRule(Rule):
    """A rule that takes several matches of its pattern together, and replaces the root of each by a node of its own.

    Each match meets the requires alone, and is reported alone. Those with one :meth:`key`, two or more, are rewritten
    together by :meth:`emit_together`, where the first of them stands; they may read nothing that is written in place
    or computed behind that place. A match that is left without others is missed.
    """

    partner: ClassVar[str] = "another match to be taken together with"
    """What a match without others wanted, for the report."""
    alone: ClassVar[str] = ""
    """The rule that takes a match alone: where it is in the pass list too, a miss has its reasons, not this rule's."""
    common: ClassVar[tuple[str, ...]] = ()
    """Captures that hold one value in all matches of a :meth:`key`, so that the first one's is as good as any."""

    @property
    def most(self) -> int | None:
        """How many matches are taken together at most, in graph order; None for any number."""
        return None

    @abstractmethod
    def key(self, m: MatchContext) -> Hashable:
        """Equal for the matches that are taken together."""

    @abstractmethod
    def emit_together(self, b: Builder, ms: Sequence[MatchContext]) -> Sequence[Node]:
        """Build the nodes that take the matches' place and return for each match, in order, what replaces its root.

        ``b.at(m)`` builds a node that is only the place of ``m``: it has its source line and provenance.
        """

    def emit(self, b: Builder, m: MatchContext) -> Node:
        """A match alone, which there is none of."""
        return self.emit_together(b, [m])[0]


class Keep(Rule):
    """A rule whose match is left exactly as it is, because the target executes it in that form; ``note`` says why."""

    def emit(self, b: Builder, m: MatchContext) -> Node:
        """Keep the match."""
        return m.root


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A rule's pattern as data, and the names of its captures."""

    pattern: Pattern
    captures: tuple[str, ...]


def compiled(rule: Rule) -> Compiled:
    """``rule``'s pattern as data.

    Raises:
        TypeError: the rule has no pattern, one that is not rooted in a call, or names in it that cannot work.
    """
    function = getattr(rule, "pattern", None)
    if function is None:
        raise TypeError(f"rule {rule.name} has no pattern method")
    captures = captures_of(function)
    pattern = function(**captures)
    if not isinstance(pattern, (Call, AnyOf)):
        raise TypeError(f"rule {rule.name}: pattern() must return op(...)(...) or any_of(...), not {pattern!r}")
    bound, sure = set(names(pattern)), always(pattern)
    for taken in sorted({*captures, *bound} & RESERVED):
        raise TypeError(f"rule {rule.name}: nothing in a pattern can be called {taken!r}, which a match has already")
    for name, capture in captures.items():
        if name not in bound:
            raise TypeError(f"rule {rule.name}: pattern() takes the capture {name!r} and its pattern has it nowhere")
        if name not in sure and not capture.optional:
            raise TypeError(
                f"rule {rule.name}: some alternatives of the pattern do not have {name!r}; give it the default None"
            )
    return Compiled(pattern, tuple(captures))


def asked(rule: Rule, what: str, root: Node, program: Program, question: Callable[[], _T]) -> _T:
    """``question()``, of ``rule`` at ``root``.

    Raises:
        RuleError: it failed; ``what`` says what was asked.
    """
    try:
        with no_guards(program, what):
            return question()
    except (Unmet, RuleError, Mistake):
        raise
    except Exception as error:
        told = str(error) or type(error).__name__
        raise RuleError(f"rule {rule.name}: at {root.name} its {what} failed: {told}") from error
