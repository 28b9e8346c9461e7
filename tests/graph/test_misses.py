"""Why rules do not act: reasons of missed candidates, other places, and places that a rule rebuilds for later rules."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

import et_cuda_passes as ecp
from et_cuda_passes.graph.pattern import any_of, op
from et_cuda_passes.graph.rule import Failure, Keep, Rule, requirement
from et_cuda_passes.testing import Quantized, Sketch, assert_misses
from tests.helpers import chain, names

aten = torch.ops.aten


def quantized() -> ExportedProgram:
    """relu(linear(x, weight))"""
    sketch = Sketch()
    y = sketch.call(aten.linear.default, sketch.input("x", 2, 64), sketch.weight("w", dtype=torch.float32))
    return sketch.program(sketch.call(aten.relu.default, y))


def patterned(pattern: Callable[[Any, Any], Any]) -> Rule:
    """A rule with this pattern of x."""
    members = {"pattern": pattern, "rewrite": lambda self, b, m: b.call(aten.neg.default, m.x)}
    return type("Nested", (Rule,), members)()  # type: ignore[no-any-return]


# Places that a rule rebuilds -----------------------------------------------------------------------------------------


class Again(Rule):
    """linear(x, w) -> linear(x, w), with the quantized weight"""

    def pattern(self, x: Any) -> Any:
        return op(aten.linear.default)(x, op(torch.ops.torchao.dequantize_affine.default)(..., name="w", shared=True))

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.linear.default, m.x, m.w)


class Transposed(Again):
    """linear(x, w) -> x @ t(w): another operator reads the weight"""

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.mm.default, m.x, b.call(aten.t.default, m.w))


def test_linear_that_a_rule_leaves_quantized_is_open_to_later_rules() -> None:
    _, report = ecp.rewrite(quantized(), "cpu", [Again()])
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.node, report.applied) == ("missed", "linear_default", {"again": 1})
    first = type("First", (Again,), {})()
    _, report = ecp.rewrite(quantized(), "cpu", ecp.default_passes("cpu").insert_before("linear_int4", first))
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.rule, report.applied) == (
        "rewritten",
        "linear_int4",
        {"first": 1, "linear_int4": 1},
    )
    assert report.warnings == []


def test_new_operator_that_reads_a_quantized_weight_is_missed_with_the_rule_that_built_it() -> None:
    _, report = ecp.rewrite(quantized(), "cpu", [Transposed()])
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.node, outcome.op, outcome.fqn) == ("missed", "linear_default", "aten.mm", "w.data")
    assert [str(reason) for reason in outcome.reasons] == [
        "transposed built this aten.mm, which still reads a quantized weight",
        "no pass after transposed rewrites aten.mm; add a rule for it, or leave the weight unquantized",
    ]
    assert report.warnings == []


class FoldFactor(Rule):
    """linear(x * c, dequantize(q, scale)) -> linear(x, dequantize(q, scale * c))"""

    def pattern(self, x: Any, c: Any) -> Any:
        return op(aten.linear.default)(op(aten.mul.Tensor)(x, c), op(ecp.DEQUANTIZE)(..., name="weight", shared=True))

    def rewrite(self, b: Any, m: Any) -> Node:
        weight = ecp.weight_of(m)
        scale = b.constant("w.folded", weight, m.c, lambda: ecp.weight_values(b.program, weight).scale * m.c)
        _, block, _, *rest = m.weight.args
        return b.call(aten.linear.default, m.x, b.call(ecp.DEQUANTIZE, weight.data, block, scale, *rest))  # type: ignore[no-any-return]


class FoldWeight(Rule):
    """dequantize(q, scale) -> dequantize(q, 2 * scale)"""

    def pattern(self) -> Any:
        return op(ecp.DEQUANTIZE)(..., name="weight")

    def rewrite(self, b: Any, m: Any) -> Node:
        weight = ecp.weight_of(m)
        scale = b.constant("w.doubled", weight, "2", lambda: ecp.weight_values(b.program, weight).scale * 2)
        _, block, _, *rest = m.weight.args
        return b.call(ecp.DEQUANTIZE, weight.data, block, scale, *rest)  # type: ignore[no-any-return]


def scaled(group: int) -> ExportedProgram:
    """linear(2 x, weight)"""
    sketch = Sketch()
    x = sketch.call(aten.mul.Tensor, sketch.input("x", 2, 64), 2.0)
    return sketch.program(sketch.call(aten.linear.default, x, sketch.weight("w", group=group, dtype=torch.float32)))


@pytest.mark.parametrize("rule", [FoldFactor(), FoldWeight()])
def test_place_whose_weight_a_rule_rebuilds_is_open_to_later_rules(rule: Rule) -> None:
    passes = [rule, *ecp.default_passes("cpu")]
    _, report = ecp.rewrite(scaled(32), "cpu", passes, expect={"linear_int4": 1, rule.name: 1, "missed": 0})
    (outcome,) = report.outcomes
    assert (outcome.rule, outcome.node, outcome.fqn) == ("linear_int4", "linear_default", "w.data")
    assert [reason for reason in outcome.reasons if reason.stage != "note"] == []


@pytest.mark.parametrize("rule", [FoldFactor(), FoldWeight()])
def test_place_whose_weight_a_rule_rebuilds_is_missed_with_the_reasons_of_later_rules(rule: Rule) -> None:
    passes = [rule, *ecp.default_passes("cpu")]
    with pytest.raises(ecp.ExpectationError, match="missed: expected 0, got 1"):
        ecp.rewrite(scaled(4), "cpu", passes, expect={"missed": 0})
    after, report = ecp.rewrite(scaled(4), "cpu", passes)
    assert names(after)[-2:] == ["torchao.dequantize_affine", "aten.linear"]
    (outcome,) = report.outcomes
    first, *others = map(str, outcome.reasons)
    assert first == f"{rule.name} built this aten.linear, which still reads a quantized weight"
    assert any(
        text.startswith("linear_int4 wanted a group size that the kernel has, found group size 4") for text in others
    )
    assert any(text.startswith("linear_int8 wanted ") for text in others)
    assert_misses(scaled(4), "found group size 4", "cpu", rule="linear_int4", passes=passes)


def test_operator_in_place_of_another_one_that_reads_a_quantized_weight_is_a_new_candidate() -> None:
    """The rule moves the weight from one operator to another one, which had none."""

    class ToRelu(Rule):
        """relu(x) -> linear(x, w)"""

        def pattern(self, x: Any) -> Any:
            return op(aten.relu.default)(x)

        def rewrite(self, b: Any, m: Any) -> Node:
            (weight,) = b.program.calls[ecp.DEQUANTIZE]
            return b.call(aten.linear.default, m.x, weight)  # type: ignore[no-any-return]

    sketch = Sketch()
    x, weight = sketch.input("x", 16, 16), sketch.weight("w", k=16, group=16, dtype=torch.float32)
    program = sketch.program(sketch.call(aten.relu.default, sketch.call(aten.mul.Tensor, x, weight)))
    _, report = ecp.rewrite(program, "cpu", [ToRelu()])
    assert [(each.op, each.status) for each in report.outcomes] == [("aten.mul", "missed"), ("aten.linear", "missed")]
    assert str(report.outcomes[1].reasons[0]).startswith("to_relu built this aten.linear")


# Why a rule did not act ----------------------------------------------------------------------------------------------


class LinearRelu(Rule):
    """relu(linear(x, weight)) -> linear(x, weight)"""

    def pattern(self, x: Any) -> Any:
        return op(aten.relu.default)(op(aten.linear.default)(x, ecp.dequantized(..., name="weight", shared=True)))

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.linear.default, m.x, m.weight)  # type: ignore[no-any-return]


def reasons_below(*after: Any, convert: bool = False, returned: bool = False) -> list[str]:
    """Why LinearRelu misses a linear whose readers are the operators ``after``."""
    sketch = Sketch()
    x, weight = sketch.input("x", 2, 64), sketch.weight("w", dtype=torch.bfloat16 if convert else torch.float32)
    if convert:
        weight = sketch.call(aten.to.dtype, weight, torch.float32)
    y = sketch.call(aten.linear.default, x, weight)
    results = [sketch.call(each, y) for each in after]
    _, report = ecp.rewrite(sketch.program(*results, *([y] if returned else [])), "cpu", [LinearRelu()])
    (outcome,) = report.outcomes
    assert outcome.status == "missed"
    return [str(reason) for reason in outcome.reasons]


def test_candidate_with_two_readers_below_the_root_has_the_reason_of_the_rule() -> None:
    assert reasons_below(aten.relu.default, returned=True) == [
        "linear_relu wanted aten.linear with this one user, found aten.linear (linear_default, 2 users); it is read by "
        "relu_default, output: give each a result of its own, or write shared=True in the pattern"
    ]


def test_candidate_without_the_reader_of_the_pattern_has_the_reason_of_the_rule() -> None:
    wanted = "linear_relu wanted aten.relu as the reader of linear_default, found"
    assert reasons_below(aten.gelu.default) == [f"{wanted} aten.gelu (gelu_default)"]
    assert reasons_below(returned=True) == [f"{wanted} the output of the graph"]


def test_candidate_whose_own_part_of_the_pattern_does_not_fit_has_the_reason_of_the_rule() -> None:
    (reason,) = reasons_below(aten.gelu.default, convert=True)
    assert reason.startswith("linear_relu wanted a dequantized weight, found aten.to (to_dtype); ")


def test_rule_that_matches_a_candidate_below_its_root_reports_the_deepest_failure() -> None:
    """The alternative with a mul fits less of the graph than the other one."""
    relu, mul, linear = op(aten.relu.default), op(aten.mul.Tensor), op(aten.linear.default)
    rule = patterned(lambda self, x: relu(any_of(mul(linear(x, ...), 2), op(aten.neg.default)(linear(x, ...)))))
    sketch = Sketch()
    y = sketch.call(aten.linear.default, sketch.input("x", 2, 64), sketch.weight("w", dtype=torch.float32))
    program = sketch.program(sketch.call(aten.abs.default, sketch.call(aten.neg.default, y)))
    _, report = ecp.rewrite(program, "cpu", [rule])
    assert [str(reason) for reason in report.outcomes[0].reasons] == [
        "nested wanted aten.relu as the reader of neg_default, found aten.abs (abs_default)"
    ]


class Never(LinearRelu):
    """linear(x, weight) -> itself, never"""

    requirements = (requirement("another model", hint="change it")(lambda m: Failure("this one")),)

    def pattern(self, x: Any) -> Any:
        return op(aten.linear.default)(x, ecp.dequantized(..., name="weight", shared=True))


REASON = "never wanted another model, found this one; change it"


def test_rule_that_missed_a_place_which_another_rule_took_is_in_the_report() -> None:
    passes = [Never(), *ecp.default_passes("cpu")]
    _, report = ecp.rewrite(quantized(), "cpu", passes, expect={"linear_int4": 1})
    assert [reason for reason in report.outcomes[0].reasons if reason.stage != "note"] == []
    assert report.rejected == {"never": [f"linear_default: {REASON}"]}
    assert json.loads(report.to_json())["rejected"] == report.rejected
    with pytest.raises(ecp.ExpectationError) as error:
        ecp.rewrite(quantized(), "cpu", passes, expect={"never": 1})
    assert str(error.value).splitlines()[-1] == f"  rejected   linear_default: {REASON}"
    assert assert_misses(quantized(), "found this one", "cpu", rule="never", passes=passes).counts()["missed"] == 0
    with pytest.raises(AssertionError, match=r"missed by never with a reason that says 'NaN'(.|\n)*found this one"):
        assert_misses(quantized(), "NaN", "cpu", rule="never", passes=passes)
    with pytest.raises(AssertionError, match="no candidate is missed with a reason"):
        assert_misses(quantized(), "found this one", "cpu", passes=passes)


def test_similar_reasons_at_many_places_share_a_text() -> None:
    _, report = ecp.rewrite(chain(5), "cpu", [Never(), *ecp.default_passes("cpu")])
    (text,) = report.rejected["never"]
    assert text == f"linear_default, linear_default_1, linear_default_2 and 2 more: {REASON}"


def test_rule_whose_place_an_earlier_rule_took_is_in_the_expectation_error() -> None:
    with pytest.raises(ecp.ExpectationError) as error:
        ecp.rewrite(quantized(), "cpu", [*ecp.default_passes("cpu"), Never()], expect={"never": 1})
    found = "never: no operator of the program fits the outermost call of its pattern; before it acted 1 x linear_int4"
    assert str(error.value).splitlines()[-1] == f"  rejected   {found}"


def test_rule_whose_place_an_earlier_rule_kept_is_in_the_expectation_error() -> None:
    class KeepLinear(Keep):
        """linear(x, weight) -> itself"""

        pattern = Never.pattern

    with pytest.raises(ecp.ExpectationError) as error:
        ecp.rewrite(quantized(), "cpu", [KeepLinear(), *ecp.default_passes("cpu")], expect={"linear_int4": 1})
    reason = "linear_int4 wanted nodes that no earlier rule keeps as they are, found linear_default"
    assert str(error.value).splitlines()[-1] == f"  rejected   linear_default: {reason}"


def test_rule_for_other_operators_that_fits_nowhere_has_its_closest_attempt_in_the_expectation_error() -> None:
    nested = patterned(lambda self, x: op(aten.abs.default)(op(aten.gelu.default)(x)))
    sketch = Sketch()
    program = sketch.program(sketch.call(aten.abs.default, sketch.input("x", 4)))
    with pytest.raises(ecp.ExpectationError, match="abs_default: nested wanted aten.gelu, found placeholder x$"):
        ecp.rewrite(program, "cpu", [nested], expect={"nested": 1})


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_converted_weight_is_missed_with_a_hint(target: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Quantized(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.layer.weight().float())

    program = torch.export.export(Model(), (torch.randn(2, 64),))
    hint = (
        "; the model converts the weight from bfloat16 to float32: remove that, and convert the activations to "
        "bfloat16 instead, or quantize the model in float32"
    )
    assert_misses(program, f"wanted a dequantized weight, found aten.to (to){hint}", target, rule="linear_int4")
    decomposed = program.run_decompositions({})
    assert_misses(decomposed, f"found aten._to_copy (_to_copy){hint}", target, rule="linear_int4")
