"""The driver: wrong rules, outcomes, conflicts, kept matches, rewrites of rewrites, group rules, and equal bytes."""

import gc
import io
import weakref
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim
from torch.fx import Node

import et_cuda_passes as ecp
from et_cuda_passes.executorch.lower import gc_throttled
from et_cuda_passes.graph.driver import gc_disabled
from et_cuda_passes.graph.errors import RuleError
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.graph.pattern import Capture, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import Failure, GroupRule, Keep, Rule, requirement
from et_cuda_passes.testing import Sketch, assert_rewrites
from tests.helpers import apply, apply_with, chain, idle, idle_program_pass, names

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
    """A rule that replaces every relu by the result of ``rewrite(b, m)``."""
    return type("Faulty", (ReluToNeg,), {"rewrite": lambda self, b, m: rewrite(b, m)})()  # type: ignore[no-any-return]


# Wrong rules ----------------------------------------------------------------------------------------------------


def test_rewrite_that_raises_is_an_error_that_names_its_rule() -> None:
    def rewrite(b: Any, m: Any) -> Node:
        raise KeyError("no such thing")

    before = relu_program()
    with pytest.raises(
        RuleError, match=r"rule faulty: at relu_default its rewrite failed: KeyError: 'no such thing'"
    ) as error:
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
        (lambda b, m: b.call(aten.split.Tensor, m.x, 2), "a tensor, by split_tensor, which is not a tensor"),
    ],
    ids=["shape", "dtype", "rank", "device", "no tensor"],
)
def test_replacement_with_another_shape_dtype_or_device_is_refused(rewrite: Any, found: str) -> None:
    with pytest.raises(RuleError) as error:
        apply(relu_program(), [rewriting(rewrite)])
    assert "rule faulty replaced relu_default" in str(error.value)
    assert found in str(error.value)


def test_replacement_with_the_size_of_the_example_is_refused() -> None:
    class Relu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

    program = torch.export.export(Relu(), (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    with pytest.raises(RuleError, match=r"rule faulty replaced relu \(torch.float32 \[s\d+, 4\] .*\[3, 4\]"):
        apply(program, [rewriting(lambda b, m: b.call(aten.new_zeros.default, m.x, [3, 4]))])
    rows = rewriting(lambda b, m: b.call(aten.new_zeros.default, m.x, [b.size(m.x, 0), 4]))
    assert names(apply(program, [rows])[0]) == ["aten.sym_size", "aten.new_zeros"]


def test_replacement_that_mutates_a_value_of_the_program_is_refused() -> None:
    with pytest.raises(RuleError, match=r"relu__default \(aten.relu_\) mutates x, which relu_default does not mutate"):
        apply(relu_program(), [rewriting(lambda b, m: b.call(aten.relu_.default, m.x))])
    own = rewriting(lambda b, m: b.call(aten.neg_.default, b.call(aten.clone.default, m.x)))
    assert names(apply(relu_program(), [own])[0]) == ["aten.clone", "aten.neg_"]


@pytest.mark.parametrize("value", [None, 3, "neg"])
def test_rewrite_that_returns_no_node_is_refused(value: Any) -> None:
    with pytest.raises(RuleError, match="rule faulty"):
        apply(relu_program(), [rewriting(lambda b, m: value)])


def test_requirement_with_a_wrong_result_names_its_rule() -> None:
    answers: Any = requirement("an answer")(lambda m: True)

    class Bare(ReluToNeg):
        requirements = (answers,)

    with pytest.raises(RuleError, match="rule bare: the requirement 'an answer' must return None"):
        apply(relu_program(), [Bare()])


# Outcomes ---------------------------------------------------------------------------------------------------------


def test_candidates_have_one_outcome_each_in_graph_order() -> None:
    @requirement("an even place")
    def place_is_even(m: Any) -> Failure | None:
        return None if m.root.name in ("relu_default", "relu_default_2") else Failure(m.root.name)

    class OnlyEven(ReluToNeg):
        requirements = (place_is_even,)

    sketch = Sketch()
    x = sketch.input("x", 4)
    for _ in range(4):
        x = sketch.call(aten.relu.default, x)
    x = sketch.call(aten.abs.default, x)
    program = sketch.program(x)
    after, report = apply(program, [OnlyEven()], aten.relu.default, aten.abs.default)
    assert [(o.node, o.status) for o in report.outcomes] == [
        ("relu_default", "rewritten"),
        ("relu_default_1", "missed"),
        ("relu_default_2", "rewritten"),
        ("relu_default_3", "missed"),
        ("abs_default", "missed"),
    ]
    assert [r.found for r in report.outcomes[1].reasons] == ["relu_default_1"]
    assert "no pass for target test rewrites aten.abs" in str(report.outcomes[4].reasons[0])
    assert names(after) == ["aten.neg", "aten.relu", "aten.neg", "aten.relu", "aten.abs"]


def test_pattern_that_does_not_fit_reports_where_it_ended() -> None:
    class Pair(ReluToNeg):
        def pattern(self, x: Capture) -> Any:
            return relu(neg(x))

    _, report = apply(relu_program(2), [Pair()], aten.relu.default)
    assert [str(o.reasons[0]) for o in report.outcomes] == [
        "pair wanted aten.neg, found placeholder x",
        "pair wanted aten.neg, found aten.relu (relu_default)",
    ]


def test_reasons_of_a_miss_vanish_if_a_later_rule_rewrites_the_place() -> None:
    class Never(ReluToNeg):
        requirements = (requirement("never")(lambda m: Failure("always")),)

    _, report = apply(relu_program(), [Never(), ReluToNeg()], aten.relu.default)
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.rule, outcome.reasons) == ("rewritten", "relu_to_neg", [])


# Conflicts and keeps ----------------------------------------------------------------------------------------------


class Pair(ReluToNeg):
    """relu(relu(x)) -> neg(x)"""

    def pattern(self, x: Capture) -> Any:
        return relu(relu(x))


def test_overlapping_matches_of_a_rule_are_chosen_in_order_and_the_others_reported() -> None:
    """Four in a row contain three pairs; the first and the last do not overlap."""
    after, report = apply(relu_program(4), [Pair()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.neg"]
    assert report.conflicts == ["pair at relu_default_2 gave way to pair at relu_default_1"]
    assert report.counts() == {"rewritten": 4, "kept": 0, "missed": 0, "pair": 2}


@requirement("the second relu")
def is_second(m: Any) -> Failure | None:
    return None if m.root.name == "relu_default_1" else Failure(m.root.name)


class OnlySecond(ReluToNeg):
    requirements = (is_second,)


def test_rule_that_is_first_in_the_list_has_the_place_and_later_rules_see_its_result() -> None:
    after, report = apply(relu_program(2), [OnlySecond(), Pair()], aten.relu.default)
    assert names(after) == ["aten.relu", "aten.neg"]
    assert report.conflicts == []
    first, second = report.outcomes
    assert (second.status, second.rule) == ("rewritten", "only_second")
    assert [str(reason) for reason in first.reasons] == [
        "only_second wanted the second relu, found relu_default",
        "pair wanted aten.relu, found placeholder x",
    ]
    after, report = apply(relu_program(2), [Pair(), OnlySecond()], aten.relu.default)
    assert names(after) == ["aten.neg"]
    assert [(outcome.status, outcome.rule) for outcome in report.outcomes] == [("rewritten", "pair")] * 2


class KeepRelu(Keep):
    """relu(x) -> itself"""

    def pattern(self, x: Capture) -> Any:
        return relu(x)


@pytest.mark.parametrize("later", [ReluToNeg(), Pair()])
def test_kept_match_is_not_changed_by_later_rules(later: Rule) -> None:
    after, report = apply(relu_program(2), [KeepRelu(), later], aten.relu.default)
    assert names(after) == ["aten.relu", "aten.relu"]
    assert [(o.status, o.rule) for o in report.outcomes] == [("kept", "keep_relu")] * 2


def test_match_with_a_kept_node_names_that_node() -> None:
    @requirement("the first relu")
    def is_first(m: Any) -> Failure | None:
        return None if m.root.name == "relu_default" else Failure(m.root.name)

    class KeepFirst(KeepRelu):
        requirements = (is_first,)

    after, report = apply(relu_program(2), [KeepFirst(), Pair()], aten.relu.default)
    assert names(after) == ["aten.relu", "aten.relu"]
    kept, missed = report.outcomes
    assert (kept.status, missed.status) == ("kept", "missed")
    assert missed.reasons[1:] == [
        Reason("pair", "conflict", "nodes that no earlier rule keeps as they are", "relu_default")
    ]


class KeepReader(Keep):
    """relu(neg(x)) -> itself"""

    def pattern(self, x: Capture) -> Any:
        return relu(neg(x, shared=True))


class Fold(ReluToNeg):
    """neg(x) -> x * -1, in place of a weight that is replaced for all its readers"""

    def pattern(self, x: Capture) -> Any:
        return neg(x)

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.mul.Tensor, m.x, -1)


def readers(program: Program) -> list[Candidate]:
    """Every reader of a neg is a candidate; the negs are its weights."""
    found = []
    for node in program.graph.nodes:
        weights = tuple(n for n in node.all_input_nodes if op_of(n) is aten.neg.default)
        if weights:
            found.append(Candidate(node, weights, ", ".join(w.name for w in weights)))
    return found


def run(program: torch.export.ExportedProgram, passes: list[Any]) -> tuple[torch.export.ExportedProgram, ecp.Report]:
    return apply_with(program, passes, readers)


def shared_weight() -> torch.export.ExportedProgram:
    """A neg that a relu and an abs read."""
    sketch = Sketch()
    weight = sketch.call(aten.neg.default, sketch.input("x", 4))
    return sketch.program(sketch.call(aten.relu.default, weight), sketch.call(aten.abs.default, weight))


@pytest.mark.parametrize(
    "between", [list, lambda: [idle], lambda: [idle_program_pass()]], ids=["rule", "callable", "executorch"]
)
def test_weight_of_a_kept_match_is_replaced_for_its_other_reader_only(between: Any) -> None:
    after, report = run(shared_weight(), [KeepReader(), *between(), Fold()])
    assert [(o.op, o.status, o.rule) for o in report.outcomes] == [
        ("aten.relu", "kept", "keep_reader"),
        ("aten.abs", "rewritten", "fold"),
    ]
    (kept,) = after.graph.find_nodes(op="call_function", target=aten.relu.default)
    (other,) = after.graph.find_nodes(op="call_function", target=aten.abs.default)
    assert kept.args[0].target is aten.neg.default
    assert other.args[0].target is aten.mul.Tensor


@pytest.mark.parametrize(
    "between", [list, lambda: [idle], lambda: [idle_program_pass()]], ids=["rule", "callable", "executorch"]
)
def test_weight_that_only_kept_matches_read_is_not_replaced(between: Any) -> None:
    sketch = Sketch()
    weight = sketch.call(aten.neg.default, sketch.input("x", 4))
    program = sketch.program(sketch.call(aten.relu.default, weight), sketch.call(aten.relu.default, weight))
    after, report = run(program, [KeepReader(), *between(), Fold()])
    assert names(after) == ["aten.neg", "aten.relu", "aten.relu"]
    assert report.counts() == {"rewritten": 0, "kept": 2, "missed": 0, "keep_reader": 2}


@pytest.mark.parametrize("between", [lambda: [idle], lambda: [idle_program_pass()]], ids=["callable", "executorch"])
def test_outcome_survives_a_later_external_pass(between: Any) -> None:
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
def test_input_of_a_kept_match_from_outside_the_match_is_rewritten(passes: list[Rule]) -> None:
    sketch = Sketch()
    inner = sketch.call(aten.relu.default, sketch.input("x", 4))
    after, report = apply(sketch.program(sketch.call(aten.abs.default, inner)), passes, *OPS.values())
    assert [o.status for o in report.outcomes] == ["rewritten", "kept"]
    assert names(after) == ["aten.neg", "aten.abs"]


def test_operator_of_two_weights_has_both_folded() -> None:
    sketch = Sketch()
    first, second = sketch.weight("a", dtype=torch.float32), sketch.weight("b", dtype=torch.float32, seed=1)
    x = sketch.input("x", 16, 64)
    program = sketch.program(sketch.call(aten.add.Tensor, x, sketch.call(aten.mul.Tensor, first, second)))
    after, report = assert_rewrites(program, "xnnpack", expect={"fold_dequantize": 2, "missed": 0}, rtol=0)
    assert names(after) == ["aten.mul", "aten.add"]
    assert [o.status for o in report.outcomes] == ["rewritten"]


def test_candidate_of_two_weights_is_missed_if_one_is_not_replaced() -> None:
    @requirement("the first one")
    def is_first(m: Any) -> Failure | None:
        return None if m.root.name == "neg_default" else Failure(m.root.name)

    class FoldFirst(Fold):
        requirements = (is_first,)

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


def sigmoid(rule: type[Rule]) -> Rule:
    """``rule`` with another result, which no rule matches."""
    return type(rule.__name__, (rule,), {"rewrite": lambda self, b, m: b.call(aten.sigmoid.default, m.x)})()  # type: ignore[no-any-return]


@given(
    st.lists(st.sampled_from(sorted(OPS)), max_size=12),
    st.permutations([KeepAbs(), sigmoid(Pair), sigmoid(ReluToNeg), sigmoid(Fold)]),
)
@settings(max_examples=60)
def test_candidates_have_one_outcome_each_in_any_chain_with_any_order_of_passes(ops: list[str], passes: Any) -> None:
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
    built = sum(count for name, count in report.applied.items() if name != "keep_abs")
    assert len(names(after)) == stays + built
    # ReluToNeg rewrites every relu that is not kept.
    left = {o.node for o in report.outcomes if o.op == "aten.relu" and o.status != "rewritten"}
    assert left == {o.node for o in report.outcomes if o.op == "aten.relu" and o.status == "kept"}


# Rewrites that feed each other ------------------------------------------------------------------------------------


def test_captures_are_the_replacements_of_earlier_rewrites() -> None:
    after, _ = assert_rewrites(chain(5), expect={"linear_int4": 5, "missed": 0})
    calls = [n for n in after.graph.nodes if n.op == "call_function"]
    assert [n.args[0] for n in calls] == [after.graph.find_nodes(op="placeholder")[-1], *calls[:-1]]
    assert not after.graph.find_nodes(op="call_function", target=aten.linear.default)


def test_linear_with_a_mutated_result_is_rewritten() -> None:
    """y = l(x); y += r: the new operator returns new memory, as the former did."""
    sketch = Sketch()
    x, r = sketch.input("x", 2, 64, dtype=torch.bfloat16), sketch.input("r", 2, 16, dtype=torch.bfloat16)
    y = sketch.call(aten.linear.default, x, sketch.weight("w"))
    program = sketch.program(sketch.call(aten.add_.Tensor, y, r))
    after, _ = assert_rewrites(program, expect={"linear_int4": 1, "missed": 0})
    assert names(after) == ["et_cuda_passes.int4_linear_mma_tiled", "aten.add_"]


def test_mutated_result_is_replaced_by_a_copy_of_a_node_with_other_readers() -> None:
    """The rule replaces relu(x) by x, and the program doubles the relu in place: x must not change."""
    sketch = Sketch()
    x = sketch.input("x", 4)
    doubled = sketch.call(aten.mul_.Tensor, sketch.call(aten.relu.default, x), 2)
    program = sketch.program(doubled, sketch.call(aten.add.Tensor, x, 1))
    after, _ = apply(program, [rewriting(lambda b, m: m.x)], aten.relu.default)
    given = torch.ones(4)
    assert [t.tolist() for t in after.module()(given)] == [[2.0] * 4, [2.0] * 4]
    assert given.tolist() == [1.0] * 4


def test_rewrite_may_return_its_input() -> None:
    after, _ = apply(relu_program(3), [rewriting(lambda b, m: m.x)], aten.relu.default)
    assert names(after) == []
    x = torch.randn(4)
    assert torch.equal(after.module()(x), x)


def test_weight_is_decoded_once_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from et_cuda_passes.quant import decoders

    decoded: list[Node] = []
    decode = decoders.decode

    def counting(program: Any, node: Node) -> Any:
        decoded.append(node)
        return decode(program, node)

    monkeypatch.setattr(decoders, "decode", counting)
    ecp.rewrite(chain(3), "cuda", expect={"linear_int4": 3})
    assert len(decoded) == 3


# Same input, same bytes ------------------------------------------------------------------------------------------


def saved(program: torch.export.ExportedProgram) -> dict[str, bytes]:
    """The members of the archive that torch.export.save writes; its header contains the time."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    # torch draws a number for each archive.
    members.pop(".data/serialization_id", None)
    return members


def test_rewrites_of_the_same_program_are_equal_to_the_byte() -> None:
    program = chain(3)
    (one, first), (two, second) = (ecp.rewrite(program, "cuda") for _ in range(2))
    members, again = saved(one), saved(two)
    assert members.keys() == again.keys()
    assert len(members) > 3
    assert [name for name in members if members[name] != again[name]] == []
    assert first.to_json() == second.to_json()
    assert str(first) == str(second)


# Garbage collection --------------------------------------------------------------------------------------------------


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def cycles_left(count: int) -> int:
    """Create ``count`` objects that only refer to themselves, and return how many still exist."""
    created = [weakref.ref(Cycle()) for _ in range(count)]
    return sum(each() is not None for each in created)


@pytest.mark.parametrize(("context", "excluded"), [(gc_disabled, True), (gc_throttled, True), (gc_throttled, False)])
def test_collector_state_is_restored_afterwards(
    context: Callable[[], AbstractContextManager[None]], excluded: bool
) -> None:
    """``excluded``: the caller has excluded objects from collections, as the tests do."""

    def state() -> tuple[object, ...]:
        return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()

    def failing() -> None:
        with context():
            assert state() != before
            raise KeyError

    (gc.freeze if excluded else gc.unfreeze)()
    try:
        before = state()
        with pytest.raises(KeyError):
            failing()
        assert state() == before
    finally:
        gc.freeze()


def test_disabled_collector_frees_nothing_and_throttled_collector_frees_large_piles() -> None:
    count = gc.get_threshold()[0] * 3
    assert cycles_left(count) < count
    with gc_disabled():
        assert cycles_left(count) == count
    with gc_throttled():
        assert cycles_left(count) == count
        assert cycles_left(count * 100) < count * 100


def test_collector_that_is_disabled_stays_disabled() -> None:
    gc.disable()
    try:
        for context in (gc_disabled, gc_throttled):
            with context():
                assert not gc.isenabled()
            assert not gc.isenabled()
    finally:
        gc.enable()


# Group rules ---------------------------------------------------------------------------------------------------------


@requirement("a name without a 9")
def name_has_no_9(m: Any) -> Failure | None:
    return Failure(m.root.name) if "9" in m.root.name else None


class Together(GroupRule):
    """relu(x), relu(x), ... -> abs(neg(x)), abs(neg(x)), ..."""

    shared_captures = ("x",)
    requirements = (name_has_no_9,)

    def pattern(self, x: Capture) -> Any:
        return relu(x)

    def group_key(self, m: Any) -> Any:
        return m.x

    def rewrite_group(self, b: Any, ms: Any) -> Sequence[Node]:
        y = b.call(aten.neg.default, ms[0].x)
        return [b.for_match(m).call(aten.abs.default, y) for m in ms]


class Single(Rule):
    """relu(x) -> sigmoid(x)"""

    def pattern(self, x: Capture) -> Any:
        return relu(x)

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.sigmoid.default, m.x)


def siblings(count: int) -> torch.export.ExportedProgram:
    """``count`` relus of x, then a relu of the first one."""
    sketch = Sketch()
    x = sketch.input("x", 4)
    results = [sketch.call(aten.relu.default, x) for _ in range(count)]
    return sketch.program(*results, sketch.call(aten.relu.default, results[0]))


def outcomes(report: Any) -> list[tuple[str, str, str | None]]:
    return [(o.node, o.status, o.rule) for o in report.outcomes]


def test_matches_with_equal_keys_become_one_rewrite_with_an_outcome_each() -> None:
    after, report = apply(siblings(3), [Together()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.abs", "aten.abs", "aten.abs", "aten.relu"]
    assert outcomes(report)[:3] == [(f"relu_default{i}", "rewritten", "together") for i in ("", "_1", "_2")]
    assert [o.detail for o in report.outcomes[:3]] == ["3 in one"] * 3
    assert report.counts()["together"] == 3
    (reason,) = report.outcomes[3].reasons
    assert str(reason) == "together wanted another match to rewrite together with, found none"


def test_match_that_fails_a_requirement_is_not_in_the_group() -> None:
    _, report = apply(siblings(10), [Together()], aten.relu.default)
    assert [o.status for o in report.outcomes] == ["rewritten"] * 9 + ["missed"] * 2
    assert "a name without a 9" in str(report.outcomes[9].reasons[0])


def test_single_match_is_left_to_later_rules() -> None:
    program = siblings(2)
    after, report = apply(program, [Together(), Single()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.abs", "aten.abs", "aten.sigmoid"]
    assert [o.rule for o in report.outcomes] == ["together", "together", "single"]
    after, report = apply(program, [Single(), Together()], aten.relu.default)
    assert names(after) == ["aten.sigmoid"] * 3
    assert report.conflicts == []


def test_groups_that_read_each_other_are_both_rewritten() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4)
    first, second = (sketch.call(aten.relu.default, x) for _ in range(2))
    program = sketch.program(second, *(sketch.call(aten.relu.default, first) for _ in range(2)))
    after, _ = apply(program, [Together()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.abs", "aten.abs", "aten.neg", "aten.abs", "aten.abs"]
    value = torch.randn(4)
    for got in after.module()(value):
        assert torch.equal(got, value.abs())


def test_mutated_input_excludes_a_match_from_the_group() -> None:
    sketch = Sketch()
    x = sketch.call(aten.neg.default, sketch.input("x", 4))
    first = sketch.call(aten.relu.default, x)
    sketch.call(aten.add_.Tensor, x, 1)
    program = sketch.program(first, sketch.call(aten.relu.default, x))
    after, report = apply(program, [Together()], aten.relu.default)
    assert names(after) == names(program)
    assert all("never mutated, found neg" in str(o.reasons[0]) for o in report.outcomes)


def test_input_computed_after_the_first_match_excludes_a_match() -> None:
    class Sum(Together):
        def pattern(self, x: Capture, other: Capture) -> Any:
            return op(aten.add.Tensor)(x, other)

    sketch = Sketch()
    x = sketch.input("x", 4)
    first, second = (sketch.call(aten.add.Tensor, x, sketch.input(name, 4)) for name in "ab")
    third = sketch.call(aten.add.Tensor, x, sketch.call(aten.neg.default, first))
    after, report = apply(sketch.program(first, second, third), [Sum()], aten.add.Tensor)
    assert [o.status for o in report.outcomes] == ["rewritten", "rewritten", "missed"]
    assert "that are computed before add_tensor and never mutated" in str(report.outcomes[2].reasons[0])
    after.graph.lint()


def test_nodes_of_a_group_have_the_provenance_of_the_roots_they_stand_for() -> None:
    after, _ = apply(siblings(2), [Together()], aten.relu.default)
    new = [node for node in after.graph.nodes if node.op == "call_function"][:3]
    sources = [[source.name for source in node.meta["from_node"]] for node in new]
    assert sources == [["relu_default", "relu_default_1"], ["relu_default"], ["relu_default_1"]]


@pytest.mark.parametrize(
    ("rewrite", "fault"),
    [
        (lambda b, ms: [ms[0].x], "replaced 2 matches by .*; return one node for each"),
        (lambda b, ms: [ms[0].x, None], "rewrite must return a node"),
        (lambda b, ms: [b.call(aten.view.default, ms[0].x, [2, 2])] * 2, r"torch.float32 \[2, 2\]"),
    ],
)
def test_wrong_result_of_rewrite_group_names_the_rule(rewrite: Any, fault: str) -> None:
    rule = type("Faulty", (Together,), {"rewrite_group": lambda self, b, ms: rewrite(b, ms)})()
    with pytest.raises(RuleError, match=f"rule faulty .*{fault}"):
        apply(siblings(2), [rule])


def test_rewrite_for_one_length_only_is_refused() -> None:
    """With a guard on a dynamic size, the program would refuse every other size."""

    class Fixed(Single):
        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(aten.view.default, b.call(aten.view.default, m.x, [3, 4]), m.val(m.x).shape)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    program = torch.export.export(Model(), (torch.randn(3, 4),), dynamic_shapes=({0: Dim("n", min=2, max=9)},))
    with pytest.raises(RuleError, match="depends on the program.s dynamic shapes"):
        apply(program, [Fixed()])
