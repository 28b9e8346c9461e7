"""ecp.rewrite: arguments, results, errors and an unchanged input; and the assertions for authors of rules."""

import cProfile
import json
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.targets import RENAMED_PASSES
from et_cuda_passes.testing import Quantized, Sketch, assert_misses, assert_rewrites
from tests.helpers import chain, names

aten = torch.ops.aten


@pytest.fixture
def program() -> ExportedProgram:
    """A linear that cuda supports, and one with a K that it does not support."""
    sketch = Sketch()
    good, odd = sketch.weight("good"), sketch.weight("odd", k=40, group=40)
    x, y = sketch.input("x", 2, 64, dtype=torch.bfloat16), sketch.input("y", 2, 40, dtype=torch.bfloat16)
    return sketch.program(sketch.call(aten.linear.default, x, good), sketch.call(aten.linear.default, y, odd))


def test_rewrite_returns_program_and_report(program: ExportedProgram) -> None:
    after, report = ecp.rewrite(program, target="cuda", passes=None, expect=None)
    assert isinstance(after, ExportedProgram)
    assert isinstance(report, ecp.Report)
    for outcome in report.outcomes:
        assert isinstance(outcome.reasons, list)
        assert outcome.status in {"rewritten", "kept", "missed"}
        assert outcome.source == f"model.py:7: y = f({outcome.node})"
    assert [(o.node, o.op, o.fqn, o.rule, o.status) for o in report.outcomes] == [
        ("linear_default", "aten.linear", "good.data", "linear_int4", "rewritten"),
        ("linear_default_1", "aten.linear", "odd.data", None, "missed"),
    ]
    assert report.bytes_after < report.bytes_before
    assert json.loads(report.to_json()) == report.to_dict()


@pytest.mark.parametrize("target", ecp.targets())
def test_rewrite_leaves_input_unchanged(program: ExportedProgram, target: str) -> None:
    before = str(program.graph), {name: (t, t.clone()) for name, t in program.state_dict.items()}
    after, _ = ecp.rewrite(program, target)
    assert str(program.graph) == before[0]
    assert program.state_dict.keys() == before[1].keys()
    for name, (tensor, copy) in before[1].items():
        assert program.state_dict[name] is tensor
        assert torch.equal(tensor, copy)
    assert after is not program


@pytest.mark.parametrize("wrong", [None, torch.nn.Linear(2, 2), "model.pt2", 3])
def test_rewrite_rejects_other_types_with_fix(wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"not {type(wrong).__name__}; export the model with torch.export.export"):
        ecp.rewrite(wrong, "cuda")


def test_rewrite_rejects_graph_module(program: ExportedProgram) -> None:
    with pytest.raises(TypeError, match="not GraphModule"):
        ecp.rewrite(program.graph_module, "cuda")  # type: ignore[arg-type]


def test_rewrite_lists_known_targets_for_unknown_name(program: ExportedProgram) -> None:
    with pytest.raises(
        ValueError,
        match="unknown target 'tpu'; known targets are cuda, metal, xnnpack, cpu, vulkan",
    ):
        ecp.rewrite(program, "tpu")


@pytest.mark.parametrize("passes", [[ecp.LinearInt4], ["linear_int4"], [None], "linear_int4", 3, [ecp.LinearInt4(), 7]])
def test_rewrite_rejects_invalid_passes(program: ExportedProgram, passes: Any) -> None:
    with pytest.raises(TypeError, match="passes"):
        ecp.rewrite(program, "cuda", passes)


def test_rewrite_rejects_two_passes_with_same_name(program: ExportedProgram) -> None:
    passes = [ecp.LinearInt4(), ecp.LinearInt4(cast_to_bf16=True)]
    with pytest.raises(ValueError, match="two passes are named 'linear_int4'"):
        ecp.rewrite(program, "cuda", passes)


def test_passes_accept_any_iterable_and_empty_list(program: ExportedProgram) -> None:
    _, report = ecp.rewrite(program, "cuda", (entry for entry in ecp.default_passes("cuda")))
    assert report.counts()["linear_int4"] == 1
    after, report = ecp.rewrite(program, "cuda", [])
    assert names(after) == names(program)
    assert report.counts() == {"rewritten": 0, "kept": 0, "missed": 2}


@pytest.mark.parametrize(
    "expect", [{}, {"linear_int4": 1}, {"rewritten": 1, "missed": 1, "kept": 0}, {"remove_linear_views": 0}]
)
def test_expect_accepts_right_counts(program: ExportedProgram, expect: dict[str, int]) -> None:
    ecp.rewrite(program, "cuda", expect=expect)


def test_expect_reports_actual_counts(program: ExportedProgram) -> None:
    with pytest.raises(ecp.ExpectationError) as error:
        ecp.rewrite(program, "cuda", expect={"linear_int4": 2, "missed": 0, "kept": 0})
    assert str(error.value).startswith("linear_int4: expected 2, got 1; missed: expected 0, got 1\n")
    assert "K = 40" in str(error.value)
    assert error.value.report.counts()["linear_int4"] == 1


@pytest.mark.parametrize(("earlier", "name"), RENAMED_PASSES.items())
def test_expect_names_the_new_name_of_a_renamed_pass(earlier: str, name: str, program: ExportedProgram) -> None:
    with pytest.raises(ValueError, match=f"expect contains '{earlier}'.*{earlier} is now {name}"):
        ecp.rewrite(program, "cuda", expect={earlier: 1})
    assert name in {entry.name for target in ecp.targets() for entry in ecp.default_passes(target)}


def test_expect_rejects_unknown_name(program: ExportedProgram) -> None:
    with pytest.raises(ValueError, match=r"expect contains 'linear_int3', .*; the nearest names are .*linear_int4"):
        ecp.rewrite(program, "cuda", expect={"linear_int3": 1})


def test_expect_rejects_former_name_with_present_name(program: ExportedProgram) -> None:
    with pytest.raises(ValueError, match="expect contains 'int4_sum', .*; int4_sum is now fuse_add"):
        ecp.rewrite(program, "cuda", expect={"int4_sum": 1})


INVALID_EXPECT: list[Any] = [["missed"], 2, "missed", {"missed": "0"}, {"missed": None}, {"missed": False}, {3: 1}]


@pytest.mark.parametrize("expect", INVALID_EXPECT)
def test_expect_rejects_other_types(program: ExportedProgram, expect: Any) -> None:
    with pytest.raises(TypeError, match=r"expect must map names to counts, as .*; got "):
        ecp.rewrite(program, "cuda", expect=expect)


def test_expect_rejects_negative_count(program: ExportedProgram) -> None:
    with pytest.raises(ValueError, match="expect has the count -1 for 'missed'; a count is 0 or more"):
        ecp.rewrite(program, "cuda", expect={"missed": -1})


def test_failed_expect_leaves_input_unchanged(program: ExportedProgram) -> None:
    before = str(program.graph), list(program.state_dict)
    with pytest.raises(ecp.ExpectationError):
        ecp.rewrite(program, "cuda", expect={"missed": 0})
    assert (str(program.graph), list(program.state_dict)) == before


def test_rewrite_keeps_edge_dialect() -> None:
    from executorch.exir import EdgeCompileConfig, to_edge

    model, x = Quantized(16, 64), torch.randn(2, 64, dtype=torch.bfloat16)
    whole = [torch.ops.torchao.dequantize_affine.default]
    config = EdgeCompileConfig(preserve_ops=whole, _core_aten_ops_exception_list=whole)
    edge = to_edge(torch.export.export(model, (x,)), compile_config=config).exported_program()
    after, _ = ecp.rewrite(edge, "cuda", expect={"linear_int4": 1})
    assert after.dialect == edge.dialect
    got, wanted = after.module()(x), model(x)
    assert (got - wanted).norm() <= 2**-7 * wanted.norm()


# The assertions for authors of rules -------------------------------------------------


def identity(module: torch.fx.GraphModule) -> None:
    """A pass that changes nothing."""


def test_assert_rewrites_returns_result_of_rewrite(program: ExportedProgram) -> None:
    after, report = assert_rewrites(program, expect={"linear_int4": 1, "missed": 1})
    plain, counted = ecp.rewrite(program, "cuda")
    assert names(after) == names(plain)
    assert "et_cuda_passes.int4_linear_mma_tiled" in names(after)
    assert report.to_dict() == counted.to_dict()


def test_assert_rewrites_fails_for_other_counts(program: ExportedProgram) -> None:
    with pytest.raises(AssertionError, match="linear_int4: expected 2, got 1"):
        assert_rewrites(program, expect={"linear_int4": 2})
    with pytest.raises(AssertionError, match="nothing was rewritten"):
        assert_rewrites(program, passes=[identity])


def test_assert_rewrites_fails_for_other_values() -> None:
    def negate(module: torch.fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=aten.abs.default):
            node.target = aten.neg.default

    sketch = Sketch()
    simple = sketch.program(sketch.call(aten.abs.default, sketch.input("x", 8)))
    with pytest.raises(AssertionError, match="output 0 is off by"):
        assert_rewrites(simple, passes=[negate], expect={"missed": 0}, inputs=(torch.ones(8),))
    assert_rewrites(simple, passes=[negate], expect={"missed": 0}, inputs=(-torch.ones(8),), rtol=0)
    with pytest.raises(AssertionError, match="output 0 is off by"):
        assert_rewrites(simple, passes=[identity], expect={"missed": 0}, inputs=(torch.full((8,), torch.nan),))


def test_assert_rewrites_fails_if_second_rewrite_changes_program() -> None:
    def again(module: torch.fx.GraphModule) -> None:
        (node,) = module.graph.output_node().args[0]
        with module.graph.inserting_after(node):
            new = module.graph.call_function(aten.alias.default, (node,))
        new.meta = dict(node.meta)
        module.graph.output_node().args = ((new,),)

    sketch = Sketch()
    simple = sketch.program(sketch.call(aten.abs.default, sketch.input("x", 8)))
    with pytest.raises(AssertionError, match="a second rewrite changed the program again") as error:
        assert_rewrites(simple, passes=[again], expect={"missed": 0})
    # The message has the changed lines only.
    changed = str(error.value).partition("--- before\n+++ after\n")[2].splitlines()
    assert any(line.startswith("+    %alias_default_1 ") for line in changed)
    assert not any("placeholder" in line for line in changed)


def test_assert_rewrites_compares_values_before_second_rewrite() -> None:
    def negate(module: torch.fx.GraphModule) -> None:
        (node,) = module.graph.output_node().args[0]
        with module.graph.inserting_after(node):
            new = module.graph.call_function(aten.neg.default, (node,))
        new.meta = dict(node.meta)
        module.graph.output_node().args = ((new,),)

    sketch = Sketch()
    simple = sketch.program(sketch.call(aten.abs.default, sketch.input("x", 8)))
    with pytest.raises(AssertionError, match="output 0 is off by"):
        assert_rewrites(simple, passes=[negate], expect={"missed": 0}, inputs=(torch.ones(8),))


def test_assert_rewrites_fails_if_input_weights_change() -> None:
    def spoil(module: torch.fx.GraphModule) -> None:
        sketch.state["w"].data.add_(1)

    sketch = Sketch()
    y = sketch.call(aten.add.Tensor, sketch.input("x", 8), sketch.parameter("w", torch.zeros(8)))
    with pytest.raises(AssertionError, match="program that it was given: constant w holds other bytes"):
        assert_rewrites(sketch.program(y), passes=[spoil], expect={"missed": 0})


def test_assert_rewrites_needs_inputs() -> None:
    bare = chain(1)
    bare._example_inputs = None
    with pytest.raises(ValueError, match="give inputs="):
        assert_rewrites(bare)


def test_assert_rewrites_requires_tuple_of_inputs(program: ExportedProgram) -> None:
    with pytest.raises(TypeError, match=r"inputs are the positional inputs as a tuple, \(x,\), and no Tensor"):
        assert_rewrites(program, inputs=torch.ones(2, 64))  # type: ignore[arg-type]


def test_assert_misses_finds_the_reason(program: ExportedProgram) -> None:
    report = assert_misses(program, "K = 40", rule="linear_int4")
    assert isinstance(report, ecp.Report)


def test_assert_misses_fails_with_the_report(program: ExportedProgram) -> None:
    with pytest.raises(AssertionError, match=r"no candidate is missed with a reason that says 'NaN'\ncuda: 2"):
        assert_misses(program, "NaN")
    with pytest.raises(AssertionError, match="no candidate is missed by remove_linear_views"):
        assert_misses(program, "K = 40", rule="remove_linear_views")
    with pytest.raises(
        ValueError, match="no pass is named 'linear_int3'; the pass list is unpack_linear, restore_float8"
    ):
        assert_misses(program, "K = 40", rule="linear_int3")
    with pytest.raises(ValueError, match="an empty reason"):
        assert_misses(program, "")


# Bytes, kernels and layouts of each layer -----------------------------------------------------------------------------


class Gated(torch.nn.Module):
    """down(silu(gate(x)) * up(x)), without zero points and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (Quantized(128, 64, zero_points=None, form=no_bias, seed=seed) for seed in (1, 2))
        self.down = Quantized(64, 128, zero_points=None, form=no_bias, seed=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def no_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


@pytest.mark.parametrize("target", ecp.targets())
def test_bytes_of_the_layers_add_up_to_those_of_the_program(target: str) -> None:
    exported = torch.export.export(Gated(), (torch.zeros(2, 64, dtype=torch.bfloat16),))
    _, report = ecp.rewrite(exported, target)
    assert len(report.outcomes) == 3
    others = report.bytes_before - sum(outcome.bytes_before for outcome in report.outcomes)
    # The model has biases, which its linears do not read.
    assert others == sum(layer.bias.nbytes for layer in Gated().children())  # type: ignore[operator, union-attr]
    assert report.bytes_after - sum(outcome.bytes_after for outcome in report.outcomes) == others
    assert [outcome.bytes_before for outcome in report.outcomes] == [128 * 64 + 128 * 2 * 2] * 3
    assert [(outcome.scheme, outcome.shape) for outcome in report.outcomes] == [
        ("int4 group 32", [128, 64]),
        ("int4 group 32", [128, 64]),
        ("int4 group 32", [64, 128]),
    ]


def test_joined_weights_share_their_bytes_by_size() -> None:
    exported = torch.export.export(Gated(), (torch.zeros(2, 64, dtype=torch.bfloat16),))
    program, report = ecp.rewrite(exported, "cuda", expect={"fuse_gate": 1})
    gate, up, _ = report.outcomes
    joined = [tensor.nbytes for name, tensor in program.state_dict.items() if "gated" in name]
    assert gate.bytes_after == up.bytes_after == sum(joined) / 2
    assert (gate.kernel, gate.layout) == ("triton", "mma_tiled")


def test_missed_layer_keeps_its_bytes_and_names_no_kernel(program: ExportedProgram) -> None:
    _, report = ecp.rewrite(program, "cuda")
    missed = report.outcomes[1]
    assert missed.status == "missed"
    assert missed.bytes_after == missed.bytes_before > 0
    assert (missed.kernel, missed.layout, missed.scheme) == ("", "", "int4 per-axis")


def test_report_says_where_the_tilings_come_from(program: ExportedProgram) -> None:
    _, named = ecp.rewrite(program, "cuda", gpu="sm_89")
    assert not named.tilings and named.notes[0].startswith("tilings predicted")
    # The int8 operator of cpu is that of cuda.
    words = torch.export.export(
        Quantized(64, 64, group=64, low=-128, high=127), (torch.zeros(1, 64, dtype=torch.bfloat16),)
    )
    for given in (program, words):
        _, packed = ecp.rewrite(given, "cpu")
        assert packed.counts()["rewritten"] and not packed.tilings and not packed.notes


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tilings are those of the GPU that is present")
def test_report_says_that_no_gpu_is_named(program: ExportedProgram) -> None:
    _, report = ecp.rewrite(program, "cuda")
    assert report.tilings.startswith("tilings: no GPU is named, so they are shown for sm_90")
    assert report.tilings not in str(report)


@pytest.mark.parametrize("target", ["cuda", "cpu", "xnnpack"])
def test_work_of_a_rewrite_is_linear_in_the_linears(target: str) -> None:
    """Function calls are counted: they are the same on every machine, and a lookup that reads all weights makes many."""

    def calls(linears: int) -> int:
        program, profile = chain(linears), cProfile.Profile()
        _, report = profile.runcall(ecp.rewrite, program, target)
        assert len(report.outcomes) == linears
        return sum(entry.callcount for entry in profile.getstats())

    calls(2)  # imports, and what is computed once for a process
    few, some, many = map(calls, (10, 40, 160))
    # Four times as many linears are added, to what is done once for a rewrite.
    assert many - some < 4 * 1.1 * (some - few)
