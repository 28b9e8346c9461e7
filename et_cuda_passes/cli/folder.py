"""Reads the folder of an export, and loads its components."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from et_cuda_passes.cli.console import RunError, UsageError, start_runtime
from et_cuda_passes.cli.inputs import read_inputs
from et_cuda_passes.executorch.packed import ModelError
from et_cuda_passes.hf.artifact import Component, ExportError
from et_cuda_passes.hf.checkpoint import check_extra

if TYPE_CHECKING:
    from et_cuda_passes.hf.runner import EtModelRunner
    from et_cuda_passes.hf.samples import Samples


@contextmanager
def errors_as(cls: type[Exception] = ModelError) -> Iterator[None]:
    """Turn an error of an export into one of the command line."""
    try:
        yield
    except ExportError as error:
        raise cls(str(error)) from error


@dataclass(frozen=True)
class Folder:
    """An export that is read, and of which nothing is executed yet.

    Attributes:
        path: the folder.
        components: by name.
        metadata: what transformers recorded about each.
        config: of the model; None if the folder has none.
        text: tokens of a text; empty if the folder has no tokenizer.
    """

    path: Path
    components: dict[str, Component]
    metadata: dict[str, Any]
    config: Any
    text: list[int]

    @staticmethod
    def read(path: Path, command: str) -> "Folder":
        """Read an export.

        Raises:
            ModelError: it is damaged, or of another format.
        """
        with errors_as():
            check_extra(command)
            from et_cuda_passes.hf.finish import read_export
            from et_cuda_passes.hf.generation import hide_warnings, load_config

            hide_warnings()
            components, metadata = read_export(path)
            return Folder(path, components, metadata, load_config(path), _text_tokens(path))

    def choose(self, name: str | None) -> list[str]:
        """The name of one component, or of all.

        Raises:
            UsageError: there is no such component.
        """
        if name is not None and name not in self.components:
            raise UsageError(f"--component {name}: {self.path} has {', '.join(self.components)}")
        return list(self.components) if name is None else [name]

    def targets(self, names: Iterable[str], target: str | None, trust: bool) -> dict[str, str]:
        """The targets of the components, and why each that is not executed is not; empty for those that are.

        Raises:
            UsageError: the components do not have the target, it does not run here, or it needs trust.
        """
        from et_cuda_passes.hf.runner import RUNNABLE, runs_here

        builds = {each: build for name in names for each, build in self.components[name].builds.items()}
        if target is not None and target not in builds:
            raise UsageError(f"--target {target}: {self.path} was exported for {', '.join(builds)}")
        found = {}
        for each, build in builds.items() if target is None else [(target, builds[target])]:
            if build.missing is not None:
                found[each] = f"it is packed, and not lowered yet: et-cuda-passes lower {self.path} --target {each}"
            elif each not in RUNNABLE:
                found[each] = f"programs for {each} do not run in Python"
            else:
                found[each] = "" if runs_here(each) else "this machine has no CUDA device"
        if target is not None and found[target]:
            raise RunError(f"{self.path} cannot be executed for {target}: {found[target]}")
        compiled = [each for each, reason in found.items() if not reason and each != "xnnpack"]
        if compiled and not trust:
            other = ", or --target xnnpack, which executes none" if "xnnpack" in builds else ""
            raise UsageError(
                f"{self.path} contains compiled libraries for {' and '.join(compiled)}, and running them executes code "
                f"of their author. Nothing was executed; give --trust if you trust the source of the folder{other}"
            )
        return found

    def samples(self, name: str) -> "Samples":
        """Draws inputs for a component."""
        from et_cuda_passes.hf.samples import Samples

        return Samples(self.components[name], self.metadata[name], self.config, self.text)

    def runner(self, name: str, target: str) -> "EtModelRunner":
        """Load a component. THIS EXECUTES CODE FROM THE FILES, except for xnnpack.

        Raises:
            RunError: it cannot be loaded.
        """
        from et_cuda_passes.hf.runner import EtModelRunner

        if target == "xnnpack":
            start_runtime()
        with errors_as(RunError):
            return EtModelRunner(self.components[name], self.metadata[name], target)

    def leaves(self, name: str, path: Path) -> list[Any]:
        """The inputs of a component from a file, which has only tensors, with its constants between them.

        Raises:
            UsageError: they are not as the export fixed them.
        """
        given, inputs = read_inputs(path), self.components[name].signature.inputs
        count = sum(each.dtype is not None for each in inputs)
        if len(given) != count:
            shown = ", ".join(f"{each.name} {each.dtype} {list(each.shape)}" for each in inputs if each.dtype)
            raise UsageError(f"--inputs has {len(given)} tensors, and {name} takes {count}: {shown}")
        tensors = iter(given)
        leaves = [each.constant if each.dtype is None else next(tensors) for each in inputs]
        with errors_as(UsageError):
            self.components[name].signature.check(leaves, name)
        return leaves


def _text_tokens(path: Path) -> list[int]:
    from et_cuda_passes.hf.generation import GenerationError, load_tokenizer
    from et_cuda_passes.hf.loading import TEXT

    try:
        return list(load_tokenizer(path)(TEXT)["input_ids"])
    except GenerationError:
        return []


def load_component(
    path: Path,
    name: str | None,
    target: str | None,
    inputs: Path | None,
    seed: int | None,
    trust: bool,
) -> tuple[str, "EtModelRunner", list[Any]]:
    """A component of an export, loaded for a target, and the leaves of its inputs.

    Random inputs have the largest sizes that the component takes.
    """
    folder = Folder.read(path, "run")
    names = folder.choose(name)
    if len(names) > 1:
        raise UsageError(f"{path} has the components {', '.join(names)}: choose one with --component")
    (chosen,) = names
    if inputs is not None:
        leaves = folder.leaves(chosen, inputs)
    else:
        samples = folder.samples(chosen)
        with errors_as(UsageError):
            leaves = samples.draw(samples.cases()[-1], torch.Generator().manual_seed(seed or 0))
    reasons = folder.targets(names, target, trust)
    usable = [each for each, reason in reasons.items() if not reason]
    if not usable:
        raise RunError(f"nothing in {path} runs here: " + "; ".join(f"{each}: {why}" for each, why in reasons.items()))
    runner = folder.runner(chosen, usable[0])
    return chosen, runner, on_device_of(runner, leaves)


def on_device_of(runner: "EtModelRunner", leaves: list[Any]) -> list[Any]:
    """Copies of the leaves on the device of the runner."""
    return [leaf.to(runner.device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
