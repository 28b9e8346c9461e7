"""The loop: one outcome a candidate, a rule's own faults, conflicts, keeps, rewrites that feed rewrites, same bytes."""

import io
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule, Node

import et_cuda_passes as ecp
from et_cuda_passes.graph.driver import apply_passes
from et_cuda_passes.graph.errors import RuleError
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.graph.pattern import Capture, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Keep, Rule, requirement
from et_cuda_passes.targets.rewrite import is_program_pass
from et_cuda_passes.testing import assert_rewrites
from tests.helpers import TARGET, Sketch, apply, chain, names

aten = torch.ops.aten
relu, neg, add = op(aten.relu.default), op(aten.neg.default), op(aten.add.Tensor)


OPS = {"relu": aten.relu.default, "neg": aten.neg.default, "abs": aten.abs.default}


class ReluToNeg(Rule):
    """relu(x) -> neg(x)"""

    def pattern(self, x: Capture) -> Any:
        return relu(x)

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.neg.default, m.x)


def relu_program(n: int = 1) -> torch.export.ExportedProgram:
    """``n`` relus in a row."""
    sketch = Sketch()
    x = sketch.input("x", 4)
    for _ in range(n):
        x = sketch.call(aten.relu.default, x)
    return sketch.program(x)


def rewriting(rewrite: Any) -> Rule:
    """A rule that takes every relu and replaces it by what ``rewrite(b, m)`` returns."""
    return type("Faulty", (ReluToNeg,), {"rewrite": lambda self, b, m: rewrite(b, m)})()  # type: ignore[no-any-return]


# A rule's own faults ----------------------------------------------------------------------------------------------


def test_a_rewrite_that_raises_is_the_rule_s_fault_by_name() -> None:
    def rewrite(b: Any, m: Any) -> Node:
        raise KeyError("no such thing")

    before = relu_program()
    with pytest.raises(RuleError, match=r"rule faulty: at relu_default its rewrite failed: 'no such thing'") as error:
        apply(before, [rewriting(rewrite)])
    assert isinstance(error.value.__cause__, KeyError)
    assert names(before) == ["aten.relu"]


@pytest.mark.parametrize(
    ("rewrite", "found"),
    [
        (lambda b, m: b.call(aten.view.default, m.x, [2, 2]), "torch.float32 [2, 2]"),
        (lambda b, m: b.call(aten._to_copy.default, m.x, dtype=torch.float64), "torch.float64 [4]"),
        (lambda b, m: b.call(aten.sum.default, m.x), "torch.float32 []"),
        (lambda b, m: b.call(aten._to_copy.default, m.x, device=torch.device("meta")), "on meta"),
        (lambda b, m: b.call(aten.split.Tensor, m.x, 2), "a tensor, by split_tensor, which is none"),
    ],
    ids=["shape", "dtype", "rank", "device", "no tensor"],
)
def test_a_rewrite_of_another_shape_dtype_or_device_is_the_rule_s_fault(rewrite: Any, found: str) -> None:
    with pytest.raises(RuleError) as error:
        apply(relu_program(), [rewriting(rewrite)])
    assert "rule faulty replaced relu_default" in str(error.value)
    assert found in str(error.value)


@pytest.mark.parametrize("value", [None, 3, "neg"])
def test_a_rewrite_that_returns_no_node_is_the_rule_s_fault(value: Any) -> None:
    with pytest.raises(RuleError, match="rule faulty"):
        apply(relu_program(), [rewriting(lambda b, m: value)])


def test_a_require_that_answers_wrongly_names_its_rule() -> None:
    class Bare(ReluToNeg):
        @requirement("an answer")
        def answer(self, m: Any) -> Any:
            return True

    with pytest.raises((RuleError, TypeError), match="bare"):
        apply(relu_program(), [Bare()])


# Outcomes ---------------------------------------------------------------------------------------------------------


def test_every_candidate_has_exactly_one_outcome_in_graph_order() -> None:
    class OnlyEvery(ReluToNeg):
        @requirement("an even place")
        def even(self, m: Any) -> Any:
            return m.root.name in ("relu_default", "relu_default_2"), m.root.name

    sketch = Sketch()
    x = sketch.input("x", 4)
    for _ in range(4):
        x = sketch.call(aten.relu.default, x)
    x = sketch.call(aten.abs.default, x)
    program = sketch.program(x)
    after, report = apply(program, [OnlyEvery()], aten.relu.default, aten.abs.default)
    assert [(o.node, o.status) for o in report.outcomes] == [
        ("relu_default", "rewritten"),
        ("relu_default_1", "missed"),
        ("relu_default_2", "rewritten"),
        ("relu_default_3", "missed"),
        ("abs_default", "missed"),
    ]
    assert [r.found for r in report.outcomes[1].reasons] == ["relu_default_1"]
    assert "no pass for target test takes aten.abs" in str(report.outcomes[4].reasons[0])
    assert names(after) == ["aten.neg", "aten.relu", "aten.neg", "aten.relu", "aten.abs"]


def test_a_pattern_that_does_not_fit_says_how_far_it_got() -> None:
    class Pair(ReluToNeg):
        def pattern(self, x: Capture) -> Any:
            return relu(neg(x))

    _, report = apply(relu_program(2), [Pair()], aten.relu.default)
    assert [str(o.reasons[0]) for o in report.outcomes] == [
        "pair wanted aten.neg, found placeholder x",
        "pair wanted aten.neg, found aten.relu (relu_default)",
    ]


def test_what_a_rule_missed_another_may_take_and_its_reasons_are_gone() -> None:
    class Never(ReluToNeg):
        @requirement("never")
        def never(self, m: Any) -> Any:
            return False, "always"

    _, report = apply(relu_program(), [Never(), ReluToNeg()], aten.relu.default)
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.rule, outcome.reasons) == ("rewritten", "relu_to_neg", [])


# Conflicts and keeps ----------------------------------------------------------------------------------------------


class Pair(ReluToNeg):
    """relu(relu(x)) -> neg(x)"""

    def pattern(self, x: Capture) -> Any:
        return relu(relu(x))


def test_overlapping_matches_are_chosen_for_the_most_and_the_losers_reported() -> None:
    """Four in a row hold three pairs: the two outer ones."""
    after, report = apply(relu_program(4), [Pair()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.neg"]
    assert report.conflicts == ["pair at relu_default_2 gave way to pair at relu_default_1"]
    assert report.counts() == {"rewritten": 4, "kept": 0, "missed": 0, "pair": 2}


def test_the_earlier_pass_has_the_first_choice_and_the_other_says_who_won() -> None:
    class OnlyMiddle(ReluToNeg):
        @requirement("the middle one")
        def middle(self, m: Any) -> Any:
            return m.root.name == "relu_default_1", m.root.name

    after, report = apply(relu_program(2), [OnlyMiddle(), Pair()], aten.relu.default)
    assert names(after) == ["aten.relu", "aten.neg"]
    assert report.conflicts == ["pair at relu_default_1 gave way to only_middle at relu_default_1"]
    assert [o.status for o in report.outcomes] == ["missed", "rewritten"]
    assert any(r.stage == "conflict" and "only_middle" in r.found for r in report.outcomes[0].reasons)
    after, report = apply(relu_program(2), [Pair(), OnlyMiddle()], aten.relu.default)
    assert names(after) == ["aten.neg"]


class KeepRelu(Keep):
    """relu(x) -> itself"""

    def pattern(self, x: Capture) -> Any:
        return relu(x)


class Late(ReluToNeg):
    """The same rewrite, in a stage of its own."""

    after = ("keep_relu",)


@pytest.mark.parametrize("later", [ReluToNeg(), Late(), Pair()])
def test_what_is_kept_stays_for_every_later_pass(later: Rule) -> None:
    after, report = apply(relu_program(2), [KeepRelu(), later], aten.relu.default)
    assert names(after) == ["aten.relu", "aten.relu"]
    assert [(o.status, o.rule) for o in report.outcomes] == [("kept", "keep_relu")] * 2


def idle(module: GraphModule) -> None:
    """A pass that changes nothing."""


class KeepReader(Keep):
    """relu(neg(x)) -> itself"""

    def pattern(self, x: Capture) -> Any:
        return relu(neg(x, shared=True))


class Fold(ReluToNeg):
    """neg(x) -> x * -1, which stands for a weight that is replaced for all who read it"""

    def pattern(self, x: Capture) -> Any:
        return neg(x)

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.mul.Tensor, m.x, -1)


def readers(program: Program) -> list[Candidate]:
    """Every reader of a neg is a candidate, the negs its weights."""
    found = []
    for node in program.graph.nodes:
        weights = tuple(n for n in node.all_input_nodes if op_of(n) is aten.neg.default)
        if weights:
            found.append(Candidate(node, weights, ", ".join(w.name for w in weights)))
    return found


def run(program: torch.export.ExportedProgram, passes: list[Any]) -> tuple[torch.export.ExportedProgram, ecp.Report]:
    return apply_passes(program, passes, TARGET, readers, is_program_pass)


def shared_weight() -> torch.export.ExportedProgram:
    """A neg that a relu and an abs read."""
    sketch = Sketch()
    weight = sketch.call(aten.neg.default, sketch.input("x", 4))
    return sketch.program(sketch.call(aten.relu.default, weight), sketch.call(aten.abs.default, weight))


def nothing() -> Any:
    """An ExecuTorch pass that looks and changes nothing."""
    from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult

    class Nothing(ExportedProgramPassBase):  # type: ignore[misc]
        def call(self, exported_program: torch.export.ExportedProgram) -> Any:
            return ExportedProgramPassResult(exported_program, False)

    return Nothing()


@pytest.mark.parametrize("between", [list, lambda: [idle], lambda: [nothing()]], ids=["rule", "callable", "executorch"])
def test_a_weight_that_a_keep_reads_is_replaced_for_its_other_reader_alone(between: Any) -> None:
    after, report = run(shared_weight(), [KeepReader(), *between(), Fold()])
    assert [(o.op, o.status, o.rule) for o in report.outcomes] == [
        ("aten.relu", "kept", "keep_reader"),
        ("aten.abs", "rewritten", "fold"),
    ]
    (kept,) = after.graph.find_nodes(op="call_function", target=aten.relu.default)
    (other,) = after.graph.find_nodes(op="call_function", target=aten.abs.default)
    assert kept.args[0].target is aten.neg.default
    assert other.args[0].target is aten.mul.Tensor


@pytest.mark.parametrize("between", [list, lambda: [idle], lambda: [nothing()]], ids=["rule", "callable", "executorch"])
def test_a_weight_that_only_keeps_read_is_left_alone(between: Any) -> None:
    sketch = Sketch()
    weight = sketch.call(aten.neg.default, sketch.input("x", 4))
    program = sketch.program(sketch.call(aten.relu.default, weight), sketch.call(aten.relu.default, weight))
    after, report = run(program, [KeepReader(), *between(), Fold()])
    assert names(after) == ["aten.neg", "aten.relu", "aten.relu"]
    assert report.counts() == {"rewritten": 0, "kept": 2, "missed": 0, "keep_reader": 2}


@pytest.mark.parametrize("between", [lambda: [idle], lambda: [nothing()]], ids=["callable", "executorch"])
def test_an_outcome_of_an_earlier_stage_is_not_told_again(between: Any) -> None:
    after, report = run(shared_weight(), [Fold(), *between()])
    assert [(o.op, o.status, o.rule) for o in report.outcomes] == [
        ("aten.relu", "rewritten", "fold"),
        ("aten.abs", "rewritten", "fold"),
    ]
    assert names(after) == ["aten.mul", "aten.relu", "aten.abs"]


class KeepAlone(Keep):
    """abs(x) -> itself, whatever x is"""

    def pattern(self, x: Capture) -> Any:
        return op(aten.abs.default)(x)


@pytest.mark.parametrize("passes", [[KeepAlone(), ReluToNeg()], [ReluToNeg(), KeepAlone()]])
def test_what_a_kept_operator_reads_from_outside_its_match_is_rewritten_for_it_too(passes: list[Rule]) -> None:
    sketch = Sketch()
    inner = sketch.call(aten.relu.default, sketch.input("x", 4))
    after, report = apply(sketch.program(sketch.call(aten.abs.default, inner)), passes, *OPS.values())
    assert [o.status for o in report.outcomes] == ["rewritten", "kept"]
    assert names(after) == ["aten.neg", "aten.abs"]


def test_an_operator_that_reads_two_weights_has_both_folded() -> None:
    sketch = Sketch()
    first, second = sketch.weight("a", dtype=torch.float32), sketch.weight("b", dtype=torch.float32, seed=1)
    x = sketch.input("x", 16, 64)
    program = sketch.program(sketch.call(aten.add.Tensor, x, sketch.call(aten.mul.Tensor, first, second)))
    after, report = assert_rewrites(program, "xnnpack", expect={"fold_dequantize": 2, "missed": 0}, rtol=0)
    assert names(after) == ["aten.mul", "aten.add"]
    assert [o.status for o in report.outcomes] == ["rewritten"]


def test_a_candidate_of_two_weights_of_which_one_stays_is_not_called_rewritten() -> None:
    class FoldFirst(Fold):
        @requirement("the first one")
        def first(self, m: Any) -> Any:
            return m.root.name == "neg_default", m.root.name

    sketch = Sketch()
    first, second = (sketch.call(aten.neg.default, sketch.input(name, 4)) for name in "xy")
    _, report = run(sketch.program(sketch.call(aten.add.Tensor, first, second)), [FoldFirst()])
    (outcome,) = report.outcomes
    assert outcome.status == "missed"
    assert [str(r) for r in outcome.reasons] == ["fold_first wanted the first one, found neg_default_1"]


class KeepAbs(Keep):
    """abs(relu(x)) -> itself"""

    def pattern(self, x: Capture) -> Any:
        return op(aten.abs.default)(relu(x))


@given(st.lists(st.sampled_from(sorted(OPS)), max_size=12), st.permutations([KeepAbs(), Pair(), ReluToNeg(), Fold()]))
@settings(max_examples=60)
def test_in_any_chain_with_any_order_of_passes_each_candidate_has_one_outcome(ops: list[str], passes: Any) -> None:
    sketch = Sketch()
    x = sketch.input("x", 4)
    for name in ops:
        x = sketch.call(OPS[name], x)
    program = sketch.program(x)
    after, report = apply(program, passes, *OPS.values())
    assert [o.node for o in report.outcomes] == [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert all(outcome.reasons for outcome in report.outcomes if outcome.status == "missed")
    assert all((outcome.rule is None) == (outcome.status == "missed") for outcome in report.outcomes)
    stays = sum(outcome.status != "rewritten" for outcome in report.outcomes)
    made = sum(count for name, count in report.applied.items() if name != "keep_abs")
    assert len(names(after)) == stays + made
    # Either relus are left because they are kept or none is: ReluToNeg takes all that it may.
    left = {o.node for o in report.outcomes if o.op == "aten.relu" and o.status != "rewritten"}
    assert left == {o.node for o in report.outcomes if o.op == "aten.relu" and o.status == "kept"}


# Rewrites that feed each other ------------------------------------------------------------------------------------


def test_captures_follow_what_earlier_rewrites_put_in_their_place() -> None:
    after, _ = assert_rewrites(chain(5), expect={"linear_int4": 5, "missed": 0})
    calls = [n for n in after.graph.nodes if n.op == "call_function"]
    assert [n.args[0] for n in calls] == [after.graph.find_nodes(op="placeholder")[-1], *calls[:-1]]
    assert not after.graph.find_nodes(op="call_function", target=aten.linear.default)


def test_a_linear_whose_result_is_written_in_place_is_rewritten() -> None:
    """y = l(x); y += r: the new operator returns memory of its own, as the old one did."""
    sketch = Sketch()
    x, r = sketch.input("x", 2, 64, dtype=torch.bfloat16), sketch.input("r", 2, 16, dtype=torch.bfloat16)
    y = sketch.call(aten.linear.default, x, sketch.weight("w"))
    program = sketch.program(sketch.call(aten.add_.Tensor, y, r))
    after, _ = assert_rewrites(program, expect={"linear_int4": 1, "missed": 0})
    assert names(after) == ["et_cuda_passes.int4_linear_mma_tiled", "aten.add_"]


def test_a_result_that_is_written_in_place_is_not_replaced_by_what_others_read() -> None:
    """relu(x) -> x, and then the relu is doubled in place: x must not be."""
    sketch = Sketch()
    x = sketch.input("x", 4)
    doubled = sketch.call(aten.mul_.Tensor, sketch.call(aten.relu.default, x), 2)
    program = sketch.program(doubled, sketch.call(aten.add.Tensor, x, 1))
    after, _ = apply(program, [rewriting(lambda b, m: m.x)], aten.relu.default)
    given = torch.ones(4)
    assert [t.tolist() for t in after.module()(given)] == [[2.0] * 4, [2.0] * 4]
    assert given.tolist() == [1.0] * 4


def test_a_rule_may_put_its_own_input_in_a_match_s_place() -> None:
    after, _ = apply(relu_program(3), [rewriting(lambda b, m: m.x)], aten.relu.default)
    assert names(after) == []
    x = torch.randn(4)
    assert torch.equal(after.module()(x), x)


def test_a_weight_and_its_scale_are_decoded_once_for_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from et_cuda_passes.quant import affine

    decoded: list[Node] = []
    decode = affine.decode

    def counting(program: Any, node: Node) -> Any:
        decoded.append(node)
        return decode(program, node)

    monkeypatch.setattr(affine, "decode", counting)
    ecp.rewrite(chain(3), "cuda", expect={"linear_int4": 3})
    assert len(decoded) == 3


# Same input, same bytes out ---------------------------------------------------------------------------------------


def saved(program: torch.export.ExportedProgram) -> dict[str, bytes]:
    """The members of what torch.export.save writes; an archive's own header has the time in it."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    # A number drawn for each archive that is written.
    members.pop(".data/serialization_id", None)
    return members


def test_two_rewrites_of_one_program_are_equal_to_the_byte() -> None:
    program = chain(3)
    (one, first), (two, second) = (ecp.rewrite(program, "cuda") for _ in range(2))
    members, again = saved(one), saved(two)
    assert members.keys() == again.keys()
    assert len(members) > 3
    assert [name for name in members if members[name] != again[name]] == []
    assert first.to_json() == second.to_json()
    assert str(first) == str(second)
