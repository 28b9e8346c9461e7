"""Rules that take several matches together: who goes with whom, reports, conflicts, faults, and writes in place."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.fx import Node

from et_cuda_passes.graph.errors import RuleError
from et_cuda_passes.graph.pattern import Capture, op
from et_cuda_passes.graph.rule import GroupRule, Rule, requirement
from tests.helpers import Sketch, apply, names

aten = torch.ops.aten
relu, neg = op(aten.relu.default), op(aten.neg.default)


class Together(GroupRule):
    """relu(x), relu(x), ... -> slices of relu(stack of them)"""

    shared_captures = ("x",)
    partner = "another relu of this input"

    def pattern(self, x: Capture) -> Any:
        return relu(x)

    @requirement("a name without a 9")
    def nine(self, m: Any) -> Any:
        return "9" not in m.root.name, m.root.name

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
    """``count`` relus of x, then one of the first of them."""
    sketch = Sketch()
    x = sketch.input("x", 4)
    results = [sketch.call(aten.relu.default, x) for _ in range(count)]
    return sketch.program(*results, sketch.call(aten.relu.default, results[0]))


def outcomes(report: Any) -> list[tuple[str, str, str | None]]:
    return [(o.node, o.status, o.rule) for o in report.outcomes]


def test_matches_of_one_key_become_one_rewrite_and_each_has_its_outcome() -> None:
    after, report = apply(siblings(3), [Together()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.abs", "aten.abs", "aten.abs", "aten.relu"]
    assert outcomes(report)[:3] == [(f"relu_default{i}", "rewritten", "together") for i in ("", "_1", "_2")]
    assert [o.detail for o in report.outcomes[:3]] == ["3 in one"] * 3
    assert report.counts()["together"] == 3
    (reason,) = report.outcomes[3].reasons
    assert str(reason) == "together wanted another relu of this input, found none"


def test_a_match_that_a_require_refuses_is_not_among_them() -> None:
    _, report = apply(siblings(10), [Together()], aten.relu.default)
    assert [o.status for o in report.outcomes] == ["rewritten"] * 9 + ["missed"] * 2
    assert "a name without a 9" in str(report.outcomes[9].reasons[0])


def test_a_later_rule_takes_what_was_left_alone_and_an_earlier_one_what_it_wants() -> None:
    program = siblings(2)
    after, report = apply(program, [Together(), Single()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.abs", "aten.abs", "aten.sigmoid"]
    assert [o.rule for o in report.outcomes] == ["together", "together", "single"]
    after, report = apply(program, [Single(), Together()], aten.relu.default)
    assert names(after) == ["aten.sigmoid"] * 3
    assert report.conflicts == []


def test_groups_that_feed_each_other() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4)
    first, second = (sketch.call(aten.relu.default, x) for _ in range(2))
    program = sketch.program(second, *(sketch.call(aten.relu.default, first) for _ in range(2)))
    after, _ = apply(program, [Together()], aten.relu.default)
    assert names(after) == ["aten.neg", "aten.abs", "aten.abs", "aten.neg", "aten.abs", "aten.abs"]
    value = torch.randn(4)
    for got in after.module()(value):
        assert torch.equal(got, value.abs())


def test_an_input_that_is_written_in_place_keeps_them_apart() -> None:
    sketch = Sketch()
    x = sketch.call(aten.neg.default, sketch.input("x", 4))
    first = sketch.call(aten.relu.default, x)
    sketch.call(aten.add_.Tensor, x, 1)
    program = sketch.program(first, sketch.call(aten.relu.default, x))
    after, report = apply(program, [Together()], aten.relu.default)
    assert names(after) == names(program)
    assert all("nothing writes in place, found neg" in str(o.reasons[0]) for o in report.outcomes)


def test_an_input_of_its_own_that_is_computed_too_late_keeps_one_out() -> None:
    class Sum(Together):
        def pattern(self, x: Capture, other: Capture) -> Any:
            return op(aten.add.Tensor)(x, other)

    sketch = Sketch()
    x = sketch.input("x", 4)
    first, second = (sketch.call(aten.add.Tensor, x, sketch.input(name, 4)) for name in "ab")
    third = sketch.call(aten.add.Tensor, x, sketch.call(aten.neg.default, first))
    after, report = apply(sketch.program(first, second, third), [Sum()], aten.add.Tensor)
    assert [o.status for o in report.outcomes] == ["rewritten", "rewritten", "missed"]
    assert "where the first of them is computed" in str(report.outcomes[2].reasons[0])
    after.graph.lint()


def test_what_is_emitted_names_the_places_that_it_stands_for() -> None:
    after, _ = apply(siblings(2), [Together()], aten.relu.default)
    made = [node for node in after.graph.nodes if node.op == "call_function"][:3]
    sources = [[source.name for source in node.meta["from_node"]] for node in made]
    assert sources == [["relu_default", "relu_default_1"], ["relu_default"], ["relu_default_1"]]


@pytest.mark.parametrize(
    ("rewrite", "fault"),
    [
        (lambda b, ms: [ms[0].x], "replaced 2 matches by .*; return a node for each"),
        (lambda b, ms: [ms[0].x, None], "rewrite must return the node"),
        (lambda b, ms: [b.call(aten.view.default, ms[0].x, [2, 2])] * 2, r"torch.float32 \[2, 2\]"),
    ],
)
def test_a_fault_in_rewrite_group_names_the_rule(rewrite: Any, fault: str) -> None:
    rule = type("Faulty", (Together,), {"rewrite_group": lambda self, b, ms: rewrite(b, ms)})()
    with pytest.raises(RuleError, match=f"rule faulty .*{fault}"):
        apply(siblings(2), [rule])


def test_a_rewrite_that_holds_for_one_length_alone_is_the_rule_s_fault() -> None:
    """A guard put on a dynamic size would make the program refuse every other."""

    class Fixed(Single):
        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(aten.view.default, b.call(aten.view.default, m.x, [3, 4]), m.val(m.x).shape)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    program = torch.export.export(Model(), (torch.randn(3, 4),), dynamic_shapes=({0: Dim("n", min=2, max=9)},))
    with pytest.raises(RuleError, match="dynamic shapes leave open"):
        apply(program, [Fixed()])
