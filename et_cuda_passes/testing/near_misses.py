"""A near miss of each requirement of a rule: a program that one requirement rejects, and no other."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram

from et_cuda_passes.attempts import Attempt, attempts
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.targets import Target

Program = ExportedProgram | Callable[[], ExportedProgram]


@dataclass(frozen=True)
class NearMiss:
    """A program that one requirement of a rule rejects, where more than the program must be said.

    Attributes:
        program: the program, or a function that exports it.
        target: another target than that of the other near misses.
        rule: the rule with other options.
        also: requirements that fail too, because no program meets them and fails this one. Each needs a near miss of
            its own.
    """

    program: Program
    target: str | Target | None = None
    rule: Rule | None = None
    also: tuple[str, ...] = ()


def assert_near_misses(
    rule: Rule,
    near_misses: Mapping[str, Program | NearMiss],
    target: str | Target = "cuda",
    passes: Iterable[Any] | None = None,
) -> None:
    """Check that every requirement of a rule has a near miss by its name, and that it alone rejects the program.

    The pattern of the rule must fit at some place of each program, with this requirement as the only one that does not
    hold. So a requirement that never fails is found, and so is one that another makes superfluous.

    Args:
        rule: the rule.
        near_misses: for each requirement, by its name, a program, a function that exports one, or a :class:`NearMiss`.
        target: the target.
        passes: the pass list; None for the target's own. The passes before ``rule`` run first.

    Raises:
        AssertionError: two requirements have one name, a requirement has no near miss, a name is that of no
            requirement, or a program is rejected by other requirements than the one that it is for; the message says
            what the rule found.
    """
    names = [requirement.name for requirement in rule.requirements]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, (
        f"rule {rule.name} has two requirements named {', '.join(twice)}, and a near miss is of one of them: rename a "
        "function, or write dataclasses.replace(requirement, name=...)"
    )
    missing = [name for name in names if name not in near_misses]
    unknown = [name for name in near_misses if name not in names]
    assert not missing, f"rule {rule.name} has no near miss of {', '.join(missing)}: add a program that each rejects"
    assert not unknown, f"rule {rule.name} has no requirement {', '.join(unknown)}; it has {', '.join(names) or 'none'}"
    listed = None if passes is None else list(passes)
    faults = []
    for name, each in near_misses.items():
        near = each if isinstance(each, NearMiss) else NearMiss(each)
        faults.append(_fault(near.rule or rule, name, near, near.target or target, listed))
    assert not any(faults), f"rule {rule.name}\n" + "\n".join(filter(None, faults))


def _fault(rule: Rule, name: str, near: NearMiss, target: str | Target, passes: list[Any] | None) -> str:
    """Why the program is no near miss; empty if it is one."""
    program = near.program if isinstance(near.program, ExportedProgram) else near.program()
    found = [attempt for attempt in attempts(program, rule, target, passes) if attempt.reason is None]
    if any(_failed(attempt) == {name, *near.also} for attempt in found):
        return ""
    shown = "\n".join(map(str, found)) or "the pattern fits nowhere"
    rejected = f"{name} alone rejects" if not near.also else f"{' and '.join([name, *near.also])} reject"
    return f"the program for {name} is not one that {rejected}:\n{shown}"


def _failed(attempt: Attempt) -> set[str]:
    """The names of the requirements that do not hold; the stage of a reason that is no requirement's."""
    return {reason.requirement or reason.stage for reason in attempt.failures}
