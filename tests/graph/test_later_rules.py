"""What rules make of what earlier ones made: each candidate has one outcome, and it says what became of it."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from et_cuda_passes.graph.driver import apply_passes
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import Capture, op
from et_cuda_passes.graph.rule import GroupRule, Keep, Rule, requirement
from et_cuda_passes.targets.rewrite import is_program_pass
from tests.graph.test_driver import idle, nothing
from tests.helpers import TARGET, Sketch, apply, calls_of, names

aten = torch.ops.aten
RELU, NEG, ABS, ADD = aten.relu.default, aten.neg.default, aten.abs.default, aten.add.Tensor


def rule(name: str, before: Any, made: Any, detail: str = "", explanation: str = "", after: str = "") -> Rule:
    """before(x) -> made(x), which runs behind the rule ``after``."""

    def pattern(self: Rule, x: Capture) -> Any:
        return op(before)(x)

    members = {
        "pattern": pattern,
        "rewrite": lambda self, b, m: b.call(made, m.x),
        "summary": lambda self, m: detail,
        "explain": lambda self, *ms: explanation,
        "name": name,
        "after": (after,) if after else (),
    }
    return type(name, (Rule,), members)()  # type: ignore[no-any-return]


FIRST = rule("first", RELU, NEG, "one", "as one")


def relus(count: int = 1) -> torch.export.ExportedProgram:
    """``count`` relus of x."""
    sketch = Sketch()
    x = sketch.input("x", 4)
    return sketch.program(*(sketch.call(RELU, x) for _ in range(count)))


def told(report: Any) -> list[tuple[str | None, str, str]]:
    assert all(outcome.status == "rewritten" for outcome in report.outcomes)
    return [(outcome.rule, outcome.detail, outcome.explanation) for outcome in report.outcomes]


@pytest.mark.parametrize(
    ("detail", "explanation", "wanted"),
    [
        ("two", "as two", ("one, two", "as two")),
        ("two", "", ("one, two", "as one")),
        ("", "as two", ("one", "as two")),
        ("", "", ("one", "as one")),
    ],
)
def test_what_a_later_rule_has_to_say_is_in_the_outcome(detail: str, explanation: str, wanted: Any) -> None:
    after, report = apply(relus(), [FIRST, rule("later", NEG, ABS, detail, explanation, "first")], RELU)
    assert names(after) == ["aten.abs"]
    assert told(report) == [("first", *wanted)]
    assert report.counts() == {"rewritten": 1, "kept": 0, "missed": 0, "first": 1, "later": 1}


def test_a_detail_where_there_was_none() -> None:
    _, report = apply(relus(), [rule("first", RELU, NEG), rule("later", NEG, ABS, "two", after="first")], RELU)
    assert told(report) == [("first", "two", "")]


def test_rules_between_carry_it_on() -> None:
    chain = [RELU, NEG, ABS, aten.sin.default, aten.cos.default]
    between = [rule(f"r{i}", *chain[i : i + 2], after=f"r{i - 1}" if i > 1 else "first") for i in (1, 2)]
    passes = [FIRST, *between, rule("last", *chain[3:], "last", "as last", "r2")]
    after, report = apply(relus(2), passes, RELU)
    assert names(after) == ["aten.cos"] * 2
    assert told(report) == [("first", "one, last", "as last")] * 2


def test_a_place_that_no_earlier_rule_made_is_nobody_s() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4)
    program = sketch.program(sketch.call(RELU, x), sketch.call(NEG, x))
    _, report = apply(program, [FIRST, rule("later", NEG, ABS, "two", after="first")], RELU)
    assert told(report) == [("first", "one, two", "as one")]
    assert report.applied["later"] == 2


class Sum(Rule):
    """neg(x) + neg(y) -> neg(x + y), of which the second neg is outside the match"""

    after = ("first",)

    def pattern(self, x: Capture, other: Capture) -> Any:
        return op(ADD)(op(NEG)(x), other)

    def takes(self, m: Any) -> Any:
        return (m.other,)

    def summary(self, m: Any) -> str:
        return "summed"

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(NEG, b.call(ADD, m.x, m.other.args[0]))


def test_what_a_rule_takes_beside_its_match_is_told_as_well() -> None:
    sketch = Sketch()
    first, second, third = (sketch.call(RELU, sketch.input(name, 4)) for name in "xyz")
    program = sketch.program(sketch.call(ADD, first, second), third)
    after, report = apply(program, [FIRST, Sum()], RELU)
    assert names(after) == ["aten.neg", "aten.add", "aten.neg"]
    assert [outcome.detail for outcome in report.outcomes] == ["one, summed", "one, summed", "one"]


def test_what_a_rule_takes_beside_its_match_no_other_of_its_stage_has() -> None:
    sketch = Sketch()
    first, second = (sketch.call(RELU, sketch.input(name, 4)) for name in "xy")
    program = sketch.program(sketch.call(ADD, first, second))
    after, report = apply(program, [FIRST, Sum(), rule("other", NEG, ABS, "two", after="first")], RELU)
    assert names(after) == ["aten.add", "aten.neg"]
    assert report.conflicts == [
        f"other at {name} gave way to sum at add_tensor" for name in ("relu_default", "relu_default_1")
    ]
    assert [outcome.detail for outcome in report.outcomes] == ["one, summed"] * 2


def test_what_is_kept_is_not_taken_beside_a_match() -> None:
    class KeepSecond(Keep):
        """neg(y) -> itself"""

        after = ("first",)

        def pattern(self, x: Capture) -> Any:
            return op(NEG)(x)

        @requirement("the second input")
        def second(self, m: Any) -> Any:
            return m.x.name == "y", m.x.name

    class Late(Sum):
        """The same, in a stage of its own."""

        after = ("keep_second",)

    sketch = Sketch()
    first, second = (sketch.call(RELU, sketch.input(name, 4)) for name in "xy")
    program = sketch.program(sketch.call(ADD, first, second))
    for later in (Sum(), Late()):
        after, report = apply(program, [FIRST, KeepSecond(), later], RELU)
        assert names(after) == ["aten.neg", "aten.neg", "aten.add"]
        assert told(report) == [("first", "one", "as one")] * 2


def test_a_candidate_that_the_later_rule_decides_has_the_outcome_of_that_rule() -> None:
    sketch = Sketch()
    program = sketch.program(sketch.call(ABS, sketch.call(RELU, sketch.input("x", 4))))

    class Both(Sum):
        """abs(neg(x)) -> sin(x)"""

        def pattern(self, x: Capture) -> Any:
            return op(ABS)(op(NEG)(x))

        def takes(self, m: Any) -> Any:
            return ()

        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(aten.sin.default, m.x)

    _, report = apply(program, [FIRST, Both()], RELU, ABS)
    assert told(report) == [("first", "one, summed", "as one"), ("both", "summed", "")]


class Together(GroupRule):
    """relu(x), relu(x), ... -> abs(neg(x)), abs(neg(x)), ..."""

    shared_captures = ("x",)

    def pattern(self, x: Capture) -> Any:
        return op(RELU)(x)

    def group_key(self, m: Any) -> Any:
        return m.x

    def rewrite_group(self, b: Any, ms: Any) -> list[Node]:
        y = b.call(NEG, ms[0].x)
        return [b.for_match(m).call(ABS, y) for m in ms]


def test_of_what_is_made_together_a_later_rule_takes_all_or_one() -> None:
    class OnlySecond(Rule):
        """abs(x) * 2 -> sin(x)"""

        after = ("together",)

        def pattern(self, x: Capture) -> Any:
            return op(aten.mul.Tensor)(op(ABS)(x), 2)

        def summary(self, m: Any) -> str:
            return "doubled"

        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(aten.sin.default, m.x)

    sketch = Sketch()
    x = sketch.input("x", 4)
    first, second = (sketch.call(RELU, x) for _ in range(2))
    program = sketch.program(first, sketch.call(aten.mul.Tensor, second, 2))
    _, report = apply(program, [Together(), OnlySecond()], RELU)
    assert [outcome.detail for outcome in report.outcomes] == ["2 in one", "2 in one, doubled"]
    _, report = apply(program, [Together(), rule("later", NEG, aten.cos.default, "cosine", after="together")], RELU)
    assert [outcome.detail for outcome in report.outcomes] == ["2 in one, cosine"] * 2


def test_a_later_rule_may_take_several_together() -> None:
    class Later(Together):
        """neg(x), neg(x), ... -> abs(sin(x)), abs(sin(x)), ..."""

        after = ("first",)

        def pattern(self, x: Capture) -> Any:
            return op(NEG)(x)

        def rewrite_group(self, b: Any, ms: Any) -> list[Node]:
            y = b.call(aten.sin.default, ms[0].x)
            return [b.for_match(m).call(ABS, y) for m in ms]

    _, report = apply(relus(3), [FIRST, Later()], RELU)
    assert told(report) == [("first", "one, 3 in one", "as one")] * 3


def test_one_thing_is_said_once() -> None:
    """Of one relu two nodes are made, and a later rule says the same of each."""

    class Two(Rule):
        """relu(x) -> neg(neg(x))"""

        def pattern(self, x: Capture) -> Any:
            return op(RELU)(x)

        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(NEG, b.call(NEG, m.x))

    _, report = apply(relus(), [Two(), rule("later", NEG, ABS, "two", after="two")], RELU)
    assert report.applied == {"two": 1, "later": 2}
    assert told(report) == [("two", "two", "")]


def test_what_keeps_a_place_makes_nothing_of_it() -> None:
    class KeepNeg(Keep):
        """neg(x) -> itself"""

        after = ("first",)

        def pattern(self, x: Capture) -> Any:
            return op(NEG)(x)

        def summary(self, m: Any) -> str:
            return "kept"

    _, report = apply(relus(), [FIRST, KeepNeg()], RELU)
    assert told(report) == [("first", "one", "as one")]


def copying(module: GraphModule) -> GraphModule:
    """A pass that hands back another graph."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


@pytest.mark.parametrize(
    ("between", "detail"),
    # A pass that copies the graph takes away what is known of its nodes.
    [(lambda: idle, "one, two"), (lambda: copying, "one"), (nothing, "one")],
    ids=["idle", "copying", "executorch"],
)
def test_behind_an_opaque_pass_there_is_one_outcome_still(between: Any, detail: str) -> None:
    passes = [FIRST, between(), rule("later", NEG, ABS, "two", after="first")]
    after, report = apply_passes(relus(), passes, TARGET, calls_of(RELU), is_program_pass)
    assert [op_of(node) for node in after.graph.nodes if node.op == "call_function"] == [ABS]
    assert [(outcome.rule, outcome.detail) for outcome in report.outcomes] == [("first", detail)]
