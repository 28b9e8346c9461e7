"""FusedLinearInt4: which linears are fused, why others are not, the numbers, and the bytes."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerGroup, quantize_

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.testing import Quantized, Sketch, assert_misses, assert_rewrites
from tests.helpers import DEQUANTIZE
from tests.rules.fused_models import PASSES, Block, X

aten = torch.ops.aten
BF16 = torch.bfloat16
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


@pytest.fixture(scope="module")
def block() -> ExportedProgram:
    return torch.export.export(Block(), (X,), dynamic_shapes=({1: Dim("length", min=2, max=64)},))


@pytest.mark.parametrize("form", ["exported", "decomposed"])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_q_k_v_and_gate_up_are_fused(block: ExportedProgram, target: str, form: str) -> None:
    before = block if form == "exported" else block.run_decompositions({})
    expect = {"fused_linear_int4": 5, "linear_int4": 2, "missed": 0}
    for length in (2, 9):
        x = torch.randn(2, length, 64).to(BF16)
        program, report = assert_rewrites(before, target, PASSES, expect, inputs=(x,))
    operators = {form.op for form in ecp.ops.INT4_LINEARS.values()}
    linears = [node for node in program.graph.nodes if node.target in operators]
    assert [node.args[5] for node in linears] == [128, 64, 200, 64]
    fused = {o.fqn: o.detail for o in report.outcomes if o.rule == "fused_linear_int4"}
    assert fused.keys() == {f"{name}.weight" for name in ("q", "k", "v", "gate", "up")}
    assert fused["k.weight"].endswith(", 3 in one")
    assert fused["up.weight"].endswith(", 2 in one")
    parts = {f"q.weight.fused_{part}" for part in ("packed", "scale_and_zero", "bias")}
    assert parts | {"gate.weight.fused_packed"} < set(program.state_dict)
    assert not any(name.startswith(("k.", "v.", "up.")) or name == "q.bias" for name in program.state_dict)


def test_slices_equal_results_of_separate_linears(block: ExportedProgram) -> None:
    """They are equal bit by bit: the position of a row in the packed weight does not change its result."""
    fused, _ = ecp.rewrite(block, "cuda", PASSES)
    alone, _ = ecp.rewrite(block, "cuda")
    assert torch.equal(fused.module()(X), alone.module()(X))


def test_slice_has_provenance_of_its_linear(block: ExportedProgram) -> None:
    program, _ = ecp.rewrite(block, "cuda", PASSES)
    slices = program.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert [[source.name for source in node.meta["from_node"]] for node in slices] == [
        ["linear"],
        ["linear_1"],
        ["linear_2"],
        ["linear_4"],
        ["linear_5"],
    ]
    (first, *_) = (n for n in program.graph.nodes if "int4_linear" in str(n.target))
    assert [source.name for source in first.meta["from_node"]] == ["linear", "linear_1", "linear_2"]
    for node in slices:
        assert node.meta["val"].is_contiguous()


def test_fused_program_can_be_saved_and_decomposed_with_the_same_bytes(block: ExportedProgram) -> None:
    def saved() -> bytes:
        buffer = io.BytesIO()
        torch.export.save(ecp.rewrite(block, "cuda", PASSES)[0], buffer)
        return buffer.getvalue()

    assert saved() == saved()
    program, _ = ecp.rewrite(block, "cuda", PASSES)
    for after in (torch.export.load(io.BytesIO(saved())), program.run_decompositions({})):
        assert torch.equal(after.module()(X), program.module()(X))


def test_methods_share_fused_constants() -> None:
    model, pool = Block(), ConstantCache()
    programs = [torch.export.export(model, (X[:, :length],)) for length in (3, 5)]
    first, second = (ecp.rewrite(program, "cuda", PASSES, pool=pool)[0] for program in programs)
    for name in ("q.weight.fused_packed", "q.weight.fused_bias"):
        assert first.state_dict[name].data_ptr() == second.state_dict[name].data_ptr()


class Pair(nn.Module):
    """``use(pair, x)`` of two quantized linears [16, 64] that can be fused; the options are those of the second."""

    def __init__(self, use: Callable[[Any, Tensor], Any], **second: Any) -> None:
        super().__init__()
        self.a = Quantized(16, 64, form=lambda x, w, b: F.linear(x, w))
        self.b = Quantized(16, **{"k": 64, "seed": 1, "form": lambda x, w, b: F.linear(x, w), **second})
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def both(pair: Any, x: Tensor) -> Any:
    return pair.a(x), pair.b(x)


def pair(use: Callable[[Any, Tensor], Any] = both, **second: Any) -> ExportedProgram:
    return torch.export.export(Pair(use, **second), (X,))


def test_linears_of_one_scheme_and_input_are_fused() -> None:
    assert_rewrites(pair(), passes=PASSES, expect={"fused_linear_int4": 2})


@pytest.mark.parametrize(
    "second",
    [{"group": 64}, {"low": 0, "high": 15}, {"scale_dtype": torch.float32}, {"storage": torch.int16}],
    ids=["group size", "range", "scales' dtype", "storage"],
)
def test_linears_of_different_schemes_are_not_fused(second: dict[str, Any]) -> None:
    program = pair(**second)
    assert_misses(program, "wanted another match to rewrite together with", rule="fused_linear_int4", passes=PASSES[:1])
    assert_rewrites(program, passes=PASSES, expect={"fused_linear_int4": 0, "linear_int4": 2})


def test_linears_are_fused_if_only_one_has_zero_points() -> None:
    assert_rewrites(pair(zero_points="random"), passes=PASSES, expect={"fused_linear_int4": 2})
    assert_rewrites(pair(zero_points=None), passes=PASSES, expect={"fused_linear_int4": 2})


def test_linears_of_different_inputs_are_not_fused() -> None:
    program = pair(lambda pair, x: (pair.a(x), pair.b(x + 1)))
    assert_misses(program, "wanted another match to rewrite together with", rule="fused_linear_int4", passes=PASSES[:1])


@pytest.mark.parametrize(
    ("use", "reader"),
    [
        (lambda p, x: (p.a(x), p.b(x), p.a(x + 1)), "dequantize_affine"),
        (lambda p, x: (p.a(x), p.b(x), p.a(x)), "dequantize_affine"),
        (lambda p, x: (p.a(x), p.b(x), p.a.weight().sum()), "dequantize_affine"),
        (lambda p, x: (p.a(x), p.b(x), p.a.data.sum()), "sum_1"),
        (lambda p, x: (p.a(x), p.b(x), torch.cond(x.sum() > 0, lambda x: p.a(x), lambda x: x[..., :16] + 1, (x,))), ""),
    ],
    ids=["another input", "twice", "dequantized", "the integers", "in a branch"],
)
def test_weight_has_one_reader_rejects_every_other_reader(use: Any, reader: str) -> None:
    program = pair(use)
    report = assert_misses(program, "a weight that only this linear reads", rule="fused_linear_int4", passes=PASSES[:1])
    assert reader in str(report)
    program, _ = assert_rewrites(program, passes=PASSES, inputs=(X.abs(),))
    assert sum(name.endswith("packed") for name in program.state_dict) == 2


def test_weight_has_one_reader_rejects_dequantized_weight_with_two_readers() -> None:
    sketch = Sketch()
    x, weight = sketch.input("x", 2, 64, dtype=BF16), sketch.weight("w")
    other = sketch.weight("v", seed=1)
    program = sketch.program(*(sketch.call(aten.linear.default, x, w) for w in (weight, other, weight)))
    assert_misses(program, "a weight that only this linear reads", passes=PASSES[:1])
    assert_rewrites(program, passes=PASSES, expect={"linear_int4": 3, "fused_linear_int4": 0})


def test_max_out_features_leaves_larger_linears_to_linear_int4(block: ExportedProgram) -> None:
    fused = ecp.FusedLinearInt4(max_out_features=64)
    _, report = ecp.rewrite(block, "cuda", [fused, ecp.LinearInt4()])
    counts = report.counts()
    # gate and up have 100 rows each.
    assert (counts["fused_linear_int4"], counts["linear_int4"], counts["missed"]) == (3, 4, 0)
    assert_misses(block, "wanted no more out_features than max_out_features, found 100", passes=[fused])


def test_bias_is_constant_vector_rejects_computed_bias() -> None:
    sketch = Sketch()
    x, bias = sketch.input("x", 2, 64, dtype=BF16), sketch.input("bias", 16, dtype=BF16)
    first = sketch.call(aten.linear.default, x, sketch.weight("w"))
    second = sketch.call(aten.linear.default, x, sketch.weight("v", seed=1), sketch.call(aten.neg.default, bias))
    program = sketch.program(first, second)
    assert_misses(program, "no bias, or a constant one", passes=PASSES[:1])
    assert_rewrites(program, passes=PASSES, expect={"linear_int4": 2})


def test_linears_with_a_mutation_of_their_input_in_between_are_not_fused() -> None:
    sketch = Sketch()
    x = sketch.call(aten.neg.default, sketch.input("x", 2, 64, dtype=BF16))
    first = sketch.call(aten.linear.default, x, sketch.weight("w"))
    sketch.call(aten.add_.Tensor, x, 1)
    second = sketch.call(aten.linear.default, x, sketch.weight("v", seed=1))
    program = sketch.program(first, second)
    assert_misses(program, "and never mutated, found neg", rule="fused_linear_int4", passes=PASSES[:1])
    assert_rewrites(program, passes=PASSES, expect={"linear_int4": 2})


def test_mutation_of_one_result_changes_no_other() -> None:
    sketch = Sketch()
    x = sketch.input("x", 2, 64, dtype=BF16)
    first = sketch.call(aten.linear.default, x, sketch.weight("w"))
    written = sketch.call(aten.add_.Tensor, first, 1)
    second = sketch.call(aten.linear.default, x, sketch.weight("v", seed=1))
    program = sketch.program(first, written, second)
    assert_rewrites(program, passes=PASSES, expect={"fused_linear_int4": 2})


def test_linears_in_branches_are_fused() -> None:
    def use(pair: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: pair.a(x) * pair.b(x), lambda x: x[..., :16] + 1, (x,))

    for x in (X.abs(), -X.abs()):
        assert_rewrites(pair(use), passes=PASSES, expect={"fused_linear_int4": 2}, inputs=(x,))


def test_linears_in_edge_form_are_fused() -> None:
    config = EdgeCompileConfig(_core_aten_ops_exception_list=[DEQUANTIZE], _skip_dim_order=True)
    edge = to_edge(pair(), compile_config=config).exported_program()
    assert_rewrites(edge, passes=PASSES, expect={"fused_linear_int4": 2}, inputs=(X,))


def test_linears_are_fused_in_bf16_by_option() -> None:
    program = torch.export.export(Block(torch.float32), (X.float(),))
    passes = [ecp.FusedLinearInt4(cast_to_bf16=True), ecp.LinearInt4(cast_to_bf16=True)]
    assert_rewrites(program, passes=passes, expect={"fused_linear_int4": 5, "linear_int4": 2}, rtol=2**-6)


def test_fused_linear_after_linear_int4_finds_nothing(block: ExportedProgram) -> None:
    assert_rewrites(block, passes=PASSES[::-1], expect={"fused_linear_int4": 0, "linear_int4": 7})


def test_default_passes_of_cuda_leave_epilogues(block: ExportedProgram) -> None:
    """They fuse q, k and v, but not gate and up: their kernel computes the activation and the product."""
    having = [t for t in ecp.targets() if any(isinstance(r, ecp.FusedLinearInt4) for r in ecp.default_passes(t))]
    assert having == ["cuda"]
    expect = {"fused_linear_int4": 3, "linear_int4": 4, "missed": 0}
    program, report = assert_rewrites(block, "cuda", None, expect, inputs=(X,))
    assert [o.fqn for o in report.outcomes if o.rule == "fused_linear_int4"] == ["q.weight", "k.weight", "v.weight"]
    last = [node.args[6:] for node in program.graph.nodes if node.target is ecp.ops.INT4_LINEARS["mma_tiled"].op]
    assert [(*args, "")[0] for args in last] == ["", "", "silu", "", ""]


@pytest.mark.parametrize(
    ("use", "fused"),
    [
        (lambda pair, x: (F.silu(pair.a(x)), pair.b(x)), False),
        (lambda pair, x: (F.gelu(pair.a(x).view(-1, 16)), pair.b(x)), False),
        (lambda pair, x: (pair.a(x) + x[..., :16], pair.b(x)), False),
        (lambda pair, x: (pair.a(x) * pair.b(x), x), False),
        (lambda pair, x: (pair.a(x) * x[..., :1], pair.b(x)), True),  # broadcast: the kernel does not compute it
        (lambda pair, x: (pair.a(x) + 1, pair.b(x)), True),
        (
            lambda pair, x: ((y := pair.a(x)) + F.silu(y), pair.b(x)),
            True,
        ),  # read twice: the result is stored in any case
        (lambda pair, x: (pair.a(x).tanh(), pair.b(x).view(-1, 4, 4).transpose(1, 2)), True),
    ],
)
def test_leave_epilogues_leaves_linears_with_an_epilogue(use: Callable[..., Any], fused: bool) -> None:
    passes = [ecp.FusedLinearInt4(leave_epilogues=True), ecp.LinearInt4()]
    if not fused:
        assert_misses(pair(use), "with leave_epilogues, nothing after it", rule="fused_linear_int4", passes=passes[:1])
    expect = {"fused_linear_int4": 2} if fused else {"linear_int4": 2}
    assert_rewrites(pair(use), "cuda", passes, {**expect, "missed": 0}, inputs=(X,))
    assert_rewrites(pair(use), "cuda", PASSES, {"fused_linear_int4": 2}, inputs=(X,))


@pytest.mark.parametrize(("most", "fused", "alone"), [(None, [5], 0), (2, [2, 2], 1), (3, [3, 2], 0), (4, [4], 1)])
def test_max_together_limits_each_fused_linear(most: int | None, fused: list[int], alone: int) -> None:
    sketch = Sketch()
    x = sketch.input("x", 2, 64, dtype=BF16)
    weights = [sketch.weight(name, seed=seed) for seed, name in enumerate("abcde")]
    program = sketch.program(*(sketch.call(aten.linear.default, x, weight) for weight in weights))
    passes = [ecp.FusedLinearInt4(max_together=most), ecp.LinearInt4()]
    expect = {"fused_linear_int4": sum(fused), "linear_int4": alone, "missed": 0}
    _, report = assert_rewrites(program, "cuda", passes, expect)
    counts = [outcome.detail.rpartition(", ")[2] for outcome in report.outcomes if outcome.rule == "fused_linear_int4"]
    assert counts == [f"{n} in one" for n in fused for _ in range(n)]


@pytest.mark.parametrize("most", [1, 0, -3])
def test_max_together_rejects_less_than_two(most: int) -> None:
    with pytest.raises(ValueError, match=f"max_together={most} leaves nothing to fuse: use 2 or more, or None"):
        ecp.FusedLinearInt4(max_together=most)


def test_misses_are_reported_by_linear_int4_if_it_is_in_the_list() -> None:
    sketch = Sketch()
    x = sketch.input("x", 2, 64)  # fp32, which the kernel lacks
    program = sketch.program(*(sketch.call(aten.linear.default, x, sketch.weight(name)) for name in "ab"))
    for passes, rule in ((PASSES, "linear_int4"), (PASSES[:1], "fused_linear_int4")):
        _, report = ecp.rewrite(program, "cuda", passes)
        assert {reason.rule for outcome in report.outcomes for reason in outcome.reasons} == {rule}


def test_linears_of_views_of_one_input_are_fused() -> None:
    """``run_decompositions`` gives each linear its own view of x."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3, 64, dtype=BF16)
    results = []
    for seed, name in enumerate("ab"):
        flat = sketch.call(aten.view.default, x, [6, 64])
        weight = sketch.call(aten.t.default, sketch.weight(name, seed=seed))
        results.append(sketch.call(aten.view.default, sketch.call(aten.mm.default, flat, weight), [2, 3, 16]))
    program, _ = assert_rewrites(sketch.program(*results), passes=PASSES, expect={"fused_linear_int4": 2})
    assert sum(op_of(node) is aten.mm.default for node in program.graph.nodes) == 0


def test_linears_of_one_quantized_activation_are_fused_with_its_quantization_dropped() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(64, n, bias=False, dtype=torch.bfloat16) for n in (48, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x)], dim=-1)

    model = Two()
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)))
    x = torch.randn(2, 3, 64).bfloat16()
    before = torch.export.export(model, (x,))
    options = {"drop_activation_quantization": True}
    weights, _ = ecp.rewrite(before, "cuda", [ecp.LinearInt4(**options)], {"linear_int4": 2})
    passes = [ecp.FusedLinearInt4(**options), ecp.LinearInt4(**options)]
    program, _ = ecp.rewrite(before, "cuda", passes, {"fused_linear_int4": 2, "missed": 0})
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("int4_linear_mma_tiled" in name for name in operators) == 1
    assert not any("quantize" in name or "choose_qparams" in name for name in operators)
    assert torch.equal(program.module()(x), weights.module()(x))
