"""Programs that contain packed weights already: layouts, supporting targets, and warnings."""

import pytest
import torch
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.targets.compatibility import packed_layouts
from et_cuda_passes.testing import Quantized, Sketch


@pytest.fixture
def exported() -> ExportedProgram:
    return torch.export.export(Quantized(16, 64), (torch.randn(2, 64, dtype=torch.bfloat16),))


@pytest.mark.parametrize(("first", "layout"), [("cuda", "mma_tiled"), ("metal", "metal"), ("cpu", "cpu")])
def test_rewrite_warns_about_weights_packed_for_other_target(
    exported: ExportedProgram, first: str, layout: str
) -> None:
    packed, report = ecp.rewrite(exported, first)
    assert report.warnings == []
    for other in set(ecp.targets()) - {first}:
        _, report = ecp.rewrite(packed, other)
        (warning,) = report.warnings
        assert f"(1 x {layout}), which target {other} does not run: rewrite the program as it was" in warning
        assert f"packed already for target {first}" in warning


def test_rewrite_reports_program_packed_for_same_target(exported: ExportedProgram) -> None:
    packed, _ = ecp.rewrite(exported, "cuda")
    _, report = ecp.rewrite(packed, "cuda")
    assert report.warnings == ["the program is packed already: 1 x mma_tiled"]


def test_xnnpack_partitioner_rejects_packed_program(exported: ExportedProgram) -> None:
    packed, _ = ecp.rewrite(exported, "cuda")
    with pytest.raises(ValueError, match="packed already for target cuda"):
        ecp.XnnpackPartitioner().transform_for_pre_decomposition(packed)


def test_packed_layouts_counts_tables() -> None:
    sketch = Sketch()
    ids = sketch.input("ids", 3, dtype=torch.int64)
    table = sketch.weight("table", n=64, k=64)
    program = sketch.program(sketch.call(torch.ops.aten.embedding.default, table, ids))
    packed, _ = ecp.rewrite(program, "cuda", expect={"embedding_int4": 1})
    assert packed_layouts(packed) == {"mma_tiled": 1}


def test_dynamic_size_is_reported_for_a_target_of_fixed_sizes() -> None:
    model = Quantized(16, 64, dtype=torch.float32)
    example = (torch.randn(2, 64),)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("rows", max=8)},))
    (warning,) = ecp.rewrite(program, "openvino")[1].warnings
    assert "has a dynamic size" in warning and "the lowering to openvino refuses: export the model with" in warning
    for other, given in (("xnnpack", program), ("openvino", torch.export.export(model, example))):
        assert ecp.rewrite(given, other)[1].warnings == []
