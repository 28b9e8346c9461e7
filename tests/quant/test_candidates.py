"""Candidates: every reader of a dequantized weight is one, and no other operator."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.candidates import find_candidates
from et_cuda_passes.testing import Sketch
from tests.helpers import DEQUANTIZE

aten = torch.ops.aten


def found(program: ExportedProgram) -> list[tuple[str, str]]:
    """Each candidate's operator and weight."""
    return [(candidate.op, candidate.fqn) for candidate in find_candidates(Program(program))]


def outcomes(program: ExportedProgram, target: str = "cuda") -> list[tuple[str, str]]:
    _, report = ecp.rewrite(program, target)
    assert len(report.outcomes) == len(find_candidates(Program(program)))
    return [(outcome.op, outcome.status) for outcome in report.outcomes]


MOVED = {
    "t": lambda s, w: s.call(aten.t.default, w),
    "transpose": lambda s, w: s.call(aten.transpose.int, w, 0, 1),
    "permute": lambda s, w: s.call(aten.permute.default, w, [1, 0]),
    "view": lambda s, w: s.call(aten.view.default, w, [64, 16]),
    "reshape": lambda s, w: s.call(aten.reshape.default, w, [64, 16]),
    "unsqueeze and squeeze": lambda s, w: s.call(
        aten.squeeze.dim, s.call(aten.unsqueeze.default, s.call(aten.t.default, w), 0), 0
    ),
    "alias": lambda s, w: s.call(aten.alias.default, s.call(aten.t.default, w)),
    "clone": lambda s, w: s.call(aten.clone.default, s.call(aten.t.default, w)),
    "cast there and back": lambda s, w: s.call(
        aten._to_copy.default,
        s.call(aten._to_copy.default, s.call(aten.t.default, w), dtype=torch.float32),
        dtype=torch.bfloat16,
    ),
    "expand": lambda s, w: s.call(aten.expand.default, s.call(aten.t.default, w), [64, 16]),
}


@pytest.mark.parametrize("how", MOVED)
def test_reader_is_found_behind_operators_that_move_the_weight(how: str) -> None:
    sketch = Sketch()
    weight = MOVED[how](sketch, sketch.weight("w"))
    y = sketch.call(aten.mm.default, sketch.input("x", 2, 64, dtype=torch.bfloat16), weight)
    program = sketch.program(y)
    assert found(program) == [("aten.mm", "w.data")]
    assert len(outcomes(program)) == 1


def stack(sketch: Sketch) -> Any:
    data = sketch.buffer("w.data", torch.zeros(3, 16, 64, dtype=torch.int8))
    scale = sketch.buffer("w.scale", torch.ones(3, 16, 2, dtype=torch.bfloat16))
    return sketch.call(DEQUANTIZE, data, [1, 1, 32], scale, None, torch.int8, -8, 7, torch.bfloat16)


SELECTED = {
    "select": lambda s, w: s.call(aten.select.int, w, 0, 1),
    "slice": lambda s, w: s.call(aten.squeeze.dim, s.call(aten.slice.Tensor, w, 0, 1, 2), 0),
    "unbind": lambda s, w: s.call(operator.getitem, s.call(aten.unbind.int, w), 1),
    "index": lambda s, w: s.call(aten.index.Tensor, w, [s.input("e", dtype=torch.int64)]),
}


@pytest.mark.parametrize("how", SELECTED)
def test_reader_of_an_expert_is_the_product(how: str) -> None:
    sketch = Sketch()
    weight = sketch.call(aten.t.default, SELECTED[how](sketch, stack(sketch)))
    program = sketch.program(sketch.call(aten.mm.default, sketch.input("x", 2, 64, dtype=torch.bfloat16), weight))
    assert found(program) == [("aten.mm", "w.data")]
    assert outcomes(program) == [("aten.mm", "missed" if how == "index" else "rewritten")]


def test_selected_row_of_a_matrix_is_read_by_the_select() -> None:
    sketch = Sketch()
    row = sketch.call(aten.select.int, sketch.weight("w"), 0, 1)
    assert found(sketch.program(sketch.call(aten.relu.default, row))) == [("aten.select", "w.data")]


def test_readers_of_one_weight_are_candidates_in_graph_order() -> None:
    sketch = Sketch()
    weight = sketch.weight("w")
    x, index = sketch.input("x", 2, 64, dtype=torch.bfloat16), sketch.input("index", 3, dtype=torch.int64)
    first = sketch.call(aten.linear.default, x, weight)
    rows = sketch.call(aten.embedding.default, weight, index)
    total = sketch.call(aten.sum.default, sketch.call(aten.t.default, weight))
    program = sketch.program(first, rows, total, sketch.call(aten.relu.default, first))
    assert found(program) == [("aten.linear", "w.data"), ("aten.embedding", "w.data"), ("aten.sum", "w.data")]
    assert outcomes(program) == [("aten.linear", "rewritten"), ("aten.embedding", "rewritten"), ("aten.sum", "missed")]


def test_reader_of_two_weights_is_one_candidate_with_both_names() -> None:
    sketch = Sketch()
    product = sketch.call(aten.mul.Tensor, sketch.weight("a"), sketch.weight("b"))
    assert found(sketch.program(product)) == [("aten.mul", "a.data, b.data")]


def test_dequantized_weight_as_an_output_is_a_candidate() -> None:
    sketch = Sketch()
    weight = sketch.weight("w", dtype=torch.float32)
    x = sketch.input("x", 2, 64)
    program = sketch.program(weight, sketch.call(aten.linear.default, x, weight))
    assert found(program) == [("aten.linear", "w.data"), ("output", "w.data")]
    assert outcomes(program) == [("aten.linear", "missed"), ("output", "missed")]
    folded, _ = ecp.rewrite(program, "xnnpack", expect={"rewritten": 2, "missed": 0})
    assert not folded.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    x = torch.randn(2, 64)
    for got, wanted in zip(folded.module()(x), program.module()(x), strict=True):
        assert torch.equal(got, wanted)


def test_dequantize_without_readers_is_no_candidate() -> None:
    sketch = Sketch()
    sketch.weight("w")
    assert found(sketch.program(sketch.call(aten.relu.default, sketch.input("x", 2)))) == []


def test_weight_computed_from_constants_is_a_candidate() -> None:
    sketch = Sketch()
    packed, scale = sketch.buffer("q", torch.zeros(64, 16, dtype=torch.int8)), sketch.buffer("s", torch.ones(16, 2))
    data = sketch.call(aten.t.default, packed)
    weight = sketch.raw(DEQUANTIZE, data, [1, 32], scale, None, torch.int8, -8, 7, val=torch.empty(16, 64))
    program = sketch.program(sketch.call(aten.linear.default, sketch.input("x", 2, 64), weight))
    assert found(program) == [("aten.linear", "q")]
    assert outcomes(program) == [("aten.linear", "missed")]


def test_integers_of_an_activation_are_no_candidate() -> None:
    sketch = Sketch()
    q = sketch.input("q", 2, 64, dtype=torch.int8)
    scale = sketch.buffer("s", torch.ones(2, 1))
    x = sketch.call(DEQUANTIZE, q, [1, 64], scale, None, torch.int8)
    weight = sketch.parameter("w", torch.randn(16, 64))
    assert found(sketch.program(sketch.call(aten.linear.default, x, weight))) == []


@pytest.mark.parametrize("decompose", [False, True])
def test_dynamic_activations_add_no_candidate(decompose: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 16))
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)))
    program = torch.export.export(model, (torch.randn(2, 64),))
    program = program.run_decompositions({}) if decompose else program
    assert len(program.graph.find_nodes(op="call_function", target=DEQUANTIZE)) == 2
    assert [fqn for _, fqn in found(program)] == ["0.weight"]


def test_program_without_quantized_weights_has_no_candidates_and_no_warning() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(16, 64))

        def forward(self, x: Tensor) -> Any:
            return F.linear(x, self.w)

    program = torch.export.export(Plain(), (torch.randn(2, 64),))
    for target in ecp.targets():
        after, report = ecp.rewrite(program, target)
        assert (report.outcomes, report.warnings) == ([], [])
        assert "no candidates" in str(report)
        assert str(after.graph) == str(program.graph)


def test_candidate_has_scheme_shape_and_bytes_of_its_weight() -> None:
    """16 x 64 integers of one byte, and a scale of two bytes for each 32 of them."""
    for move in MOVED.values():
        sketch = Sketch()
        weight = move(sketch, sketch.weight("w"))
        x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
        (candidate,) = find_candidates(Program(sketch.program(sketch.call(aten.mm.default, x, weight))))
        assert (candidate.scheme, candidate.shape) == ("int4 group 32", (16, 64))
        zero_points = candidate.weight_bytes - (16 * 64 + 16 * 2 * 2)
        assert zero_points in (0, 16 * 2)  # one byte each, if the sketch has them


@pytest.mark.parametrize("how", ["select", "slice", "unbind"])
def test_reader_of_an_expert_has_the_bytes_of_that_expert(how: str) -> None:
    sketch = Sketch()
    weight = sketch.call(aten.t.default, SELECTED[how](sketch, stack(sketch)))
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    (candidate,) = find_candidates(Program(sketch.program(sketch.call(aten.mm.default, x, weight))))
    assert candidate.weight_bytes == 16 * 64 + 16 * 2 * 2
    assert candidate.shape == (64, 16)  # as the product reads it


def test_weight_in_a_form_that_no_decoder_reads_has_its_dtype_and_bytes() -> None:
    sketch = Sketch()
    data = sketch.buffer("w", torch.zeros(16, 64, dtype=torch.float8_e4m3fn))
    weight = sketch.call(aten._to_copy.default, data, dtype=torch.bfloat16)
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    (candidate,) = find_candidates(Program(sketch.program(sketch.call(aten.linear.default, x, weight))))
    assert (candidate.scheme, candidate.shape, candidate.weight_bytes) == ("float8_e4m3fn", (16, 64), 16 * 64)


class Cached(nn.Module):
    """Attention over keys that are kept in int8: appended, dequantized, multiplied."""

    def __init__(self, converts: bool) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 8, 32, dtype=torch.int8))
        self.register_buffer("scale", torch.full((8,), 0.05))
        self.register_buffer("zero", torch.zeros(8, dtype=torch.int8))
        self.converts = converts

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        self.keys.index_copy_(1, place, (x / 0.05).round().to(torch.int8).view(1, 1, 32))
        if self.converts:
            keys = self.keys.to(x.dtype) * self.scale.view(1, 8, 1)
        else:
            block = (1, 1, 32)
            keys = DEQUANTIZE(self.keys, block, self.scale, self.zero, torch.int8, -128, 127, output_dtype=x.dtype)
        return torch.softmax(x.view(1, 1, 32) @ keys.transpose(1, 2), -1)


@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("target", ["cuda", "cpu", "xnnpack"])
def test_quantized_cache_is_left_and_reported(target: str, converts: bool) -> None:
    model, given = Cached(converts), (torch.randn(32), torch.tensor([3]))
    program = torch.export.export(model, given)
    for form in (program, program.run_decompositions({})):
        rewritten, report = ecp.rewrite(form, target)
        assert report.outcomes == [] and report.warnings == []
        assert "left as they are: caches of quantized numbers that the program mutates (keys)" in report.notes
        assert torch.equal(rewritten.module()(*given), form.module()(*given))
