"""``verify`` and ``run`` for the folder of an export."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from et_cuda_passes.cli.compare import Comparison, compare, default_tolerance
from et_cuda_passes.cli.console import RunError, Steps, UsageError, one_line
from et_cuda_passes.cli.inputs import read_inputs
from et_cuda_passes.executorch.packed import ModelError
from et_cuda_passes.hf.artifact import Component, ExportError
from et_cuda_passes.hf.checkpoint import Checkpoint, check_extra
from et_cuda_passes.hf.support import casts_to_bf16

if TYPE_CHECKING:
    from et_cuda_passes.hf.config import EtConfig
    from et_cuda_passes.hf.reference import Reference
    from et_cuda_passes.hf.runner import EtModelRunner
    from et_cuda_passes.hf.samples import Samples


@contextmanager
def _errors(cls: type[Exception] = ModelError) -> Iterator[None]:
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
        with _errors():
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

        with _errors(RunError):
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
        with _errors(UsageError):
            self.components[name].signature.check(leaves, name)
        return leaves


def _text_tokens(path: Path) -> list[int]:
    from et_cuda_passes.hf.generation import GenerationError, load_tokenizer
    from et_cuda_passes.hf.loading import TEXT

    try:
        return list(load_tokenizer(path)(TEXT)["input_ids"])
    except GenerationError:
        return []


# run ------------------------------------------------------------------------------------------------------------------


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
        with _errors(UsageError):
            leaves = samples.draw(samples.cases()[-1], torch.Generator().manual_seed(seed or 0))
    reasons = folder.targets(names, target, trust)
    usable = [each for each, reason in reasons.items() if not reason]
    if not usable:
        raise RunError(f"nothing in {path} runs here: " + "; ".join(f"{each}: {why}" for each, why in reasons.items()))
    runner = folder.runner(chosen, usable[0])
    return chosen, runner, _on(runner, leaves)


def _on(runner: "EtModelRunner", leaves: list[Any]) -> list[Any]:
    """Copies of the leaves on the device of the runner."""
    return [leaf.to(runner.device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


# verify ---------------------------------------------------------------------------------------------------------------


_FACTOR = 4
"""How much larger the error of a program may be than that of the model in eager, one sample of its rounding."""
_SHOWN = 5
"""How many wrong outputs of a call are printed."""
_CAST = 2.0**-4
"""The tolerance for a model in float32 whose quantized layers are computed in bfloat16: 2 to 4 % in 30 layers."""
_BETWEEN_TARGETS = 2.0**-2
"""The tolerance between two targets that round: how much the model itself rounds is unknown then."""


@dataclass(frozen=True)
class Wanted:
    """The right result of a call.

    Attributes:
        source: a name for it.
        values: the leaves of the outputs, and of the inputs after the call; of a model in float32.
        model: those of the model in the dtype of the export, with the activations that the export quantizes; None if
            there is only a program of another target.
    """

    source: str
    values: list[Any]
    model: list[Any] | None = None

    def rounded(self, place: int) -> Any:
        """A value in the dtype that a program returns."""
        value = self.values[place]
        if self.model is not None and isinstance(value, Tensor) and isinstance(self.model[place], Tensor):
            return value.to(self.model[place].dtype)
        return value

    def rounding(self, place: int) -> float:
        """The relative error of the model itself, by the dtype of the export and its quantized activations."""
        return 0.0 if self.model is None else compare("", self.model[place], self.rounded(place), None, False).relative


@dataclass(frozen=True)
class Verification:
    """The options of ``verify`` for an export.

    Attributes:
        folder: the export.
        component: the only component; None for all.
        target: the only target; None for all that run here.
        checkpoint: the model that was exported; None to compare the targets with each other.
        tolerance: of the relative error; None for the default of the dtype.
        inputs: a file with the inputs of the component; None for random ones.
        seed: of the random inputs.
        trust: whether compiled libraries may be executed.
    """

    folder: Folder
    component: str | None
    target: str | None
    checkpoint: Checkpoint | None
    tolerance: float | None
    inputs: Path | None
    seed: int
    trust: bool

    def run(self) -> None:
        """Compare, and print every result and a verdict.

        Raises:
            RunError: a file is damaged, a program does not run, or its numbers are wrong.
        """
        folder = self.folder
        names = folder.choose(self.component)
        if self.inputs is not None and len(names) > 1:
            raise UsageError(f"--inputs has the inputs of one component: give --component, of {', '.join(names)}")
        with Steps() as step:
            step("checking the files")
            typer.echo(self._checked_files())
        reasons = folder.targets(names, self.target, self.trust)
        for target, reason in reasons.items():
            if reason:
                typer.echo(f"{target}: not executed: {reason}")
        targets = [target for target, reason in reasons.items() if not reason]
        compared: list[Comparison] = []
        with Steps() as step:
            reference = self._reference(step) if targets else None
            for name in names:
                compared += self._compare(name, targets, reference, step)
        typer.echo(self._verdict(names, targets, compared))

    def _checked_files(self) -> str:
        builds = [build for each in self.folder.components.values() for build in each.builds.values()]
        checked: set[Path] = set()
        with _errors(RunError):
            for build in builds:
                if not checked.issuperset(build.files):
                    build.check()
                    checked.update(build.files)
        count = f"{len(checked)} file{'s' if len(checked) > 1 else ''} of {len(self.folder.components)} components"
        if any(build.recorded is None for build in builds):
            return f"files: {count} have the recorded sizes; this export has no checksums"
        return f"files: {count} are those that the export wrote, by size and SHA-256"

    def _reference(self, step: Steps) -> "Reference | None":
        if self.checkpoint is None:
            return None
        from et_cuda_passes.hf.loading import quiet
        from et_cuda_passes.hf.reference import Reference

        report = self.folder.path / "report.json"
        try:
            source = json.loads(report.read_text(encoding="utf-8")).get("model", {})
        except (OSError, ValueError) as error:
            raise ModelError(f"{report} cannot be read, and it says how the model was loaded: {error}") from error
        with _errors(), quiet():
            return Reference(self.folder.path, self.checkpoint, self.folder.metadata, source, step)

    def _compare(self, name: str, targets: list[str], reference: "Reference | None", step: Steps) -> list[Comparison]:
        folder, component = self.folder, self.folder.components[name]
        runners = {}
        for target in targets:
            if target in component.builds:
                step(f"loading {name} for {target}")
                runners[target] = folder.runner(name, target)
        found: list[Comparison] = []
        with _errors(UsageError):
            calls = self._calls(name, runners, step)
        for label, leaves in calls:
            step(f"running {name}: {label}")
            wanted = None
            if reference is not None:
                with _errors(UsageError):
                    exact = reference.run(component, leaves, precise=True)
                    wanted = Wanted(str(self.checkpoint), exact, reference.run(component, leaves))
                _check_nonzero(exact[: len(exact) - len(leaves)], f"{name} of {self.checkpoint} with {label}")
            for target, runner in runners.items():
                given = _on(runner, leaves)
                try:
                    got = [*tree_leaves(runner.run(given)), *given]
                except Exception as error:  # runtimes raise many kinds
                    raise RunError(f"{name} for {target} does not run with {label}: {one_line(error)}") from error
                if wanted is None:
                    _check_finite(got, f"{name} for {target} with {label}")
                    _check_nonzero(got[: len(got) - len(leaves)], f"{name} for {target} with {label}")
                    wanted = Wanted(target, got)
                    continue
                results = self._outputs(runner, leaves, got, wanted)
                found += results
                typer.echo(f"{name} for {target}, {label}: {_summary(results)}")
                wrong = [each for each in results if not each.holds]
                for each in wrong[:_SHOWN]:
                    typer.echo(f"  {each}")
                if len(wrong) > _SHOWN:
                    typer.echo(f"  and {len(wrong) - _SHOWN} more")
        return found

    def _calls(self, name: str, runners: "dict[str, EtModelRunner]", step: Steps) -> list[tuple[str, list[Any]]]:
        """The inputs of each call, and a name for it."""
        folder = self.folder
        if self.inputs is not None:
            return [("the inputs of --inputs", folder.leaves(name, self.inputs))]
        generator = torch.Generator().manual_seed(self.seed)
        samples, found = folder.samples(name), []
        for case in samples.cases():
            leaves = samples.draw(case, generator)
            if case.past is not None and "prefill" in folder.components and name != "prefill" and runners:
                # A random cache is unlike any that the model fills, and its attention depends on every rounding.
                before = folder.samples("prefill")
                filling = before.length_case(case.past)
                if filling is not None:
                    step(f"filling the cache with {case.past} tokens")
                    runner = folder.runner("prefill", next(iter(runners)))
                    leaves = samples.with_cache(leaves, runner.run(_on(runner, before.draw(filling, generator))))
                    leaves = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            found.append((str(case), leaves))
        return found

    def _outputs(
        self, runner: "EtModelRunner", leaves: list[Any], got: list[Any], wanted: "Wanted"
    ) -> list[Comparison]:
        """The outputs compared, and the inputs that either side mutated.

        Args:
            runner: its component was called.
            leaves: the inputs before the call.
            got: its outputs, and its inputs after the call.
            wanted: likewise, of the other side.
        """
        inputs = [f"input {each.name}" for each in runner.component.signature.inputs]
        names = [*_output_names(runner.out_spec), *inputs]
        if not len(names) == len(got) == len(wanted.values):
            raise RunError(
                f"{runner.component.name} has {len(got) - len(inputs)} outputs, and {wanted.source} has "
                f"{len(wanted.values) - len(inputs)}"
            )
        before = [None] * (len(names) - len(inputs)) + leaves
        config = _config_of(runner)
        quantized = config.quantizes_activations
        # Without a model, the other target may be the one that casts.
        cast = config.cast_to_bf16 and (wanted.model is None or casts_to_bf16(runner.target))
        return [
            compare(each, got[place], wanted.rounded(place), self._tolerance(wanted, place, quantized, cast), quantized)
            for place, each in enumerate(names)
            if not each.startswith("input ")
            or not (_same(before[place], got[place]) and _same(before[place], wanted.rounded(place)))
        ]

    def _tolerance(self, wanted: "Wanted", place: int, quantized: bool, cast: bool) -> float | None:
        value = wanted.values[place]
        if self.tolerance is not None or not isinstance(value, Tensor) or not value.is_floating_point():
            return self.tolerance
        if wanted.model is not None:
            least = max(default_tolerance(wanted.model[place].dtype, quantized), _CAST if cast else 0.0)
            return max(least, _FACTOR * wanted.rounding(place))
        rounded = quantized or cast or value.dtype.itemsize <= 2
        return _BETWEEN_TARGETS if rounded else default_tolerance(value.dtype)

    def _verdict(self, names: list[str], targets: list[str], compared: list[Comparison]) -> str:
        path = self.folder.path
        if not targets:
            return f"verdict: the files of {path} are whole; none of its targets runs here, so nothing was executed"
        if not compared:
            hint = "" if self.checkpoint else "; give --model with the model that was exported"
            return (
                f"verdict: {path} is whole and runs for {targets[0]}; its numbers were compared with nothing, "
                f"because no other target runs here{hint}"
            )
        worst = max(compared, key=lambda each: each.relative / (each.tolerance or 1))
        summary = f"largest relative error {worst.relative:.2e} ({worst.what})"
        if wrong := sum(not each.holds for each in compared):
            raise RunError(f"{path}: {wrong} of {len(compared)} outputs are wrong, {summary}")
        what = f"{', '.join(names)} of {path}"
        if self.checkpoint is not None:
            return f"verdict: {what} for {', '.join(targets)} agrees with {self.checkpoint} in eager; {summary}"
        return (
            f"verdict: {what} agrees between {' and '.join(targets)}; {summary}. Nothing was compared with the model: "
            "give --model for that"
        )


def _summary(results: list[Comparison]) -> str:
    worst = max(results, key=lambda each: each.relative / (each.tolerance or 1))
    wrong = sum(not each.holds for each in results)
    verdict = f"{wrong} of {len(results)} outputs are WRONG" if wrong else "ok"
    return f"relative error up to {worst.relative:.2e}, tolerance {worst.tolerance:.2e}: {verdict}"


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first.cpu(), second.cpu())
    return type(first) is type(second) and bool(first == second)


def _check_finite(values: list[Any], where: str) -> None:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not value.isfinite().any():
            raise RunError(f"{where}: none of the {value.numel()} elements of an output is finite")


def _check_nonzero(outputs: list[Any], where: str) -> None:
    floats = [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point() and value.numel()]
    if floats and not any(bool(value.any()) for value in floats):
        raise RunError(
            f"{where}: all outputs are 0, as those of a model with other weights could be, so a comparison says "
            "nothing: give other inputs with --inputs"
        )


def _output_names(spec: Any) -> list[str]:
    """A name for each leaf of the outputs."""
    if spec.is_leaf():
        return ["0"]
    children = spec.children()
    keys = spec.context if isinstance(spec.context, list) and len(spec.context) == len(children) else range(10**6)
    return [
        str(key) if child.is_leaf() else f"{key}.{index}"
        for key, child in zip(keys, children, strict=False)
        for index in range(child.num_leaves)
    ]


def _config_of(runner: "EtModelRunner") -> "EtConfig":
    from et_cuda_passes.hf.config import EtConfig

    return EtConfig(**runner.metadata.export_config)
