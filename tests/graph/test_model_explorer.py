"""Node data for Model Explorer: a value for each candidate, under the name of its node in the exported graph."""

import json
import math
from dataclasses import replace

import torch

import et_cuda_passes as ecp
from et_cuda_passes.graph.model_explorer import node_data
from et_cuda_passes.graph.report import LayerAccuracy
from et_cuda_passes.testing import Quantized
from tests.reports import report_on


def test_keys_are_the_nodes_of_the_exported_graph_that_read_a_weight() -> None:
    model = torch.nn.Sequential(Quantized(64, 64), torch.nn.ReLU(), Quantized(64, 64, group=8, high=100, low=-100))
    exported = torch.export.export(model, (torch.zeros(1, 64, dtype=torch.bfloat16),))
    data = node_data(ecp.rewrite(exported, "cuda")[1].to_dict())
    linears = [node.name for node in exported.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert list(data["results"]) == linears
    assert [result["value"] for result in data["results"].values()] == ["rewritten, triton (mma_tiled)", "missed"]
    assert data["name"] == "cuda"


def test_value_has_status_kernel_and_error() -> None:
    given = report_on(1, missed_every=4)
    layers = (LayerAccuracy("w", "linear", 20.4, 44.6), LayerAccuracy("w", "linear_1", None, None))
    results = node_data(replace(given, accuracy=layers).to_dict())["results"]
    assert results["linear"]["value"] == "missed, 20 dB"
    assert results["linear_1"]["value"] == "rewritten, triton (mma_tiled)"
    worse = (LayerAccuracy("w", "linear", math.inf, 44.6), LayerAccuracy("w", "linear_1", 30.0, math.nan))
    worse_results = node_data(replace(given, accuracy=worse).to_dict())["results"]
    assert worse_results["linear"]["value"] == "missed, 45 dB"
    assert worse_results["linear_1"]["value"] == "rewritten, triton (mma_tiled), not finite"
    colors = {result["value"].partition(",")[0]: result["bgColor"] for result in results.values()}
    assert len(set(colors.values())) == 2


def test_kernel_that_no_rule_names_is_the_rule() -> None:
    given = report_on(1)
    given.outcomes[:] = [replace(given.outcomes[0], rule="fold_dequantize", kernel="", layout="")]
    assert node_data(given.to_dict())["results"]["linear"]["value"] == "rewritten, fold_dequantize"


def test_node_data_have_the_fields_of_the_format() -> None:
    data = json.loads(json.dumps(node_data(report_on(2).to_dict())))
    assert data.keys() == {"name", "results", "showExpandedSummaryOnGroupNode"}
    assert all(result.keys() == {"value", "bgColor", "textColor"} for result in data["results"].values())
