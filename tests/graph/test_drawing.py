"""Drawings of rewrites: what is drawn once, the sizes that differ, the text and the coordinates."""

from itertools import pairwise

import torch

import et_cuda_passes as ecp
from et_cuda_passes.graph.drawing import DrawnNode, drawing_text
from et_cuda_passes.graph.report_page import place_nodes
from et_cuda_passes.testing import Quantized


class Chain(torch.nn.Module):
    """Linears of several widths, one after another."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Quantized(n, k, zero_points=None) for k, n in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def rewritten(*widths: int, target: str = "cuda") -> ecp.Report:
    x = torch.zeros(1, widths[0], dtype=torch.bfloat16)
    return ecp.rewrite(torch.export.export(Chain(*widths), (x,)), target)[1]


def test_rewrites_that_differ_in_sizes_are_one_drawing_with_letters() -> None:
    (found,) = rewritten(64, 128, 64, 128).drawings
    assert (found.rule, found.count) == ("linear_int4", 3)
    assert found.before == [
        DrawnNode("aten.linear", "operator", "bfloat16 [1, A]", [1, 2, 5]),
        DrawnNode("input", "input", "bfloat16 [1, B]", []),
        DrawnNode("torchao.dequantize_affine", "operator", "bfloat16 [A, B]", [3, 4]),
        DrawnNode("input", "constant", "int8 [A, B]", []),
        DrawnNode("scale", "constant", "bfloat16 [A, C]", []),
        DrawnNode("bias", "constant", "bfloat16 [A]", []),
    ]
    assert [(node.label, node.kind, node.inputs) for node in found.after] == [
        ("int4_linear_mma_tiled", "operator", [1, 2, 3, 4]),
        ("x", "input", []),
        ("packed", "constant", []),
        ("scale_and_zero", "constant", []),
        ("bias", "constant", []),
    ]
    assert [(sizes.count, sizes.sizes["A"], sizes.sizes["B"], sizes.sizes["C"]) for sizes in found.sizes] == [
        (2, "128", "64", "2"),
        (1, "64", "128", "4"),
    ]


def test_equal_rewrites_have_their_sizes_in_the_drawing() -> None:
    (found,) = rewritten(64, 64, 64).drawings
    assert (found.count, found.sizes) == (2, [])
    assert found.before[0].value == "bfloat16 [1, 64]"


def test_other_operators_are_another_drawing() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Quantized(64, 64), Quantized(64, 64, form=lambda x, w, b: x @ w.T)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.other(self.one(x))
            return y

    report = ecp.rewrite(torch.export.export(Two(), (torch.zeros(1, 64, dtype=torch.bfloat16),)), "cuda")[1]
    assert [(drawing.rule, drawing.count) for drawing in report.drawings] == [("linear_int4", 1), ("linear_int4", 1)]


def test_drawing_names_the_options_of_a_fused_operator() -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = Quantized(64, 64, seed=1), Quantized(64, 64, seed=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.gate(x)) * self.up(x)

    report = ecp.rewrite(torch.export.export(Gated(), (torch.zeros(1, 64, dtype=torch.bfloat16),)), "cuda")[1]
    assert {drawing.rule: drawing.after[0].label for drawing in report.drawings} == {
        "linear_int4": "int4_linear_mma_tiled",
        "fuse_activation": "int4_linear_mma_tiled(silu)",
        "fuse_gate": "int4_linear_mma_tiled(silu, gated)",
    }
    gate = next(drawing for drawing in report.drawings if drawing.rule == "fuse_gate")
    # Both linears read one input, which is drawn once.
    assert [node.label for node in gate.before if node.kind == "input"] == ["x"]


def test_drawing_of_a_folded_weight_ends_in_a_constant() -> None:
    (found,) = rewritten(64, 64, target="xnnpack").drawings
    assert found.rule == "fold_dequantize"
    assert found.after == [DrawnNode("dequantized", "constant", "bfloat16 [64, 64]", [])]


def test_drawings_are_equal_in_every_run() -> None:
    assert rewritten(64, 128, 64).drawings == rewritten(64, 128, 64).drawings


def test_text_of_a_drawing_is_a_tree_from_the_result_to_the_inputs() -> None:
    (found,) = rewritten(64, 128, 64).drawings
    assert drawing_text(found) == (
        "linear_int4, 2 times\n"
        "  before\n"
        "    aten.linear  bfloat16 [1, A]\n"
        "    ├─ input  bfloat16 [1, B]\n"
        "    ├─ torchao.dequantize_affine  bfloat16 [A, B]\n"
        "    │  ├─ input  int8 [A, B]\n"
        "    │  └─ scale  bfloat16 [A, C]\n"
        "    └─ bias  bfloat16 [A]\n"
        "  after\n"
        "    int4_linear_mma_tiled  bfloat16 [1, A]\n"
        "    ├─ x  bfloat16 [1, B]\n"
        "    ├─ packed  int32 [A, D]\n"
        "    ├─ scale_and_zero  bfloat16 [1, A, 8]\n"
        "    └─ bias  bfloat16 [A]\n"
        "  once with A = 128, B = 64, C = 2, D = 8\n"
        "  once with A = 64, B = 128, C = 4, D = 16"
    )


def test_text_names_the_first_sizes_and_counts_the_others() -> None:
    (found,) = rewritten(*range(32, 32 * 12, 32)).drawings
    assert len(found.sizes) == 10
    assert drawing_text(found).endswith("  and 4 other combinations of sizes")


def test_columns_follow_the_distance_to_the_result() -> None:
    # 0 reads 1, 2 and 5; 2 reads 3 and 4.
    layout = place_nodes([[1, 2, 5], [], [3, 4], [], [], []])
    assert (layout.columns, layout.rows) == (3, 3)
    columns = [column for column, _ in layout.places]
    assert columns == [2, 1, 1, 0, 0, 1]
    # Neighbours in a column are 1 apart, in the order of the arguments, and columns are centred.
    assert [layout.places[node][1] for node in (1, 2, 5)] == [0, 1, 2]
    assert [layout.places[node][1] for node in (3, 4)] == [0.5, 1.5]
    assert layout.places[0][1] == 1


def test_one_node_alone_is_placed() -> None:
    layout = place_nodes([[]])
    assert (layout.places, layout.columns, layout.rows) == ([(0.0, 0.0)], 1, 1)
