"""The one loop that applies a pass list: match, require, select, rewrite, check; each candidate gets one outcome."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassResult

from et_cuda_passes.graph.aliasing import alias_root, mutated_operands
from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.errors import RuleError, Unmet
from et_cuda_passes.graph.finish import eliminate_dead_nodes, finish_program
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.matcher import Miss, match
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.outcomes import Candidate, OutcomeTracker
from et_cuda_passes.graph.passes import Pass, parse, quiet_rules, stages
from et_cuda_passes.graph.pattern import root_ops
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import Reason, Report
from et_cuda_passes.graph.rule import (
    Failure,
    GroupRule,
    Keep,
    Notes,
    Requirement,
    Rule,
    Stage,
    call_hook,
    compile_pattern,
)
from et_cuda_passes.graph.selection import Claim, group_matches, select_matches, taken

FindCandidates = Callable[[Program], Iterable[Candidate]]


def apply_passes(
    exported: ExportedProgram,
    passes: Iterable[Any],
    target: Any,
    find_candidates: FindCandidates,
    is_program_pass: Callable[[Any], bool],
    pool: ConstantCache | None = None,
) -> tuple[ExportedProgram, Report]:
    """Run a pass list over a copy of ``exported``.

    Args:
        exported: the program; it is not changed.
        passes: see :func:`et_cuda_passes.graph.passes.parse`.
        target: what rules see as ``m.target``; has a ``name``.
        find_candidates: finds the operators that the report must account for.
        is_program_pass: tells the passes that take a whole ExportedProgram.
        pool: packed constants to share with other methods of the same model.

    Returns:
        The changed program and the report.

    Raises:
        TypeError, ValueError: the pass list is not valid.
        RuleError: a rule failed after it claimed a match; nothing of it is the program's fault.
    """
    entries = parse(passes, is_program_pass)
    report = Report(target.name, [entry.name for entry in entries], bytes_before=_constant_bytes(exported))
    with gc_disabled():
        program = Program(exported, pool)
        tracker = OutcomeTracker(report, find_candidates(program), quiet_rules(entries))
    for stage in stages(entries):
        if stage[0].rule is None:
            program = _run_external_pass(stage[0], program)
            tracker.remap_after_pass(find_candidates(program), stage[0].name)
        else:
            with gc_disabled():
                _run_rules(stage, program, target, tracker)
    with gc_disabled():
        tracker.warn_unrewritten(find_candidates(program))
        result = finish_program(program)
    tracker.finalize()
    report.bytes_after = _constant_bytes(result)
    return result, report


@contextmanager
def gc_disabled() -> Iterator[None]:
    """No cyclic garbage collection inside.

    A rewrite allocates and keeps: each collection would walk all that was built so far and free nothing, which was a
    quarter of the time for 2,000 linears and made the whole more than linear in the graph.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run_rules(stage: Sequence[Pass], program: Program, target: Any, tracker: OutcomeTracker) -> None:
    claims = _match_stage(stage, program, target, tracker)
    chosen, lost = select_matches(claims)
    for loser, winner in lost.items():
        for m in claims[loser].matches:
            tracker.add_conflict(claims[loser].rule.name, m.match, claims[winner].rule.name, claims[winner].root)
    # Keeps are written first: a weight all of whose readers are kept is not rewritten under their feet.
    for claim in sorted((claims[i] for i in chosen), key=lambda claim: not isinstance(claim.rule, Keep)):
        rule, ms = claim.rule, [m for m in claim.matches if not tracker.all_readers_decided(m.match)]
        notes = call_hook(rule, "notes", ms[0].root, program, partial(rule.notes, *ms)) if ms else Notes()
        if not isinstance(notes, Notes):
            raise RuleError(f"rule {rule.name}: notes must return Notes(note, explanation); it returned {notes!r}")
        for m in ms:
            detail = call_hook(rule, "summary", m.root, program, partial(rule.summary, m))
            detail = ", ".join(filter(None, (detail, f"{len(ms)} in one" if len(ms) > 1 else "")))
            told = (notes.note, detail, notes.explanation)
            if isinstance(rule, Keep):
                program.kept.update(m.match.owned)
                program.kept_operands.update(m.match.shared)
                tracker.set_kept(rule.name, m.match, *told)
            else:
                tracker.set_rewritten(rule.name, m.match, taken(rule, m), *told)
        if ms and not isinstance(rule, Keep):
            tracker.track_created(_emit(rule, ms, program))
    tracker.apply_moves()
    if any(not isinstance(claims[i].rule, Keep) for i in chosen):  # else what was read stays known to the next stage
        eliminate_dead_nodes(program, tracker.is_undecided)
        program.refresh()


def _match_stage(stage: Sequence[Pass], program: Program, target: Any, tracker: OutcomeTracker) -> list[Claim]:
    """Every match of the stage's rules whose requires hold; what fell short is in the tracker."""
    nodes: dict[Any, list[Node]] = defaultdict(list)
    order: dict[Node, int] = {}
    for position, node in enumerate(program.subgraphs.nodes()):
        order[node] = position
        nodes[op_of(node)].append(node)
    claims: list[Claim] = []
    for rank, entry in enumerate(stage):
        rule = entry.rule
        assert rule is not None
        form = compile_pattern(rule)
        starts = {node for root in root_ops(form.pattern) for node in nodes.get(root, ())}
        for node in sorted(starts, key=order.__getitem__):
            found = match(form.pattern, node, program.mutated)
            if isinstance(found, Miss):
                places = () if found.expects_rewritten_op else dict.fromkeys((node, *found.reached))
                for reached in filter(tracker.is_undecided, places):
                    tracker.add_miss(reached, Reason(rule.name, "match", found.wanted, found.found))
                continue
            m = Match(found, program, target, rule, form.captures)
            reasons = _failed_requirements(rule, m, "metadata") or _failed_requirements(rule, m, "values")
            if reasons:
                tracker.add_failures(found, reasons)
            elif program.kept.isdisjoint((*found.owned, *taken(rule, m))):
                claims.append(Claim(rule, (m,), rank, tracker.benefit(found)))
        if isinstance(rule, GroupRule):
            claims = group_matches(rule, claims, order, tracker)
    return claims


def _failed_requirements(rule: Rule, m: Match, stage: Stage) -> list[Reason]:
    """Every require of ``stage`` that does not hold, with what it found."""
    reasons: list[Reason] = []
    inner = (*m.match.owned[1:], *m.match.shared) if stage == "metadata" else taken(rule, m)
    for node in m.program.boundary_nodes.intersection(inner):
        reasons = [Reason(rule.name, "match", "nodes on one side of a preserved module's boundary", node.name)]
    for requirement in rule.requirements:
        if requirement.stage != stage:
            continue
        try:
            failure = _check_requirement(rule, requirement, m)
        except Unmet as unmet:
            # A decoder that raises does so in every requirement that calls it; the report says it once.
            failure = Failure(str(unmet))
            if any(reason.found == failure.found for reason in reasons):
                continue
        if failure is not None:
            hint = requirement.hint if failure.hint is None else failure.hint
            reasons.append(Reason(rule.name, stage, requirement.wanted, failure.found, hint))
    return reasons


def _check_requirement(rule: Rule, requirement: Requirement, m: Match) -> Failure | None:
    what = f"requirement {requirement.wanted!r}"
    answer: Any = call_hook(rule, what, m.root, m.program, lambda: requirement.check(m))
    if answer is None or isinstance(answer, Failure):
        return answer
    raise RuleError(
        f"rule {rule.name}: the requirement {requirement.wanted!r} must return None where it holds, and a Failure "
        f"where it does not; it returned {answer!r}"
    )


def _emit(rule: Rule, ms: Sequence[Match], program: Program) -> Mapping[Node, Sequence[Node]]:
    """Rewrite ``ms``; returns each node that was built, with the roots that it stands for."""
    root = ms[0].root
    b = Builder(program, [m.root for m in ms], rule.name)
    new = call_hook(rule, "rewrite", root, program, partial(_call_rewrite, rule, ms, b))
    if not isinstance(new, (list, tuple)) or len(new) != len(ms):
        raise RuleError(f"rule {rule.name} replaced {len(ms)} matches by {new!r}; return a node for each of them")
    for m, node in zip(ms, new, strict=True):
        _replace(rule, m, node, b.for_match(m))
    program.mark_dead(b.created)
    return b.created


def _call_rewrite(rule: Rule, ms: Sequence[Match], b: Builder) -> Sequence[Node]:
    return rule.rewrite_group(b, ms) if isinstance(rule, GroupRule) else [rule.rewrite(b, ms[0])]


def _replace(rule: Rule, m: Match, new: Node, b: Builder) -> None:
    root, program = m.root, b.program
    if not isinstance(new, Node):
        raise RuleError(
            f"rule {rule.name} replaced {root.name} by {new!r}; rewrite must return the node that replaces it"
        )
    if new is root:
        raise RuleError(f"rule {rule.name} left {root.name} as it was; a rule that keeps its matches derives from Keep")
    _check_replacement(rule, root, new)
    _check_mutations(rule, root, b)
    owner = alias_root(new, program.subgraphs.views)
    mutated = root in program.mutated or owner in program.mutated
    if (new not in b.created or new is not owner) and (mutated or program.subgraphs.escapes(root)):
        # `new` has memory that others read as well: a mutation of either would reach the readers of the other. And a
        # branch may not return memory of its operands.
        new = b.call(torch.ops.aten.clone.default, new)
    program.replace(root, new)
    program.mark_dead((*m.match.owned, *m.match.shared))


def _check_replacement(rule: Rule, old: Node, new: Node) -> None:
    """The replacement must have the shape, dtype and device of what it replaces."""
    before, after = old.meta.get("val"), new.meta.get("val")
    if not isinstance(before, torch.Tensor):
        return
    if not isinstance(after, torch.Tensor):
        fix = "build it with b.call" if after is None else "take one of its results: b.call(operator.getitem, node, 0)"
        raise RuleError(f"rule {rule.name} replaced {old.name}, a tensor, by {new.name}, which is none; {fix}")
    same = (
        len(before.shape) == len(after.shape)
        and not any(statically_known_true(a != b) for a, b in zip(before.shape, after.shape, strict=True))
        and before.dtype == after.dtype
        and before.device == after.device
    )
    if not same:
        raise RuleError(
            f"rule {rule.name} replaced {old.name} ({_signature(before)}) by {new.name} ({_signature(after)}), and the "
            "two must be of one shape, dtype and device"
        )


def _check_mutations(rule: Rule, old: Node, b: Builder) -> None:
    """Where a rule replaces an operator that mutates, the replacement must mutate the same memory."""
    views = b.program.subgraphs.views
    kept = {alias_root(operand, views) for node in b.created for operand in mutated_operands(node)}
    lost = [operand.name for operand in mutated_operands(old) if alias_root(operand, views) not in kept]
    if lost:
        raise RuleError(
            f"rule {rule.name} replaced {old.name}, which mutates {', '.join(lost)}, by nodes that do not; build an "
            "operator with the same mutation, or match an operator without one"
        )


def _signature(value: torch.Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _run_external_pass(entry: Pass, program: Program) -> Program:
    """Run a pass that is not a rule, then look that the program it left is whole."""
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
                f"pass {entry.name} reads a tensor of its own, {node.target}; a pass that adds constants must be an "
                "ExecuTorch ExportedProgramPassBase, which can change the signature"
            )
    program.replace_graph(left, entry.name)
    return program


def _constant_bytes(exported: ExportedProgram) -> int:
    """Bytes of all constants, each tensor once, a subclass by its parts."""
    seen: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            for attribute in flatten()[0]:
                add(getattr(tensor, attribute))
        else:
            seen[id(tensor)] = tensor.numel() * tensor.element_size()

    for tensor in (*exported.state_dict.values(), *exported.constants.values()):
        add(tensor)
    return sum(seen.values())
