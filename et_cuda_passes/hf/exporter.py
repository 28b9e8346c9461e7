"""``EtExporter``: exports a model of transformers for several targets, from one quantization and one export.

transformers traces the model and splits it into the components that generation needs. Here it is quantized before, and
rewritten and lowered per target afterwards.
"""

import gc
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from transformers import GenerationConfig, PreTrainedModel
from transformers.exporters import ExportedModel as _ExportedModel
from transformers.exporters import register_backend
from transformers.exporters.base import EXPORT_MANIFEST_FILE, EXPORT_SCHEMA_VERSION, ExportedComponent
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.metadata import ExportMetadata
from transformers.utils.hub import cached_file, cached_files

from et_cuda_passes.executorch.lower import (
    Progress,
    gpu_of_methods,
    lower,
    lowering_steps,
    missing_requirement,
    move_files,
    staging_folder,
    uninterrupted,
)
from et_cuda_passes.executorch.packed import save_packed
from et_cuda_passes.graph.report import Report
from et_cuda_passes.hf.artifact import (
    SUFFIX,
    Build,
    Component,
    ExportError,
    Signature,
    files_of_export,
    interface_of,
    refuse_existing,
)
from et_cuda_passes.hf.components import (
    Inputs,
    check_rope,
    choose_experts,
    contiguous,
    dynamic_lengths,
    fqn_in,
    longest_text,
    split_model,
    stop_dynamic_rope,
    structural_copy,
    tensor_first,
    text_length_of,
    with_fqns_of_root,
)
from et_cuda_passes.hf.config import FORMAT, EtConfig, config_of
from et_cuda_passes.hf.finish import PAGE_FILE, REPORT_FILE, page_of, with_target
from et_cuda_passes.hf.options import QuantizationOptions, dtype_problem, expected_counts, passes_for
from et_cuda_passes.hf.runner import EtModelRunner
from et_cuda_passes.hf.schemes import quantize_model_
from et_cuda_passes.rewrite import constant_pool, rewrite
from et_cuda_passes.rules.attention import SDPA
from et_cuda_passes.shortage import find_shortage
from et_cuda_passes.unfinished import TemporaryFolder

# torchao's message for an operator that its tensors do not implement.
_UNIMPLEMENTED = re.compile(
    r"dispatch: attempting to run unimplemented operator/function: func=<OpOverload\(op='([\w.]+)'"
)
_PACKAGES = ("torch", "torchao", "executorch")


class ExportedModel(_ExportedModel):  # type: ignore[misc]  # transformers is not followed
    """transformers' ``ExportedModel``, whose ``save_pretrained`` writes everything or nothing, and a report.

    Attributes:
        report: the outcome of every quantized weight by target and component, the quantization, the versions of the
            packages, and the command line.
    """

    def __init__(self, *args: Any, report: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.report: Mapping[str, Any] = report or {}

    def save_pretrained(
        self,
        save_directory: str | Path,
        push_to_hub: bool = False,
        *,
        overwrite: bool = False,
        processor: Any = None,
    ) -> None:
        """Write the export to a folder, from which :meth:`from_pretrained` loads it.

        Args:
            save_directory: the folder; created where it does not exist.
            push_to_hub: must be False: upload the folder with ``huggingface_hub`` afterwards.
            overwrite: replace an export that the folder holds.
            processor: the tokenizer or processor, to be saved beside the programs.

        Raises:
            FileExistsError: the folder has a file of a name that would be written, and ``overwrite`` is False.
            ExportError: ``push_to_hub`` is True.
        """
        if push_to_hub:
            raise ExportError("save the export first, then upload the folder: huggingface_hub.upload_folder")
        folder = Path(save_directory)
        if not overwrite:
            refuse_existing(folder, [EXPORT_MANIFEST_FILE])
        entries = {}
        with staging_folder(folder) as staging:
            for name, component in self.components.items():
                file = f"{name}{SUFFIX}"
                component.program.save(staging / file)
                entries[name] = {"file": file, "metadata": asdict(component.metadata)}
            for part in (self.config, self.generation_config, processor):
                if part is not None:
                    part.save_pretrained(staging)
            if page := page_of(self.report, folder.resolve().name):
                (staging / PAGE_FILE).write_text(page, encoding="utf-8")
            manifest = {
                "schema_version": EXPORT_SCHEMA_VERSION,
                "export_format": str(self.export_format),
                "components": entries,
                # A later export into this folder removes them: a tokenizer that stayed would be read as its own.
                "files": sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()),
            }
            for file, data in ((EXPORT_MANIFEST_FILE, manifest), (REPORT_FILE, self.report)):
                (staging / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            new = {path.relative_to(staging) for path in staging.rglob("*")}
            with uninterrupted(folder):
                if not overwrite:
                    refuse_existing(folder, [EXPORT_MANIFEST_FILE, *(path.name for path in staging.iterdir())])
                # Everything is written by now. A folder without a manifest is no export, should the machine stop here.
                for stale in files_of_export(folder):
                    if stale.relative_to(folder) not in new or stale.name == EXPORT_MANIFEST_FILE:
                        stale.unlink()
                move_files(staging, folder, last=EXPORT_MANIFEST_FILE)

    def discard(self) -> None:
        """Remove the files of an export that are not saved yet. They otherwise go when nothing refers to it."""
        for component in self.components.values():
            if (folder := component.program.folder) is not None:
                folder.remove()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "ExportedModel":
        """As transformers' method. ``target="xnnpack"`` chooses among the targets of the export.

        From the Hub it also downloads the files that the components share, which transformers' own method does not
        know.

        Raises:
            ExportError: a file is missing or damaged, or nothing in the export runs here.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _download(str(pretrained_model_name_or_path), kwargs)
        model: ExportedModel = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        report = folder / REPORT_FILE
        if report.is_file():
            try:
                model.report = json.loads(report.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ExportError(f"{report} is damaged: delete it, or export the model again") from error
        return model


_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _download(name: str, options: dict[str, Any]) -> Path:
    """Download an export from the Hub, and return its folder in the cache.

    Args:
        name: of the repository.
        options: of ``from_pretrained``. ``force_download`` is removed, so that nothing is downloaded twice.
    """
    chosen = {key: options[key] for key in _DOWNLOAD_OPTIONS if key in options}
    manifest = Path(cached_file(name, EXPORT_MANIFEST_FILE, **chosen))
    try:
        files = [
            str(entry["file"]) for entry in json.loads(manifest.read_text(encoding="utf-8"))["components"].values()
        ]
        cached_files(name, files, **chosen)
        shared = {
            str(file)
            for path in files
            for build in json.loads((manifest.parent / path).read_text(encoding="utf-8"))["targets"].values()
            for file in build["files"]
        }
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ExportError(f"the export {name} on the Hub is damaged, or of another format: export it again") from error
    cached_files(name, sorted(shared), **chosen)
    cached_files(name, [REPORT_FILE], _raise_exceptions_for_missing_entries=False, **chosen)
    options.pop("force_download", None)
    return manifest.parent


@dataclass(frozen=True)
class Traced:
    """The generic programs of a model's components: quantized, not rewritten for any target.

    Attributes:
        programs: by component; constants have the names that they have in the whole model.
        metadata: what transformers recorded, by component.
        quantization: the report of each quantization.
    """

    programs: dict[str, ExportedProgram]
    metadata: dict[str, ExportMetadata]
    quantization: list[dict[str, Any]]


class EtExporter(DynamoExporter):  # type: ignore[misc]  # transformers is not followed
    """Exports a model of transformers for the targets of its config.

        exporter = EtExporter()
        exported = exporter.export(model, inputs, EtConfig(target="cpu", qlinear="4w"))
        exported = exporter.export_for_generation(model, inputs, EtConfig(target="cuda,xnnpack", qlinear="4w"))

    The model is not changed: what is quantized is a copy that shares the other weights. A model that torchao has
    quantized before is exported as it is.

    Args:
        progress: called with the name of each step as it begins.
        planned: called with the number of the steps that follow, as soon as it is known.
        part: called during a rewrite with the number of weights that have an outcome, and of all.
        failed: called with the name of a target and the error of its rewrite or lowering; the export then goes on with
            the other targets, and has nothing for this one. Without it, the first error ends the export. An error
            ends it in any case if it leaves a component without a target, or if a disk is full or read-only.
    """

    export_format = FORMAT
    config_class = EtConfig
    program_suffix = SUFFIX

    required_packages: ClassVar[list[str]] = list(_PACKAGES)
    tested_versions: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        progress: Progress = lambda step: None,
        planned: Callable[[int], None] = lambda count: None,
        part: Callable[[int, int], None] | None = None,
        failed: Callable[[str, Exception], None] | None = None,
    ) -> None:
        super().__init__()
        self._progress, self._planned, self._part, self._failed = progress, planned, part, failed

    def export_program(
        self, model: PreTrainedModel, sample_inputs: Inputs, config: EtConfig
    ) -> tuple[Component, ExportMetadata]:
        """Export one graph.

        Args:
            model: not changed.
            sample_inputs: the kwargs of its forward. As in transformers' exporters, inputs that the model would compute
                from others are added to it.
            config: the targets and the quantization.

        Raises:
            ExportError: the model and a target do not go together.
        """
        component = self.export(model, sample_inputs, config).components["model"]
        return component.program, component.metadata

    def export(self, model: PreTrainedModel, sample_inputs: Inputs, config: EtConfig | dict[str, Any]) -> ExportedModel:
        """Export the model as one graph, the component "model"; see :meth:`export_program`."""
        return self._export(
            {"model": (model, sample_inputs)}, {"model": config_of(config)}, model, text_length_of(sample_inputs)
        )

    def export_for_generation(
        self,
        model: PreTrainedModel,
        sample_inputs: Inputs,
        config: EtConfig | dict[str, Any],
        *,
        generation_config: GenerationConfig | None = None,
        multi_token_decode: bool = False,
    ) -> ExportedModel:
        """Split a generative model into components and export each; they share the files of each target.

        Args:
            model: not changed.
            sample_inputs: the kwargs of ``model.generate``.
            config: one for all components, or one by component.
            generation_config: as in transformers; ``cache_implementation="static"`` with ``max_cache_len`` gives a
                cache of a fixed size, which the components update in place.
            multi_token_decode: as in transformers.

        Raises:
            ExportError: the model and a target do not go together.
            ValueError: a component has no config.
            RuntimeError: transformers cannot split or trace the model.
        """
        self._progress("splitting the model into components")
        shared = structural_copy(model)
        parts = split_model(shared, sample_inputs, generation_config, multi_token_decode)
        if not isinstance(config, dict) or "target" in config:
            configs = dict.fromkeys(parts, config_of(config))
        else:
            configs = {name: config_of(each) for name, each in config.items()}
        if unconfigured := [name for name in parts if name not in configs]:
            raise ExportError(
                f"the config has no entry for {', '.join(unconfigured)}; the components are {', '.join(parts)}"
            )
        exported = self._export(parts, configs, shared, text_length_of(sample_inputs))
        exported.generation_config = generation_config or getattr(model, "generation_config", None)
        return exported

    def trace(
        self,
        parts: Mapping[str, tuple[nn.Module, Inputs]],
        configs: Mapping[str, EtConfig],
        root: nn.Module,
        text_length: int | None = None,
    ) -> "Traced":
        """Quantize ``root`` once for each quantization in ``configs``, and trace its parts; nothing is lowered.

        Args:
            parts: modules of ``root`` with the kwargs of their forward, by component.
            configs: by component.
            root: the whole model; not changed.
            text_length: the length of the text in the kwargs, for a config with ``max_length``.

        Raises:
            ExportError: the model and a target do not go together.
            ExportError: the model reads a quantized weight in a way that torchao cannot trace.
            RuntimeError: transformers cannot trace a part.
        """
        for name, (module, inputs) in parts.items():
            _check_dtypes(module, configs[name], name)
            check_rope(module, longest_text(configs[name], inputs, text_length), name)
        copies = QuantizedModel(root, self._progress)
        programs: dict[str, ExportedProgram] = {}
        metadata: dict[str, ExportMetadata] = {}
        for name, (module, inputs) in parts.items():
            fqn = fqn_in(root, module)
            quantized = copies.get(configs[name], module, fqn)
            self._progress(f"exporting {name}")
            try:
                config = replace(configs[name], **dynamic_lengths(configs[name], quantized, inputs, text_length))
                with torch.no_grad():
                    program, metadata[name] = super().export_program(
                        quantized, tensor_first(contiguous(inputs)), config
                    )
            except Exception as error:
                if operator := _UNIMPLEMENTED.search(str(error)):
                    raise ExportError(
                        f"{name}: {_line_of_model(error)} reads a quantized weight with {operator[1]}, which torchao "
                        "does not implement for quantized weights: leave that layer as it is (skip it in a recipe)"
                    ) from error
                raise RuntimeError(
                    f"transformers cannot export {name} ({type(module).__name__}): {type(error).__name__}: {error}"
                ) from error
            # The export contains the recipe, and not the name of a file elsewhere.
            recorded = replace(configs[name], recipe=configs[name].options.to_dict()["recipe"])
            metadata[name].export_config = json.loads(recorded.to_json_string())
            metadata[name].packages["et_cuda_passes"] = version("et-cuda-passes")
            programs[name] = with_fqns_of_root(program, fqn, name if len(parts) > 1 else "")
        return Traced(programs, metadata, copies.reports())

    def _export(
        self,
        parts: Mapping[str, tuple[nn.Module, Inputs]],
        configs: Mapping[str, EtConfig],
        root: nn.Module,
        text_length: int | None,
    ) -> ExportedModel:
        """Quantize ``root``, trace its parts, and lower them together."""
        self._planned(_steps(parts, configs))
        traced = self.trace(parts, configs, root, text_length)
        components = self._lower(traced.programs, configs)
        for name, component in components.items():
            component.interface = interface_of(traced.metadata[name])
        return ExportedModel(
            {name: ExportedComponent(each, traced.metadata[name]) for name, each in components.items()},
            self.export_format,
            config=getattr(root, "config", None),
            report={
                "targets": _reports_by_target(components),
                "quantization": traced.quantization,
                "command": sys.argv,
                "packages": {name: each.packages for name, each in traced.metadata.items()},
            },
        )

    def _lower(self, programs: Mapping[str, ExportedProgram], configs: Mapping[str, EtConfig]) -> dict[str, Component]:
        """Rewrite each program for its targets, and lower those of one target together."""
        folder = TemporaryFolder()
        try:
            return self._lower_into(folder, programs, configs)
        except BaseException:
            # The traceback keeps the folder alive, and the disk may be full.
            folder.remove()
            raise

    def _lower_into(
        self, folder: TemporaryFolder, programs: Mapping[str, ExportedProgram], configs: Mapping[str, EtConfig]
    ) -> dict[str, Component]:
        alone = len(programs) == 1
        components = {
            name: Component(name, "forward" if alone else name, Signature.of(program), {}, folder=folder)
            for name, program in programs.items()
        }
        open_targets = {name: set(configs[name].targets) for name in programs}
        for target in dict.fromkeys(target for name in programs for target in configs[name].targets):
            chosen = {name: program for name, program in programs.items() if target in configs[name].targets}
            try:
                builds, reports = self._rewrite_and_build(chosen, configs, target, folder.path, alone)
            except Exception as error:
                for name in chosen:
                    open_targets[name].discard(target)
                shortage = find_shortage(error)
                # The targets share a disk. The memory that one lacks may be enough for another.
                disk_is_short = shortage is not None and shortage.kind != "memory"
                if self._failed is None or disk_is_short or not all(open_targets.values()):
                    raise
                self._failed(target, error)
            else:
                for name in chosen:
                    components[name].builds[target] = builds[name]
                    components[name].report[target] = reports[name].to_dict()
                continue
            # The traceback is in cycles with the programs of the failed target. The next target needs their memory.
            gc.collect()
        return components

    def _rewrite_and_build(
        self,
        programs: Mapping[str, ExportedProgram],
        configs: Mapping[str, EtConfig],
        target: str,
        folder: Path,
        alone: bool,
    ) -> tuple[dict[str, Build], dict[str, Report]]:
        """Rewrite the programs for one target, and lower them."""
        # One for the target: components pack a weight that they share once, under one name.
        config = next(configs[name] for name in programs)
        pool = constant_pool(config.stream, config.cache)
        rewritten: dict[str, ExportedProgram] = {}
        reports: dict[str, Report] = {}
        for name, program in programs.items():
            self._progress(f"rewriting {name} for {target}")
            options = configs[name].options
            passes = passes_for(options, target, encoder=name.endswith("_encoder"))
            rewritten[name], reports[name] = rewrite(
                program,
                target,
                passes,
                expected_counts(options, target),
                pool=pool,
                gpu=configs[name].gpu if target == "cuda" else None,
                progress=self._part,
            )
            if target == "cuda":
                _check_attention(name, rewritten[name])
        return self._build(rewritten, reports, config, target, folder, alone), reports

    def _build(
        self,
        programs: Mapping[str, ExportedProgram],
        reports: Mapping[str, Report],
        config: EtConfig,
        target: str,
        folder: Path,
        alone: bool,
    ) -> dict[str, Build]:
        """Lower the programs of one target; or save them packed where this machine lacks something for it."""
        if lacking := missing_requirement(target, gpu_of_methods(programs)):
            builds = {}
            for name, program in programs.items():
                self._progress(f"saving {name} packed for {target}")
                path = folder / f"{name}.{target}.packed.pt2"
                save_packed(program, reports[name], path)
                builds[name] = Build((path,), lacking)
            return builds
        methods = {"forward": programs["model"]} if alone and "model" in programs else programs
        specs = (config.compile_specs or {}) if target == "cuda" else {}
        progress = partial(with_target, self._progress, target)
        files = lower(methods, target, folder, f"model.{target}", progress, specs)
        return dict.fromkeys(programs, Build(tuple(files)))

    @classmethod
    def save_program(cls, program: Component, path: str | Path) -> None:
        """Write one component, and the files that it shares with others."""
        program.save(Path(path))

    @classmethod
    def load_program(cls, path: str | Path) -> Component:
        """Read what :meth:`save_program` wrote; no code is executed yet."""
        return Component.load(Path(path))


def _line_of_model(error: BaseException) -> str:
    """``file:line`` of the last frame that is in the code of a model."""
    frames = traceback.extract_tb(error.__traceback__)
    found = [frame for frame in frames if Path(frame.filename).name.startswith("modeling_")] or frames
    return f"{Path(found[-1].filename).name}:{found[-1].lineno}"


def _reports_by_target(components: Mapping[str, Component]) -> dict[str, dict[str, Any]]:
    """The reports of the rewrites by target and component."""
    reports: dict[str, dict[str, Any]] = {}
    for name, component in components.items():
        for target, report in component.report.items():
            reports.setdefault(target, {})[name] = report
    return reports


class QuantizedModel:
    """The root model, quantized once for each quantization that a config asks for."""

    def __init__(self, root: nn.Module, progress: Progress) -> None:
        self._root, self._progress = root, progress
        self._copies: list[tuple[EtConfig, nn.Module, Any]] = []

    def get(self, config: EtConfig, module: nn.Module, fqn: str | None) -> nn.Module:
        """``module`` of the root, quantized and ready for the targets of ``config``."""
        return self._copy_of(config).get_submodule(fqn) if fqn is not None else self._prepared(module, config)[0]

    def reports(self) -> list[dict[str, Any]]:
        """The reports of the quantizations."""
        return [report.to_dict() for _, _, report in self._copies if report is not None]

    def _copy_of(self, config: EtConfig) -> nn.Module:
        for known, model, _ in self._copies:
            if known.options == config.options:
                return model
        model, report = self._prepared(self._root, config)
        self._copies.append((config, model, report))
        return model

    def _prepared(self, module: nn.Module, config: EtConfig) -> tuple[nn.Module, Any]:
        model = structural_copy(module)
        model.eval()
        stop_dynamic_rope(model)
        choose_experts(model, config.targets)
        report = None
        if config.quantizes:
            self._progress("quantizing")
            report = quantize_model_(
                model, **{each.name: getattr(config, each.name) for each in fields(QuantizationOptions)}
            )
        return model, report


def _steps(parts: Mapping[str, Any], configs: Mapping[str, EtConfig]) -> int:
    """How many steps an export reports after the model is split."""
    options = [configs[name].options for name in parts if configs[name].quantizes]
    count = len(parts) + len([each for index, each in enumerate(options) if each not in options[:index]])
    for target in dict.fromkeys(target for name in parts for target in configs[name].targets):
        methods = sum(target in configs[name].targets for name in parts)
        gpu = next((configs[name].gpu for name in parts if configs[name].gpu), None)
        count += methods + (methods if missing_requirement(target, gpu) else lowering_steps(target, methods))
    return count


def _check_dtypes(module: nn.Module, config: EtConfig, name: str) -> None:
    """Refuse before any work what a backend refuses at the end of a lowering."""
    for dtype in dict.fromkeys(each.dtype for each in module.parameters() if each.is_floating_point()):
        if problem := dtype_problem(dtype, config.targets, config.cast_to_bf16):
            raise ExportError(f"{name} is in {str(dtype).removeprefix('torch.')}, and {problem}")


def _check_attention(name: str, program: ExportedProgram) -> None:
    """Refuse before the lowering an attention for which ExecuTorch's CUDA backend (executorch 1.5.1) has no kernel."""
    graphs = (module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule))
    nodes = (node for graph in graphs for node in graph.find_nodes(op="call_function", target=SDPA))
    if node := next((node for node in nodes if node.args[0].meta["val"].dtype is not torch.bfloat16), None):
        dtype = str(node.args[0].meta["val"].dtype).removeprefix("torch.")
        raise ExportError(
            f"{name}: the attention {node.name} is in {dtype}, and ExecuTorch's kernel for cuda computes in bfloat16: "
            "load the model with dtype=torch.bfloat16, or give cast_to_bf16=True"
        )


register_backend(EtExporter, EtModelRunner)
