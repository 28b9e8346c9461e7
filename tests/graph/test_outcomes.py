"""Outcomes of candidates that several rules rewrite: one per candidate, with the texts of all these rules."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import Capture, op
from et_cuda_passes.graph.rule import GroupRule, Keep, Notes, Rule
from et_cuda_passes.testing import Sketch
from tests.helpers import apply, idle, idle_program_pass, names

aten = torch.ops.aten
RELU, NEG, ABS, ADD = aten.relu.default, aten.neg.default, aten.abs.default, aten.add.Tensor


def rule(name: str, before: Any, new: Any, detail: str = "", explanation: str = "") -> Rule:
    """before(x) -> new(x)"""

    def pattern(self: Rule, x: Capture) -> Any:
        return op(before)(x)

    members = {
        "pattern": pattern,
        "rewrite": lambda self, b, m: b.call(new, m.x),
        "summary": lambda self, m: detail,
        "notes": lambda self, *ms: Notes("", explanation),
        "name": name,
    }
    return type(name, (Rule,), members)()  # type: ignore[no-any-return]


FIRST = rule("first", RELU, NEG, "one", "as one")


def relus(count: int = 1) -> torch.export.ExportedProgram:
    """``count`` relus of x."""
    sketch = Sketch()
    x = sketch.input("x", 4)
    return sketch.program(*(sketch.call(RELU, x) for _ in range(count)))


def texts(report: Any) -> list[tuple[str | None, str, str]]:
    """Rule, detail and explanation of each outcome; all must be rewritten."""
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
def test_texts_of_a_later_rule_are_in_the_outcome(detail: str, explanation: str, wanted: Any) -> None:
    after, report = apply(relus(), [FIRST, rule("later", NEG, ABS, detail, explanation)], RELU)
    assert names(after) == ["aten.abs"]
    assert texts(report) == [("first", *wanted)]
    assert report.counts() == {"rewritten": 1, "kept": 0, "missed": 0, "first": 1, "later": 1}


def test_summary_of_a_later_rule_fills_an_empty_detail() -> None:
    _, report = apply(relus(), [rule("first", RELU, NEG), rule("later", NEG, ABS, "two")], RELU)
    assert texts(report) == [("first", "two", "")]


def test_texts_reach_the_outcome_over_several_rules() -> None:
    chain = [RELU, NEG, ABS, aten.sin.default, aten.cos.default]
    between = [rule(f"r{i}", *chain[i : i + 2]) for i in (1, 2)]
    passes = [FIRST, *between, rule("last", *chain[3:], "last", "as last")]
    after, report = apply(relus(2), passes, RELU)
    assert names(after) == ["aten.cos"] * 2
    assert texts(report) == [("first", "one, last", "as last")] * 2


def test_texts_of_a_rule_at_an_exported_node_reach_no_outcome() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4)
    program = sketch.program(sketch.call(RELU, x), sketch.call(NEG, x))
    _, report = apply(program, [FIRST, rule("later", NEG, ABS, "two")], RELU)
    assert texts(report) == [("first", "one, two", "as one")]
    assert report.applied["later"] == 2


def test_candidate_that_a_later_rule_decides_has_the_outcome_of_that_rule() -> None:
    sketch = Sketch()
    program = sketch.program(sketch.call(ABS, sketch.call(RELU, sketch.input("x", 4))))

    class Both(Rule):
        """abs(neg(x)) -> sin(x)"""

        def pattern(self, x: Capture) -> Any:
            return op(ABS)(op(NEG)(x))

        def summary(self, m: Any) -> str:
            return "both"

        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(aten.sin.default, m.x)

    _, report = apply(program, [FIRST, Both()], RELU, ABS)
    assert texts(report) == [("first", "one, both", "as one"), ("both", "both", "")]


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


def test_later_rule_reaches_the_outcomes_of_the_group_members_it_matches() -> None:
    class OnlySecond(Rule):
        """abs(x) * 2 -> sin(x)"""

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
    _, report = apply(program, [Together(), rule("later", NEG, aten.cos.default, "cosine")], RELU)
    assert [outcome.detail for outcome in report.outcomes] == ["2 in one, cosine"] * 2


def test_later_group_rule_reaches_the_outcomes_of_all_its_matches() -> None:
    class Later(Together):
        """neg(x), neg(x), ... -> abs(sin(x)), abs(sin(x)), ..."""

        def pattern(self, x: Capture) -> Any:
            return op(NEG)(x)

        def rewrite_group(self, b: Any, ms: Any) -> list[Node]:
            y = b.call(aten.sin.default, ms[0].x)
            return [b.for_match(m).call(ABS, y) for m in ms]

    _, report = apply(relus(3), [FIRST, Later()], RELU)
    assert texts(report) == [("first", "one, 3 in one", "as one")] * 3


def test_summary_is_appended_once() -> None:
    """The first rule builds two nodes for one relu, and the later rule has the same summary for both."""

    class Two(Rule):
        """relu(x) -> neg(neg(x))"""

        def pattern(self, x: Capture) -> Any:
            return op(RELU)(x)

        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(NEG, b.call(NEG, m.x))

    _, report = apply(relus(), [Two(), rule("later", NEG, ABS, "two")], RELU)
    assert report.applied == {"two": 1, "later": 2}
    assert texts(report) == [("two", "two", "")]


def test_keep_rule_appends_no_summary() -> None:
    class KeepNeg(Keep):
        """neg(x) -> itself"""

        def pattern(self, x: Capture) -> Any:
            return op(NEG)(x)

        def summary(self, m: Any) -> str:
            return "kept"

    _, report = apply(relus(), [FIRST, KeepNeg()], RELU)
    assert texts(report) == [("first", "one", "as one")]


def copying(module: GraphModule) -> GraphModule:
    """A pass that returns a copy of the graph."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


@pytest.mark.parametrize(
    ("between", "detail"),
    # After a copy of the graph, the candidate of a new node is unknown.
    [(lambda: idle, "one, two"), (lambda: copying, "one"), (idle_program_pass, "one")],
    ids=["idle", "copying", "executorch"],
)
def test_candidate_has_one_outcome_after_an_external_pass(between: Any, detail: str) -> None:
    passes = [FIRST, between(), rule("later", NEG, ABS, "two")]
    after, report = apply(relus(), passes, RELU)
    assert [op_of(node) for node in after.graph.nodes if node.op == "call_function"] == [ABS]
    assert [(outcome.rule, outcome.detail) for outcome in report.outcomes] == [("first", detail)]
