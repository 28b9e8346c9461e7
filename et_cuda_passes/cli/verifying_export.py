"""``verify`` for the folder of an export: judges its files and the outputs of its components."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from et_cuda_passes.cli.compare import Comparison, compare, default_tolerance
from et_cuda_passes.cli.console import RunError, Steps, UsageError, one_line, print_json
from et_cuda_passes.cli.documents import Compared, Verify
from et_cuda_passes.cli.folder import Folder, errors_as, on_device_of
from et_cuda_passes.executorch.packed import ModelError
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.hf.support import casts_to_bf16

if TYPE_CHECKING:
    from et_cuda_passes.hf.config import EtConfig
    from et_cuda_passes.hf.reference import Reference
    from et_cuda_passes.hf.runner import EtModelRunner

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
        as_json: print one JSON document instead of text.
    """

    folder: Folder
    component: str | None
    target: str | None
    checkpoint: Checkpoint | None
    tolerance: float | None
    inputs: Path | None
    seed: int
    trust: bool
    as_json: bool = False

    def run(self) -> None:
        """Compare, and print every result and a verdict.

        Raises:
            RunError: a file is damaged, a program does not run, or its numbers are wrong.
        """
        folder = self.folder
        names = folder.choose(self.component)
        if self.inputs is not None and len(names) > 1:
            raise UsageError(f"--inputs has the inputs of one component: give --component, of {', '.join(names)}")
        steps = Steps()
        with steps as step:
            step("checking the files")
            self._print(self._checked_files())
        reasons = folder.targets(names, self.target, self.trust)
        for target, reason in reasons.items():
            if reason:
                self._print(f"{target}: not executed: {reason}")
        targets = [target for target, reason in reasons.items() if not reason]
        compared: list[Comparison] = []
        entries: list[Compared] = []
        with steps as step:
            reference = self._reference(step) if targets else None
            step.expect(sum(self._steps(name, targets) for name in names))
            for name in names:
                for target, label, results in self._compare(name, targets, reference, step):
                    compared += results
                    entries += [each.entry(target, name, label) for each in results]
        verdict, holds = self._verdict(names, targets, compared)
        if self.as_json:
            not_executed = {target: reason for target, reason in reasons.items() if reason}
            print_json(Verify(str(folder.path), holds, verdict, entries, not_executed))
        if holds is False:
            raise RunError(verdict)
        self._print(f"verdict: {verdict}")

    def _print(self, text: str) -> None:
        if not self.as_json:
            typer.echo(text)

    def _checked_files(self) -> str:
        builds = [build for each in self.folder.components.values() for build in each.builds.values()]
        checked: set[Path] = set()
        with errors_as(RunError):
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
        with errors_as(), quiet():
            return Reference(self.folder.path, self.checkpoint, self.folder.metadata, source, step)

    def _compare(
        self, name: str, targets: list[str], reference: "Reference | None", step: Steps
    ) -> Iterator[tuple[str, str, list[Comparison]]]:
        """The results of each call for each target that is compared, with the target and a name for the call."""
        folder, component = self.folder, self.folder.components[name]
        runners = {}
        for target in targets:
            if target in component.builds:
                step(f"loading {name} for {target}")
                runners[target] = folder.runner(name, target)
        with errors_as(UsageError):
            calls = self._calls(name, runners, step)
        for label, leaves in calls:
            step(f"running {name}: {label}")
            wanted = None
            if reference is not None:
                with errors_as(UsageError):
                    exact = reference.run(component, leaves, precise=True)
                    wanted = Wanted(str(self.checkpoint), exact, reference.run(component, leaves))
                _check_nonzero(exact[: len(exact) - len(leaves)], f"{name} of {self.checkpoint} with {label}")
            for target, runner in runners.items():
                given = on_device_of(runner, leaves)
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
                yield target, label, results
                self._print(f"{name} for {target}, {label}: {_summary(results)}")
                wrong = [each for each in results if not each.holds]
                for each in wrong[:_SHOWN]:
                    self._print(f"  {each}")
                if len(wrong) > _SHOWN:
                    self._print(f"  and {len(wrong) - _SHOWN} more")

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
                    leaves = samples.with_cache(
                        leaves, runner.run(on_device_of(runner, before.draw(filling, generator)))
                    )
                    leaves = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            found.append((str(case), leaves))
        return found

    def _steps(self, name: str, targets: list[str]) -> int:
        """The number of steps of :meth:`_compare`."""
        loaded = sum(target in self.folder.components[name].builds for target in targets)
        if self.inputs is not None:
            return loaded + 1
        fills = "prefill" in self.folder.components and name != "prefill" and loaded > 0
        with errors_as(UsageError):
            cases = self.folder.samples(name).cases()
        return loaded + sum(2 if case.past is not None and fills else 1 for case in cases)

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

    def _verdict(self, names: list[str], targets: list[str], compared: list[Comparison]) -> tuple[str, bool | None]:
        """The result in a sentence, and whether every output is right; None if nothing was compared."""
        path = self.folder.path
        if not targets:
            return f"the files of {path} are whole; none of its targets runs here, so nothing was executed", None
        if not compared:
            hint = "" if self.checkpoint else "; give --model with the model that was exported"
            return (
                f"{path} is whole and runs for {targets[0]}; its numbers were compared with nothing, because no other "
                f"target runs here{hint}"
            ), None
        worst = max(compared, key=lambda each: each.relative / (each.tolerance or 1))
        summary = f"largest relative error {worst.relative:.2e} ({worst.what})"
        if wrong := sum(not each.holds for each in compared):
            return f"{path}: {wrong} of {len(compared)} outputs are wrong, {summary}", False
        what = f"{', '.join(names)} of {path}"
        if self.checkpoint is not None:
            return f"{what} for {', '.join(targets)} agrees with {self.checkpoint} in eager; {summary}", True
        return (
            f"{what} agrees between {' and '.join(targets)}; {summary}. Nothing was compared with the model: give "
            "--model for that"
        ), True


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
