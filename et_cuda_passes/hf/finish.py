"""An export that is read again: its components, and the targets that another machine could not finish."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.exporters.base import EXPORT_MANIFEST_FILE
from transformers.exporters.metadata import ExportMetadata, register_treespec_types

from et_cuda_passes.executorch.lower import Progress, atomic_output, gpu_of_methods, lower, missing_requirement
from et_cuda_passes.executorch.packed import load_model, read_report
from et_cuda_passes.graph.report_page import render
from et_cuda_passes.hf.artifact import SUFFIX, Build, Component, ExportError
from et_cuda_passes.hf.config import FORMAT

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"


def page_of(report: Mapping[str, Any], title: str) -> str:
    """The page of all targets and components of an export; empty if its report has none."""
    try:
        reports = {
            f"{target}, {name}" if len(parts) > 1 else target: read_report(part).to_dict()
            for target, parts in report.get("targets", {}).items()
            for name, part in parts.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError("the report of the export is damaged: export the model again") from error
    return render(reports, title) if reports else ""


def with_target(progress: Progress, target: str, step: str) -> None:
    """Report a step with its target."""
    progress(f"{target}: {step}")


def finish_export(
    folder: str | Path,
    progress: Progress = lambda step: None,
    only: str | None = None,
    compile_specs: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """Lower what another machine saved packed because it lacked something, such as a GPU; ``folder`` is changed.

    Args:
        folder: from :meth:`ExportedModel.save_pretrained`.
        progress: called with the name of each step as it begins.
        only: the target to finish; None for each that is not finished.
        compile_specs: see :func:`et_cuda_passes.executorch.lower.lower`.

    Returns:
        The files that were added; empty if nothing was left to do.

    Raises:
        ExportError: the folder is no export of this format or is damaged, or this machine lacks the same.
    """
    folder = Path(folder)
    components, metadata = read_export(folder)
    targets = {name for each in components.values() for name, build in each.builds.items() if build.missing}
    added: list[Path] = []
    for target in sorted(targets if only is None else targets & {only}):
        if lacking := missing_requirement(target):
            raise ExportError(f"lowering to {target} needs {lacking}: finish {folder} on a machine that has it")
        unfinished = {name: each for name, each in components.items() if target in each.builds}
        if any(each.builds[target].missing is None for each in unfinished.values()):
            raise ExportError(f"{folder} is finished for {target} in part, by a process that was killed: export again")
        programs = {}
        for each in metadata.values():
            for spec in (each.in_spec, each.out_spec):
                register_treespec_types(spec)
        for name, component in unfinished.items():
            progress(f"reading {name} for {target}")
            component.builds[target].check()
            programs[component.method] = load_model(component.builds[target].files[0], target).program
        if lacking := missing_requirement(target, gpu_of_methods(programs)):
            raise ExportError(f"lowering to {target} needs {lacking}: finish {folder} on a machine that has it")
        packed = [component.builds[target].files[0] for component in unfinished.values()]
        # These come first: until the components name them, nothing reads them.
        files = lower(
            programs, target, folder, f"model.{target}", partial(with_target, progress, target), compile_specs
        )
        build = Build(tuple(files))
        with atomic_output(folder) as staging:
            for name, component in unfinished.items():
                component.builds[target] = build
                component.write(staging / f"{name}{SUFFIX}")
        added += files
        for path in packed:
            path.unlink()
    report = folder / REPORT_FILE
    if added and report.is_file():
        # Another version may have exported the folder, and its page does not show everything that this one's does.
        with atomic_output(folder) as staging:
            page = page_of(json.loads(report.read_text(encoding="utf-8")), folder.resolve().name)
            (staging / PAGE_FILE).write_text(page, encoding="utf-8")
    return added


def read_export(folder: Path) -> tuple[dict[str, Component], dict[str, ExportMetadata]]:
    """The components of an export, and what transformers recorded about each.

    Raises:
        ExportError: the folder is no export of this format, or a file is missing or damaged.
    """
    try:
        manifest = json.loads((folder / EXPORT_MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["export_format"] != FORMAT:
            raise ExportError(f"{folder} is an export of the format {manifest['export_format']}, not {FORMAT}")
        entries = {name: folder / entry["file"] for name, entry in manifest["components"].items()}
        metadata = {name: ExportMetadata.from_dict(entry["metadata"]) for name, entry in manifest["components"].items()}
    except OSError as error:
        raise ExportError(f"{folder} is no export: {EXPORT_MANIFEST_FILE} cannot be read ({error.strerror})") from error
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ExportError(f"{folder / EXPORT_MANIFEST_FILE} is damaged: export the model again") from error
    components = {name: Component.load(path) for name, path in entries.items()}
    for name, component in components.items():
        component.check_interface(metadata[name])
    return components, metadata
