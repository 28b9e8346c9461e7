"""Weights in subgraphs: rewritten there, passed as operands, and shared with readers elsewhere."""

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.utils import unwrap_tensor_subclass

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.program import Program
from et_cuda_passes.testing import Quantized, assert_misses, assert_rewrites
from et_cuda_passes.testing.assertions import RTOL
from tests.graph.subgraph_models import (
    INPUTS,
    LINEARS,
    USES,
    Net,
    X,
    cond,
    exported,
    looped,
    mapped,
    nested,
    scanned,
    without_grad,
)
from tests.helpers import DEQUANTIZE

BF16 = torch.bfloat16
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def reloaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def graphs(program: ExportedProgram) -> dict[str, Graph]:
    """The graphs of ``program`` by path; its own graph has the empty path."""
    modules = program.graph_module.named_modules()
    return {path: module.graph for path, module in modules if isinstance(module, GraphModule)}


def calls(program: ExportedProgram, *targets: Any) -> list[Node]:
    """Every call of ``targets``, in subgraphs too."""
    return [node for graph in graphs(program).values() for node in graph.nodes if op_of(node) in targets]


def held(program: ExportedProgram) -> dict[str, torch.Tensor]:
    return {**program.constants, **program.state_dict}


@cache
def rewritten(use: Any) -> ExportedProgram:
    return ecp.rewrite(exported(use), "cuda")[0]


def assert_equal_results(program: ExportedProgram, before: ExportedProgram, rtol: float) -> None:
    """Compare two programs on inputs that take every branch."""
    got, wanted = program.module(), before.module()
    with torch.no_grad():
        for x in INPUTS:
            for y, right in zip(tree_leaves(got(x)), tree_leaves(wanted(x)), strict=True):
                assert (y.double() - right.double()).norm() <= rtol * right.double().norm()


FORMS: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "exported": lambda program: program,
    "decomposed": lambda program: program.run_decompositions({}),
    "reloaded": reloaded,
}


@pytest.mark.parametrize("form", ["exported", "decomposed", pytest.param("reloaded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_linears_in_subgraphs_are_rewritten_and_packed_once(use: Any, form: str) -> None:
    before = FORMS[form](exported(use))
    program, report = assert_rewrites(before, expect={"linear_int4": LINEARS[use], "missed": 0})
    assert_equal_results(program, before, RTOL)
    assert not calls(program, DEQUANTIZE, torch.ops.aten.linear.default)
    packed = {f"{name}.data.{part}" for name in USES[use] for part in ("packed", "scale_and_zero")}
    assert {name for name in held(program) if not name.endswith("bias") and "lifted" not in name} == packed
    assert {outcome.fqn for outcome in report.outcomes} == {f"{name}.data" for name in USES[use]}
    assert len({outcome.node for outcome in report.outcomes}) == len(report.outcomes)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_rewritten_subgraphs_survive_decomposition_save_and_load(use: Any) -> None:
    program = rewritten(use)
    decomposed = program.run_decompositions({})
    for after in (decomposed, reloaded(program), reloaded(decomposed)):
        assert_equal_results(after, program, rtol=0)


@pytest.mark.parametrize("use", [cond, mapped, scanned, looped], ids=lambda use: use.__name__)
def test_linears_in_subgraphs_are_rewritten_with_a_dynamic_number_of_rows(use: Any) -> None:
    before = exported(use, dynamic=True)
    for rows in (2, 7):
        x = torch.randn(rows, 64).to(BF16)
        program, _ = assert_rewrites(before, expect={"linear_int4": LINEARS[use]}, inputs=(x,))
    for graph in graphs(program).values():
        for node in graph.nodes:
            assert node.op in ("get_attr", "output") or "val" in node.meta


def test_kernel_that_does_not_run_in_control_flow_is_not_used_there() -> None:
    passes = [ecp.LinearInt4(kernel="int4pack_cpu")]
    found = "a place where the kernel compiles, found control flow at"
    report = assert_misses(exported(cond), found, "cpu", passes=passes)
    assert {"." in o.node: o.status for o in report.outcomes} == {True: "missed", False: "rewritten"}
    assert_rewrites(exported(without_grad), "cpu", expect={"linear_int4": 2})


def test_linears_in_control_flow_become_plain_operators_on_cpu() -> None:
    program, report = assert_rewrites(exported(cond), "cpu", expect={"linear_int4": 5})
    assert_equal_results(program, exported(cond), RTOL)
    assert {"." in o.node: o.kernel for o in report.outcomes} == {True: "plain operators", False: "int4pack_cpu"}


@pytest.mark.parametrize("target", ["cuda", "metal", "xnnpack"])
def test_linears_in_subgraphs_are_rewritten_for_every_other_target(target: str) -> None:
    before = exported(cond)
    program, _ = assert_rewrites(before, target, expect={"rewritten": 5})
    assert_equal_results(program, before, RTOL)
    assert not calls(program, DEQUANTIZE)


@pytest.mark.parametrize(
    "use", [cond, pytest.param(nested, marks=pytest.mark.slow), mapped], ids=lambda use: use.__name__
)
def test_edge_program_with_subgraphs_is_rewritten_to_edge_operators(use: Any) -> None:
    config = EdgeCompileConfig(_core_aten_ops_exception_list=[DEQUANTIZE], _skip_dim_order=True)
    edge = to_edge(rewritten(use), compile_config=config).exported_program()
    later, _ = assert_rewrites(to_edge(exported(use), compile_config=config).exported_program(), inputs=(X,))
    for program in (edge, later):
        forms = {type(node.target).__name__ for node in calls(program, ecp.ops.INT4_LINEARS["mma_tiled"].op)}
        assert forms == {"EdgeOpOverload"}
        assert not calls(program, DEQUANTIZE)
        assert_equal_results(program, rewritten(use), 2**-7)


def test_xnnpack_keeps_nothing_inside_control_flow() -> None:
    """executorch 1.5.1 delegates no linear in a subgraph: the delegate reads weights as constants of the program."""
    int8 = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))

    def use(net: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: net.a(y), lambda y: y + 1, (x,)) + net.b(x)

    before = torch.export.export(Unwrapped(use, unwrap=True, config=int8), (X,))
    report = assert_misses(before, "a place outside control flow", "xnnpack", passes=[ecp.KeepDynamicInt4(bf16=True)])
    assert {o.fqn: o.status for o in report.outcomes} == {"a.weight": "missed", "b.weight": "kept"}


def test_subgraphs_of_a_cond_have_the_same_operands_and_no_unused_ones() -> None:
    program, _ = ecp.rewrite(exported(nested), "cuda")
    seen = 0
    for path, graph in graphs(program).items():
        for call in graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
            _, *branches, operands = call.args
            for branch in branches:
                inside = graphs(program)[".".join(filter(None, (path, branch.target)))]
                placeholders = inside.find_nodes(op="placeholder")
                assert [p.meta["val"].shape for p in placeholders] == [o.meta["val"].shape for o in operands]
            columns = zip(
                *(
                    graphs(program)[".".join(filter(None, (path, b.target)))].find_nodes(op="placeholder")
                    for b in branches
                ),
                strict=True,
            )
            assert all(any(placeholder.users for placeholder in column) for column in columns)
            seen += 1
    assert seen == 2


def test_weight_with_several_readers_is_one_operand() -> None:
    def twice(net: Net, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: net.a(net.a(y)), lambda y: net.a(y + 1), (x,))

    program, _ = assert_rewrites(torch.export.export(Net(twice), (X,)), expect={"linear_int4": 3})
    (call,) = calls(program, torch.ops.higher_order.cond)
    assert sorted(operand.name for operand in call.args[3]) == [
        "p_a_bias",
        "p_a_data_packed",
        "p_a_data_scale_and_zero",
        "x",
    ]


def test_report_names_weight_path_and_user_line() -> None:
    _, report = ecp.rewrite(exported(cond, strict=True), "cuda")
    where = {outcome.node.rpartition(".")[0] for outcome in report.outcomes}
    assert len(where) == 3
    assert "" in where
    for outcome in report.outcomes:
        assert "modules.py" in outcome.source
        assert outcome.source.endswith("return self.form(x, self.weight(), self.bias)")
    # Without strict, torch traces a subgraph through generated code, whose lines are not the user's.
    _, report = ecp.rewrite(exported(cond), "cuda")
    assert not any("<" in outcome.source for outcome in report.outcomes)


def test_new_nodes_in_a_subgraph_have_value_and_provenance() -> None:
    before = exported(cond, strict=True)
    program, _ = ecp.rewrite(before, "cuda", [ecp.LinearInt4()])
    old = {(path, node.name): node for path, graph in graphs(before).items() for node in graph.nodes}
    inside = [(path, node) for path, graph in graphs(program).items() if path for node in graph.nodes]
    new = [(path, node) for path, node in inside if str(node.target).startswith("et_cuda_passes")]
    assert len(new) == 3
    for path, node in new:
        (source,) = node.meta["from_node"]
        assert source.pass_name == "linear_int4"
        assert node.meta["stack_trace"] == old[path, source.name].meta["stack_trace"]
        assert node.meta["val"].shape == old[path, source.name].meta["val"].shape


def test_rewrites_of_the_same_program_with_subgraphs_are_equal_to_the_byte() -> None:
    def saved() -> bytes:
        buffer = io.BytesIO()
        torch.export.save(ecp.rewrite(exported(nested), "cuda")[0], buffer)
        return buffer.getvalue()

    assert saved() == saved()


def test_weight_with_another_reader_stays_an_operand() -> None:
    def also(net: Net, x: Tensor) -> Any:
        def true(y: Tensor) -> Tensor:
            return net.a(y) + net.a.weight()[0]

        return torch.cond(x.sum() > 0, true, lambda y: net.a(y), (x,))

    before = torch.export.export(Net(also), (X,))
    program, report = assert_rewrites(before, expect={"linear_int4": 2, "missed": 1})
    (call,) = calls(program, torch.ops.higher_order.cond)
    names = {operand.name for operand in call.args[3]}
    assert {"b_a_data", "b_a_scale", "p_a_data_packed"} <= names
    assert {o.op for o in report.outcomes if o.status == "missed"} == {"aten.select"}


def test_reader_in_a_subgraph_of_a_weight_dequantized_outside_is_a_candidate() -> None:
    def outside(net: Net, x: Tensor) -> Any:
        weight = net.a.weight()
        return torch.cond(x.sum() > 0, lambda y: F.linear(y, weight), lambda y: y + 1, (x,))

    before = torch.export.export(Net(outside), (X,))
    report = assert_misses(before, "wanted a dequantized weight, found placeholder")
    (outcome,) = report.outcomes
    assert (outcome.op, outcome.fqn) == ("aten.linear", "a.data")
    folded, report = assert_rewrites(before, "xnnpack", expect={"fold_dequantize": 1})
    assert report.outcomes[0].status == "rewritten"
    assert not calls(folded, DEQUANTIZE)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t(), lambda w: w.view(2, 32, 64)[0]])
def test_weight_that_a_subgraph_returns_is_folded_without_an_alias_of_an_operand(view: Any) -> None:
    """A result of a subgraph may not alias an operand: torch would refuse to trace the program again."""

    def back(net: Net, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: view(net.a.weight()), lambda x: view(net.b.weight()) + x.sum(), (x,))

    before = torch.export.export(Net(back), (X,))
    program, _ = assert_rewrites(before, "xnnpack", expect={"fold_dequantize": 2}, rtol=0)
    assert_equal_results(program, before, rtol=0)
    assert_equal_results(program.run_decompositions({}), before, rtol=0)


def test_weight_that_differs_in_each_run_is_missed_with_the_reason() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("data", torch.randint(-8, 8, (3, 64, 64), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(3, 64, 2).to(BF16) * 0.02)

        def forward(self, x: Tensor) -> Any:
            def step(x: Tensor, layer: Any) -> Any:
                weight = torch.ops.torchao.dequantize_affine(layer[0], [1, 32], layer[1], None, torch.int8, -8, 7, BF16)
                x = F.linear(x, weight)
                return x, x.clone()

            return scan(step, x, (self.data, self.scale))[0]

    report = assert_misses(torch.export.export(Layers(), (X,)), "not straight from a parameter or buffer")
    assert [outcome.op for outcome in report.outcomes] == ["aten.linear"]


def test_weight_in_a_subgraph_of_an_unsupported_call_is_missed_with_the_reason() -> None:
    """The call of the subgraph becomes that of another higher-order operator, which is not supported."""
    before = exported(without_grad)
    (call,) = before.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled)
    known, call.target = call.target, torch.ops.higher_order.hints_wrapper
    try:
        after, report = ecp.rewrite(before, "cuda", expect={"missed": 1, "rewritten": 1})
    finally:
        call.target = known
    (missed,) = (outcome for outcome in report.outcomes if outcome.status == "missed")
    assert "by an unknown operator" in str(missed.reasons[0])
    assert missed.node.endswith(".linear")
    assert len(calls(after, DEQUANTIZE)) == 1


def test_subgraph_that_two_calls_share_is_left_alone() -> None:
    before = exported(cond).run_decompositions({})
    (call,) = before.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    with before.graph.inserting_before(call):
        other = before.graph.create_node("call_function", call.target, call.args)
        other.meta = dict(call.meta)
    try:
        after, report = ecp.rewrite(before, "cuda")
    finally:
        before.graph.erase_node(other)
    assert report.counts()["missed"] == 3
    assert {str(r) for o in report.outcomes for r in o.reasons} == {
        "it stands in a graph that is called from two places, or by an unknown operator"
    }
    for call in after.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        assert len(call.args[3]) == len(graphs(after)["true_graph_0"].find_nodes(op="placeholder"))


class Unwrapped(nn.Module):
    """Weights of torchao, as parametrizations or as tensor subclasses, one of them in a subgraph."""

    def __init__(self, use: Callable[[Any, Tensor], Any], unwrap: bool, config: Any = INT4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 64, dtype=BF16), nn.Linear(64, 64, dtype=BF16, bias=False)
        self.register_buffer("last", torch.zeros(64, dtype=BF16))
        self.use = use
        quantize_(self, config)
        if unwrap:
            unwrap_tensor_subclass(self)

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def test_parametrized_weights_in_subgraphs_have_the_fqn_of_the_weight() -> None:
    def use(net: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: net.a(y) + net.b(y), lambda y: net.b(y), (x,)) + net.b(x)

    before = torch.export.export(Unwrapped(use, unwrap=True), (X,))
    program, report = assert_rewrites(before, expect={"linear_int4": 4})
    assert_equal_results(program, before, RTOL)
    assert {o.fqn for o in report.outcomes} == {"a.weight", "b.weight"}
    assert {name for name in program.state_dict if "weight" in name} == {
        f"{name}.weight.{part}" for name in "ab" for part in ("packed", "scale_and_zero")
    }


@pytest.mark.parametrize("shared", [False, True])
def test_subclass_weights_under_no_grad_are_rewritten(shared: bool) -> None:
    def use(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = net.a(x)
            net.last.copy_(x[0])
        return y + net.last + (net.a(x) if shared else 0)

    before = torch.export.export(Unwrapped(use, unwrap=False), (X,))
    program, report = assert_rewrites(before, expect={"linear_int4": 1 + shared})
    assert {outcome.fqn for outcome in report.outcomes} == {"a.weight"}
    assert "a.weight" not in program.state_dict
    assert_rewrites(before.run_decompositions({}), expect={"linear_int4": 1 + shared})


def test_weight_mutated_in_a_subgraph_is_not_packed() -> None:
    def use(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        with torch.no_grad():
            net.a.data.copy_(net.a.data + 1)
            z = net.b(x)
        return y + z

    before = torch.export.export(Net(use), (X,))
    assert any(spec.target == "a.data" for spec in before.graph_signature.output_specs) or calls(
        before, torch.ops.aten.copy_.default
    )
    report = assert_misses(before, "which the program mutates while it runs")
    assert {o.fqn: o.status for o in report.outcomes} == {"a.data": "missed", "b.data": "rewritten"}


def test_methods_share_a_weight_that_one_of_them_reads_in_a_subgraph() -> None:
    net, other = Net(cond), Net(mapped)
    other.a, other.b = net.a, net.b
    pool = ConstantCache()
    first, _ = ecp.rewrite(torch.export.export(net, (X,)), "cuda", pool=pool)
    second, _ = ecp.rewrite(torch.export.export(other, (X,)), "cuda", pool=pool)
    for name in ("a.data.packed", "b.data.packed"):
        assert first.state_dict[name].data_ptr() == second.state_dict[name].data_ptr()


def test_callable_pass_between_rules_sees_and_keeps_the_subgraphs() -> None:
    seen: list[int] = []

    def count(module: GraphModule) -> None:
        inside = [m for m in module.modules() if isinstance(m, GraphModule)]
        seen.append(sum("int4_linear" in str(n.target) for m in inside for n in m.graph.nodes))
        args = [X if "x" in n.name.split("_") else None for n in module.graph.find_nodes(op="placeholder")]
        assert any(arg is not None for arg in args)

    passes = [ecp.LinearInt4(), count, ecp.RemoveLinearViews()]
    assert_rewrites(exported(cond), passes=passes, expect={"linear_int4": 5})
    assert seen[0] == 5


def test_views_around_a_linear_in_a_subgraph_are_removed() -> None:
    def use(net: Net, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: net.a(y), lambda y: net.b(y), (x,))

    x = torch.randn(2, 3, 64).to(BF16)
    before = torch.export.export(Net(use), (x,)).run_decompositions()
    if calls(before, DEQUANTIZE):
        assert_rewrites(before, expect={"linear_int4": 2})
    before = torch.export.export(Net(use), (x,)).run_decompositions({})
    program, _ = assert_rewrites(before, expect={"linear_int4": 2})
    assert not calls(program, torch.ops.aten.view.default)


def test_decomposed_dequantize_in_a_subgraph_gets_a_warning() -> None:
    def use(net: Net, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: net.a(y), lambda y: y + 1, (x,))

    _, report = ecp.rewrite(torch.export.export(Net(use), (X,)).run_decompositions(), "cuda")
    assert report.outcomes == []
    assert "a.data" in report.warnings[0]


def test_copy_of_a_program_with_subgraphs_equals_the_program() -> None:
    before = exported(nested)
    after, report = ecp.rewrite(before, "cuda", passes=[])
    assert {path: str(graph) for path, graph in graphs(after).items()} == {
        path: str(graph) for path, graph in graphs(before).items()
    }
    assert report.counts()["missed"] == 4


def test_nodes_come_in_the_order_of_execution() -> None:
    program = Program(exported(nested))
    place = {program.subgraphs.path(node): number for number, node in enumerate(program.subgraphs.nodes())}
    assert place["true_graph_0.true_graph_0.linear"] < place["true_graph_0.cond"] < place["cond"] < place["linear"]
    assert place["x"] < place["true_graph_0.x"]


@pytest.mark.parametrize(("low", "high", "rule"), [(-8, 7, "embedding_int4"), (-128, 127, "embedding_int8")])
def test_table_in_a_subgraph_is_rewritten(low: int, high: int, rule: str) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Quantized(64, 64, low=low, high=high)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return torch.cond(
                x.sum() > 0, lambda y, i: F.embedding(i, self.table.weight()) + y, lambda y, i: y * 2, (x, ids)
            )

    before = torch.export.export(Lookup(), (X, torch.arange(len(X))))
    for target in ("cuda", "cpu"):
        for x in INPUTS:
            assert_rewrites(before, target, expect={rule: 1, "missed": 0}, inputs=(x, torch.arange(len(x))))


def test_int8_linear_in_a_subgraph_is_rewritten() -> None:
    def use(net: Any, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda y: net.l(y), lambda y: y + 1, (x,))

    net = Net(use)
    net.l = Quantized(64, 64, group=64, low=-128, high=127)
    before = torch.export.export(net, (X,))
    program, _ = assert_rewrites(before, "cpu", expect={"linear_int8": 1, "missed": 0})
    assert_equal_results(program, before, RTOL)
