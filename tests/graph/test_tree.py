"""The tree of a pattern: its marks, for attempts that match and for those that stop anywhere."""

from typing import Any

import pytest
import torch

from et_cuda_passes.graph.matcher import match, match_inner
from et_cuda_passes.graph.pattern import Capture, any_of, inner_calls, op
from et_cuda_passes.graph.tree import draw, draw_unmatched
from et_cuda_passes.testing import Sketch

aten = torch.ops.aten
X, Y = Capture("x"), Capture("y", optional=True)
relu, neg, add, mul, cat = (
    op(each) for each in (aten.relu.default, aten.neg.default, aten.add.Tensor, aten.mul.Tensor, aten.cat.default)
)


def sketched() -> tuple[Sketch, Any, Any]:
    sketch = Sketch()
    return sketch, sketch.input("a", 2, 4), sketch.input("b", 2, 4)


def test_tree_of_a_match_marks_every_part() -> None:
    sketch, a, b = sketched()
    root = sketch.call(aten.relu.default, sketch.call(aten.add.Tensor, sketch.call(aten.neg.default, a), b))
    pattern = relu(add(neg(X, name="minus"), Y))
    assert draw(pattern, match(pattern, root)) == [
        "✓ aten.relu relu_default",
        "└─ ✓ self: aten.add add_tensor",
        "   ├─ ✓ self: aten.neg neg_default as minus",
        "   │  └─ ✓ self: x = a",
        "   └─ ✓ other: y = b",
    ]


def test_tree_marks_the_call_that_is_not_there() -> None:
    sketch, a, b = sketched()
    root = sketch.call(aten.relu.default, sketch.call(aten.add.Tensor, a, sketch.call(aten.abs.default, b)))
    pattern = relu(add(X, neg(Y)))
    assert draw(pattern, match(pattern, root)) == [
        "✓ aten.relu relu_default",
        "└─ ✓ self: aten.add add_tensor",
        "   ├─ ✓ self: x = a",
        "   └─ ✗ other: wanted aten.neg, found aten.abs (abs_default)",
        "      └─ · self: y",
    ]


def test_tree_marks_an_argument_that_the_pattern_leaves_out() -> None:
    sketch, a, b = sketched()
    root = sketch.call(aten.add.Tensor, a, b, alpha=2)
    pattern = add(X, Y)
    assert draw(pattern, match(pattern, root)) == [
        "✓ aten.add add_tensor",
        "├─ ✓ self: x = a",
        "├─ ✓ other: y = b",
        "└─ ✗ alpha: wanted aten.add(alpha=1), found 2",
    ]


def test_tree_marks_a_capture_that_stands_for_two_nodes() -> None:
    sketch, a, b = sketched()
    root = sketch.call(aten.add.Tensor, sketch.call(aten.neg.default, a), b)
    pattern = add(neg(X), X)
    assert draw(pattern, match(pattern, root)) == [
        "✓ aten.add add_tensor",
        "├─ ✓ self: aten.neg neg_default",
        "│  └─ ✓ self: x = a",
        "└─ ✗ other: wanted the same x in both places, found placeholder b",
    ]


def test_tree_has_the_alternative_that_fits_farthest() -> None:
    sketch, a, b = sketched()
    root = sketch.call(aten.mul.Tensor, sketch.call(aten.neg.default, a), sketch.call(aten.abs.default, b))
    pattern = any_of(add(X, Y), mul(relu(X), Y), mul(neg(X), relu(Y)))
    assert draw(pattern, match(pattern, root)) == [
        "✓ aten.mul mul_tensor",
        "├─ ✓ self: aten.neg neg_default",
        "│  └─ ✓ self: x = a",
        "└─ ✗ other: wanted aten.relu, found aten.abs (abs_default)",
        "   └─ · self: y",
    ]


def test_tree_of_a_list_has_its_items() -> None:
    sketch, a, b = sketched()
    root = sketch.call(aten.cat.default, [sketch.call(aten.neg.default, a), b], 1)
    pattern = cat([neg(X), relu(Y)], 1)
    assert draw(pattern, match(pattern, root)) == [
        "✓ aten.cat cat_default",
        "├─ ✓ tensors: [aten.neg, aten.relu] = [neg_default, b]",
        "│  ├─ ✓ aten.neg neg_default",
        "│  │  └─ ✓ self: x = a",
        "│  └─ ✗ wanted aten.relu, found placeholder b",
        "│     └─ · self: y",
        "└─ · dim: 1",
    ]


def test_tree_of_an_inner_call_marks_the_reader_that_is_another() -> None:
    sketch, a, _ = sketched()
    inner = sketch.call(aten.neg.default, a)
    sketch.call(aten.abs.default, sketch.call(aten.relu.default, inner))
    pattern = any_of(mul(neg(X), 2), add(relu(neg(X)), Y))
    miss = match_inner(inner_calls(pattern), inner)
    assert miss is not None
    assert draw(pattern, miss) == [
        "✗ wanted aten.add as the reader of relu_default, found aten.abs (abs_default, 0 users)",
        "├─ ✓ self: aten.relu relu_default",
        "│  └─ ✓ self: aten.neg neg_default",
        "│     └─ ✓ self: x = a",
        "└─ · other: y",
    ]


def test_tree_of_a_pattern_that_was_not_tried_has_no_nodes() -> None:
    assert draw_unmatched(relu(any_of(add(X, 1), neg(X)))) == ["· aten.relu", "└─ · self: aten.add or aten.neg"]


@pytest.mark.parametrize(
    ("operator", "fix"),
    [
        (aten.relu_.default, "the in-place form is not matched: write aten.relu in the model"),
        (aten.abs.default, ""),
    ],
)
def test_miss_of_an_in_place_form_has_the_fix(operator: Any, fix: str) -> None:
    sketch, a, _ = sketched()
    root = sketch.call(aten.neg.default, sketch.raw(operator, a, val=torch.empty(2, 4)))
    miss: Any = match(neg(relu(X)), root)
    assert miss.hint.startswith(fix) and bool(miss.hint) == bool(fix)


def test_miss_of_a_mutated_value_has_the_fix() -> None:
    sketch, a, _ = sketched()
    inner = sketch.call(aten.relu.default, a)
    miss: Any = match(neg(relu(X)), sketch.call(aten.neg.default, inner), {inner})
    assert miss.hint == (
        "write the mutation out of place in the model, or call run_decompositions({}) on the program first"
    )


def test_miss_of_another_argument_names_the_value_of_the_pattern() -> None:
    sketch, a, b = sketched()
    miss: Any = match(add(X, Y), sketch.call(aten.add.Tensor, a, b, alpha=2))
    assert miss.hint == "write the call with alpha=1, or write this value in the pattern"
