"""Node data for Google's Model Explorer: the outcome of each candidate, shown on the graph of the exported program.

The format is that of ``model_explorer.node_data_builder.GraphNodeData``. Model Explorer's adapter for a ``.pt2`` gives
each node the name that it has in the graph as its id. It shows no subgraphs of control flow.
"""

from collections.abc import Mapping
from typing import Any

from et_cuda_passes.graph.decibels import decibels_from_json, decibels_to_json, worst_ratio

_COLORS = {"rewritten": "#a7e3bf", "kept": "#b3d4fc", "missed": "#ffb3b5"}


def node_data(report: Mapping[str, Any]) -> dict[str, Any]:
    """The node data of a report, as ``Report.to_dict`` gives it: status, kernel, layout and error of each candidate.

    The value of a node is a text, because Model Explorer counts equal values; so ratios are rounded to whole dB.
    """
    ratios: dict[str, list[float | None]] = {}
    for layer in report["accuracy"]:
        found = map(decibels_from_json, (layer["quantized_db"], layer["rewritten_db"]))
        ratios.setdefault(layer["node"], []).extend(found)
    results = {}
    for outcome in report["outcomes"]:
        kernel = f"{outcome['kernel']} ({outcome['layout']})" if outcome["layout"] else outcome["kernel"]
        worst = decibels_to_json(worst_ratio(ratios.get(outcome["node"], ())))
        ratio = f"{worst:.0f} dB" if isinstance(worst, (int, float)) else worst
        value = ", ".join(filter(None, (outcome["status"], kernel or outcome["rule"], ratio)))
        results[outcome["node"]] = {"value": value, "bgColor": _COLORS[outcome["status"]], "textColor": "#1c2024"}
    return {"name": report["target"], "results": results, "showExpandedSummaryOnGroupNode": True}
