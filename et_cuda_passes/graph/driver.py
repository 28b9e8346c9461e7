"""Application of a pass list: each rule matches, checks, selects and rewrites; other passes get the whole program."""

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassResult

from et_cuda_passes.graph.aliasing import alias_root, mutated_operands
from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.constants import tensor_bytes
from et_cuda_passes.graph.drawing import DrawingRecorder, drawn_nodes
from et_cuda_passes.graph.errors import RuleError, Unmet
from et_cuda_passes.graph.finish import eliminate_dead_nodes, finish_program
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.matcher import MatchResult, Miss, match, match_inner
from et_cuda_passes.graph.operators import Target, op_name
from et_cuda_passes.graph.outcomes import Candidate, OutcomeTracker, Texts
from et_cuda_passes.graph.passes import Pass
from et_cuda_passes.graph.pattern import root_ops
from et_cuda_passes.graph.program import Program, constants_read
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import (
    CompiledRule,
    Failure,
    GroupRule,
    Keep,
    Notes,
    Requirement,
    Rule,
    Stage,
    call_hook,
)
from et_cuda_passes.graph.selection import Claim, group_claims, select_claims

FindCandidates = Callable[[Program, Collection[Node] | None], Iterable[Candidate]]
"""Finds the candidates of a program, in graph order.

With a collection of new nodes: only those of them that are candidates, and the candidates that read a weight among
them.
"""


@dataclass
class RuleTrace:
    """Counts and the time of one rule in one rewrite.

    Attributes:
        rule: its name.
        tried: nodes at which its pattern was tried as the root.
        matched: nodes at which it fits.
        failed: matches that a requirement rejects, by the name of the requirement; each is counted for all of them.
        applied: matches that were rewritten or kept.
        seconds: the time of all of it.
    """

    rule: str
    tried: int = 0
    matched: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    applied: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        failed = ", ".join(f"{count} x {name}" for name, count in sorted(self.failed.items()))
        return (
            f"{self.rule}: {self.tried} tried, {self.matched} matched, {self.applied} applied, {self.seconds:.3f} s"
            + (f"; failed {failed}" if failed else "")
        )


def apply_passes(
    program: Program,
    passes: Sequence[Pass],
    target: Any,
    tracker: OutcomeTracker,
    find_candidates: FindCandidates,
    created_ops: AbstractSet[Target] = frozenset(),
    trace: list[RuleTrace] | None = None,
) -> Program:
    """Run ``passes`` one after another; each sees the graph that the one before it left.

    Args:
        program: it is changed.
        passes: in their order (:func:`et_cuda_passes.graph.passes.parse`).
        target: rules read it as ``m.target``.
        tracker: records the outcomes.
        find_candidates: finds the candidates again after a pass that is not a rule, and among the nodes that a rule
            built.
        created_ops: operators that only rewrites create. A rule that misses one gives no reason for a miss: its pattern
            is about the results of other rules, not about the program as it was exported.
        trace: gets an entry for each rule, with counts and times.

    Returns:
        The program, or another one where a pass returned another one.

    Raises:
        RuleError: a rule matched and then failed; the rule is wrong, not the program.
    """
    for entry in passes:
        if entry.rule is None:
            program = _run_external_pass(entry, program)
            tracker.remap_after_pass(find_candidates(program, None), entry.name)
        else:
            with gc_disabled():
                counts = RuleTrace(entry.name)
                began = time.perf_counter()
                _apply_rule(entry.rule, program, target, tracker, find_candidates, created_ops, counts)
                counts.seconds = time.perf_counter() - began
                if trace is not None:
                    trace.append(counts)
    return program


def record_weight_bytes(program: Program, tracker: OutcomeTracker) -> None:
    """Record the bytes of the new constants from which the candidates now read their weights.

    A constant of a node that stands for several candidates counts for each in proportion to its weight.
    """
    added = set(program.added.values())
    constants: dict[Candidate, dict[Node, int]] = defaultdict(dict)
    for node, candidates in tracker.stand_ins():
        if node not in program.order:
            continue
        total = sum(candidate.weight_bytes for candidate in candidates)
        for constant in constants_read(program, node):
            if constant in added:
                size = tensor_bytes([program.held(constant)])
                for candidate in candidates:
                    constants[candidate][constant] = round(size * candidate.weight_bytes / total) if total else size
    tracker.set_bytes_after({each.node: sum(sizes.values()) for each, sizes in constants.items()})


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable cyclic garbage collection.

    A rewrite allocates and frees little. Each collection would visit everything that was built so far: for 2,000
    linears that took a quarter of the time, and grew faster than the graph.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _apply_rule(
    compiled: CompiledRule,
    program: Program,
    target: Any,
    tracker: OutcomeTracker,
    find_candidates: FindCandidates,
    created_ops: AbstractSet[Target],
    counts: RuleTrace,
) -> None:
    rule = compiled.rule
    created: dict[Node, None] = {}
    matches = _find_matches(compiled, program, target, tracker, created_ops, counts)
    claims = [Claim((m,), tracker.benefit(m.match)) for m in matches]
    if isinstance(rule, GroupRule):
        claims, failed = group_claims(rule, claims, program.order)
        for m, reason in failed:
            _add_failures(tracker, m, [reason])
    chosen, lost = select_claims(claims)
    for loser, winner in lost.items():
        for m in claims[loser].matches:
            tracker.add_conflict(rule.name, m.match, claims[winner].root)
    for claim in (claims[index] for index in chosen):
        ms = []
        for m in claim.matches:
            if tracker.all_readers_decided(m.match):
                tracker.add_decided(rule.name, m.match)
            else:
                ms.append(m)
        if ms:
            counts.applied += len(ms)
            _record(rule, ms, tracker)
            if isinstance(rule, Keep):
                for m in ms:
                    program.kept.update(m.match.owned)
                    program.kept_operands.update(m.match.shared)
            else:
                built = _rewrite(rule, ms, program, tracker.drawings)
                created.update(dict.fromkeys(built))
                tracker.track_created(built)
    if chosen and not isinstance(rule, Keep):
        eliminate_dead_nodes(program, tracker.is_undecided)
        program.refresh()
        tracker.follow_created(rule.name, find_candidates(program, created.keys()))


def _record(rule: Rule, ms: Sequence[Match], tracker: OutcomeTracker) -> None:
    """Record the matches ``ms``, which are rewritten together, with the texts of their rule."""
    program = ms[0].program
    for m in ms:
        m.unmet = tracker.unmet(m.match)
    notes = call_hook(rule, "notes", ms[0].root, program, partial(rule.notes, *ms))
    if not isinstance(notes, Notes):
        raise RuleError(f"rule {rule.name}: notes must return Notes(note, explanation); it returned {notes!r}")
    together = f"{len(ms)} in one" if len(ms) > 1 else ""
    write = tracker.set_kept if isinstance(rule, Keep) else tracker.set_rewritten
    for m in ms:
        summary = call_hook(rule, "summary", m.root, program, partial(rule.summary, m))
        write(rule.name, m.match, Texts(", ".join(filter(None, (summary, together))), *notes))


def roots(compiled: CompiledRule, program: Program) -> list[Node]:
    """The nodes at which the pattern of a rule may have its root, in graph order."""
    starts = {node for operator in root_ops(compiled.pattern) for node in program.calls.get(operator, ())}
    return sorted(starts, key=program.order.__getitem__)


def check_match(
    compiled: CompiledRule, found: MatchResult, program: Program, target: Any
) -> tuple[Match, list[Reason]]:
    """The match as the rule reads it, and a reason for each requirement that does not hold."""
    m = Match(found, program, target, compiled.rule, compiled.captures)
    return m, [*_crossed_boundaries(m), *_failures(m, "metadata")] or _failures(m, "values")


def _find_matches(
    compiled: CompiledRule,
    program: Program,
    target: Any,
    tracker: OutcomeTracker,
    created_ops: AbstractSet[Target],
    counts: RuleTrace,
) -> list[Match]:
    """The matches of a rule that meet all its requirements, in graph order; the tracker gets the reasons of others."""
    rule = compiled.rule
    matches: list[Match] = []
    tried: set[Node] = set()
    closest: Miss | None = None
    for node in roots(compiled, program):
        counts.tried += 1
        found = match(compiled.pattern, node, program.mutated)
        if isinstance(found, Miss):
            if _is_reported(rule, found, created_ops):
                reached = list(filter(tracker.is_undecided, dict.fromkeys((node, *found.reached))))
                tried.update(reached)
                for candidate in reached:
                    tracker.add_miss(candidate, _miss(rule, found))
                if not reached and (closest is None or found.progress > closest.progress):
                    closest = found
            continue
        tried.update(found.owned, found.shared)
        counts.matched += 1
        m, reasons = check_match(compiled, found, program, target)
        counts.failed.update(reason.requirement or reason.stage for reason in reasons)
        kept = next((owned for owned in found.owned if owned in program.kept), None)
        if reasons:
            _add_failures(tracker, m, reasons)
        elif kept is not None:
            tracker.add_kept_conflict(rule.name, found, kept)
        else:
            matches.append(m)
    # A pattern may contain a candidate below its root, and then no root need be there.
    for node in tracker.undecided(compiled.inner_operators) if rule.reports_misses else ():
        miss = None if node in tried else match_inner(compiled.inner_calls, node, program.mutated)
        if miss is not None and _is_reported(rule, miss, created_ops):
            tried.add(node)
            tracker.add_miss(node, _miss(rule, miss))
    if closest is not None and not tried:
        tracker.add_rejected(closest.root.name, _miss(rule, closest))
    return matches


def _is_reported(rule: Rule, miss: Miss, created_ops: AbstractSet[Target]) -> bool:
    return rule.reports_misses and not (miss.wanted_ops and created_ops >= set(miss.wanted_ops))


def _miss(rule: Rule, miss: Miss) -> Reason:
    return Reason(rule.name, "match", miss.wanted, miss.found, miss.hint)


def _add_failures(tracker: OutcomeTracker, m: Match, reasons: Sequence[Reason]) -> None:
    if m.rule.reports_misses:
        tracker.add_failures(m.match, reasons)


def _crossed_boundaries(m: Match) -> list[Reason]:
    """A reason for each inner node of the match that is an input or output of a preserved module, in graph order."""
    inner = {*m.match.owned[1:], *m.match.shared}
    wanted = "nodes on one side of a preserved module's boundary"
    hint = "leave the module out of preserve_module_call_signature"
    return [Reason(m.rule.name, "match", wanted, node.name, hint) for node in sorted(inner & m.program.boundary_nodes)]


def _failures(m: Match, stage: Stage) -> list[Reason]:
    """A reason for each requirement of ``stage`` that does not hold."""
    reasons: list[Reason] = []
    for requirement in m.rule.requirements:
        if requirement.stage != stage:
            continue
        try:
            failure = _check(requirement, m)
        except Unmet as unmet:
            # A decoder that raises does so in every requirement that calls it; the report says it once.
            failure = Failure(str(unmet))
            if any(reason.found == failure.found for reason in reasons):
                continue
        if failure is not None:
            hint = requirement.hint if failure.hint is None else failure.hint
            reasons.append(Reason(m.rule.name, stage, requirement.wanted, failure.found, hint, requirement.name))
    return reasons


def _check(requirement: Requirement, m: Match) -> Failure | None:
    what = f"requirement {requirement.wanted!r}"

    def check() -> Any:
        try:
            return requirement.check(m)
        except Unmet as unmet:
            return unmet

    answer: Any = call_hook(m.rule, what, m.root, m.program, check)
    if isinstance(answer, Unmet):
        raise answer
    if answer is None or isinstance(answer, Failure):
        return answer
    raise RuleError(
        f"rule {m.rule.name}: the requirement {requirement.wanted!r} must return None where it holds, and a Failure "
        f"where it does not; it returned {answer!r}"
    )


def _rewrite(
    rule: Rule, ms: Sequence[Match], program: Program, drawings: DrawingRecorder
) -> Mapping[Node, Sequence[Node]]:
    """Rewrite ``ms`` together; returns each node that was built, with the roots that it stands for."""
    b = Builder(program, [m.root for m in ms], rule.name)
    matched = {node for m in ms for node in (*m.match.owned, *m.match.shared)}
    before = drawn_nodes(b.roots, matched, program.drawn_fqn)
    new: Any
    if isinstance(rule, GroupRule):
        new = call_hook(rule, "rewrite_group", ms[0].root, program, partial(rule.rewrite_group, b, ms))
    else:
        new = [call_hook(rule, "rewrite", ms[0].root, program, partial(rule.rewrite, b, ms[0]))]
    if not isinstance(new, (list, tuple)) or len(new) != len(ms):
        raise RuleError(f"rule {rule.name} replaced {len(ms)} matches by {new!r}; return one node for each match")
    for m, node in zip(ms, new, strict=True):
        _replace(rule, m, node, b.for_match(m))
    drawings.add(rule.name, before, drawn_nodes(new, b.created, program.drawn_fqn))
    program.mark_dead(b.created)
    return b.created


def _replace(rule: Rule, m: Match, new: Node, b: Builder) -> None:
    root, program = m.root, b.program
    if not isinstance(new, Node):
        raise RuleError(f"rule {rule.name} replaced {root.name} by {new!r}; rewrite must return a node")
    if new is root:
        raise RuleError(
            f"rule {rule.name} returned {root.name} itself; a rule that keeps its matches derives from Keep"
        )
    _check_replacement(rule, root, new)
    _check_mutations(rule, root, b)
    owner = alias_root(new, program.subgraphs.views)
    mutated = root in program.mutated or owner in program.mutated
    if (new not in b.created or new is not owner) and (mutated or program.subgraphs.escapes(root)):
        # Other nodes may read the memory of `new`. Insert a copy: a mutation would also reach them, and a subgraph must
        # not return the memory of an operand.
        new = b.call(torch.ops.aten.clone.default, new)
    program.replace(root, new)
    program.mark_dead((*m.match.owned, *m.match.shared))


def _check_replacement(rule: Rule, old: Node, new: Node) -> None:
    """Check that the replacement has the shape, dtype and device of the node that it replaces."""
    before, after = old.meta.get("val"), new.meta.get("val")
    if not isinstance(before, torch.Tensor):
        return
    if not isinstance(after, torch.Tensor):
        fix = "build it with b.call" if after is None else "take one of its results: b.call(operator.getitem, node, 0)"
        raise RuleError(f"rule {rule.name} replaced {old.name}, a tensor, by {new.name}, which is not a tensor; {fix}")
    same = (
        len(before.shape) == len(after.shape)
        and all(map(_may_be_equal, before.shape, after.shape))
        and before.dtype == after.dtype
        and before.device == after.device
    )
    if not same:
        raise RuleError(
            f"rule {rule.name} replaced {old.name} ({_signature(before)}) by {new.name} ({_signature(after)}); shape, "
            "dtype and device must be the same"
        )


def _may_be_equal(before: int | torch.SymInt, after: int | torch.SymInt) -> bool:
    """Whether two sizes of one axis are equal. Two symbolic sizes count as equal unless they are known to differ."""
    if isinstance(before, int) != isinstance(after, int):
        # A size that `rewrite` read as a number is the one of the example inputs, and wrong for all others.
        return statically_known_true(before == after)
    return not statically_known_true(before != after)


def _check_mutations(rule: Rule, old: Node, b: Builder) -> None:
    """Check that the replacement mutates the same memory as the operator that it replaces, and no other."""
    views = b.program.subgraphs.views
    mutated = {alias_root(operand, views) for operand in mutated_operands(old)}
    for node in b.created:
        for operand in mutated_operands(node):
            owner = alias_root(operand, views)
            if owner not in b.created and owner not in mutated:
                raise RuleError(
                    f"rule {rule.name} replaced {old.name} by nodes of which {node.name} ({op_name(node.target)}) "
                    f"mutates {operand.name}, which {old.name} does not mutate; build an operator without the mutation"
                )
    kept = {alias_root(operand, views) for node in b.created for operand in mutated_operands(node)}
    lost = [operand.name for operand in mutated_operands(old) if alias_root(operand, views) not in kept]
    if lost:
        raise RuleError(
            f"rule {rule.name} replaced {old.name}, which mutates {', '.join(lost)}, by nodes that do not; build an "
            "operator with the same mutation, or match an operator without a mutation"
        )


def _signature(value: torch.Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _run_external_pass(entry: Pass, program: Program) -> Program:
    """Run a pass that is not a rule, and check its result."""
    if entry.on_program:
        result = entry.value(finish_program(program))
        exported = getattr(result, "exported_program", result)
        if not isinstance(exported, ExportedProgram):
            raise TypeError(f"pass {entry.name} returned {type(exported).__name__}, not an ExportedProgram")
        after = Program(exported, program.pool)
        after.restore_kept(*program.node_keys())
        return after
    module = program.as_graph_module()
    result = entry.value(module)
    returned = result.graph_module if isinstance(result, PassResult) else result
    if returned is not None and not isinstance(returned, GraphModule):
        raise TypeError(
            f"pass {entry.name} returned {type(returned).__name__}; return None, a GraphModule or a PassResult"
        )
    left = module if returned is None else returned
    for node in left.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(left, str(node.target), None), torch.Tensor):
            raise ValueError(
                f"pass {entry.name} added the tensor {node.target}; a pass that adds constants must be an ExecuTorch "
                "ExportedProgramPassBase, which can change the signature"
            )
    program.replace_graph(left, entry.name)
    return program
