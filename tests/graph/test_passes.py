"""Pass lists: accepted entries, names, order, editing by name; callables on a GraphModule and what they may change."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import et_cuda_passes as ecp
from et_cuda_passes.graph.passes import PassList, parse
from et_cuda_passes.graph.pattern import op
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.testing import Sketch
from tests.helpers import apply, names

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


@pytest.mark.parametrize("wrong", [3, "linear_int4", None, object()])
def test_entry_that_is_no_pass_is_refused_with_the_accepted_kinds(wrong: Any) -> None:
    with pytest.raises(TypeError) as error:
        order([wrong])
    assert repr(wrong) in str(error.value)
    for accepted in ("rules", "ExportedProgramPassBase", "torch.fx.GraphModule"):
        assert accepted in str(error.value)


@pytest.mark.parametrize("wrong", ["linear_int4", 3, None])
def test_passes_that_are_no_list_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="passes must be a list of rules"):
        parse(wrong, lambda value: False)


def test_class_in_place_of_an_instance_is_refused() -> None:
    with pytest.raises(TypeError, match=r"pass an instance, LinearInt4\(\)"):
        order([ecp.LinearInt4])


def test_passes_with_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two passes are named 'a'"):
        order([rule("a"), plain("a")])


def test_pass_is_named_by_its_name_its_function_or_its_class() -> None:
    def tidy(module: GraphModule) -> None: ...

    assert order([rule("a"), plain("b"), tidy, functools.partial(tidy)]) == ["a", "b", "tidy", "partial"]


def test_passes_without_constraints_run_in_the_order_of_the_list() -> None:
    assert order([plain("c"), rule("a"), rule("b")]) == ["c", "a", "b"]


def test_constraints_move_their_own_pass_as_far_as_they_demand_and_no_other() -> None:
    assert order([rule("a", after=("c",)), rule("b"), rule("c"), rule("d")]) == ["b", "c", "a", "d"]
    assert order([rule("a"), rule("b"), rule("c"), rule("d", before=("b",))]) == ["a", "d", "b", "c"]
    assert order([rule("a"), rule("b"), plain("d", before=("b",), after=("a",)), rule("c")]) == ["a", "d", "b", "c"]
    assert order([plain("a", after=("b",)), rule("b")]) == ["b", "a"]


def test_constraint_with_an_unknown_name_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(
        ValueError, match="pass a names 'linear_int' in before or after; the nearest names are linear_i"
    ):
        order([rule("a", after=("linear_int",)), rule("linear_int4"), rule("fold")])
    with pytest.raises(ValueError, match="pass a names 'xyz' in before or after; the names are a, fold$"):
        order([rule("a", before=("xyz",)), rule("fold")])


def test_constraint_with_a_known_name_that_the_list_lacks_demands_nothing() -> None:
    passes = [rule("a", after=("nowhere",), before=("else",)), rule("b")]
    assert [entry.name for entry in parse(passes, lambda value: False, {"nowhere", "else"})] == ["a", "b"]


def test_rewrite_knows_the_names_of_all_default_rules() -> None:
    """A rule for several targets names rules of all of them."""
    relus = rule("relus", before=("fold_dequantize",), after=("linear_int8", "fuse_gate"))
    _, report = ecp.rewrite(relu_program(), "cpu", [relus, ecp.LinearInt4(), ecp.LinearInt8()])
    assert report.passes == ["linear_int4", "linear_int8", "relus"]
    with pytest.raises(
        ValueError, match="pass relus names 'linear_int9' in before or after; the nearest names are lin"
    ):
        ecp.rewrite(relu_program(), "cpu", [rule("relus", after=("linear_int9",))])


def test_default_rules_have_no_constraints() -> None:
    for target in ecp.targets():
        for each in ecp.default_passes(target):
            assert (each.before, each.after) == ((), ())


def test_constraint_may_be_a_single_name() -> None:
    """Not its letters."""
    assert order([rule("a", after="late"), rule("late")]) == ["late", "a"]


def members(passes: list[Any]) -> list[str]:
    """The members of the cycle that the error on ``passes`` names."""
    with pytest.raises(ValueError, match="form a cycle: ") as error:
        order(passes)
    names = str(error.value).partition("form a cycle: ")[2].partition(";")[0].split(" -> ")
    assert names[0] == names[-1]
    return sorted(names[1:])


def test_cycle_is_refused_with_its_members() -> None:
    passes = [rule("free"), rule("a", after=("c",)), rule("b", after=("a",)), rule("c", after=("b",))]
    assert members(passes) == ["a", "b", "c"]
    assert members([rule("a", after=("a",))]) == ["a"]


def test_cycle_through_the_order_of_the_list_names_only_passes_with_constraints() -> None:
    passes = [rule("first"), rule("between"), rule("last"), rule("a", after=("last",), before=("first",))]
    assert members(passes) == ["a", "first", "last"]


# Editing a list by names ------------------------------------------------------------------------------------------


def edited(passes: list[Any]) -> list[str]:
    assert isinstance(passes, PassList)
    return order(passes)


def test_list_is_edited_by_the_names_of_its_passes() -> None:
    given, new = PassList([rule("a"), plain("b"), rule("c")]), rule("new")
    assert edited(given.replace("b", new)) == ["a", "new", "c"]
    assert edited(given.without("b")) == ["a", "c"]
    assert edited(given.insert_before("a", new)) == ["new", "a", "b", "c"]
    assert edited(given.insert_after("c", new)) == ["a", "b", "c", "new"]
    assert edited(given.without("a").replace("c", new).insert_after("new", rule("a"))) == ["b", "new", "a"]
    assert order(given) == ["a", "b", "c"]


@pytest.mark.parametrize("edit", ["replace", "without", "insert_before", "insert_after"])
def test_editing_by_an_unknown_name_is_refused_with_the_nearest_names(edit: str) -> None:
    passes = ecp.default_passes("cuda")
    value = [] if edit == "without" else [rule("new")]
    with pytest.raises(ValueError, match="the list has no pass named 'linear_int'; the nearest names are linear_int"):
        getattr(passes, edit)("linear_int", *value)


@pytest.mark.parametrize("edit", ["replace", "without", "insert_before", "insert_after"])
def test_editing_by_a_former_name_is_refused_with_the_present_name(edit: str) -> None:
    passes = ecp.default_passes("cuda").without("linear_int8")
    value = [] if edit == "without" else [rule("new")]
    with pytest.raises(ValueError, match="the list has no pass named 'int4_sum'; int4_sum is now fuse_add"):
        getattr(passes, edit)("int4_sum", *value)


def test_constraint_with_a_former_name_is_refused_with_the_present_name() -> None:
    with pytest.raises(ValueError, match="pass a names 'int4_sum' in before or after; int4_sum is now fuse_add"):
        ecp.rewrite(relu_program(), "cuda", [rule("a", after=("int4_sum",))])


def test_default_passes_are_a_new_list_each_time() -> None:
    passes = ecp.default_passes("cuda")
    assert isinstance(passes, list)
    passes.clear()
    assert ecp.default_passes("cuda").replace("linear_int4", ecp.LinearInt4(kernel="tinygemm"))


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
def test_callable_changes_the_graph_and_returns_it_or_nothing(entry: Any) -> None:
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
def test_callable_that_returns_something_else_is_refused_by_name(garbage: Any) -> None:
    def odd(module: GraphModule) -> Any:
        return garbage()

    with pytest.raises(TypeError, match="pass odd returned .*; return None, a GraphModule or a PassResult"):
        apply(relu_program(), [odd])


def test_callable_that_adds_an_input_is_refused() -> None:
    def adds(module: GraphModule) -> None:
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            module.graph.placeholder("extra")

    with pytest.raises(ValueError, match=r"pass adds changed the program's inputs \(extra\)"):
        apply(relu_program(), [adds])


def test_callable_that_changes_the_order_of_the_inputs_is_refused() -> None:
    """The caller's arguments would silently change places."""

    def swaps(module: GraphModule) -> None:
        first, second, *_ = module.graph.nodes
        second.append(first)

    sketch = Sketch()
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    program = sketch.program(sketch.call(aten.sub.Tensor, x, y))
    with pytest.raises(ValueError, match="pass swaps changed the .*inputs"):
        apply(program, [swaps])


def test_callable_that_drops_an_output_is_refused() -> None:
    def drops(module: GraphModule) -> None:
        output = module.graph.output_node()
        output.args = (output.args[0][:1],)  # type: ignore[index]

    sketch = Sketch()
    x = sketch.input("x", 4)
    program = sketch.program(sketch.call(aten.relu.default, x), sketch.call(aten.neg.default, x))
    with pytest.raises(ValueError, match="pass drops changed the number of the program's outputs"):
        apply(program, [drops])


def test_callable_that_raises_leaves_the_original_unchanged() -> None:
    def breaks(module: GraphModule) -> None:
        to_neg(module)
        raise RuntimeError("halfway")

    before = relu_program()
    with pytest.raises(RuntimeError, match="halfway"):
        apply(before, [breaks])
    assert names(before) == ["aten.relu"]


def test_rule_sees_the_result_of_the_callable_before_it() -> None:
    def to_relu(module: GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=aten.abs.default):
            node.target = aten.relu.default

    sketch = Sketch()
    program = sketch.program(sketch.call(aten.abs.default, sketch.input("x", 4)))
    after, report = apply(program, [rule("early"), to_relu, rule("late")], aten.abs.default)
    assert names(after) == ["aten.neg"]
    assert report.applied["late"] == 1
    assert "early" not in report.applied


def test_executorch_program_pass_gets_and_returns_an_exported_program() -> None:
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
