"""The parts of the benchmark of one token that need no GPU."""

import pytest
import torch

from benchmarks.voxtral.dimensions import SCALES
from benchmarks.voxtral.kernels import summarize
from benchmarks.voxtral.lowering import partitioners
from benchmarks.voxtral.one_token import METHOD, export, kernels, launches, times
from benchmarks.voxtral.variants import VARIANTS
from benchmarks.voxtral.weights import build

TINY = SCALES["tiny"]


def test_program_of_one_token_computes_the_decoder_token_by_token() -> None:
    model, _ = build(TINY, "float", "cpu", dtype=torch.float32)
    x = torch.randn(1, 5, TINY.features)
    with torch.no_grad():
        wanted = model.text_decoder(x, torch.arange(5)).clone()
        program = export(model, TINY)
        run = program.module()
        found = [run(x[:, at : at + 1], torch.tensor([at])) for at in range(5)]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-4, atol=1e-4)
    sizes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    assert all(isinstance(size, int) for shape in sizes for size in shape), "a graph needs static sizes"


@pytest.mark.parametrize("name", ["ours", "unfused", "ungated"])
def test_variant_rewrites_every_linear(name: str) -> None:
    program = export(build(TINY, "int4", "cpu")[0], TINY)
    (partitioner,) = partitioners(VARIANTS[name], TINY)[METHOD]
    partitioner.transform_for_pre_decomposition(program)  # raises for another number than expected
    assert partitioner.report.counts()["rewritten"] == TINY.linears[METHOD]


def some_results() -> dict[str, dict[str, object]]:
    found = summarize([("int4_matmul", 60.0)] * 10 + [("triton_poi_fused_add_0", 20.0)] * 30, 2)
    return {
        "bf16": {"plain": 2.0, "graph": 1.0, "profile": summarize([("nvjet_mm", 400.0)] * 4, 2)},
        "ours": {"plain": 1.0, "graph": 0.7, "profile": found},
    }


def test_times_have_ratios_to_bf16_and_gaps() -> None:
    _, bf16, ours = times(some_results())
    assert bf16[1:] == ["2.000", "1.000", "1.00", "1.00", "0.800", "60%"]
    assert ours[1:] == ["1.000", "0.700", "0.50", "0.70", "0.600", "40%"]
    assert times({"ours": some_results()["ours"]})[1][3:5] == ["", ""]


def test_launches_are_counted_by_kind_for_a_token_and_a_layer() -> None:
    lines = [line[1:] for line in launches(some_results(), layers=5)[1:]]
    assert lines == [
        ["matmul", "2", "0.4", "800"],
        ["all", "2", "0.4", "800"],
        ["matmul", "5", "1.0", "300"],
        ["pointwise", "15", "3.0", "300"],
        ["all", "20", "4.0", "600"],
    ]
    assert sorted(line[1:] for line in kernels(some_results())[1:]) == [
        ["`int4_matmul`", "5", "300.0"],
        ["`nvjet_mm`", "2", "800.0"],
        ["`triton_poi_fused_add_0`", "15", "300.0"],
    ]
