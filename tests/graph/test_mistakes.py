"""What a rule's author can get wrong: an error that names the rule and what to change, and never a bad program."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

import et_cuda_passes as ecp
from et_cuda_passes.graph.errors import RuleError
from et_cuda_passes.graph.pattern import any_of, op
from et_cuda_passes.graph.rule import GroupRule, Rule, compile_pattern, requirement
from tests.helpers import Sketch, apply, names

aten = torch.ops.aten
relu, add = op(aten.relu.default), op(aten.add.Tensor)


class Relu(Rule):
    """relu(x) -> neg(x)"""

    def pattern(self, x: Any) -> Any:
        return relu(x)

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.neg.default, m.x)


def made(**members: Any) -> Rule:
    return type("Faulty", (Relu,), members)()  # type: ignore[no-any-return]


def rewriting(rewrite: Callable[[Any, Any], Any]) -> Rule:
    return made(rewrite=lambda self, b, m: rewrite(b, m))


def two() -> ExportedProgram:
    """neg(relu(x) + y), and what stands behind the relu."""
    sketch = Sketch()
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    total = sketch.call(aten.add.Tensor, sketch.call(aten.relu.default, x), y)
    return sketch.program(sketch.call(aten.neg.default, total))


# What is said of the pattern ----------------------------------------------------------------------------------------


def test_a_packet_a_function_and_a_name_are_no_operators() -> None:
    with pytest.raises(TypeError, match=r"aten.add has several overloads.* write aten.add.Tensor or aten.add.Scalar"):
        op(aten.add)
    for wrong in (nn.functional.linear, "aten.linear"):
        with pytest.raises(TypeError, match=r"is no operator of an exported graph: write its overload, as aten.linear"):
            op(wrong)
    assert op(operator.getitem) is not None
    assert op(torch.sym_max) is not None


def test_a_capture_that_the_pattern_does_not_have_is_refused() -> None:
    rule = made(pattern=lambda self, x, bias: relu(x))
    with pytest.raises(
        TypeError, match="rule faulty: pattern.. takes the capture 'bias' and its pattern has it nowhere"
    ):
        compile_pattern(rule)


def test_a_capture_that_some_alternatives_lack_is_optional() -> None:
    with pytest.raises(TypeError, match="some alternatives of the pattern do not have 'y'; give it the default None"):
        compile_pattern(made(pattern=lambda self, x, y: any_of(relu(x), add(x, y))))
    compile_pattern(made(pattern=lambda self, x, y=None: any_of(relu(x), add(x, y))))


def test_a_require_is_given_text_and_a_stage_that_exists() -> None:
    with pytest.raises(TypeError, match=r"@requirement\('...'\) above the function"):
        requirement(lambda self, m: (False, "nothing"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in one of the stages .*'metadata', 'values'.*, not 'value'"):
        requirement("a thing", stage="value")  # type: ignore[arg-type]


def test_requires_that_want_the_same_are_told_both() -> None:
    def no(found: str) -> Any:
        return requirement("one thing")(lambda self, m: (False, found))

    rule = made(first=no("this"), second=no("that"))
    _, report = apply(two(), [rule])
    assert report.rejected["faulty"] == [
        "relu_default: faulty wanted one thing, found this",
        "relu_default: faulty wanted one thing, found that",
    ]


def test_a_pass_may_not_be_called_as_an_outcome_is() -> None:
    with pytest.raises(ValueError, match="a pass is named 'missed', which is what reports call an outcome"):
        apply(two(), [made(name="missed")])


# What is said of the questions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"c": requirement("a thing")(lambda self, m: 1 / 0)}, "requirement 'a thing'"),
        ({"takes": lambda self, m: 1 / 0}, "takes"),
        ({"summary": lambda self, m: 1 / 0}, "summary"),
        ({"notes": lambda self, *ms: 1 / 0}, "notes"),
    ],
)
def test_a_question_that_fails_names_its_rule_and_place(members: dict[str, Any], what: str) -> None:
    with pytest.raises(RuleError, match=rf"rule faulty: at relu_default its {what} failed: division by zero") as error:
        apply(two(), [made(**members)])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_absent_capture_has_no_metadata() -> None:
    def ask(self: Any, m: Any) -> Any:
        return m.val(m.y).dim() == 1, "y"

    rule = made(pattern=lambda self, x, y=None: any_of(relu(x), add(x, y)), c=requirement("a thing")(ask))
    with pytest.raises(RuleError, match="None stands where a node was asked for: an optional capture may be absent"):
        apply(two(), [rule])


@pytest.mark.parametrize("key", [lambda self, m: 1 / 0, lambda self, m: [m.x]], ids=["raises", "unhashable"])
def test_a_key_that_fails_names_its_rule(key: Any) -> None:
    together = {"group_key": key, "rewrite_group": lambda self, b, ms: [], "pattern": Relu.pattern}
    rule = type("Faulty", (GroupRule,), together)()
    with pytest.raises(RuleError, match="rule faulty: at relu_default its group_key failed: "):
        apply(two(), [rule])


# What is built ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewrite", "fault"),
    [
        (
            lambda b, m: b.call(aten.add.Tensor, m.x, torch.ones(4)),
            "a new tensor is made a constant .* with b.constant",
        ),
        (
            lambda b, m: b.call(aten.mul.Tensor, m.root, 1.0),
            "relu_default is what rewrite replaces, and cannot be read",
        ),
        (lambda b, m: b.call(aten.neg.default, next(iter(m.root.users))), "add_tensor is computed behind relu_default"),
        (lambda b, m: b.call(aten.add, m.x, 1), "aten.add has several overloads"),
        (lambda b, m: b.call(nn.functional.relu, m.x), "is no operator of an exported graph"),
        (lambda b, m: m.root, "left relu_default as it was; a rule that keeps its matches derives from Keep"),
        (
            lambda b, m: b.call(aten.max.dim, m.x, 0),
            r"which is none; take one of its results: b.call\(operator.getitem",
        ),
        (
            lambda b, m: b.constant("c", [], "c", lambda: torch.ones(4)),
            "c has no sources, or some that are no constants",
        ),
        (lambda b, m: b.constant("c", [m.x], "c", lambda: torch.ones(4)), r"are weight_of\(m\).sources"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(rewrite: Any, fault: str) -> None:
    before = two()
    with pytest.raises(RuleError, match=f"rule faulty.*{fault}"):
        apply(before, [rewriting(rewrite)])
    assert names(before) == ["aten.relu", "aten.add", "aten.neg"]


def test_a_node_made_without_the_builder_has_no_value() -> None:
    def rewrite(b: Any, m: Any) -> Node:
        with m.root.graph.inserting_before(m.root):
            return m.root.graph.call_function(aten.neg.default, (m.x,))  # type: ignore[no-any-return]

    with pytest.raises(RuleError, match=r"which is none; build it with b.call"):
        apply(two(), [rewriting(rewrite)])


def test_a_node_that_was_removed_is_refused() -> None:
    gone: list[Node] = []

    class First(Relu):
        def rewrite(self, b: Any, m: Any) -> Node:
            gone.append(m.root)
            return super().rewrite(b, m)

    class Second(Relu):
        after = ("first",)

        def pattern(self, x: Any) -> Any:
            return op(aten.neg.default)(x)

        def rewrite(self, b: Any, m: Any) -> Node:
            return b.call(aten.abs.default, gone[0])  # type: ignore[no-any-return]

    with pytest.raises(RuleError, match="rule second: .* is not in the graph that .* stands in, or was removed"):
        apply(two(), [First(), Second()])


def test_a_node_that_nothing_reads_is_gone() -> None:
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
        {"c": requirement("few rows")(lambda self, m: (True, "") if m.val(m.x).shape[0] <= 16 else (False, "many"))},
        {"c": requirement("four rows")(lambda self, m: (bool(m.val(m.x).shape[0] == 4), "others"))},
        {"rewrite": lambda self, b, m: b.call(aten.slice.Tensor, m.x, 0, 0, int(m.val(m.x).shape[0]))},
        {"takes": lambda self, m: [m.x] if m.val(m.x).shape[0] > 9 else []},
    ],
    ids=["a branch", "a bool", "a number", "what is taken"],
)
def test_a_dynamic_size_is_not_fixed_by_a_rule(members: dict[str, Any]) -> None:
    program = lines()
    with pytest.raises(RuleError, match=r"rule faulty: at relu its .* which the program's dynamic shapes leave open"):
        ecp.rewrite(program, "cpu", [made(**members)])


def test_an_answer_about_a_dynamic_size_is_no_bool() -> None:
    even = requirement("even rows")(lambda self, m: (m.val(m.x).shape[0] % 2 == 0, "odd"))
    with pytest.raises(RuleError, match=r"with holds a bool .*statically_known_true says"):
        ecp.rewrite(lines(), "cpu", [made(c=even)])


def test_a_dynamic_size_is_an_argument_as_a_node() -> None:
    def whole(b: Any, m: Any) -> Node:
        return b.call(aten.view.default, b.call(aten.relu.default, m.x), [b.size(m.x, 0), b.size(m.x, 1)])  # type: ignore[no-any-return]

    program, _ = ecp.rewrite(lines(), "cpu", [rewriting(whole)], expect={"faulty": 1})
    for rows in (2, 40):
        x = torch.randn(rows, 3)
        assert torch.equal(program.module()(x), Lines()(x))
    with pytest.raises(RuleError, match=r"takes no symbolic number \(s\d+\).* is b.size\(node, dim\)"):
        ecp.rewrite(lines(), "cpu", [rewriting(lambda b, m: b.call(aten.view.default, m.x, list(m.val(m.x).shape)))])


# What is told -------------------------------------------------------------------------------------------------------


def test_what_is_no_candidate_and_was_not_taken_is_told_where_it_was_expected() -> None:
    never = requirement("a thing", hint="change it")(lambda self, m: (False, "another"))
    with pytest.raises(
        ecp.ExpectationError, match=r"faulty: expected 1, got 0(.|\n)*rejected   relu: faulty wanted a thing"
    ):
        ecp.rewrite(lines(), "cpu", [made(c=never)], expect={"faulty": 1})
    _, report = ecp.rewrite(lines(), "cpu", [made(c=never)])
    assert report.to_dict()["rejected"] == {"faulty": ["relu: faulty wanted a thing, found another; change it"]}
    assert ecp.Report.merge([report, report]).rejected == {"faulty": 2 * report.rejected["faulty"]}


def quantized() -> ExportedProgram:
    sketch = Sketch()
    x = sketch.input("x", 2, 64)
    y = sketch.call(aten.linear.default, x, sketch.weight("w", dtype=torch.float32))
    return sketch.program(sketch.call(aten.relu.default, y))


class Again(Rule):
    """linear(x, w) -> linear(x, w): the weight stays quantized"""

    def pattern(self, x: Any) -> Any:
        return op(aten.linear.default)(x, op(torch.ops.torchao.dequantize_affine.default)(..., name="w", shared=True))

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.linear.default, m.x, m.w)


class Transposed(Again):
    """linear(x, w) -> x @ t(w): another operator reads the weight"""

    def rewrite(self, b: Any, m: Any) -> Node:
        return b.call(aten.mm.default, m.x, b.call(aten.t.default, m.w))


def test_a_linear_that_a_rule_left_quantized_is_open_to_later_rules() -> None:
    _, report = ecp.rewrite(quantized(), "cpu", [Again()])
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.node, report.applied) == ("missed", "linear_default", {"again": 1})
    first = type("First", (Again,), {"before": ("linear_int4",)})()
    _, report = ecp.rewrite(quantized(), "cpu", [first, *ecp.default_passes("cpu")])
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.rule, report.applied) == (
        "rewritten",
        "linear_int4",
        {"first": 1, "linear_int4": 1},
    )
    assert report.warnings == []


def test_another_operator_that_a_rule_left_quantized_is_warned_of() -> None:
    _, report = ecp.rewrite(quantized(), "cpu", [Transposed()])
    (warning,) = report.warnings
    assert warning.startswith("aten.mm linear_default still reads the quantized weight w.data: a rule built it")


def test_a_pattern_rooted_behind_a_candidate_says_why_it_missed_it() -> None:
    behind = made(pattern=lambda self, x: relu(op(aten.linear.default)(op(aten.gelu.default)(x), ...)))
    _, report = ecp.rewrite(quantized(), "cpu", [behind])
    assert [str(reason) for reason in report.outcomes[0].reasons] == ["faulty wanted aten.gelu, found placeholder x"]


def test_a_rule_for_what_others_make_says_nothing_of_what_was_exported() -> None:
    """A weight that is doubled: the pass list has a sum of packed linears, which this never was."""
    sketch = Sketch()
    doubled = sketch.call(aten.mul.Tensor, sketch.weight("w"), 2)
    _, report = ecp.rewrite(sketch.program(doubled), "cuda")
    (reason,) = report.outcomes[0].reasons
    assert str(reason).startswith("no pass for target cuda takes aten.mul; ")
