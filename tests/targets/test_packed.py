"""A program that is packed already: told apart by layout, warned about where the target does not run it."""

import pytest
import torch
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.targets.packed import packed_layouts
from tests.helpers import Sketch
from tests.quantized import Quantized


@pytest.fixture
def exported() -> ExportedProgram:
    return torch.export.export(Quantized(16, 64), (torch.randn(2, 64, dtype=torch.bfloat16),))


@pytest.mark.parametrize(("first", "layout"), [("cuda", "mma_tiled"), ("metal", "metal"), ("cpu", "cpu")])
def test_what_another_target_packed_is_warned_about(exported: ExportedProgram, first: str, layout: str) -> None:
    packed, report = ecp.rewrite(exported, first)
    assert report.warnings == []
    for other in set(ecp.targets()) - {first}:
        _, report = ecp.rewrite(packed, other)
        (warning,) = report.warnings
        assert f"(1 x {layout}), which target {other} does not run: rewrite the program as it was" in warning
        assert f"packed already for target {first}" in warning


def test_what_was_packed_for_the_target_is_said_to_be(exported: ExportedProgram) -> None:
    packed, _ = ecp.rewrite(exported, "cuda")
    _, report = ecp.rewrite(packed, "cuda")
    assert report.warnings == ["the program is packed already: 1 x mma_tiled"]


def test_a_packed_program_does_not_reach_xnnpack(exported: ExportedProgram) -> None:
    packed, _ = ecp.rewrite(exported, "cuda")
    with pytest.raises(ValueError, match="packed already for target cuda"):
        ecp.XnnpackPartitioner().transform_for_pre_decomposition(packed)


def test_tables_and_experts_count() -> None:
    sketch = Sketch()
    ids = sketch.input("ids", 3, dtype=torch.int64)
    table = sketch.weight("table", n=64, k=64)
    program = sketch.program(sketch.call(torch.ops.aten.embedding.default, table, ids))
    packed, _ = ecp.rewrite(program, "cuda", expect={"embedding_int4": 1})
    assert packed_layouts(packed) == {"mma_tiled": 1}
