"""Rules: their requirements, the order and stages in which these are checked, texts for the report, names."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.fx import Node

from et_cuda_passes.graph.errors import RuleError, Unmet
from et_cuda_passes.graph.pattern import Capture, any_of, op
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import Failure, GroupRule, Keep, Notes, Requirement, Rule, compile_rule, requirement
from tests.helpers import Sketch, apply, names

aten = torch.ops.aten


class Negate(Rule):
    """relu(x) -> neg(x)"""

    def pattern(self, x: Capture) -> Any:
        return op(aten.relu.default)(x)

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.neg.default, m.x)


def relu_program() -> torch.export.ExportedProgram:
    sketch = Sketch()
    return sketch.program(sketch.call(aten.relu.default, sketch.input("x", 4)))


def reasons(rule: Rule) -> list[Reason]:
    """Why ``rule`` missed the only candidate."""
    program, report = apply(relu_program(), [rule], aten.relu.default)
    assert names(program) == ["aten.relu"]
    (outcome,) = report.outcomes
    assert outcome.status == "missed"
    return outcome.reasons


def test_rule_is_named_after_its_class_in_snake_case() -> None:
    class LinearInt4(Negate): ...

    class HTTPFold(Negate): ...

    class Named(Negate):
        name = "my_name"

    class Again(Named): ...

    assert [c.name for c in (LinearInt4, HTTPFold, Named, Again)] == ["linear_int4", "http_fold", "my_name", "again"]


@requirement("a cat", hint="adopt one")
def is_cat(m: Any) -> Failure | None:
    return Failure("a dog")


@requirement("the root")
def has_root(m: Any) -> Failure | None:
    return None if m.root.name else Failure("no name")


@requirement("a moon", hint="look up")
def has_moon(m: Any) -> Failure | None:
    return Failure("clouds", "wait for the wind")


def test_requirement_has_the_name_texts_and_stage_of_its_function() -> None:
    @requirement("finite scales", hint="quantize again", stage="values")
    def scales_are_finite(m: Any) -> Failure | None:
        return None

    assert isinstance(scales_are_finite, Requirement)
    got = (scales_are_finite.name, scales_are_finite.wanted, scales_are_finite.hint, scales_are_finite.stage)
    assert got == ("scales_are_finite", "finite scales", "quantize again", "values")


def test_requirements_of_a_subclass_are_those_that_it_states_or_inherits() -> None:
    class Base(Negate):
        requirements = (is_cat, has_root)

    class Same(Base): ...

    class More(Base):
        requirements = (*Base.requirements, has_moon)

    class Fewer(Base):
        requirements = (has_root,)

    assert Negate.requirements == ()
    assert Same.requirements == (is_cat, has_root)
    assert More.requirements == (is_cat, has_root, has_moon)
    assert Fewer.requirements == (has_root,)


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        (is_cat, "requirements must be a tuple of requirements"),
        ([is_cat], "requirements must be a tuple of requirements"),
        ((lambda m: None,), r"requirements contains <function .*@requirement\('...'\) above a function"),
    ],
    ids=["one", "list", "plain function"],
)
def test_requirements_that_are_no_tuple_of_requirements_are_refused(requirements: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"rule Wrong: {message}"):
        type("Wrong", (Negate,), {"requirements": requirements})


def test_failures_are_reported_in_the_order_of_the_tuple_with_their_own_hints() -> None:
    class Picky(Negate):
        requirements = (has_moon, has_root, is_cat)

    assert reasons(Picky()) == [
        Reason("picky", "metadata", "a moon", "clouds", "wait for the wind"),
        Reason("picky", "metadata", "a cat", "a dog", "adopt one"),
    ]
    assert str(reasons(Picky())[0]) == "picky wanted a moon, found clouds; wait for the wind"


def test_empty_hint_of_a_failure_replaces_that_of_the_requirement() -> None:
    @requirement("a cat", hint="adopt one")
    def is_cat(m: Any) -> Failure | None:
        return Failure("a tiger", "")

    class Picky(Negate):
        requirements = (is_cat,)

    assert reasons(Picky()) == [Reason("picky", "metadata", "a cat", "a tiger", "")]


@pytest.mark.parametrize("answer", [True, False, "clouds", (False, "clouds")])
def test_requirement_that_returns_neither_none_nor_a_failure_is_refused(answer: Any) -> None:
    @requirement("a moon")
    def has_moon(m: Any) -> Any:
        return answer

    class Picky(Negate):
        requirements = (has_moon,)

    with pytest.raises(RuleError, match="rule picky: the requirement 'a moon' must return None where it holds"):
        reasons(Picky())


def test_requirement_reads_the_options_of_its_rule_from_the_match() -> None:
    @requirement("to be allowed")
    def is_allowed(m: Any) -> Failure | None:
        return None if m.rule.allow else Failure("forbidden")

    @dataclass(frozen=True)
    class Optional(Negate):
        allow: bool = False
        requirements = (is_allowed,)

    assert reasons(Optional())[0].found == "forbidden"
    program, report = apply(relu_program(), [Optional(allow=True)], aten.relu.default)
    assert names(program) == ["aten.neg"]
    assert report.counts()["rewritten"] == 1


def test_function_with_parameters_returns_a_requirement_per_call() -> None:
    def has_name(name: str) -> Requirement:
        @requirement(f"the name {name}")
        def has_this_name(m: Any) -> Failure | None:
            return None if m.root.name == name else Failure(m.root.name)

        return has_this_name

    class Picky(Negate):
        requirements = (has_name("relu_default"), has_name("other"))

    assert reasons(Picky()) == [Reason("picky", "metadata", "the name other", "relu_default")]


def test_requirement_with_other_parameters_is_refused_with_the_fix() -> None:
    def first(self: Any, m: Any) -> Any:
        return True, ""

    with pytest.raises(
        TypeError, match=r"the requirement first must be a function \(m\) -> Failure | None; write it outs"
    ):
        requirement("first")(first)  # type: ignore[arg-type]


def test_unmet_text_of_a_decoder_is_reported_once() -> None:
    @requirement("one thing", hint="general")
    def one(m: Any) -> Failure | None:
        raise Unmet("no weight at all")

    @requirement("another thing")
    def another(m: Any) -> Failure | None:
        raise Unmet("no weight at all")

    @requirement("a third")
    def third(m: Any) -> Failure | None:
        raise Unmet("something else")

    class Undecodable(Negate):
        requirements = (one, another, third)

    assert reasons(Undecodable()) == [
        Reason("undecodable", "metadata", "one thing", "no weight at all", "general"),
        Reason("undecodable", "metadata", "a third", "something else"),
    ]


@pytest.mark.parametrize("good", [True, False])
def test_values_stage_runs_only_if_all_metadata_requirements_hold(good: bool) -> None:
    checked: list[str] = []

    @requirement("good values", stage="values")
    def values(m: Any) -> Failure | None:
        checked.append("values")
        return Failure("bad values")

    @requirement("good metadata")
    def metadata(m: Any) -> Failure | None:
        checked.append("metadata")
        return None if good else Failure("bad metadata")

    class Staged(Negate):
        requirements = (values, metadata)

    (reason,) = reasons(Staged())
    assert (reason.stage, reason.found) == (("values", "bad values") if good else ("metadata", "bad metadata"))
    assert checked == (["metadata", "values"] if good else ["metadata"])


def test_captures_and_named_calls_are_attributes_of_a_match() -> None:
    seen: dict[str, Any] = {}

    @requirement("to look")
    def look(m: Any) -> Failure | None:
        seen.update(x=m.x.name, inner=m.inner.name, bias=m.bias, root=m.root.name, target=m.target.name)
        with pytest.raises(AttributeError, match="no capture named 'y'"):
            _ = m.y
        return Failure("enough")

    class Look(Rule):
        def pattern(self, x: Capture, bias: Capture | None = None) -> Any:
            plain = op(aten.relu.default)(op(aten.neg.default)(x, name="inner"))
            return any_of(plain, op(aten.relu.default)(op(aten.add.Tensor)(x, bias, name="inner")))

        requirements = (look,)

        def rewrite(self, b: Any, m: Any) -> Node:
            raise AssertionError

    sketch = Sketch()
    x = sketch.input("x", 4)
    apply(sketch.program(sketch.call(aten.relu.default, sketch.call(aten.neg.default, x))), [Look()])
    assert seen == {"x": "x", "inner": "neg_default", "bias": None, "root": "relu_default", "target": "test"}


RELU = op(aten.relu.default)


@pytest.mark.parametrize(
    ("taken", "form"),
    [
        ("root", lambda self, root: RELU(root)),
        ("rule", lambda self, rule: RELU(rule)),
        ("target", lambda self, target: RELU(target)),
        ("program", lambda self, program: RELU(program)),
        ("val", lambda self, x: RELU(x, name="val")),
    ],
)
def test_capture_with_the_name_of_an_attribute_of_a_match_is_refused(taken: str, form: Any) -> None:
    """m.target is the target; a capture of that name could not be read."""

    class Collides(Negate):
        pattern = form

    with pytest.raises(TypeError, match=taken):
        compile_rule(Collides())


def test_rule_without_a_pattern_or_a_rewrite_is_refused() -> None:
    class NoPattern(Rule):
        def rewrite(self, b: Any, m: Any) -> Node:
            raise AssertionError

    class Everywhere(Negate):
        def pattern(self, x: Capture) -> Any:
            return x

    class NoRewrite(Rule):
        def pattern(self, x: Capture) -> Any:
            return op(aten.relu.default)(x)

    with pytest.raises(TypeError, match="rule no_pattern has no pattern method"):
        compile_rule(NoPattern())
    with pytest.raises(TypeError, match=r"rule everywhere: pattern\(\) must return op"):
        compile_rule(Everywhere())
    with pytest.raises(
        TypeError, match="rule no_rewrite has no rewrite method; a rule that leaves its matches derives"
    ):
        compile_rule(NoRewrite())


def test_keep_rule_and_group_rule_need_no_rewrite() -> None:
    class KeepRelu(Keep):
        def pattern(self, x: Capture) -> Any:
            return op(aten.relu.default)(x)

    class Group(GroupRule):
        pattern = KeepRelu.pattern

        def group_key(self, m: Any) -> Any:
            return m.x

        def rewrite_group(self, b: Any, ms: Any) -> Any:
            raise AssertionError

    class NoKey(GroupRule):
        pattern = KeepRelu.pattern

    assert compile_rule(KeepRelu()).captures == compile_rule(Group()).captures == ("x",)
    with pytest.raises(TypeError, match="abstract"):
        NoKey()  # type: ignore[abstract]


def test_keep_rule_leaves_its_match_and_reports_its_notes() -> None:
    class KeepRelu(Keep):
        def pattern(self, x: Capture) -> Any:
            return op(aten.relu.default)(x)

        def notes(self, *ms: Any) -> Notes:
            return Notes(f"{ms[0].root.name} is fine", "it is positive")

        def summary(self, m: Any) -> str:
            return "in its own form"

    program, report = apply(relu_program(), [KeepRelu()], aten.relu.default)
    assert names(program) == ["aten.relu"]
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.rule, outcome.detail) == ("kept", "keep_relu", "in its own form")
    assert outcome.explanation == "it is positive"
    assert [str(reason) for reason in outcome.reasons] == ["relu_default is fine"]


def test_notes_of_another_type_are_refused() -> None:
    class Talks(Negate):
        def notes(self, *ms: Any) -> Any:
            return "a text"

    with pytest.raises(
        RuleError, match=r"rule talks: notes must return Notes\(note, explanation\); it returned 'a text'"
    ):
        apply(relu_program(), [Talks()], aten.relu.default)


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (Rule, "emit", "is now called rewrite"),
        (Rule, "detail", "is now called summary"),
        (Rule, "silent", "is now called reports_misses"),
        (Rule, "requires", "is now called requirements"),
        (Rule, "note", "is now part of notes"),
        (Rule, "takes", "no longer exists: a match owns only the nodes of its pattern"),
        (GroupRule, "alone", "no longer exists"),
        (GroupRule, "emit_together", "is now called rewrite_group"),
        (GroupRule, "key", "is now called group_key"),
        (GroupRule, "most", "is now called max_group_size"),
        (GroupRule, "common", "is now called shared_captures"),
    ],
)
def test_former_attribute_is_refused_when_its_rule_is_defined(base: type[Rule], old: str, new: str) -> None:
    with pytest.raises(TypeError, match=f"rule Old defines {old}, which {new}"):
        type("Old", (base,), {old: lambda self, b, m: m.root})
