"""The matcher: argument forms, alternatives, captures, other users of a node, mutations."""

import operator
from typing import Any

import pytest
import torch
from torch.fx import Node

from et_cuda_passes.graph import matcher as engine
from et_cuda_passes.graph.aliasing import mutated_nodes
from et_cuda_passes.graph.matcher import MatchResult, Miss, match
from et_cuda_passes.graph.pattern import Capture, any_of, inner_calls, op
from et_cuda_passes.testing import Sketch

aten = torch.ops.aten
X, Y = Capture("x"), Capture("y")
OPTIONAL = Capture("z", optional=True)
add, relu, neg, mul = op(aten.add.Tensor), op(aten.relu.default), op(aten.neg.default), op(aten.mul.Tensor)


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


def found(pattern: Any, node: Node) -> MatchResult:
    result = match(pattern, node, mutated_nodes(node.graph.nodes))
    assert isinstance(result, MatchResult), f"wanted {result.wanted}, found {result.found}"
    return result


def missed(pattern: Any, node: Node) -> tuple[str, str]:
    result = match(pattern, node, mutated_nodes(node.graph.nodes))
    assert isinstance(result, Miss)
    return result.wanted, result.found


def test_arguments_match_by_position_and_by_name(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    nodes = [sketch.call(aten.add.Tensor, x, y), sketch.call(aten.add.Tensor, x, other=y, alpha=1)]
    for pattern in (add(X, Y), add(X, other=Y), add(self=X, other=Y), add(X, Y, alpha=1)):
        for node in nodes:
            assert found(pattern, node).bindings == {"x": x, "y": y}


def test_argument_without_a_pattern_must_have_its_default(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    node = sketch.call(aten.add.Tensor, x, y, alpha=2)
    assert missed(add(X, Y), node) == ("aten.add(alpha=1)", "2")
    assert missed(add(X, Y, alpha=3), node) == ("aten.add(alpha=3)", "2")
    assert found(add(X, Y, alpha=2), node)
    assert found(add(X, Y, alpha=Capture("a")), node).bindings["a"] == 2


def test_open_pattern_allows_any_other_arguments(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    node = sketch.call(aten.add.Tensor, x, y, alpha=2)
    assert found(add(X, ...), node).bindings == {"x": x}
    assert found(add(X, ..., alpha=2), node)
    assert missed(add(X, ..., alpha=1), node) == ("aten.add(alpha=1)", "2")


def test_argument_name_that_the_operator_lacks_is_refused() -> None:
    with pytest.raises(TypeError, match=r"aten.relu has no argument called 'inplace'; it has self"):
        relu(X, inplace=False)


def test_python_function_matches_by_position(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    parts = sketch.call(aten.split.Tensor, x, 2)
    node = sketch.graph.call_function(operator.getitem, (parts, 1))
    getitem = op(operator.getitem)
    assert found(getitem(op(aten.split.Tensor)(X, ...), 1), node).bindings == {"x": x}
    assert missed(getitem(Y, 0), node) == ("0", "1")


def test_alternatives_are_tried_in_order(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    node = sketch.call(aten.neg.default, sketch.call(aten.relu.default, x))
    wide, narrow = neg(X), neg(relu(X))
    assert found(any_of(wide, narrow), node).bindings["x"].target is aten.relu.default
    assert found(any_of(narrow, wide), node).bindings["x"] is x
    assert found(any_of(mul(X, Y), narrow), node).bindings["x"] is x


def test_alternative_that_fails_later_is_given_up_for_the_next(sketch: Sketch) -> None:
    """The first alternative binds x to a node that is not the second operand."""
    x = sketch.input("x", 4)
    node = sketch.call(aten.add.Tensor, sketch.call(aten.neg.default, x), x)
    pattern = add(any_of(X, neg(X)), X)
    result = found(pattern, node)
    assert result.bindings == {"x": x}
    assert [n.target for n in result.owned] == [aten.add.Tensor, aten.neg.default]


def test_repeated_capture_must_match_the_same_node(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    assert found(mul(X, X), sketch.call(aten.mul.Tensor, x, x)).bindings == {"x": x}
    wanted, what = missed(mul(X, X), sketch.call(aten.mul.Tensor, x, y))
    assert wanted == "the same x in both places"
    assert "y" in what


def test_optional_capture_is_none_if_absent(sketch: Sketch) -> None:
    x, w, b = sketch.input("x", 2, 4), sketch.input("w", 3, 4), sketch.input("b", 3)
    linear = op(aten.linear.default)
    without, with_bias = sketch.call(aten.linear.default, x, w), sketch.call(aten.linear.default, x, w, b)
    assert found(linear(X, Y, OPTIONAL), without).bindings["z"] is None
    assert found(linear(X, Y, OPTIONAL), with_bias).bindings["z"] is b
    assert missed(linear(X, Y, Capture("bias")), without) == ("bias", "None")


def test_inner_node_with_another_user_is_a_miss_unless_shared(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    inner = sketch.call(aten.relu.default, x)
    node = sketch.call(aten.neg.default, inner)
    sketch.call(aten.abs.default, inner)
    wanted, what = missed(neg(relu(X)), node)
    assert (wanted, what) == ("aten.relu with this one user", "aten.relu (relu_default, 2 users)")
    result = found(neg(relu(X, shared=True)), node)
    assert (result.owned, result.shared) == ((node,), (inner,))


def test_root_may_have_any_number_of_users(sketch: Sketch) -> None:
    node = sketch.call(aten.relu.default, sketch.input("x", 4))
    for _ in range(3):
        sketch.call(aten.neg.default, node)
    assert found(relu(X), node).owned == (node,)


def test_mutated_inner_node_does_not_match(sketch: Sketch) -> None:
    """A mutation through a view counts too."""
    inner = sketch.call(aten.neg.default, sketch.input("x", 4))
    sketch.call(aten.add_.Tensor, sketch.call(aten.view.default, inner, [2, 2]), 1)
    node = sketch.call(aten.relu.default, inner)
    assert "is not mutated" in missed(relu(neg(X, shared=True)), node)[0]


def test_detach_in_place_is_no_mutation(sketch: Sketch) -> None:
    """``torch.export`` puts one after every ``torch.tensor([...])`` of a model."""
    inner = sketch.call(aten.neg.default, sketch.input("x", 4))
    node = sketch.call(aten.relu.default, sketch.call(aten.detach_.default, inner))
    sketch.call(aten.relu.default, inner)
    assert mutated_nodes(node.graph.nodes) == set()


def test_match_does_not_move_a_read_across_a_mutation(sketch: Sketch) -> None:
    """relu(x + y) with x doubled in between: a new operator at the root would read the doubled x."""
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    total = sketch.call(aten.add.Tensor, x, y)
    sketch.call(aten.mul_.Tensor, x, 2)
    node = sketch.call(aten.relu.default, total)
    assert isinstance(match(relu(add(X, Y)), node, mutated_nodes(node.graph.nodes)), Miss)


def test_match_does_not_move_a_read_of_a_view_across_a_mutation_of_its_source(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 2, 2)
    total = sketch.call(aten.add.Tensor, sketch.call(aten.view.default, x, [2, 2]), y)
    sketch.call(aten.mul_.Tensor, x, 2)
    node = sketch.call(aten.relu.default, total)
    assert isinstance(match(relu(add(X, Y)), node, mutated_nodes(node.graph.nodes)), Miss)


def test_operand_of_the_root_may_be_mutated_elsewhere(sketch: Sketch) -> None:
    """The new operator stands in the place of the former one, and reads the same values."""
    x = sketch.input("x", 4)
    node = sketch.call(aten.relu.default, x)
    sketch.call(aten.mul_.Tensor, x, 2)
    assert found(relu(X), node).bindings == {"x": x}


@pytest.mark.parametrize(
    "form", [aten.view.default, aten.reshape.default, aten.view_copy.default, aten._unsafe_view.default]
)
def test_view_and_copying_forms_match_the_same_pattern(sketch: Sketch, form: Any) -> None:
    x = sketch.input("x", 4)
    node = sketch.call(form, x, [2, 2])
    for pattern_form in (aten.view.default, aten.reshape.default, aten.view_copy.default):
        assert found(op(pattern_form)(X, [2, 2]), node).bindings == {"x": x}
        assert missed(op(pattern_form)(X, [4, 1]), node) == ("aten.view(size=[4, 1])", "[2, 2]")


def test_forms_of_an_operator_match_by_argument_name(sketch: Sketch) -> None:
    """The second argument of view is called size, that of reshape shape."""
    x = sketch.input("x", 4)
    node = sketch.call(aten.reshape.default, x, [2, 2])
    assert found(op(aten.view.default)(X, size=[2, 2]), node).bindings == {"x": x}


def test_edge_operator_matches_the_aten_operator_it_wraps(sketch: Sketch) -> None:
    from executorch.exir.dialects._ops import ops

    x = sketch.input("x", 2, 4)
    node = sketch.graph.call_function(ops.edge.aten.transpose_copy.int, (x, 0, 1))
    assert found(op(aten.transpose.int)(X, 0, 1), node).bindings == {"x": x}
    assert found(op(ops.edge.aten.transpose_copy.int)(X, 0, dim1=1), node).bindings == {"x": x}
    view = sketch.graph.call_function(ops.edge.aten.view_copy.default, (node, [8]))
    assert found(op(aten.view.default)(op(aten.transpose.int)(X, 0, 1), [8]), view).bindings == {"x": x}


def test_miss_is_the_attempt_that_matched_the_most_nodes(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    node = sketch.call(aten.neg.default, sketch.call(aten.relu.default, sketch.call(aten.abs.default, x)))
    pattern = any_of(neg(relu(mul(X, Y))), neg(mul(X, Y)))
    assert missed(pattern, node) == ("aten.mul", "aten.abs (abs_default)")
    assert missed(neg(relu(op(aten.abs.default)(neg(X)))), node) == ("aten.neg", "placeholder x")


def test_text_of_a_miss_is_computed_when_it_is_read(sketch: Sketch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(engine, "op_name", lambda target: calls.append(target) or "named")
    miss = match(neg(relu(X)), sketch.call(aten.neg.default, sketch.call(aten.abs.default, sketch.input("x", 4))))
    assert isinstance(miss, Miss)
    assert not calls
    assert miss.found == "named (abs_default)"
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["placeholder", "output"])
def test_node_without_a_call_matches_no_call(sketch: Sketch, kind: str) -> None:
    x = sketch.input("x", 4)
    node = x if kind == "placeholder" else sketch.graph.output((x,))
    found = "placeholder x" if kind == "placeholder" else "the output of the graph"
    assert missed(relu(X), node) == ("aten.relu", found)


def test_list_is_matched_item_by_item(sketch: Sketch) -> None:
    x, ids = sketch.input("x", 4, 8), sketch.input("ids", 3, dtype=torch.int64)
    pattern = op(aten.index.Tensor)(X, [Y])
    assert found(pattern, sketch.call(aten.index.Tensor, x, [ids])).bindings == {"x": x, "y": ids}
    wanted, what = missed(pattern, sketch.call(aten.index.Tensor, x, [None, ids]))
    assert (wanted, what) == ("[y]", "[None, ids]")
    assert missed(pattern, sketch.call(aten.index.Tensor, x, [None]))[0] == "y"
    assert found(op(aten.permute.default)(X, [1, 0]), sketch.call(aten.permute.default, x, [1, 0]))


def test_list_item_that_is_mutated_later_does_not_match(sketch: Sketch) -> None:
    x, ids = sketch.input("x", 4, 8), sketch.input("ids", 3, dtype=torch.int64)
    picked = sketch.call(aten.index.Tensor, x, [ids])
    sketch.call(aten.add_.Tensor, ids, 1)
    root = sketch.call(aten.relu.default, picked)
    assert missed(relu(op(aten.index.Tensor)(X, [Y])), root)[0] == "y, which is not mutated"


def test_mutation_of_one_result_reaches_the_others_only_through_views(sketch: Sketch) -> None:
    x = sketch.input("x", 4, 8)
    for many, apart in ((sketch.call(aten.topk.default, x, 2), True), (sketch.call(aten.split.Tensor, x, 2), False)):
        first, second = (sketch.call(operator.getitem, many, index) for index in (0, 1))
        sketch.call(aten.div_.Tensor, first, 2)
        written = mutated_nodes(sketch.graph.nodes)
        assert first in written
        assert (second not in written) == apart


def test_operands_in_the_other_order_are_the_reason_of_a_miss(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    product = sketch.call(aten.mul.Tensor, x, sketch.call(aten.relu.default, x))
    pattern = mul(relu(X), X)
    miss = match(pattern, product)
    assert isinstance(miss, Miss)
    assert miss.wanted == "aten.mul with its operands in the order of the pattern"
    assert "write both orders in the pattern, with any_of" in miss.hint
    found(any_of(pattern, mul(X, relu(X))), product)


def test_operands_in_the_other_order_are_no_reason_if_they_do_not_fit_either(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    product = sketch.call(aten.mul.Tensor, x, sketch.call(aten.relu.default, y))
    assert missed(mul(relu(X), X), product) == ("aten.relu", "placeholder x")
    difference = sketch.call(aten.sub.Tensor, x, sketch.call(aten.relu.default, x))
    assert missed(op(aten.sub.Tensor)(relu(X), X), difference) == ("aten.relu", "placeholder x")


def test_reader_of_a_dead_node_is_reported_as_none(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    miss = engine.match_inner(inner_calls(neg(relu(X))), sketch.call(aten.relu.default, x))
    assert miss is not None and miss.found == "no reader"


def test_assertion_is_not_named_as_the_reader_that_does_not_fit(sketch: Sketch) -> None:
    y = sketch.call(aten.relu.default, sketch.input("x", 4))
    sketch.call(aten._assert_tensor_metadata.default, y, dtype=torch.float32)
    sketch.program(sketch.call(aten.abs.default, y))
    miss = engine.match_inner(inner_calls(neg(relu(X))), y)
    assert miss is not None and miss.found.startswith("aten.abs")
