"""A rule: a pattern, the requirements of a match, and the rewrite of a match that meets all of them."""

import dataclasses
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args, overload

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import RuleError, Unmet, UsageError
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import AnyOf, Call, Pattern, always_bound, bound_names, parse_captures
from et_cuda_passes.graph.program import Program, forbid_new_guards

Stage = Literal["metadata", "values"]
Check = Callable[[Match], "Failure | None"]
# Until every rule has a tuple of requirements: a method (self, m) that returns one of these.
Answer = tuple[bool, str] | tuple[bool, str, str]
_T = TypeVar("_T")


# A Match has these attributes itself; a capture of the same name could not be read.
RESERVED_CAPTURE_NAMES = frozenset({"match", "captures", "program", "target", "rule", "root", "val", "memoize"})


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a requirement does not hold at a match.

    ``found`` is what stands there instead of what is wanted. ``hint`` is what to change, where that is better than the
    requirement's own hint.
    """

    found: str
    hint: str | None = None


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One condition of a rule.

    ``wanted`` is a noun phrase that a report puts after "wanted"; ``hint`` is what the user changes to meet the
    requirement. ``check`` returns None where the requirement holds.
    """

    name: str
    wanted: str
    hint: str
    stage: Stage
    check: Check


class _Decorator(Protocol):
    @overload
    def __call__(self, check: Check, /) -> Requirement: ...
    @overload
    def __call__(self, check: Callable[[Any, Match], Answer], /) -> Callable[[Any, Match], Answer]: ...
    def __call__(self, check: Any, /) -> Any: ...


def requirement(wanted: str, hint: str = "", stage: Stage = "metadata") -> _Decorator:
    """Make a function ``(m) -> Failure | None`` a :class:`Requirement` that is named after the function.

    Args:
        wanted: the condition as a noun phrase, read after "wanted": ``"a group size that the kernel has"``.
        hint: what the user changes to meet the requirement; a :class:`Failure` may have a better one.
        stage: ``"metadata"`` reads shapes, dtypes and users only. ``"values"`` may read tensors, and is checked only
            if every requirement of the metadata stage holds.

    Raises:
        TypeError: ``wanted`` is not text (``@requirement`` without its parentheses, for example).
        ValueError: there is no such stage.
    """
    if not isinstance(wanted, str):
        raise TypeError("requirement needs a text that says what is wanted: @requirement('...') above the function")
    if stage not in get_args(Stage):
        raise ValueError(f"a requirement is checked in one of the stages {get_args(Stage)}, not {stage!r}")

    def decorate(check: Any) -> Any:
        name = getattr(check, "__name__", type(check).__name__)
        if len(inspect.signature(check).parameters) == 1:
            return Requirement(name, wanted, hint, stage, check)
        check._requirement = Requirement(name, wanted, hint, stage, _of_method(wanted, check))
        return check

    return decorate


def _of_method(wanted: str, check: Callable[[Any, Match], Answer]) -> Check:
    """The check of a rule that has a method in place of a requirement."""

    def answered(m: Match) -> Failure | None:
        answer: Any = check(m.rule, m)
        if not isinstance(answer, tuple) or len(answer) not in (2, 3) or not isinstance(answer[0], bool):
            raise RuleError(
                f"rule {m.rule.name}: the requirement {wanted!r} must return (holds, found) or (holds, found, hint), "
                f"with holds a bool (of a dynamic size, what statically_known_true says); it returned {answer!r}"
            )
        holds, found, *hint = answer
        return None if holds else Failure(found, *hint)

    return answered


class Notes(NamedTuple):
    """What a report says of a match beyond its summary.

    ``note`` stands beside the outcome in the report's text. ``explanation`` is longer, and in the data only.
    """

    note: str = ""
    explanation: str = ""


class Rule(ABC):
    """One rewrite. Subclasses are frozen dataclasses whose fields are the rule's options; they keep no other state.

    A subclass defines ``pattern`` (its parameters are the captures), ``requirements`` and ``rewrite``. A match that
    meets all requirements is rewritten: ``rewrite`` may not decline.
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
        "requires": "requirements",
    }
    """Earlier names of attributes with those of today. A subclass may not define them: nothing would read them."""
    # Until every rule has a tuple: the requirements of the nearest base class that states its tuple.
    _stated: ClassVar[tuple[Requirement, ...]] = ()
    requirements: ClassVar[tuple[Requirement, ...]] = ()
    """All requirements, in the order in which a report lists those that do not hold."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in cls._renamed.items():
            if old in cls.__dict__:
                raise TypeError(f"rule {cls.__name__} defines {old}, which is now called {new}")
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        if "requirements" in cls.__dict__:
            _check_requirements(cls)
            cls._stated = cls.requirements
        else:
            cls.requirements = (*cls._stated, *_methods(cls))

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

    def summary(self, m: Match) -> str:
        """A few words for the report's table that say what this rule builds at a place (``int4 group 32 -> ...``).

        Where the match contains nodes that earlier rules built, their outcomes get it appended to their own summary.
        """
        return ""

    def notes(self, *ms: Match) -> Notes:
        """Further texts for the report on a match, or on the matches ``ms`` that are rewritten together.

        Where the match contains nodes that earlier rules built, the explanation replaces that of their outcomes.
        """
        return Notes(self.note(ms[0]), self.explain(*ms))

    # Until every rule has notes: the two hooks that became one.
    def note(self, m: Match) -> str:
        """See :class:`Notes`."""
        return ""

    def explain(self, *ms: Match) -> str:
        """See :class:`Notes`."""
        return ""


def _check_requirements(cls: type[Rule]) -> None:
    stated: object = cls.requirements
    if not isinstance(stated, tuple):
        raise TypeError(f"rule {cls.__name__}: requirements must be a tuple of requirements, not {stated!r}")
    for each in stated:
        if not isinstance(each, Requirement):
            raise TypeError(
                f"rule {cls.__name__}: requirements contains {each!r}, which is no requirement; write "
                "@requirement('...') above a function (m) -> Failure | None"
            )


def _methods(cls: type[Rule]) -> tuple[Requirement, ...]:
    """The requirements that are methods of ``cls``, or of base classes up to one that states its tuple."""
    found: dict[str, Requirement] = {}
    mro = cls.__mro__
    until = next((index for index, base in enumerate(mro) if "_stated" in vars(base)), len(mro))
    for base in reversed(mro[:until]):
        for attribute, value in vars(base).items():
            method = getattr(value, "_requirement", None)
            if isinstance(method, Requirement):
                found[attribute] = method
            else:
                found.pop(attribute, None)
    return tuple(found.values())


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
