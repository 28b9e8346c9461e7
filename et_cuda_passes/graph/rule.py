"""A rule: a pattern, the requirements of a match, and the rewrite of a match that meets all of them."""

import dataclasses
import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeVar, get_args

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import RuleError, Unmet, UsageError
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import Target
from et_cuda_passes.graph.pattern import (
    AnyOf,
    Call,
    Pattern,
    always_bound,
    bound_names,
    inner_calls,
    inner_operators,
    parse_captures,
)
from et_cuda_passes.graph.program import Program, forbid_new_guards

Stage = Literal["metadata", "values"]
Check = Callable[[Match], "Failure | None"]
_T = TypeVar("_T")


# A Match has these attributes itself; a capture of the same name could not be read.
RESERVED_CAPTURE_NAMES = frozenset(
    {"match", "captures", "program", "target", "rule", "unmet", "root", "val", "constant", "memoize"}
)


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


def requirement(wanted: str, hint: str = "", stage: Stage = "metadata") -> Callable[[Check], Requirement]:
    """Make a function ``(m) -> Failure | None`` a :class:`Requirement` that is named after the function.

    Args:
        wanted: the condition as a noun phrase, read after "wanted": ``"a group size that the kernel has"``.
        hint: what the user changes to meet the requirement; a :class:`Failure` may have a better one.
        stage: ``"metadata"`` reads shapes, dtypes and users only. ``"values"`` may read tensors, and is checked only
            if every requirement of the metadata stage holds.

    Raises:
        TypeError: ``wanted`` is not text (``@requirement`` without its parentheses, for example), or the function has
            other parameters.
        ValueError: there is no such stage.
    """
    if not isinstance(wanted, str):
        raise TypeError("requirement needs a text that says what is wanted: @requirement('...') above the function")
    if stage not in get_args(Stage):
        raise ValueError(f"a requirement is checked in one of the stages {get_args(Stage)}, not {stage!r}")

    def decorate(check: Check) -> Requirement:
        name = getattr(check, "__name__", type(check).__name__)
        if len(inspect.signature(check).parameters) != 1:
            raise TypeError(
                f"the requirement {name} must be a function (m) -> Failure | None; write it outside of the class, and "
                "name it in the tuple `requirements` of the class"
            )
        return Requirement(name, wanted, hint, stage, check)

    return decorate


class Notes(NamedTuple):
    """Texts of a report on a match, beyond its summary.

    ``note`` stands beside the outcome in the report's text. The others are in the data and on the report page only:
    ``explanation`` is longer, ``kernel`` names the kernel that computes the result, and ``layout`` the layout that it
    reads.
    """

    note: str = ""
    explanation: str = ""
    kernel: str = ""
    layout: str = ""


class Rule:
    """One rewrite. Subclasses are frozen dataclasses whose fields are the rule's options; they keep no other state.

    A subclass defines ``pattern`` (its parameters are the captures), ``requirements`` and ``rewrite``. A match that
    meets all requirements is rewritten: ``rewrite`` may not decline.
    """

    name: ClassVar[str] = ""
    """Unique in a pass list; by default the class name in snake case."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of passes that must run after this rule, which moves in a pass list if necessary."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes that must run before this rule."""
    reports_misses: ClassVar[bool] = True
    """False for a rule that few programs need: a report then does not say why the rule did not act at a place."""
    _renamed: ClassVar[Mapping[str, str]] = {
        "emit": "is now called rewrite",
        "emit_together": "is now called rewrite_group, of a GroupRule",
        "detail": "is now called summary",
        "note": "is now part of notes",
        "explain": "is now part of notes",
        "silent": "is now called reports_misses, with the opposite value",
        "requires": "is now called requirements",
        "takes": "no longer exists: a match owns only the nodes of its pattern",
    }
    """Former attributes. A subclass may not define them: nothing would read them."""
    requirements: ClassVar[tuple[Requirement, ...]] = ()
    """All requirements, in the order in which a report lists those that do not hold."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in cls._renamed.items():
            if old in cls.__dict__:
                raise TypeError(f"rule {cls.__name__} defines {old}, which {new}")
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        _check_requirements(cls)

    pattern: Callable[..., Pattern]
    """The form that the rule looks for, written with :func:`~et_cuda_passes.graph.pattern.op`."""
    rewrite: Callable[[Builder, Match], Node]
    """Builds the nodes that take the place of a match, and returns the node that replaces its root."""

    def summary(self, m: Match) -> str:
        """A few words for the report's table that say what this rule builds at a place (``int4 group 32 -> ...``).

        Where the match contains nodes that earlier rules built, their outcomes get it appended to their own summary.
        """
        return ""

    def notes(self, *ms: Match) -> Notes:
        """Further texts for the report on a match, or on the matches ``ms`` that are rewritten together.

        Where the match contains nodes that earlier rules built, explanation, kernel and layout replace those of their
        outcomes.
        """
        return Notes()


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


class GroupRule(Rule, ABC):
    """A rule that rewrites several matches of its pattern together, and replaces the root of each by a separate node.

    Every match must meet the requirements, and has its own outcome. Two or more matches with equal :meth:`group_key`
    are rewritten by :meth:`rewrite_group`, at the place of the first of them. Their inputs may not be mutated, and must
    be computed before that place. A match that remains without another is missed; its reasons are reported only where
    no other rule gives any.
    """

    _renamed: ClassVar[Mapping[str, str]] = {
        **Rule._renamed,
        "key": "is now called group_key",
        "most": "is now called max_group_size",
        "common": "is now called shared_captures",
        "alone": "no longer exists: a report gives the reasons of other rules first",
        "partner": "no longer exists",
    }
    shared_captures: ClassVar[tuple[str, ...]] = ()
    """Captures that hold the same value in all matches with equal :meth:`group_key`, so that one value is enough."""

    @property
    def max_group_size(self) -> int | None:
        """The largest number of matches that are rewritten together, in graph order; None for any number."""
        return None

    @abstractmethod
    def group_key(self, m: Match) -> Hashable:
        """Equal for the matches that are rewritten together."""

    @abstractmethod
    def rewrite_group(self, b: Builder, ms: Sequence[Match]) -> Sequence[Node]:
        """Build the nodes that take the places of ``ms``; return the node that replaces each root, in order.

        ``b.for_match(m)`` builds a node for the place of ``m`` alone, with the source line and provenance of ``m``.
        """


class Keep(Rule):
    """A rule without ``rewrite``: the target executes the match as it stands. Its ``notes`` say why."""


@dataclasses.dataclass(frozen=True)
class CompiledRule:
    """A rule with its pattern as data, and the names of its captures."""

    rule: Rule
    pattern: Pattern
    captures: tuple[str, ...]

    @functools.cached_property
    def inner_operators(self) -> set[Target]:
        """The operators of the calls inside the pattern's outermost call."""
        return inner_operators(self.pattern)

    @functools.cached_property
    def inner_calls(self) -> tuple[tuple[Call, ...], ...]:
        """These calls with the calls around each: thousands in some rules, and only a miss needs them."""
        return tuple(inner_calls(self.pattern))


def compile_rule(rule: Rule) -> CompiledRule:
    """``rule`` with its pattern as data.

    Raises:
        TypeError: the rule has no pattern or no rewrite, the pattern is not rooted in a call, or a name in the pattern
            cannot work.
        RuleError: ``pattern`` failed.
    """
    function = getattr(rule, "pattern", None)
    if function is None:
        raise TypeError(f"rule {rule.name} has no pattern method")
    _check_options(rule)
    if not isinstance(rule, (GroupRule, Keep)) and getattr(rule, "rewrite", None) is None:
        raise TypeError(f"rule {rule.name} has no rewrite method; a rule that leaves its matches derives from Keep")
    captures = parse_captures(function)
    try:
        pattern = function(**captures)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        raise RuleError(f"rule {rule.name}: its pattern failed: {type(error).__name__}: {error}") from error
    if not isinstance(pattern, (Call, AnyOf)):
        raise TypeError(f"rule {rule.name}: pattern() must return op(...)(...) or any_of(...), not {pattern!r}")
    bound, sure = bound_names(pattern), always_bound(pattern)
    for name in sorted({*captures, *bound} & RESERVED_CAPTURE_NAMES):
        raise TypeError(f"rule {rule.name}: a match has an attribute {name!r}; give the capture another name")
    for name, capture in captures.items():
        if name not in bound:
            raise TypeError(
                f"rule {rule.name}: pattern() has the parameter {name!r}, which its pattern does not contain"
            )
        if name not in sure and not capture.optional:
            raise TypeError(
                f"rule {rule.name}: some alternatives of the pattern do not contain {name!r}; give it the default None"
            )
    return CompiledRule(rule, pattern, tuple(captures))


def _check_options(rule: Rule) -> None:
    """Check that a rule has no state: a frozen dataclass with its options as fields, or a class without any."""
    cls = type(rule)
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is not None and "__dataclass_params__" in vars(cls):
        stateless = parameters.frozen
    else:
        own = inspect.get_annotations(cls)
        stateless = all("ClassVar" in str(kind) for kind in own.values()) and (parameters is not None or not vars(rule))
    if not stateless:
        raise TypeError(
            f"rule {rule.name} has options, or state, and {cls.__name__} is no frozen dataclass: write "
            "@dataclasses.dataclass(frozen=True) above the class; its fields are then the options"
        )


def call_hook(rule: Rule, hook: str, root: Node, program: Program, call: Callable[[], _T]) -> _T:
    """The result of ``call()``, which calls a hook of ``rule`` for the match at ``root``.

    Raises:
        RuleError: the hook failed; ``hook`` names it.
    """
    try:
        with forbid_new_guards(program, hook):
            return call()
    except (RuleError, UsageError):
        raise
    except Unmet as error:
        raise RuleError(
            f"rule {rule.name}: at {root.name} its {hook} failed: Unmet: {error}; check it in a requirement: one that "
            "raises Unmet does not hold, and the match is not rewritten"
        ) from error
    except Exception as error:
        # The texts of Python's own errors need the type: that of a KeyError is the key alone.
        text = (
            str(error) if type(error) in (RuntimeError, ValueError, TypeError) else f"{type(error).__name__}: {error}"
        )
        raise RuleError(f"rule {rule.name}: at {root.name} its {hook} failed: {text}") from error
