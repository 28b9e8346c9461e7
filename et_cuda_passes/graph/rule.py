"""What a rule is: a pattern, the requires that each answer with what they found, and what is built where all hold."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import RuleError, Unmet, UsageError
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import AnyOf, Call, Pattern, always_bound, bound_names, parse_captures
from et_cuda_passes.graph.program import Program, forbid_new_guards

Stage = Literal["metadata", "values"]
Answer = tuple[bool, str] | tuple[bool, str, str]
Check = Callable[[Any, Match], Answer]
_C = TypeVar("_C", bound=Check)
_T = TypeVar("_T")


# What a Match itself has; a capture of the same name could not be reached.
RESERVED_CAPTURE_NAMES = frozenset({"match", "captures", "program", "target", "root", "val", "memoize"})


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One condition of a rule: what is wanted, what to do about it, at which stage it is asked, and the question."""

    wanted: str
    hint: str
    stage: Stage
    check: Check


def requirement(wanted: str, hint: str = "", stage: Stage = "metadata") -> Callable[[_C], _C]:
    """Mark a method ``(self, m) -> (holds, found)`` or ``(holds, found, hint)`` as a condition of its rule.

    Args:
        wanted: the condition as a noun phrase, read after "wanted": ``"a group size that the kernel has"``.
        hint: what the user changes to meet it; the method may return a better one as its third value.
        stage: ``"metadata"`` reads shapes, dtypes and users only; ``"values"`` may read tensors and is asked after
            every metadata condition holds.

    Raises:
        TypeError: ``wanted`` is no text (``@requirement`` without its parentheses, say).
        ValueError: there is no such stage.
    """
    if not isinstance(wanted, str):
        raise TypeError("requirement is given what is wanted, as text: @requirement('...') above the method")
    if stage not in get_args(Stage):
        raise ValueError(f"a require is asked at one of the stages {get_args(Stage)}, not {stage!r}")

    def mark(check: _C) -> _C:
        check._requirement = Requirement(wanted, hint, stage, check)  # type: ignore[attr-defined]
        return check

    return mark


class Rule(ABC):
    """One rewrite. Subclasses are frozen dataclasses whose fields are the rule's options; they keep no other state.

    A subclass defines ``pattern`` (its parameters are the captures), any number of :func:`requirement` methods, and
    ``rewrite``. What matched and holds every require is rewritten: ``rewrite`` may not decline.
    """

    name: ClassVar[str] = ""
    """Unique in a pass list; by default the class name in snake case."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of passes that run after this one."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes that run before this one."""
    reports_misses: ClassVar[bool] = True
    """Whether a report says why the rule did not act at a place. False for one that repairs what few programs have."""
    _renamed: ClassVar[Mapping[str, str]] = {
        "emit": "rewrite",
        "emit_together": "rewrite_group, of a GroupRule",
        "detail": "summary",
        "silent": "reports_misses, with the opposite value",
    }
    """Attributes that a subclass may not define, by earlier names of what a rule defines: they would not be called."""
    requires: ClassVar[tuple[Requirement, ...]] = ()
    """Every require of the class, in the order written, a base class's first."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in cls._renamed.items():
            if old in cls.__dict__:
                raise TypeError(f"rule {cls.__name__} defines {old}, which is now called {new}")
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
    def rewrite(self, b: Builder, m: Match) -> Node:
        """Build the nodes that take the match's place and return the one that replaces its root."""

    def takes(self, m: Match) -> Sequence[Node]:
        """Nodes outside the match that become part of what this rule makes, and that it needs alone.

        Asked where every require that reads metadata holds.
        """
        return ()

    def note(self, m: Match) -> str:
        """A remark for the report on a place this rule acted on; empty for none."""
        return ""

    def summary(self, m: Match) -> str:
        """What this rule made of a place, in a few words for the report's table (``int4 group 32 -> ...``).

        Where it takes what earlier rules made, the outcomes that they wrote have it behind their own summary.
        """
        return ""

    def explain(self, *ms: Match) -> str:
        """What there is to know of a place beyond ``summary``, or of the places that are taken together, ``ms``.

        Where it takes what earlier rules made, it stands in the outcomes that they wrote in place of theirs.
        """
        return ""


class GroupRule(Rule):
    """A rule that takes several matches of its pattern together, and replaces the root of each by a node of its own.

    Each match meets the requires alone, and is reported alone. Two or more with one :meth:`group_key` are rewritten
    together by :meth:`rewrite_group`, where the first of them stands; they may read nothing that is written in place
    or computed behind that place. A match that is left without others is missed.
    """

    _renamed: ClassVar[Mapping[str, str]] = {
        **Rule._renamed,
        "key": "group_key",
        "most": "max_group_size",
        "common": "shared_captures",
    }
    partner: ClassVar[str] = "another match to be taken together with"
    """What a match without others wanted, for the report."""
    alone: ClassVar[str] = ""
    """The rule that takes a match alone: where it is in the pass list too, a miss has its reasons, not this rule's."""
    shared_captures: ClassVar[tuple[str, ...]] = ()
    """Captures that hold one value in all matches of a :meth:`group_key`, so that any match's can be used."""

    @property
    def max_group_size(self) -> int | None:
        """How many matches are taken together at most, in graph order; None for any number."""
        return None

    @abstractmethod
    def group_key(self, m: Match) -> Hashable:
        """Equal for the matches that are taken together."""

    @abstractmethod
    def rewrite_group(self, b: Builder, ms: Sequence[Match]) -> Sequence[Node]:
        """Build the nodes that take the matches' place and return for each match, in order, what replaces its root.

        ``b.for_match(m)`` builds a node that is only the place of ``m``: it has its source line and provenance.
        """

    def rewrite(self, b: Builder, m: Match) -> Node:
        """A match alone, which there is none of."""
        return self.rewrite_group(b, [m])[0]


class Keep(Rule):
    """A rule whose match is left exactly as it is, because the target executes it in that form; ``note`` says why."""

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Keep the match."""
        return m.root


@dataclasses.dataclass(frozen=True)
class CompiledPattern:
    """A rule's pattern as data, and the names of its captures."""

    pattern: Pattern
    captures: tuple[str, ...]


def compile_pattern(rule: Rule) -> CompiledPattern:
    """``rule``'s pattern as data.

    Raises:
        TypeError: the rule has no pattern, one that is not rooted in a call, or names in it that cannot work.
    """
    function = getattr(rule, "pattern", None)
    if function is None:
        raise TypeError(f"rule {rule.name} has no pattern method")
    captures = parse_captures(function)
    pattern = function(**captures)
    if not isinstance(pattern, (Call, AnyOf)):
        raise TypeError(f"rule {rule.name}: pattern() must return op(...)(...) or any_of(...), not {pattern!r}")
    bound, sure = set(bound_names(pattern)), always_bound(pattern)
    for taken in sorted({*captures, *bound} & RESERVED_CAPTURE_NAMES):
        raise TypeError(f"rule {rule.name}: nothing in a pattern can be called {taken!r}, which a match has already")
    for name, capture in captures.items():
        if name not in bound:
            raise TypeError(f"rule {rule.name}: pattern() takes the capture {name!r} and its pattern has it nowhere")
        if name not in sure and not capture.optional:
            raise TypeError(
                f"rule {rule.name}: some alternatives of the pattern do not have {name!r}; give it the default None"
            )
    return CompiledPattern(pattern, tuple(captures))


def call_hook(rule: Rule, what: str, root: Node, program: Program, question: Callable[[], _T]) -> _T:
    """``question()``, of ``rule`` at ``root``.

    Raises:
        RuleError: it failed; ``what`` says what was asked.
    """
    try:
        with forbid_new_guards(program, what):
            return question()
    except (Unmet, RuleError, UsageError):
        raise
    except Exception as error:
        told = str(error) or type(error).__name__
        raise RuleError(f"rule {rule.name}: at {root.name} its {what} failed: {told}") from error
