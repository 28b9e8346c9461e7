"""Patterns as data: op and any_of, captures from parameters, and the roots of matches."""

import dataclasses
from typing import Any

import pytest
import torch

from et_cuda_passes.graph.pattern import Call, Capture, Literal, Wildcard, any_of, op, parse_captures, root_ops

aten = torch.ops.aten


def test_arguments_are_lifted_to_patterns() -> None:
    x = Capture("x")
    call = op(aten.add.Tensor)(x, 2, alpha=3, name="sum", shared=True)
    assert call == Call((aten.add.Tensor,), (x, Literal(2)), (("alpha", Literal(3)),), "sum", False, True)


def test_ellipsis_matches_anything_and_the_last_one_opens_the_pattern() -> None:
    x = Capture("x")
    assert op(aten.add.Tensor)(..., x).args == (Wildcard(), x)
    assert not op(aten.add.Tensor)(..., x).open
    last = op(aten.add.Tensor)(x, ...)
    assert (last.args, last.open) == ((x,), True)


def test_pattern_is_immutable() -> None:
    call = op(aten.relu.default)(Capture("x"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.name = "y"  # type: ignore[misc]
    assert hash(call) == hash(op(aten.relu.default)(Capture("x")))


def test_op_without_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op\(\) needs at least one operator"):
        op()


def test_forms_of_an_operator_are_one_target() -> None:
    assert op(aten.view.default, aten.reshape.default, aten.view_copy.default)().targets == (aten.view.default,)


def test_any_of_flattens_alternatives_in_order() -> None:
    a, b, c = (op(t)() for t in (aten.relu.default, aten.neg.default, aten.abs.default))
    assert any_of(a, any_of(b, c)).alternatives == (a, b, c)


def test_captures_are_the_parameters_of_the_pattern_method() -> None:
    def pattern(x: Any, bias: Any = None) -> None: ...

    assert parse_captures(pattern) == {"x": Capture("x"), "bias": Capture("bias", optional=True)}


def test_captures_cannot_be_variadic() -> None:
    def pattern(*xs: Any) -> None: ...

    with pytest.raises(TypeError, match="cannot be variadic"):
        parse_captures(pattern)


def test_default_of_a_capture_can_only_be_none() -> None:
    def pattern(x: Any = 1) -> None: ...

    with pytest.raises(TypeError, match="only default is None"):
        parse_captures(pattern)


def test_roots_are_those_of_every_alternative() -> None:
    pattern = any_of(op(aten.mm.default, aten.addmm.default)(...), op(aten.linear.default)(...))
    assert list(root_ops(pattern)) == [aten.mm.default, aten.addmm.default, aten.linear.default]


@pytest.mark.parametrize("pattern", [Capture("x"), Wildcard(), any_of(op(aten.relu.default)(), Literal(1))])
def test_pattern_without_a_call_at_its_root_is_refused(pattern: Any) -> None:
    with pytest.raises(TypeError, match="rooted in a call"):
        list(root_ops(pattern))


def test_text_of_a_pattern_names_its_operators() -> None:
    mm, addmm = op(aten.mm.default)(...), op(aten.addmm.default)(...)
    assert str(op(aten.mm.default, aten.linear.default)()) == "aten.mm or aten.linear"
    assert str(any_of(mm, addmm, mm)) == "aten.mm or aten.addmm"
    assert (str(Capture("x")), str(Literal(2)), str(Wildcard())) == ("x", "2", "...")


def test_more_positional_arguments_than_the_operator_has_are_refused() -> None:
    with pytest.raises(TypeError, match=r"aten\.relu"):
        op(aten.relu.default)(Capture("x"), Capture("y"))
