"""Rules: their requirements, the order and stages in which these are checked, texts for the report, names."""

import dataclasses
import io
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

import et_cuda_passes as ecp
from et_cuda_passes.graph.errors import RuleError, Unmet
from et_cuda_passes.graph.pattern import Capture, any_of, op
from et_cuda_passes.graph.report import Reason
from et_cuda_passes.graph.rule import Failure, GroupRule, Keep, Notes, Requirement, Rule, compile_rule, requirement
from et_cuda_passes.testing import Sketch
from tests.helpers import apply, names

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
        Reason("picky", "metadata", "a moon", "clouds", "wait for the wind", "has_moon"),
        Reason("picky", "metadata", "a cat", "a dog", "adopt one", "is_cat"),
    ]
    assert str(reasons(Picky())[0]) == "picky wanted a moon, found clouds; wait for the wind"


def test_empty_hint_of_a_failure_replaces_that_of_the_requirement() -> None:
    @requirement("a cat", hint="adopt one")
    def is_cat(m: Any) -> Failure | None:
        return Failure("a tiger", "")

    class Picky(Negate):
        requirements = (is_cat,)

    assert reasons(Picky()) == [Reason("picky", "metadata", "a cat", "a tiger", "", "is_cat")]


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

    assert reasons(Picky()) == [Reason("picky", "metadata", "the name other", "relu_default", "", "has_this_name")]


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
        Reason("undecodable", "metadata", "one thing", "no weight at all", "general", "one"),
        Reason("undecodable", "metadata", "a third", "something else", "", "third"),
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


@dataclasses.dataclass
class Mutable(Rule):
    """A rule whose option can be changed."""

    limit: int = 1


class Undecorated(Rule):
    """A rule whose option would be ignored."""

    limit: int = 1


@dataclasses.dataclass(frozen=True)
class Options(Rule):
    """A rule with an option."""

    limit: int = 1


class More(Options):
    """A rule whose second option would be ignored."""

    other: int = 1


class Stateful(Rule):
    """A rule with state."""

    def __init__(self) -> None:
        self.seen = 0


class Plain(Rule):
    """A rule without options."""

    level: ClassVar[int] = 1


class Renamed(Options):
    """A rule with the options of another one."""

    name = "renamed"


def with_methods(cls: type[Rule]) -> Rule:
    methods = {"pattern": lambda self, x: op(aten.relu.default)(x), "rewrite": lambda self, b, m: m.x}
    for name, method in methods.items():
        setattr(cls, name, method)
    return cls()


@pytest.mark.parametrize("cls", [Mutable, Undecorated, More, Stateful])
def test_rule_with_options_that_is_no_frozen_dataclass_is_an_error(cls: type[Rule]) -> None:
    with pytest.raises(TypeError, match=r"has options, or state, and .* is no frozen dataclass: write @dataclasses"):
        compile_rule(with_methods(cls))


@pytest.mark.parametrize("cls", [Options, Plain, Renamed])
def test_rule_without_options_need_not_be_a_dataclass(cls: type[Rule]) -> None:
    assert compile_rule(with_methods(cls)).captures == ("x",)


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


# Mistakes of a rule's author -----------------------------------------------------------------------------------------


relu, add = op(aten.relu.default), op(aten.add.Tensor)


class Relu(Rule):
    """relu(x) -> neg(x)"""

    def pattern(self, x: Any) -> Any:
        return relu(x)

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.neg.default, m.x)


def faulty(**members: Any) -> Rule:
    return type("Faulty", (Relu,), members)()  # type: ignore[no-any-return]


def rewriting(rewrite: Callable[[Any, Any], Any]) -> Rule:
    return faulty(rewrite=lambda self, b, m: rewrite(b, m))


def two() -> ExportedProgram:
    """neg(relu(x) + y)"""
    sketch = Sketch()
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    total = sketch.call(aten.add.Tensor, sketch.call(aten.relu.default, x), y)
    return sketch.program(sketch.call(aten.neg.default, total))


# Mistakes in the pattern --------------------------------------------------------------------------------------------


def test_packet_function_and_name_are_refused_as_operators() -> None:
    with pytest.raises(
        TypeError,
        match=r"aten.add has several overloads; write the one that the graph calls: aten.add.Tensor or aten.add.Scalar",
    ):
        op(aten.add)
    for wrong in (nn.functional.linear, "aten.linear"):
        with pytest.raises(
            TypeError, match=r"is not an operator of an exported graph; write an overload, such as aten.linear"
        ):
            op(wrong)
    assert op(operator.getitem) is not None
    assert op(torch.sym_max) is not None


def test_capture_that_the_pattern_lacks_is_refused() -> None:
    rule = faulty(pattern=lambda self, x, bias: relu(x))
    with pytest.raises(
        TypeError, match="rule faulty: pattern.. has the parameter 'bias', which its pattern does not contain"
    ):
        compile_rule(rule)


def test_capture_that_some_alternatives_lack_must_be_optional() -> None:
    with pytest.raises(
        TypeError, match="some alternatives of the pattern do not contain 'y'; give it the default None"
    ):
        compile_rule(faulty(pattern=lambda self, x, y: any_of(relu(x), add(x, y))))
    compile_rule(faulty(pattern=lambda self, x, y=None: any_of(relu(x), add(x, y))))


def test_requirement_without_a_text_or_with_an_unknown_stage_is_refused() -> None:
    with pytest.raises(TypeError, match=r"@requirement\('...'\) above the function"):
        requirement(lambda m: Failure("nothing"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in one of the stages .*'metadata', 'values'.*, not 'value'"):
        requirement("a thing", stage="value")  # type: ignore[arg-type]


def test_requirements_with_the_same_text_are_both_reported() -> None:
    def finds(found: str) -> Requirement:
        return requirement("one thing")(lambda m: Failure(found))

    rule = faulty(requirements=(finds("this"), finds("that")))
    _, report = apply(two(), [rule])
    assert report.rejected["faulty"] == [
        "relu_default: faulty wanted one thing, found this",
        "relu_default: faulty wanted one thing, found that",
    ]


def test_pass_with_the_name_of_a_status_is_refused() -> None:
    with pytest.raises(ValueError, match="a pass is named 'missed', which is a status in reports; rename the pass"):
        apply(two(), [faulty(name="missed")])


# Mistakes in the hooks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"requirements": (requirement("a thing")(lambda m: 1 / 0),)}, "requirement 'a thing'"),
        ({"summary": lambda self, m: 1 / 0}, "summary"),
        ({"notes": lambda self, *ms: 1 / 0}, "notes"),
    ],
)
def test_hook_that_raises_names_its_rule_and_place(members: dict[str, Any], what: str) -> None:
    with pytest.raises(
        RuleError, match=rf"rule faulty: at relu_default its {what} failed: ZeroDivisionError: division by zero"
    ) as error:
        apply(two(), [faulty(**members)])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_absent_capture_has_no_metadata() -> None:
    @requirement("a thing")
    def y_is_a_vector(m: Any) -> Failure | None:
        return None if m.val(m.y).dim() == 1 else Failure("y")

    rule = faulty(pattern=lambda self, x, y=None: any_of(relu(x), add(x, y)), requirements=(y_is_a_vector,))
    with pytest.raises(RuleError, match="m.val needs a node, not None: an optional capture may be absent"):
        apply(two(), [rule])


@pytest.mark.parametrize("key", [lambda self, m: 1 / 0, lambda self, m: [m.x]], ids=["raises", "unhashable"])
def test_group_key_that_fails_names_its_rule(key: Any) -> None:
    together = {"group_key": key, "rewrite_group": lambda self, b, ms: [], "pattern": Relu.pattern}
    rule = type("Faulty", (GroupRule,), together)()
    with pytest.raises(RuleError, match="rule faulty: at relu_default its group_key failed: "):
        apply(two(), [rule])


# Mistakes with the builder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewrite", "fault"),
    [
        (
            lambda b, m: b.call(aten.add.Tensor, m.x, torch.ones(4)),
            "b.call accepts nodes, not tensors; b.constant adds",
        ),
        (
            lambda b, m: b.call(aten.mul.Tensor, m.root, 1.0),
            "relu_default is being replaced, so a new node cannot read it",
        ),
        (lambda b, m: b.call(aten.neg.default, next(iter(m.root.users))), "add_tensor is computed after relu_default"),
        (lambda b, m: b.call(aten.add, m.x, 1), "aten.add has several overloads"),
        (lambda b, m: b.call(nn.functional.relu, m.x), "is not an operator of an exported graph"),
        (lambda b, m: m.root, "returned relu_default itself; a rule that keeps its matches derives from Keep"),
        (
            lambda b, m: b.call(aten.max.dim, m.x, 0),
            r"which is not a tensor; take one of its results: b.call\(operator.getitem",
        ),
        (
            lambda b, m: b.constant("c", [], "c", lambda: torch.ones(4)),
            "c needs sources, and each must be a constant",
        ),
        (
            lambda b, m: b.constant("c", [m.x], "c", lambda: torch.ones(4)),
            r"for a quantized weight pass weight_of",
        ),
    ],
)
def test_wrong_use_of_the_builder_is_refused_with_the_fix(rewrite: Any, fault: str) -> None:
    before = two()
    with pytest.raises(RuleError, match=f"rule faulty.*{fault}"):
        apply(before, [rewriting(rewrite)])
    assert names(before) == ["aten.relu", "aten.add", "aten.neg"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "has an empty part"),
        ("x.", "has an empty part"),
        ("x..y", "has an empty part"),
        ("0.weight.and.q", "has the part 'and', which is a keyword of Python"),
        ("x.a b", "has the part 'a b', which is not an identifier"),
        ("x.half", "has the part 'half', which is an attribute of every torch.nn.Module"),
        ("graph", "has the part 'graph', which is an attribute of every torch.nn.Module"),
        ("0", "the name '0' is that of a module with constants of its own"),
        (None, "must be text, not None"),
    ],
)
def test_name_of_a_constant_that_no_module_can_hold_is_refused_with_the_fix(name: Any, fault: str) -> None:
    sketch = Sketch()
    x, w = sketch.input("x", 4), sketch.parameter("0.weight", torch.ones(4))
    program = sketch.program(sketch.call(aten.relu.default, x), w)
    rule = rewriting(lambda b, m: b.call(aten.mul.Tensor, m.x, b.constant(name, [held(b)], "c", lambda: torch.ones(4))))
    with pytest.raises(RuleError, match=rf"rule faulty: at relu_default its rewrite failed: .*{fault}.*'layers\.0\."):
        apply(program, [rule])


def test_name_of_a_constant_that_extends_that_of_another_one_is_refused() -> None:
    sketch = Sketch()
    x, w = sketch.input("x", 4), sketch.parameter("w", torch.ones(4))
    program = sketch.program(sketch.call(aten.relu.default, x), w)

    def rewrite(b: Any, m: Any) -> Node:
        parts = [b.constant(name, [held(b)], name, lambda: torch.ones(4)) for name in ("w.a", "w.a.b")]
        return b.call(aten.mul.Tensor, *parts)  # type: ignore[no-any-return]

    with pytest.raises(RuleError, match=r"'w\.a\.b' extends that of the new constant 'w\.a'; rename one of them"):
        apply(program, [rewriting(rewrite)])


@pytest.mark.parametrize("name", ["w.packed", "w.a.b", "w.original", "a-b.0.weight.packed"])
def test_constant_that_extends_the_name_of_a_constant_or_module_of_the_program_is_saved(name: str) -> None:
    """torch.export accepts any name of a module; the constant that is still read gets another name."""
    sketch = Sketch()
    x, w, other = sketch.input("x", 4), sketch.parameter("w", torch.ones(4)), torch.full((4,), 2.0)
    module = sketch.parameter("a-b.0.weight", other)
    program = sketch.program(sketch.call(aten.relu.default, x), w, module)
    rule = rewriting(lambda b, m: b.call(aten.mul.Tensor, m.x, b.constant(name, [held(b)], "c", lambda: other * 3)))
    after, _ = apply(program, [rule])
    file = io.BytesIO()
    torch.export.save(after, file)
    file.seek(0)
    result = torch.export.load(file).module()(torch.ones(4))
    assert [float(each[0]) for each in result] == [6.0, 1.0, 2.0]
    assert name in after.state_dict


def held(b: Any) -> Node:
    """The first constant of the program."""
    return next(node for node in b.program.graph.nodes if b.program.constant(node) is not None)


def product(second: Callable[[Sketch], Any]) -> ExportedProgram:
    """x * second"""
    sketch = Sketch()
    x = sketch.input("x", 4)
    return sketch.program(sketch.call(aten.mul.Tensor, x, second(sketch)))


class Ones(Rule):
    """x * w -> x, where w is a constant of ones"""

    requirements = (
        requirement("ones", stage="values")(
            lambda m: None if bool((m.constant("w") == 1).all()) else Failure("other values")
        ),
    )

    def pattern(self, x: Any, w: Any) -> Any:
        return op(aten.mul.Tensor)(x, w)

    def rewrite(self, b: Any, m: Any) -> Node:
        return m.x  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (lambda s: s.parameter("w", torch.ones(4)), None),
        (lambda s: s.constant("w", torch.ones(4)), None),
        (lambda s: s.buffer("w", torch.full((4,), 2.0)), "other values"),
        (lambda s: 1.0, "w is 1.0, not a tensor"),
        (lambda s: s.input("y", 4), "w is y, which is not a parameter, buffer or constant of the program"),
    ],
)
def test_requirement_reads_the_values_of_a_captured_constant(second: Any, found: str | None) -> None:
    program, report = apply(product(second), [Ones()], aten.mul.Tensor)
    assert names(program) == ([] if found is None else ["aten.mul"])
    assert [reason.found for reason in report.outcomes[0].reasons] == ([] if found is None else [found])


def test_mutated_buffer_is_not_a_constant_for_a_requirement() -> None:
    sketch = Sketch()
    w = sketch.buffer("w", torch.ones(4))
    y = sketch.call(aten.mul.Tensor, sketch.input("x", 4), w)
    _, report = apply(sketch.program(y, writes={"w": sketch.call(aten.add.Tensor, w, 1)}), [Ones()], aten.mul.Tensor)
    assert [reason.found for reason in report.outcomes[0].reasons] == [
        "w is b_w, which the program mutates while it runs"
    ]


@pytest.mark.parametrize("hook", ["rewrite", "summary", "notes"])
def test_unmet_outside_of_a_requirement_names_the_rule_the_place_and_the_fix(hook: str) -> None:
    def fails(*_: Any) -> Any:
        raise Unmet("the scale is relu, not a constant")

    with pytest.raises(RuleError) as error:
        apply(two(), [faulty(**{hook: fails})])
    assert str(error.value) == (
        f"rule faulty: at relu_default its {hook} failed: Unmet: the scale is relu, not a constant; check it in a "
        "requirement: one that raises Unmet does not hold, and the match is not rewritten"
    )


def test_unmet_in_a_group_key_names_the_rule_and_the_place() -> None:
    class Grouped(GroupRule):
        def pattern(self, x: Any) -> Any:
            return relu(x)

        def group_key(self, m: Any) -> Any:
            raise Unmet("no weight")

        def rewrite_group(self, b: Any, ms: Any) -> Any:
            raise AssertionError

    with pytest.raises(RuleError, match="rule grouped: at relu_default its group_key failed: Unmet: no weight; check"):
        apply(two(), [Grouped()])


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    """Operators that exist for one test."""
    with torch.library._scoped_library("et_cuda_passes_test", "FRAGMENT") as made:
        yield made


def test_operator_without_a_fake_implementation_names_the_rule_the_place_and_the_fix(
    library: torch.library.Library,
) -> None:
    library.define("no_fake(Tensor x) -> Tensor")
    library.impl("no_fake", lambda x: x + 1, "CPU")
    operator = torch.ops.et_cuda_passes_test.no_fake.default
    with pytest.raises(RuleError) as error:
        apply(two(), [rewriting(lambda b, m: b.call(operator, m.x))])
    assert str(error.value) == (
        "rule faulty: at relu_default its rewrite failed: the operator et_cuda_passes_test::no_fake has no fake "
        "implementation, which computes the shape and dtype of its result; register one with "
        'torch.library.register_fake("et_cuda_passes_test::no_fake") where the operator is registered'
    )
    torch.library.register_fake("et_cuda_passes_test::no_fake", torch.empty_like, lib=library)
    after, _ = apply(two(), [rewriting(lambda b, m: b.call(operator, m.x))])
    assert names(after)[0] == "et_cuda_passes_test.no_fake"


def test_operator_that_rejects_its_arguments_is_named() -> None:
    with pytest.raises(RuleError, match=r"rule faulty: at relu_default its rewrite failed: the call of aten.mm f"):
        apply(two(), [rewriting(lambda b, m: b.call(aten.mm.default, m.x, m.x))])


def test_node_created_without_the_builder_is_refused() -> None:
    def rewrite(b: Any, m: Any) -> Node:
        with m.root.graph.inserting_before(m.root):
            return m.root.graph.call_function(aten.neg.default, (m.x,))  # type: ignore[no-any-return]

    with pytest.raises(RuleError, match=r"which is not a tensor; build it with b.call"):
        apply(two(), [rewriting(rewrite)])


def test_removed_node_is_refused_as_an_argument() -> None:
    gone: list[Node] = []

    class First(Relu):
        def rewrite(self, b: Any, m: Any) -> Node:
            gone.append(m.root)
            return super().rewrite(b, m)

    class Second(Relu):
        def pattern(self, x: Any) -> Any:
            return op(aten.neg.default)(x)

        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(aten.abs.default, gone[0])  # type: ignore[no-any-return]

    with pytest.raises(RuleError, match="rule second: .* is not in the graph of .*, or was removed"):
        apply(two(), [First(), Second()])


def test_unused_new_node_is_eliminated() -> None:
    def rewrite(b: Any, m: Any) -> Node:
        b.call(aten.abs.default, m.x)
        return b.call(aten.neg.default, m.x)  # type: ignore[no-any-return]

    program, _ = apply(two(), [rewriting(rewrite)])
    assert names(program) == ["aten.neg", "aten.add", "aten.neg"]


# Dynamic sizes ------------------------------------------------------------------------------------------------------


class Lines(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


def lines() -> ExportedProgram:
    return torch.export.export(Lines(), (torch.randn(4, 3),), dynamic_shapes={"x": {0: Dim("n", min=2, max=64)}})


@pytest.mark.parametrize(
    "members",
    [
        {"requirements": (requirement("few")(lambda m: None if m.val(m.x).shape[0] <= 16 else Failure("many")),)},
        {"requirements": (requirement("four")(lambda m: None if bool(m.val(m.x).shape[0] == 4) else Failure("x")),)},
        {"rewrite": lambda self, b, m: b.call(aten.slice.Tensor, m.x, 0, 0, int(m.val(m.x).shape[0]))},
        {"summary": lambda self, m: "many rows" if m.val(m.x).shape[0] > 9 else "few rows"},
    ],
    ids=["a branch", "a bool", "a number", "a text"],
)
def test_rule_that_compares_a_dynamic_size_is_refused(members: dict[str, Any]) -> None:
    program = lines()
    with pytest.raises(RuleError, match=r"rule faulty: at relu its .*, which depends on the program's dynamic shapes"):
        ecp.rewrite(program, "cpu", [faulty(**members)])


def test_requirement_that_returns_a_symbolic_bool_is_refused() -> None:
    even: Any = requirement("even rows")(lambda m: m.val(m.x).shape[0] % 2 == 0)
    with pytest.raises(RuleError, match=r"must return None where it holds, and a Failure where it does not"):
        ecp.rewrite(lines(), "cpu", [faulty(requirements=(even,))])


def test_dynamic_size_is_an_argument_as_a_node() -> None:
    def whole(b: Any, m: Any) -> Node:
        return b.call(aten.view.default, b.call(aten.relu.default, m.x), [b.size(m.x, 0), b.size(m.x, 1)])  # type: ignore[no-any-return]

    program, _ = ecp.rewrite(lines(), "cpu", [rewriting(whole)], expect={"faulty": 1})
    for rows in (2, 40):
        x = torch.randn(rows, 3)
        assert torch.equal(program.module()(x), Lines()(x))
    with pytest.raises(RuleError, match=r"accepts no symbolic number \(s\d+\); write b.size\(node, dim\)"):
        ecp.rewrite(lines(), "cpu", [rewriting(lambda b, m: b.call(aten.view.default, m.x, list(m.val(m.x).shape)))])


# The report --------------------------------------------------------------------------------------------------------


def test_rejected_match_without_a_candidate_is_in_the_expectation_error() -> None:
    never = requirement("a thing", hint="change it")(lambda m: Failure("another"))
    with pytest.raises(
        ecp.ExpectationError, match=r"faulty: expected 1, got 0(.|\n)*rejected   relu: faulty wanted a thing"
    ):
        ecp.rewrite(lines(), "cpu", [faulty(requirements=(never,))], expect={"faulty": 1})
    _, report = ecp.rewrite(lines(), "cpu", [faulty(requirements=(never,))])
    assert report.to_dict()["rejected"] == {"faulty": ["relu: faulty wanted a thing, found another; change it"]}
    assert ecp.Report.merge([report, report]).rejected == {"faulty": 2 * report.rejected["faulty"]}


def quantized() -> ExportedProgram:
    sketch = Sketch()
    x = sketch.input("x", 2, 64)
    y = sketch.call(aten.linear.default, x, sketch.weight("w", dtype=torch.float32))
    return sketch.program(sketch.call(aten.relu.default, y))


def test_pattern_rooted_after_a_candidate_reports_why_it_missed_it() -> None:
    behind = faulty(pattern=lambda self, x: relu(op(aten.linear.default)(op(aten.gelu.default)(x), ...)))
    _, report = ecp.rewrite(quantized(), "cpu", [behind])
    assert [str(reason) for reason in report.outcomes[0].reasons] == ["faulty wanted aten.gelu, found placeholder x"]


def test_rule_for_operators_that_rewrites_create_reports_no_miss_at_exported_ones() -> None:
    """The pass list has rules for sums and products of packed linears. No exported program contains these."""
    sketch = Sketch()
    doubled = sketch.call(aten.mul.Tensor, sketch.weight("w"), 2)
    _, report = ecp.rewrite(sketch.program(doubled), "cuda")
    (reason,) = report.outcomes[0].reasons
    assert str(reason).startswith("no pass for target cuda rewrites aten.mul; ")
