"""Every place at which a rule tries its pattern, with how far it fits and which requirements hold."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.driver import apply_passes, check_match, gc_disabled, roots
from et_cuda_passes.graph.matcher import MatchResult, Miss, match, match_inner
from et_cuda_passes.graph.operators import op_name, op_of
from et_cuda_passes.graph.outcomes import OutcomeTracker
from et_cuda_passes.graph.passes import group_rules, nearest_names
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import Reason, Report, user_source_line
from et_cuda_passes.graph.rule import CompiledRule, Requirement, Rule, compile_rule
from et_cuda_passes.graph.tree import FITS, NOT_REACHED, STOPPED, draw
from et_cuda_passes.ops.registry import OPERATORS
from et_cuda_passes.quant.candidates import find_candidates
from et_cuda_passes.rewrite import parse_passes
from et_cuda_passes.rules.restore import normalised
from et_cuda_passes.targets import default_passes, get_target
from et_cuda_passes.targets.target import Target


@dataclass(frozen=True)
class Attempt:
    """One place at which a rule tries its pattern.

    Attributes:
        node: the name of the node at which the attempt starts; in control flow its path.
        op: the operator of that node.
        source: the user's line, "file:line: code".
        progress: the number of calls of the pattern that fit, with the one at which the attempt stopped if its operator
            fits.
        reason: where the pattern does not fit, and why; None if it fits.
        failures: a reason for each requirement that does not hold. Requirements that read values are checked only if
            all others hold.
        nodes: the names of the nodes that fit.
        stopped_at: the name of the node that does not fit; empty if that is no node.
        tree: the lines of the pattern as a tree, with a mark at each part.
        requirements: the lines of the requirements, with a mark at each; empty if the pattern does not fit.
    """

    node: str
    op: str
    source: str
    progress: int
    reason: Reason | None
    failures: tuple[Reason, ...]
    nodes: frozenset[str]
    stopped_at: str
    tree: tuple[str, ...]
    requirements: tuple[str, ...]

    @property
    def matches(self) -> bool:
        """Whether the pattern fits and all requirements hold."""
        return self.reason is None and not self.failures

    def __str__(self) -> str:
        lines = [f"{self.node} ({self.op}){f' at {self.source}' if self.source else ''}"]
        lines += [f"  {line}" for line in self.tree]
        if self.reason is not None:
            lines.append(f"  stopped: {self.reason}")
        elif self.requirements:
            lines += ["  requirements", *(f"  {line}" for line in self.requirements)]
        return "\n".join(lines)


def attempts(
    exported_program: ExportedProgram,
    rule: Rule,
    target: str | Target,
    passes: Iterable[Any] | None = None,
    at: str | None = None,
) -> list[Attempt]:
    """Try the pattern of ``rule`` everywhere in a program, as it is when it is the turn of the rule.

    Args:
        exported_program: as for :func:`et_cuda_passes.rewrite`; it is not changed.
        rule: the rule.
        target: the target.
        passes: the pass list; None for the target's own. The passes before ``rule`` run first. A rule that is not in
            the list runs first itself, unless its ``after`` demands others before it.
        at: the name of a node: only attempts that contain it.

    Returns:
        The attempts: those that match, then those that fit with the fewest failed requirements, then those with the
        most progress.

    Raises:
        ValueError: the target is unknown, or no attempt contains the node ``at``; the message says what it is.
    """
    chosen = get_target(target)
    listed = list(default_passes(chosen) if passes is None else passes)
    names = [getattr(each, "name", "") for each in listed]
    if rule.name in names:
        listed[names.index(rule.name)] = rule
    else:
        listed.insert(0, rule)
    entries = parse_passes(listed)
    before = entries[: [entry.name for entry in entries].index(rule.name)]

    source, still_wrapped = normalised(exported_program)
    find = partial(find_candidates, schemes=chosen.advised, wrapped=still_wrapped)
    with gc_disabled():
        program = Program(source)
        tracker = OutcomeTracker(find(program), group_rules(entries))
    program = apply_passes(program, before, chosen, tracker, find, OPERATORS)
    found = _attempts(compile_rule(rule), program, chosen, at)
    if at is not None and not found:
        raise ValueError(_no_part(at, program, tracker.report(chosen.name, [entry.name for entry in before])))
    return sorted(found, key=lambda each: (each.reason is not None, len(each.failures), -each.progress))


def _no_part(name: str, program: Program, report: Report) -> str:
    """The error message for a node that no attempt contains."""
    nodes = {program.subgraphs.path(node): node for node in program.subgraphs.nodes()}
    earlier = next((each for each in report.outcomes if each.node == name and each.status == "rewritten"), None)
    rewritten = f"; {earlier.rule}, which runs earlier, rewrote it" if earlier is not None else ""
    if name not in nodes:
        nearest = "" if rewritten else f"; {nearest_names(name, nodes)}"
        return f"the program has no node {name!r} when it is the turn of the rule{rewritten}{nearest}"
    node = nodes[name]
    called = op_name(node.target) if node.op == "call_function" else f"a {node.op}"
    return f"{name} is {called}, which no attempt reaches{rewritten}"


def _attempts(compiled: CompiledRule, program: Program, target: Target, at: str | None) -> list[Attempt]:
    tried: list[Attempt] = []
    for node in roots(compiled, program):
        result = match(compiled.pattern, node, program.mutated)
        reasons: list[Reason] = []
        if isinstance(result, MatchResult):
            reasons = check_match(compiled, result, program, target)[1]
            kept = next((owned for owned in result.owned if owned in program.kept), None)
            if kept is not None and not reasons:
                reasons = [Reason(compiled.rule.name, "conflict", "nodes that no earlier rule keeps", kept.name)]
        tried.append(_attempt(compiled, result, reasons, program))
    seen = {name for attempt in tried for name in (attempt.node, *attempt.nodes)}
    # The operators of inner calls without an attempt from a root: their reader is not the one of the pattern.
    for node in program.subgraphs.nodes():
        if op_of(node) in compiled.inner_operators and program.subgraphs.path(node) not in seen:
            miss = match_inner(compiled.inner_calls, node, program.mutated)
            if miss is not None:
                tried.append(_attempt(compiled, miss, [], program))
    # Two inner calls of one place stop at the same reader.
    places = {attempt.tree: attempt for attempt in reversed(tried)}
    unique = [attempt for attempt in tried if places[attempt.tree] is attempt]
    return unique if at is None else [each for each in unique if at in (each.node, each.stopped_at, *each.nodes)]


def _attempt(compiled: CompiledRule, result: MatchResult | Miss, reasons: list[Reason], program: Program) -> Attempt:
    path = program.subgraphs.path
    reason = None
    if isinstance(result, Miss):
        reason = Reason(compiled.rule.name, "match", result.wanted, result.found, result.hint)
    return Attempt(
        node=path(result.root),
        op=op_name(result.root.target),
        source=user_source_line(result.root),
        progress=result.progress + result.operator_fits if isinstance(result, Miss) else len(result.calls),
        reason=reason,
        failures=tuple(reasons),
        nodes=frozenset(path(node) for _, node in result.calls),
        stopped_at=path(result.node) if isinstance(result, Miss) and isinstance(result.node, Node) else "",
        tree=tuple(draw(compiled.pattern, result)),
        requirements=() if reason else tuple(_requirement_lines(compiled.rule.requirements, reasons)),
    )


def _requirement_lines(requirements: Iterable[Requirement], reasons: list[Reason]) -> Iterable[str]:
    failed = {(reason.requirement, reason.wanted): reason for reason in reasons if reason.requirement}
    stopped = any(reason.stage != "values" for reason in reasons)
    for each in requirements:
        if (reason := failed.get((each.name, each.wanted))) is not None:
            yield f"{STOPPED} {each.name}: {replace(reason, rule=None, found=_text(reason))}"
        elif each.stage == "values" and stopped:
            yield f"{NOT_REACHED} {each.name}: {each.wanted}"
        else:
            yield f"{FITS} {each.name}: {each.wanted}"
    for reason in reasons:
        if not reason.requirement:
            yield f"{STOPPED} {_text(reason)}"


def _text(reason: Reason) -> str:
    return f"wanted {reason.wanted}, found {reason.found}"
