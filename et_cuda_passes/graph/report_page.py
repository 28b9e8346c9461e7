"""A page of reports: one HTML file that needs no network, written by templates from the data of the reports."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import networkx as nx
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from et_cuda_passes.graph.decibels import decibels_from_json, decibels_text, worst_ratio
from et_cuda_passes.graph.names import fold, form_of, without_numbers

STATUSES = ("rewritten", "kept", "missed")
Data = Mapping[str, Any]
"""A report, or a part of one, as ``Report.to_dict`` gives it."""


def render(reports: Mapping[str, Data], title: str = "") -> str:
    """One page with a section for each report.

    Args:
        reports: the reports as ``Report.to_dict`` gives them, by the heading of their section: usually the target.
        title: of the page; empty for a general one.

    Returns:
        HTML. It loads nothing, and every text of a report is escaped.
    """
    sections = [_section(f"s{number}", heading, report) for number, (heading, report) in enumerate(reports.items(), 1)]
    return _environment().get_template("report.html").render(title=title or "Quantized layers", sections=sections)


@cache
def _environment() -> Environment:
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "size": size_text,
        "decibels": partial(decibels_text, unit=" dB"),
        "sortable": sortable,
    }
    return environment


def size_text(count: int) -> str:
    """A number of bytes in the largest unit that keeps it above 1: "1.5 MB"."""
    for unit, digits in (("B", 0), ("kB", 0), ("MB", 1), ("GB", 2)):
        factor: int = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[unit]
        if count < 1000 * factor or unit == "GB":
            return f"{count / factor:.{digits}f} {unit}"
    raise AssertionError


def sortable(value: float | None) -> str:
    """A number for the script of the page; empty for None. NaN is worse than any other ratio."""
    if value is None:
        return ""
    return str(-math.inf if math.isnan(value) else float(value)).replace("inf", "Infinity")


# Sections -------------------------------------------------------------------------------------------------------------


def _section(name: str, heading: str, report: Data) -> dict[str, Any]:
    accuracy: dict[str, Data] = {}
    for measured in report["accuracy"]:
        layer = {key: decibels_from_json(value) for key, value in measured.items()}
        # An operator with several weights has the worst of their ratios.
        accuracy[layer["node"]] = min(accuracy.get(layer["node"], layer), layer, key=_badness)
    rows = [_row(outcome, accuracy.get(outcome["node"])) for outcome in report["outcomes"]]
    largest = max((row["before"] for row in rows), default=0) or 1
    for row in rows:
        row["bar"] = (_percent(row["after"], largest), _percent(row["before"], largest))
    return {
        "id": name,
        "heading": heading,
        "report": report,
        "counts": [(status, report["counts"][status]) for status in STATUSES],
        "acted": [(rule, report["counts"][rule]) for rule in report["passes"] if report["counts"].get(rule)],
        "groups": _groups(rows),
        "notes": _notes(report["outcomes"]),
        "measured": bool(accuracy),
        "worst_first": _worst_first(rows),
        "outputs": [
            {key: decibels_from_json(value) for key, value in output.items()} for output in report["output_accuracy"]
        ],
        "beyond": sum(row["beyond"] for row in rows),
        "misses": _misses(report["outcomes"]),
        "drawings": [_drawing(drawing) for drawing in report["drawings"]],
        "explanations": _explanations(report["outcomes"]),
        "charts": _charts(rows, bool(accuracy)),
    }


def _badness(layer: Data) -> float:
    worst = worst_ratio((layer["quantized_db"], layer["rewritten_db"]))
    return math.inf if worst is None else -math.inf if math.isnan(worst) else worst


def _worst_first(rows: Iterable[Data]) -> str:
    """The heading of the column by which measured layers are sorted at first; empty if none is measured."""
    if any(row["beyond"] for row in rows):
        return _RATIOS[1]
    return next((name for place, name in enumerate(_RATIOS) if any(row["db"][place] is not None for row in rows)), "")


def _percent(part: int, whole: int) -> int:
    return min(100, round(100 * part / whole))


def _row(outcome: Data, accuracy: Data | None) -> dict[str, Any]:
    path, _, code = outcome["source"].partition(": ")
    measured = accuracy or {"quantized_db": None, "rewritten_db": None, "limit_db": None}
    ratio, limit = measured["rewritten_db"], measured["limit_db"]
    return {
        "layer": outcome["fqn"],
        "node": outcome["node"],
        "status": outcome["status"],
        "rule": outcome["rule"] or "",
        "op": outcome["op"],
        "scheme": outcome["scheme"],
        "kernel": outcome["kernel"],
        "layout": outcome["layout"],
        "shape": list(map(str, outcome["shape"])),
        "elements": math.prod(outcome["shape"]),
        "before": outcome["bytes_before"],
        "after": outcome["bytes_after"],
        "where": re.split(r"[/\\]", path)[-1],
        "path": path,
        "code": code,
        "db": (measured["quantized_db"], ratio),
        "limit": limit,
        "beyond": limit is not None and not (ratio is not None and ratio >= limit),
    }


_RATIOS = ("SNR quantized", "SNR rewritten")
_COMMON = ("status", "rule", "op", "scheme", "kernel", "layout", "beyond")


def _groups(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows by FQN without indices, and by everything else that the row of a group states."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((form_of(row["layer"]), *(row[key] for key in _COMMON)), []).append(row)
    groups = [_group(members) for members in found.values()]
    largest = max((group["before"] for group in groups), default=0) or 1
    for group in groups:
        group["bar"] = (_percent(group["after"], largest), _percent(group["before"], largest))
    return groups


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    shapes = {tuple(row["shape"]) for row in rows}
    lines = {row["where"] for row in rows}
    return first | {
        "rows": rows,
        "layers": fold(row["layer"] for row in rows),
        "shape": first["shape"] if len(shapes) == 1 else [f"{len(shapes)} shapes"],
        "before": sum(row["before"] for row in rows),
        "after": sum(row["after"] for row in rows),
        "where": first["where"] if len(lines) == 1 else f"{len(lines)} lines",
        "code": first["code"] if len({row["code"] for row in rows}) == 1 else "",
        "db": [worst_ratio(row["db"][place] for row in rows) for place in (0, 1)],
        "limit": max((row["limit"] for row in rows if row["limit"] is not None), default=None),
    }


def _notes(outcomes: Iterable[Data]) -> list[dict[str, Any]]:
    """The notes on rewritten and kept layers. Those that differ in numbers alone share the text of the first."""
    found: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        for reason in outcome["reasons"]:
            if reason["stage"] == "note" and outcome["status"] != "missed":
                found.setdefault((outcome["rule"] or "", without_numbers(reason["found"])), []).append(reason["found"])
    return [{"rule": rule, "text": texts[0], "count": len(texts)} for (rule, _), texts in found.items()]


def _misses(outcomes: Iterable[Data]) -> list[dict[str, Any]]:
    """The misses by operator and similar reasons, the largest group first."""
    groups: dict[tuple[str, ...], list[Data]] = {}
    for outcome in outcomes:
        if outcome["status"] == "missed":
            alike = (without_numbers(str(sorted(reason.items()))) for reason in outcome["reasons"])
            groups.setdefault((outcome["op"], *alike), []).append(outcome)
    return [
        {
            "op": members[0]["op"],
            "count": len(members),
            "layers": fold(member["fqn"] for member in members),
            "bytes": sum(member["bytes_before"] for member in members),
            "sources": list(dict.fromkeys(member["source"] for member in members if member["source"])),
            "notes": [reason["found"] for reason in members[0]["reasons"] if reason["stage"] == "note"],
            "ways": _ways(members[0]["reasons"]),
        }
        for members in sorted(groups.values(), key=len, reverse=True)
    ]


def _ways(reasons: Iterable[Data]) -> list[dict[str, Any]]:
    """For each rule, what to change so that it acts, and why; first the rule that needs the fewest changes."""
    by_rule: dict[str, list[dict[str, str]]] = defaultdict(list)
    for reason in reasons:
        if reason["stage"] != "note":
            # A hint may begin with what there is: "the kernel has 32 and 64: quantize with PerGroup(32)".
            known, _, fix = reason["hint"].rpartition(": ")
            found = f"{reason['found']}; {known}" if known else reason["found"]
            by_rule[reason["rule"] or ""].append({"wanted": reason["wanted"], "found": found, "fix": fix})
    order = sorted(by_rule, key=lambda rule: (sum(not each["fix"] for each in by_rule[rule]), len(by_rule[rule])))
    ways: dict[str, dict[str, Any]] = {}
    for rule in order:
        fixes = ", and ".join(dict.fromkeys(each["fix"] for each in by_rule[rule] if each["fix"]))
        text = f"Or {fixes}" if ways and fixes else fixes[:1].upper() + fixes[1:]
        way = ways.setdefault(fixes, {"fix": text, "reasons": []})
        way["reasons"] += [{"rule": rule, **each} for each in by_rule[rule]]
    return list(ways.values())


def _explanations(outcomes: Iterable[Data]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome["explanation"]:
            found.setdefault(outcome["explanation"], []).append(outcome["fqn"])
    return [(text, fold(names)) for text, names in found.items()]


# Pictures -------------------------------------------------------------------------------------------------------------

_HEIGHT = 100
"""Height of a chart, in its own units; each bar is 1 wide, with a gap."""
_UNEVEN = 8
"""Bars are drawn by the square root of their values if the largest is more than so many times the median."""


def _charts(rows: Sequence[Data], measured: bool) -> list[dict[str, Any]]:
    """A bar for each layer, in the order of the graph: bytes, and signal-to-noise ratios where they were measured."""
    charts: list[dict[str, Any]] = []
    sizes = [max(row["before"], row["after"]) for row in rows]
    largest = max(sizes, default=0)
    if largest > 0:
        # A table of words would leave nothing to see of the other layers.
        uneven = largest > _UNEVEN * median(sizes)
        power = 0.5 if uneven else 1.0
        bars = [("before", _bars([row["before"] for row in rows], largest, power))]
        for status in STATUSES:
            after = [row["after"] if row["status"] == status else 0 for row in rows]
            bars += [(status, _bars(after, largest, power))] if any(after) else []
        legend = f"; grey is as exported{'; heights by square root' if uneven else ''}"
        charts.append({"title": "Bytes of each layer", "bars": bars, "largest": size_text(largest), "legend": legend})
    for place, title in enumerate(("quantized against float", "rewritten against as exported")):
        values = [row["db"][place] for row in rows]
        most = max((value for value in values if value is not None and math.isfinite(value)), default=0.0)
        if measured and most > 0:
            heights = [0.0 if value is None or math.isnan(value) else min(max(value, 0.0), most) for value in values]
            signal = [("signal", _bars(heights, most))]
            name, text = f"Signal to noise of each layer, {title}", f"{most:.1f} dB"
            charts.append({"title": name, "bars": signal, "largest": text, "legend": ""})
    return [{**chart, "count": len(rows), "height": _HEIGHT} for chart in charts]


def _bars(values: Sequence[float], largest: float, power: float = 1.0) -> list[tuple[int, int]]:
    """Position and height of each bar; a small value still shows."""
    return [(i, max(1, round(_HEIGHT * (value / largest) ** power))) for i, value in enumerate(values) if value > 0]


_CHARACTER, _PADDING, _BOX, _GAPS = 6.7, 20, 38, (42, 12)
"""Pixels: width of a character, padding of a box, height of a box, gaps between boxes."""


def _drawing(drawing: Data) -> dict[str, Any]:
    return {**drawing, "sides": [(side, _picture(drawing[side])) for side in ("before", "after")]}


def _picture(nodes: Sequence[Data]) -> dict[str, Any]:
    """The boxes and edges of one side, in pixels. A column is as wide as its longest text."""
    layout = place_nodes([node["inputs"] for node in nodes])
    widths = [0.0] * layout.columns
    for node, (column, _) in zip(nodes, layout.places, strict=True):
        longest = max(len(node["label"]), len(node["value"]))
        widths[round(column)] = max(widths[round(column)], longest * _CHARACTER + _PADDING)
    lefts = [sum(widths[:column]) + column * _GAPS[0] for column in range(layout.columns)]
    boxes = [
        {
            **node,
            "x": lefts[round(column)],
            "y": row * (_BOX + _GAPS[1]),
            "width": widths[round(column)],
            "height": _BOX,
        }
        for node, (column, row) in zip(nodes, layout.places, strict=True)
    ]
    edges = []
    for box in boxes:
        for place, source in enumerate(box["inputs"], 1):
            start = boxes[source]
            # The ends of several edges are spread over the side of the box.
            end = box["y"] + _BOX * place / (len(box["inputs"]) + 1)
            edges.append((start["x"] + start["width"], start["y"] + _BOX / 2, box["x"], end))
    width, height = lefts[-1] + widths[-1], layout.rows * (_BOX + _GAPS[1]) - _GAPS[1]
    return {"boxes": boxes, "edges": edges, "width": width, "height": height}


@dataclass(frozen=True)
class Layout:
    """The place of each node: its column, from the inputs to the results, and its row; with their numbers."""

    places: list[tuple[float, float]]
    columns: int
    rows: int


def place_nodes(inputs: Sequence[Sequence[int]]) -> Layout:
    """Place nodes, of which each list has the positions of its inputs, in columns by their distance to the results."""
    distance = [0] * len(inputs)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(inputs)))
    graph.add_edges_from((source, node) for node, sources in enumerate(inputs) for source in sources)
    for node in reversed(list(nx.topological_sort(graph))):
        distance[node] = max((distance[reader] + 1 for reader in graph.successors(node)), default=0)
    last = max(distance, default=0)
    columns: dict[int, list[int]] = {column: [] for column in range(last + 1)}
    for node in _depth_first(inputs):
        columns[last - distance[node]].append(node)
    tallest = max(map(len, columns.values()))
    places = nx.multipartite_layout(graph, subset_key=columns)
    xs, ys = ([float(places[node][axis]) for node in graph] for axis in (0, 1))
    # networkx scales the places; with this unit neighbours are 1 apart.
    unit = (max(xs) - min(xs)) / last if last else (max(ys) - min(ys)) / max(tallest - 1, 1) or 1.0
    found = [(round((x - min(xs)) / unit, 2), round((y - min(ys)) / unit, 2)) for x, y in zip(xs, ys, strict=True)]
    return Layout(found, last + 1, tallest)


def _depth_first(inputs: Sequence[Sequence[int]]) -> list[int]:
    """All nodes, the inputs of each after it in their order."""
    order: dict[int, None] = {}
    read = {source for sources in inputs for source in sources}
    work = [node for node in reversed(range(len(inputs))) if node not in read]
    while work:
        node = work.pop()
        if node not in order:
            order[node] = None
            work += reversed(inputs[node])
    return list(order)
