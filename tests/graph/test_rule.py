"""Rules: which requires a class has, what is asked when, what a failed one says, names."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.pattern import Capture, any_of, op
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import GroupRule, Keep, Rule, compile_pattern, requirement
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


def test_a_rule_is_named_after_its_class_in_snake_case() -> None:
    class LinearInt4(Negate): ...

    class HTTPFold(Negate): ...

    class Named(Negate):
        name = "my_name"

    class Again(Named): ...

    assert [c.name for c in (LinearInt4, HTTPFold, Named, Again)] == ["linear_int4", "http_fold", "my_name", "again"]


def test_requires_are_collected_in_order_from_the_base_and_overridden_in_place() -> None:
    class Base(Negate):
        @requirement("first")
        def first(self, m: Any) -> Any:
            return True, ""

        @requirement("second")
        def second(self, m: Any) -> Any:
            return True, ""

        @requirement("third")
        def third(self, m: Any) -> Any:
            return True, ""

    class Sub(Base):
        @requirement("other first", hint="do this")
        def first(self, m: Any) -> Any:
            return True, ""

        def third(self, m: Any) -> Any:
            """No longer a condition."""

        @requirement("fourth", stage="values")
        def fourth(self, m: Any) -> Any:
            return True, ""

    assert [r.wanted for r in Base.requires] == ["first", "second", "third"]
    assert [(r.wanted, r.hint, r.stage) for r in Sub.requires] == [
        ("other first", "do this", "metadata"),
        ("second", "", "metadata"),
        ("fourth", "", "values"),
    ]


def test_requires_of_a_mixin_that_is_no_rule_count_too() -> None:
    class Mixin:
        @requirement("mixed in")
        def mixed(self, m: Any) -> Any:
            return True, ""

    class Sub(Mixin, Negate): ...

    assert [r.wanted for r in Sub.requires] == ["mixed in"]


def test_every_failed_require_is_reported_and_a_better_hint_replaces_the_general_one() -> None:
    class Picky(Negate):
        @requirement("a cat", hint="adopt one")
        def cat(self, m: Any) -> Any:
            return False, "a dog"

        @requirement("what there is")
        def there(self, m: Any) -> Any:
            return True, "all"

        @requirement("a moon", hint="look up")
        def moon(self, m: Any) -> Any:
            return False, "clouds", "wait for the wind"

    assert reasons(Picky()) == [
        Reason("picky", "metadata", "a cat", "a dog", "adopt one"),
        Reason("picky", "metadata", "a moon", "clouds", "wait for the wind"),
    ]
    assert str(reasons(Picky())[1]) == "picky wanted a moon, found clouds; wait for the wind"


def test_a_question_that_cannot_be_asked_is_reported_once() -> None:
    class Unaskable(Negate):
        @requirement("one thing", hint="general")
        def one(self, m: Any) -> Any:
            raise Unmet("no weight at all")

        @requirement("another thing")
        def another(self, m: Any) -> Any:
            raise Unmet("no weight at all")

        @requirement("a third")
        def third(self, m: Any) -> Any:
            raise Unmet("something else")

    assert reasons(Unaskable()) == [
        Reason("unaskable", "metadata", "one thing", "no weight at all", "general"),
        Reason("unaskable", "metadata", "a third", "something else"),
    ]


@pytest.mark.parametrize("good", [True, False])
def test_values_are_asked_for_only_after_all_metadata_holds(good: bool) -> None:
    asked: list[str] = []

    class Staged(Negate):
        @requirement("good values", stage="values")
        def values(self, m: Any) -> Any:
            asked.append("values")
            return False, "bad values"

        @requirement("good metadata")
        def metadata(self, m: Any) -> Any:
            asked.append("metadata")
            return good, "bad metadata"

    (reason,) = reasons(Staged())
    assert (reason.stage, reason.found) == (("values", "bad values") if good else ("metadata", "bad metadata"))
    assert asked == (["metadata", "values"] if good else ["metadata"])


def test_captures_and_named_calls_are_attributes_and_nothing_else_is() -> None:
    seen: dict[str, Any] = {}

    class Look(Rule):
        def pattern(self, x: Capture, bias: Capture | None = None) -> Any:
            plain = op(aten.relu.default)(op(aten.neg.default)(x, name="inner"))
            return any_of(plain, op(aten.relu.default)(op(aten.add.Tensor)(x, bias, name="inner")))

        @requirement("to look")
        def look(self, m: Any) -> Any:
            seen.update(x=m.x.name, inner=m.inner.name, bias=m.bias, root=m.root.name, target=m.target.name)
            with pytest.raises(AttributeError, match="no capture named 'y'"):
                _ = m.y
            return False, "enough"

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
        ("target", lambda self, target: RELU(target)),
        ("program", lambda self, program: RELU(program)),
        ("val", lambda self, x: RELU(x, name="val")),
    ],
)
def test_a_capture_with_the_name_of_something_that_a_match_has_is_refused(taken: str, form: Any) -> None:
    """m.target is the target; a capture of that name could not be read."""

    class Collides(Negate):
        pattern = form

    with pytest.raises(TypeError, match=taken):
        compile_pattern(Collides())


def test_the_parts_of_a_rule_are_required() -> None:
    class NoPattern(Rule):
        def rewrite(self, b: Any, m: Any) -> Node:
            raise AssertionError

    class Everywhere(Negate):
        def pattern(self, x: Capture) -> Any:
            return x

    class NoEmit(Rule):
        def pattern(self, x: Capture) -> Any:
            return op(aten.relu.default)(x)

    with pytest.raises(TypeError, match="rule no_pattern has no pattern method"):
        compile_pattern(NoPattern())
    with pytest.raises(TypeError, match=r"rule everywhere: pattern\(\) must return op"):
        compile_pattern(Everywhere())
    with pytest.raises(TypeError, match="rewrite"):
        NoEmit()  # type: ignore[abstract]


def test_options_are_fields_and_need_no_class_of_their_own() -> None:
    @dataclass(frozen=True)
    class Optional(Negate):
        allow: bool = False

        @requirement("to be allowed")
        def allowed(self, m: Any) -> Any:
            return self.allow, "forbidden"

    assert reasons(Optional())[0].found == "forbidden"
    program, report = apply(relu_program(), [Optional(allow=True)], aten.relu.default)
    assert names(program) == ["aten.neg"]
    assert report.counts()["rewritten"] == 1


def test_keep_leaves_its_match_as_it_is_and_says_why() -> None:
    class KeepRelu(Keep):
        def pattern(self, x: Capture) -> Any:
            return op(aten.relu.default)(x)

        def note(self, m: Any) -> str:
            return f"{m.root.name} is fine"

        def summary(self, m: Any) -> str:
            return "in its own form"

    program, report = apply(relu_program(), [KeepRelu()], aten.relu.default)
    assert names(program) == ["aten.relu"]
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.rule, outcome.detail) == ("kept", "keep_relu", "in its own form")
    assert [str(reason) for reason in outcome.reasons] == ["relu_default is fine"]


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (Rule, "emit", "rewrite"),
        (Rule, "detail", "summary"),
        (Rule, "silent", "reports_misses"),
        (GroupRule, "emit_together", "rewrite_group"),
        (GroupRule, "key", "group_key"),
        (GroupRule, "most", "max_group_size"),
        (GroupRule, "common", "shared_captures"),
    ],
)
def test_renamed_hook_is_refused_when_its_rule_is_defined(base: type[Rule], old: str, new: str) -> None:
    with pytest.raises(TypeError, match=f"rule Old defines {old}, which is now called {new}"):
        type("Old", (base,), {old: lambda self, b, m: m.root})
