"""``rules``: the passes of each target. Those of this package are in a file, because the rules import torch."""

import dataclasses
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from et_cuda_passes.cli.console import quiet_import
from et_cuda_passes.cli.documents import Pass, Requirement, Rules, TargetPasses
from et_cuda_passes.plugins import RULES, TARGETS, PluginError, has_fault, import_fix, installed, report_fault

About = dict[str, dict[str, Any]]
"""For each target its summary and its passes, as data."""


def describe_rule(rule: Any) -> dict[str, Any]:
    """A rule as data: its rewrite, its requirements, and its options with their values."""
    fields: Iterable[Any] = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
    return {
        "name": rule.name,
        "rewrite": (inspect.getdoc(type(rule)) or "").partition("\n")[0].strip(),
        "requires": [{"wanted": need.wanted, "hint": need.hint, "stage": need.stage} for need in rule.requirements],
        "options": {field.name: getattr(rule, field.name) for field in fields},
    }


def own_rules() -> About:
    """The targets of this package with their rules. ``make docs`` writes the file from the code."""
    about: About = json.loads((Path(__file__).parent / "rules.json").read_text(encoding="utf-8"))
    return about


def all_rules() -> About:
    """The targets of this package and those of plugins, with the rules of their lists in order.

    A rule or target of a plugin has the key "package", with the package and its version.
    """
    about = own_rules()
    plugins = installed(TARGETS)
    if not plugins and not installed(RULES):
        return about
    # These import torch, and then the packages of the plugins.
    with quiet_import(False):
        from et_cuda_passes.targets import default_passes, get_target, targets
        from et_cuda_passes.targets.joining import origin_of

    names = targets()
    packages = {plugin.name: plugin for plugin in plugins if plugin.name not in about}
    for name in names:
        try:
            entries = default_passes(name)
        except ValueError as error:
            if isinstance(error, PluginError) or name not in packages:
                raise
            report_fault(packages[name], str(error), import_fix(error.__cause__))
            continue
        known = {entry["name"]: entry for entry in about.get(name, {}).get("passes", ())}
        passes = []
        for rule in entries:
            origin = origin_of(rule)
            passes.append(
                known[rule.name]
                if rule.name in known
                else json.loads(json.dumps(describe_rule(rule), default=str)) | ({"package": origin} if origin else {})
            )
        about[name] = {"summary": get_target(name).summary, "passes": passes}
        if name in packages:
            about[name]["package"] = packages[name].origin
    return about


def rules_document(about: About) -> Rules:
    """The document of ``rules --json``."""
    return Rules(
        {
            name: TargetPasses(
                each["summary"],
                [
                    Pass(**{**entry, "requires": [Requirement(**need) for need in entry["requires"]]})
                    for entry in each["passes"]
                ],
                each.get("package"),
            )
            for name, each in about.items()
        }
    )


def as_text(about: About) -> str:
    """The passes of each target in order, then each rule with its requirements, then the plugins."""
    lines = []
    for name, target in about.items():
        lines.append(f"{name}: {target['summary']}{_package(target)}")
        lines.append(f"  passes: {', '.join(entry['name'] + _package(entry) for entry in target['passes'])}")
    for entry in {entry["name"]: entry for target in about.values() for entry in target["passes"]}.values():
        lines += ["", f"{entry['name']}{_package(entry)}", f"  {entry['rewrite']}"]
        for need in entry["requires"]:
            hint = f"; {need['hint']}" if need["hint"] else ""
            lines.append(f"  requires {need['wanted']}{hint}")
        lines += [f"  option {name} = {default}" for name, default in entry["options"].items()]
    plugins = [*installed(TARGETS), *installed(RULES)]
    if plugins:
        lines += ["", "plugins"]
        for plugin in plugins:
            kind = "target" if plugin.group == TARGETS else "rules"
            fault = " (has a fault)" if has_fault(plugin) else ""
            lines.append(f"  {plugin.origin}: {kind} {plugin.name} = {plugin.value}{fault}")
    return "\n".join(lines)


def _package(entry: dict[str, Any]) -> str:
    return f" ({entry['package']})" if entry.get("package") else ""
