"""What a rule is asked and told to do, watched: an error names the rule and the place, and no dynamic size is fixed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from torch.fx import Node

from et_cuda_passes.graph.rule import Mistake, Rule, Unmet

if TYPE_CHECKING:
    from et_cuda_passes.graph.program import Program

_T = TypeVar("_T")


class RuleError(Exception):
    """A rule claimed a place and then failed to rewrite it, or emitted something of another shape or dtype."""


@contextmanager
def no_guards(program: "Program", who: str) -> Iterator[None]:
    """Within it, nothing may compare a dynamic size in Python: torch would hold what came out for true of every run.

    Raises:
        ValueError: ``who`` did.
    """
    shapes = program.fake_mode.shape_env
    known = 0 if shapes is None else len(shapes.guards)
    yield
    if shapes is not None and len(shapes.guards) > known:
        expression = shapes.guards[-1].expr
        raise ValueError(
            f"{who} holds for {expression} alone, which the program's dynamic shapes leave open; ask "
            "torch.fx.experimental.symbolic_shapes.statically_known_true(...) instead of comparing in Python"
        )


def asked(rule: Rule, what: str, root: Node, program: "Program", question: Callable[[], _T]) -> _T:
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
