"""Pass lists: what may stand in one, names, order, stages; callables on a GraphModule and what they may leave."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import et_cuda_passes as ecp
from et_cuda_passes.graph.passes import parse, stages
from et_cuda_passes.graph.pattern import op
from et_cuda_passes.graph.rule import Rule
from tests.helpers import Sketch, apply, names

aten = torch.ops.aten


def rule(name: str, before: Any = (), after: Any = ()) -> Rule:
    """A rule called ``name`` that replaces relu by neg."""
    body = {
        "name": name,
        "before": before,
        "after": after,
        "pattern": lambda self, x: op(aten.relu.default)(x),
        "rewrite": lambda self, b, m: b.call(aten.neg.default, m.x),
    }
    return type(name, (Rule,), body)()  # type: ignore[no-any-return]


def plain(name: str, **order: Any) -> Any:
    """A callable pass called ``name`` that does nothing."""

    class Nothing:
        def __call__(self, module: GraphModule) -> None: ...

    value = Nothing()
    vars(value).update(name=name, **order)
    return value


def order(passes: list[Any]) -> list[str]:
    return [entry.name for entry in parse(passes, lambda value: False)]


def staged(passes: list[Any]) -> list[list[str]]:
    return [[entry.name for entry in stage] for stage in stages(parse(passes, lambda value: False))]


@pytest.mark.parametrize("wrong", [3, "linear_int4", None, object()])
def test_what_is_no_pass_is_refused_with_what_is_accepted(wrong: Any) -> None:
    with pytest.raises(TypeError) as error:
        order([wrong])
    assert repr(wrong) in str(error.value)
    for accepted in ("rules", "ExportedProgramPassBase", "torch.fx.GraphModule"):
        assert accepted in str(error.value)


@pytest.mark.parametrize("wrong", ["linear_int4", 3, None])
def test_what_is_no_list_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="passes must be a list of rules"):
        parse(wrong, lambda value: False)


def test_a_class_in_place_of_an_instance_is_refused() -> None:
    with pytest.raises(TypeError, match=r"pass an instance, LinearInt4\(\)"):
        order([ecp.LinearInt4])


def test_two_passes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two passes are named 'a'"):
        order([rule("a"), plain("a")])


def test_a_pass_is_named_by_its_name_its_function_or_its_class() -> None:
    def tidy(module: GraphModule) -> None: ...

    assert order([rule("a"), plain("b"), tidy, functools.partial(tidy)]) == ["a", "b", "tidy", "partial"]


def test_without_constraints_the_order_is_the_one_written() -> None:
    assert order([plain("c"), rule("a"), rule("b")]) == ["c", "a", "b"]


def test_constraints_move_a_pass_and_nothing_else() -> None:
    assert order([rule("a", after=("c",)), rule("b"), rule("c"), rule("d")]) == ["b", "c", "a", "d"]
    assert order([rule("a"), rule("b"), rule("c", before=("a",))]) == ["b", "c", "a"]
    assert order([plain("a", after=("b",)), rule("b")]) == ["b", "a"]


def test_a_constraint_on_a_pass_that_is_not_there_is_void() -> None:
    assert order([rule("a", after=("nowhere",), before=("else",)), rule("b")]) == ["a", "b"]


def test_a_constraint_given_as_one_name_is_that_name() -> None:
    """Not its letters."""
    assert order([rule("a", after="late"), rule("late")]) == ["late", "a"]


def test_a_cycle_is_reported_with_its_members() -> None:
    passes = [rule("free"), rule("a", after=("c",)), rule("b", after=("a",)), rule("c", after=("b",))]
    with pytest.raises(ValueError, match="cycle") as error:
        order(passes)
    members = str(error.value).partition("form a cycle: ")[2].partition(";")[0].split(" -> ")
    assert members[0] == members[-1]
    assert sorted(members[1:]) == ["a", "b", "c"]
    assert "free" not in members


def test_a_pass_after_itself_is_a_cycle() -> None:
    with pytest.raises(ValueError, match="a -> a"):
        order([rule("a", after=("a",))])


def test_rules_match_together_unless_one_must_follow_another_and_the_rest_stand_alone() -> None:
    passes = [rule("a"), rule("b"), rule("c", after=("b",)), plain("p"), plain("q"), rule("d")]
    assert staged(passes) == [["a", "b"], ["c"], ["p"], ["q"], ["d"]]
    assert staged([rule("a", before=("b",)), rule("b")]) == [["a"], ["b"]]


# Callables on a GraphModule ---------------------------------------------------------------------------------------


def relus(module: GraphModule) -> list[torch.fx.Node]:
    return module.graph.find_nodes(op="call_function", target=aten.relu.default)


def to_neg(module: GraphModule) -> None:
    """Every relu becomes a neg, in place."""
    for node in relus(module):
        node.target = aten.neg.default


def relu_program() -> torch.export.ExportedProgram:
    sketch = Sketch()
    return sketch.program(sketch.call(aten.relu.default, sketch.input("x", 4)))


def returns_none(module: GraphModule) -> None:
    to_neg(module)


def returns_it(module: GraphModule) -> GraphModule:
    to_neg(module)
    return module


def returns_another(module: GraphModule) -> GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    result = GraphModule(module, graph)
    to_neg(result)
    return result


def returns_pass_result(module: GraphModule) -> Any:
    to_neg(module)
    return torch.fx.passes.infra.pass_base.PassResult(module, True)


@pytest.mark.parametrize("entry", [returns_none, returns_it, returns_another, returns_pass_result])
def test_a_callable_changes_the_graph_and_returns_it_or_nothing(entry: Any) -> None:
    before = relu_program()
    after, report = apply(before, [entry])
    assert (names(before), names(after)) == (["aten.relu"], ["aten.neg"])
    assert report.passes == [entry.__name__]
    assert torch.equal(after.module()(torch.tensor([1.0, -2, 3, -4])), torch.tensor([-1.0, 2, -3, 4]))


@pytest.mark.parametrize(
    "garbage",
    [lambda: 3, lambda: "done", list, lambda: SimpleNamespace(graph_module="no module", modified=True), relu_program],
    ids=["number", "text", "list", "strange result", "exported program"],
)
def test_a_callable_that_returns_something_else_is_refused_by_name(garbage: Any) -> None:
    def odd(module: GraphModule) -> Any:
        return garbage()

    with pytest.raises(TypeError, match="pass odd returned .*; return None, a GraphModule or a PassResult"):
        apply(relu_program(), [odd])


def test_a_callable_that_adds_an_input_is_refused() -> None:
    def adds(module: GraphModule) -> None:
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            module.graph.placeholder("extra")

    with pytest.raises(ValueError, match=r"pass adds changed the program's inputs \(extra\)"):
        apply(relu_program(), [adds])


def test_a_callable_that_changes_the_order_of_the_inputs_is_refused() -> None:
    """The caller's arguments would silently change places."""

    def swaps(module: GraphModule) -> None:
        first, second, *_ = module.graph.nodes
        second.append(first)

    sketch = Sketch()
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    program = sketch.program(sketch.call(aten.sub.Tensor, x, y))
    with pytest.raises(ValueError, match="pass swaps changed the .*inputs"):
        apply(program, [swaps])


def test_a_callable_that_drops_an_output_is_refused() -> None:
    def drops(module: GraphModule) -> None:
        output = module.graph.output_node()
        output.args = (output.args[0][:1],)  # type: ignore[index]

    sketch = Sketch()
    x = sketch.input("x", 4)
    program = sketch.program(sketch.call(aten.relu.default, x), sketch.call(aten.neg.default, x))
    with pytest.raises(ValueError, match="pass drops changed the number of the program's outputs"):
        apply(program, [drops])


def test_a_callable_that_raises_leaves_the_program_as_it_was() -> None:
    def breaks(module: GraphModule) -> None:
        to_neg(module)
        raise RuntimeError("halfway")

    before = relu_program()
    with pytest.raises(RuntimeError, match="halfway"):
        apply(before, [breaks])
    assert names(before) == ["aten.relu"]


def test_a_rule_sees_what_the_callable_before_it_left() -> None:
    def to_relu(module: GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=aten.abs.default):
            node.target = aten.relu.default

    sketch = Sketch()
    program = sketch.program(sketch.call(aten.abs.default, sketch.input("x", 4)))
    after, report = apply(program, [rule("early"), to_relu, rule("late")], aten.abs.default)
    assert names(after) == ["aten.neg"]
    assert report.applied["late"] == 1
    assert "early" not in report.applied


def test_an_executorch_program_pass_runs_and_may_change_the_signature() -> None:
    from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult

    class Rename(ExportedProgramPassBase):  # type: ignore[misc]
        """Replaces relu by neg, on the whole program."""

        seen: Any = None

        def call(self, exported_program: torch.export.ExportedProgram) -> Any:
            self.seen = exported_program
            to_neg(exported_program.graph_module)
            return ExportedProgramPassResult(exported_program, True)

    entry, before = Rename(), relu_program()
    after, report = ecp.rewrite(before, "cuda", [entry])
    assert isinstance(entry.seen, torch.export.ExportedProgram)
    assert entry.seen is not before
    assert (names(before), names(after)) == (["aten.relu"], ["aten.neg"])
    assert report.passes == ["Rename"]


def test_rules_run_before_and_after_a_program_pass() -> None:
    from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult

    class Nothing(ExportedProgramPassBase):  # type: ignore[misc]
        """Looks and changes nothing."""

        def call(self, exported_program: torch.export.ExportedProgram) -> Any:
            return ExportedProgramPassResult(exported_program, False)

    sketch = Sketch()
    first = sketch.weight("a", 32, 64)
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    program = sketch.program(sketch.call(aten.relu.default, sketch.call(aten.linear.default, x, first)))
    after, report = ecp.rewrite(program, "cuda", [rule("early"), Nothing(), ecp.LinearInt4()])
    assert names(after) == ["et_cuda_passes.int4_linear_mma_tiled", "aten.neg"]
    assert [(o.status, o.rule) for o in report.outcomes] == [("rewritten", "linear_int4")]
