"""The one loop that applies a pass list: match, require, choose, emit, check; each candidate ends with one outcome."""

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
from et_cuda_passes.graph.constants import ConstantPool
from et_cuda_passes.graph.errors import RuleError, Unmet
from et_cuda_passes.graph.finish import finish_program, sweep
from et_cuda_passes.graph.match import MatchContext
from et_cuda_passes.graph.matcher import Miss, match
from et_cuda_passes.graph.operators import called
from et_cuda_passes.graph.outcomes import Candidate, Ledger
from et_cuda_passes.graph.passes import Pass, parse, stages, untold
from et_cuda_passes.graph.pattern import roots
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import Reason, Report
from et_cuda_passes.graph.rule import Answer, JointRule, Keep, Requirement, Rule, Stage, asked, compiled
from et_cuda_passes.graph.selection import Claim, joined, resolve, taken

FindCandidates = Callable[[Program], Iterable[Candidate]]


def apply_passes(
    exported: ExportedProgram,
    passes: Iterable[Any],
    target: Any,
    find_candidates: FindCandidates,
    is_program_pass: Callable[[Any], bool],
    pool: ConstantPool | None = None,
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
    with paused_collector():
        program = Program(exported, pool)
        ledger = Ledger(report, find_candidates(program), untold(entries))
    for stage in stages(entries):
        if stage[0].rule is None:
            program = _run_opaque(stage[0], program)
            ledger.follow(find_candidates(program), stage[0].name)
        else:
            with paused_collector():
                _run_rules(stage, program, target, ledger)
    with paused_collector():
        ledger.look_over(find_candidates(program))
        result = finish_program(program)
    ledger.close()
    report.bytes_after = _constant_bytes(result)
    return result, report


@contextmanager
def paused_collector() -> Iterator[None]:
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


def _run_rules(stage: Sequence[Pass], program: Program, target: Any, ledger: Ledger) -> None:
    claims = _match_stage(stage, program, target, ledger)
    chosen, lost = resolve(claims)
    for loser, winner in lost.items():
        for m in claims[loser].ms:
            ledger.lost(claims[loser].rule.name, m.match, claims[winner].rule.name, claims[winner].root)
    # Keeps are written first: a weight all of whose readers are kept is not rewritten under their feet.
    for claim in sorted((claims[i] for i in chosen), key=lambda claim: not isinstance(claim.rule, Keep)):
        rule, ms = claim.rule, [m for m in claim.ms if not ledger.is_settled(m.match)]
        for m in ms:
            note, detail, explanation = asked(
                rule, "note, detail or explain", m.root, program, partial(_told, rule, m, ms)
            )
            detail = ", ".join(filter(None, (detail, f"{len(ms)} in one" if len(ms) > 1 else "")))
            told = (note, detail, explanation)
            if isinstance(rule, Keep):
                program.kept.update(m.match.owned)
                program.kept_inputs.update(m.match.shared)
                ledger.keep(rule.name, m.match, *told)
            else:
                ledger.rewrite(rule.name, m.match, taken(rule, m), *told)
        if ms and not isinstance(rule, Keep):
            ledger.made(_emit(rule, ms, program))
    ledger.move()
    if any(not isinstance(claims[i].rule, Keep) for i in chosen):  # else what was read stays known to the next stage
        sweep(program)
        program.refresh()


def _told(rule: Rule, m: MatchContext, ms: Sequence[MatchContext]) -> tuple[str, str, str]:
    return rule.note(m), rule.detail(m), rule.explain(*ms)


def _match_stage(stage: Sequence[Pass], program: Program, target: Any, ledger: Ledger) -> list[Claim]:
    """Every match of the stage's rules whose requires hold; what fell short is in the ledger."""
    nodes: dict[Any, list[Node]] = defaultdict(list)
    order: dict[Node, int] = {}
    for position, node in enumerate(program.branches.nodes()):
        order[node] = position
        nodes[called(node)].append(node)
    claims: list[Claim] = []
    for rank, entry in enumerate(stage):
        rule = entry.rule
        assert rule is not None
        form = compiled(rule)
        starts = {node for root in roots(form.pattern) for node in nodes.get(root, ())}
        for node in sorted(starts, key=order.__getitem__):
            found = match(form.pattern, node, program.written)
            if isinstance(found, Miss):
                places = () if found.of_a_rewrite else dict.fromkeys((node, *found.reached))
                for reached in filter(ledger.is_open, places):
                    ledger.miss(reached, Reason(rule.name, "match", found.wanted, found.found))
                continue
            m = MatchContext(found, program, target, form.captures)
            reasons = _unmet(rule, m, "metadata") or _unmet(rule, m, "values")
            if reasons:
                ledger.unmet(found, reasons)
            elif program.kept.isdisjoint((*found.owned, *taken(rule, m))):
                claims.append(Claim(rule, (m,), rank, ledger.worth(found)))
        if isinstance(rule, JointRule):
            claims = joined(rule, claims, order, ledger)
    return claims


def _unmet(rule: Rule, m: MatchContext, stage: Stage) -> list[Reason]:
    """Every require of ``stage`` that does not hold, with what it found."""
    reasons: list[Reason] = []
    inner = (*m.match.owned[1:], *m.match.shared) if stage == "metadata" else taken(rule, m)
    for node in m.program.at_boundaries.intersection(inner):
        reasons = [Reason(rule.name, "match", "nodes on one side of a preserved module's boundary", node.name)]
    for requirement in rule.requires:
        if requirement.stage != stage:
            continue
        try:
            holds, found, *better = _answer(rule, requirement, m)
        except Unmet as unmet:
            # A question that cannot be asked fails every require that asks it; once in the report is enough.
            holds, found, better = False, str(unmet), []
            if any(reason.found == found for reason in reasons):
                continue
        if not holds:
            hint = better[0] if better else requirement.hint
            reasons.append(Reason(rule.name, stage, requirement.wanted, found, hint))
    return reasons


def _answer(rule: Rule, requirement: Requirement, m: MatchContext) -> Answer:
    what = f"require {requirement.wanted!r}"
    answer = asked(rule, what, m.root, m.program, lambda: requirement.check(rule, m))
    if not isinstance(answer, tuple) or len(answer) not in (2, 3) or not isinstance(answer[0], bool):
        raise RuleError(
            f"rule {rule.name}: the require {requirement.wanted!r} must return (holds, found) or (holds, found, hint), "
            f"with holds a bool (of a dynamic size, what statically_known_true says); it returned {answer!r}"
        )
    return answer


def _emit(rule: Rule, ms: Sequence[MatchContext], program: Program) -> Mapping[Node, Sequence[Node]]:
    """Rewrite ``ms``; returns each node that was built, with the roots that it stands for."""
    root = ms[0].root
    b = Builder(program, [m.root for m in ms], rule.name)
    new = asked(rule, "emit", root, program, partial(_emitted, rule, ms, b))
    if not isinstance(new, (list, tuple)) or len(new) != len(ms):
        raise RuleError(f"rule {rule.name} replaced {len(ms)} matches by {new!r}; return a node for each of them")
    for m, node in zip(ms, new, strict=True):
        _replace(rule, m, node, b.at(m))
    program.abandon(b.created)
    return b.created


def _emitted(rule: Rule, ms: Sequence[MatchContext], b: Builder) -> Sequence[Node]:
    return rule.emit_together(b, ms) if isinstance(rule, JointRule) else [rule.emit(b, ms[0])]


def _replace(rule: Rule, m: MatchContext, new: Node, b: Builder) -> None:
    root, program = m.root, b.program
    if not isinstance(new, Node):
        raise RuleError(f"rule {rule.name} replaced {root.name} by {new!r}; emit must return the node that replaces it")
    if new is root:
        raise RuleError(f"rule {rule.name} left {root.name} as it was; a rule that keeps its matches derives from Keep")
    _check(rule, root, new)
    _check_mutations(rule, root, b)
    owner = alias_root(new, program.branches.views)
    mutated = root in program.written or owner in program.written
    if (new not in b.created or new is not owner) and (mutated or program.branches.is_handed_back(root)):
        # `new` has memory that others read as well: a mutation of either would reach the readers of the other. And a
        # branch may not return memory of its operands.
        new = b.call(torch.ops.aten.clone.default, new)
    program.replace(root, new)
    program.abandon((*m.match.owned, *m.match.shared))


def _check(rule: Rule, old: Node, new: Node) -> None:
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
    views = b.program.branches.views
    kept = {alias_root(operand, views) for node in b.created for operand in mutated_operands(node)}
    lost = [operand.name for operand in mutated_operands(old) if alias_root(operand, views) not in kept]
    if lost:
        raise RuleError(
            f"rule {rule.name} replaced {old.name}, which mutates {', '.join(lost)}, by nodes that do not; build an "
            "operator with the same mutation, or match an operator without one"
        )


def _signature(value: torch.Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _run_opaque(entry: Pass, program: Program) -> Program:
    """Run a pass that is not a rule, then look that the program it left is whole."""
    if entry.on_program:
        result = entry.value(finish_program(program))
        exported = getattr(result, "exported_program", result)
        if not isinstance(exported, ExportedProgram):
            raise TypeError(f"pass {entry.name} returned {type(exported).__name__}, not an ExportedProgram")
        after = Program(exported, program.pool)
        after.keep_again(*program.places())
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
    program.adopt(left, entry.name)
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
