"""docs/reference/zoo.md, from the records."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.zoo.models import MODELS

Row = Mapping[str, Any]

HEAD = """# Architectures

The outcome of every quantized weight in {count} architectures of transformers, small and with random weights, for each
target. `make zoo` writes this page.

Each model is quantized and traced by `EtExporter`, and rewritten for each target: 4w in bfloat16 for cuda and metal,
4w in float32 for cpu, and 8da4w in float32 for xnnpack. A model that generates text is split into its components first,
with a static cache where it has one. A mixture of experts is quantized for each target apart: its experts are quantized
for cuda and cpu, and stay floating-point for metal and xnnpack, which have no kernel for them. Nothing is lowered here.

- Weights: operators that read a quantized weight.
- Rewritten, kept, missed: their outcomes. Kept: the backend reads the weight as it was exported.
- Difference: the greatest error of an output of the rewritten program from the generic program, relative to its norm.
  Both run in eager mode on the CPU, where an operator of this package computes what its kernel computes.

{summary}
"""


def write_page(records: Path, path: Path) -> Path:
    """Write the page from the records in a folder."""
    rows = {
        model.model_type: json.loads(file.read_text(encoding="utf-8"))
        for model in MODELS
        if (file := records / f"{model.model_type}.json").exists()
    }
    exported = {name: listed for name, listed in rows.items() if any(row["linears"] for row in listed)}
    refused = {name: listed for name, listed in rows.items() if name not in exported}
    lines = [HEAD.format(count=len(rows), summary=_summary(rows)).rstrip(), "", *_table(exported)]
    lines += ["", "## Missed weights and errors", "", *_problems(rows)]
    if refused:
        lines += ["", "## Architectures without a program", "", *_refused(refused)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _summary(rows: Mapping[str, list[Row]]) -> str:
    lines = ["| target | components | weights | rewritten | kept | missed | greatest difference |", "|" + "---|" * 7]
    for target in ("cuda", "metal", "cpu", "xnnpack"):
        mine = [row for listed in rows.values() for row in listed if row["target"] == target and not row["error"]]
        total: Counter[str] = Counter()
        for row in mine:
            total.update({key: row[key] for key in ("linears", "rewritten", "kept", "missed")})
        worst = max((row["difference"] or 0.0 for row in mine), default=0.0)
        counts = " | ".join(str(total[key]) for key in ("linears", "rewritten", "kept", "missed"))
        lines.append(f"| {target} | {len(mine)} | {counts} | {worst:.1e} |")
    return "\n".join(lines)


def _table(rows: Mapping[str, list[Row]]) -> list[str]:
    lines = ["| model | component | target | weights | rewritten | kept | missed | difference |", "|" + "---|" * 8]
    for name, listed in rows.items():
        for row in listed:
            shown = "" if row["difference"] is None else f"{row['difference']:.1e}"
            counts = " | ".join(str(row[key]) for key in ("linears", "rewritten", "kept", "missed"))
            lines.append(f"| {name} | {row['component']} | {row['target']} | {counts} | {shown or 'error'} |")
    return lines


def _problems(rows: Mapping[str, list[Row]]) -> list[str]:
    seen: dict[str, list[str]] = {}
    for name, listed in rows.items():
        for row in listed:
            texts = ([row["error"]] if row["error"] else []) + list(row["reasons"] if row["missed"] else [])
            for text in texts:
                places = seen.setdefault(text.replace("|", "\\|"), [])
                where = f"{name} {row['component']}".strip() + f" ({row['target']})"
                if where not in places:
                    places.append(where)
    return [f"- {text}: {', '.join(places)}." for text, places in seen.items()] or ["None."]


def _refused(rows: Mapping[str, list[Row]]) -> list[str]:
    errors = {name: [row["error"] for row in listed if row["error"]] for name, listed in rows.items()}
    return [f"- {name}: {(listed or ['no quantized weight'])[0]}" for name, listed in errors.items()]
