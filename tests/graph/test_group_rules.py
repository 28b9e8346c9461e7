"""Rules that rewrite several matches together: groups, reports, wrong results, and mutations."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.fx import Node

from et_cuda_passes.graph.errors import RuleError
from et_cuda_passes.graph.pattern import Capture, op
from et_cuda_passes.graph.rule import Failure, GroupRule, Rule, requirement
from tests.helpers import Sketch, apply, names

aten = torch.ops.aten
relu, neg = op(aten.relu.default), op(aten.neg.default)


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
