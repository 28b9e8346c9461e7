"""``accuracy``: the error of each quantized layer, by its quantization and by its rewrite, and of the whole output.

Every number is a signal-to-quantization-noise ratio in dB, ``10 log10(sum of wanted^2 / sum of (got - wanted)^2)`` over
all elements of all input sets:

- **quantized against float.** The *float run* executes the graph of the quantized program with the floating-point
  weights, and without the quantization of activations. At each layer the quantized layer gets the inputs that the float
  layer has there. So a ratio is the error of one layer alone, and does not contain the errors of the layers before it.
  The ratio of the whole output contains all of them.
- **rewritten against exported.** The *exported run* executes the quantized program as it was exported. At each layer
  the rewritten operators get the values of that run. The ratio is that of rounding;
  :func:`~.comparison.rounding_limit` says how small it may be.

A ratio is infinite if there is no noise ("exact"), minus infinity if there is noise and no signal ("no signal"), and
NaN if only one of the two values is finite somewhere, or nothing is ("not finite").
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from et_cuda_passes.comparison import Comparison, FloatRun, FloatWeights, QuantizedProgram, RewrittenProgram
from et_cuda_passes.graph.decibels import decibels_text, decibels_to_json
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.interpret import Region, Runner, Tap
from et_cuda_passes.graph.operators import op_name
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.graph.report import LayerAccuracy, OutputAccuracy, Report
from et_cuda_passes.quant.decoders import is_dequantize
from et_cuda_passes.rewrite import rewrite
from et_cuda_passes.targets.target import Target

_SHOWN = 20
"""The layers that the text of a result lists."""

# Results --------------------------------------------------------------------------------------------------------------


class Ratio:
    """Sums the powers of a signal and of its noise."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self._compared = False
        self._odd = False
        self._blank = False

    def add(self, wanted: Tensor, got: Tensor) -> None:
        """Add the elements of two tensors of one shape. Elements that are infinite or NaN alike do not count."""
        if not wanted.numel():
            return
        dtype = torch.float64 if wanted.dtype is torch.float64 else torch.float32
        a, b = wanted.detach().to(dtype), got.detach().to(dtype)
        finite = a.isfinite() & b.isfinite()
        if not finite.all():
            self._odd |= not bool((finite | (a == b) | (a.isnan() & b.isnan())).all())
            a, b = a[finite], b[finite]
        self._compared |= a.numel() > 0
        self._blank |= a.numel() == 0
        self.signal += _power(a)
        self.noise += _power(b - a)

    @property
    def decibels(self) -> float | None:
        """The ratio; None if no element was compared."""
        if self._odd or self._blank:
            return math.nan
        return to_decibels(self.signal, self.noise) if self._compared else None

    @property
    def lacks_numbers(self) -> bool:
        """Whether all elements of an input set are infinite or NaN in both tensors alike."""
        return self._blank and not self._odd


def _power(x: Tensor) -> float:
    # Without a copy of x in float64.
    return float(torch.linalg.vector_norm(x.flatten(), dtype=torch.float64)) ** 2


def to_decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two powers."""
    if not noise:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


@dataclass(frozen=True)
class MeasuredLayer(LayerAccuracy):
    """The ratios of a layer, with what they were measured at.

    Attributes:
        op: the short name of the operator that reads the weight.
        at: the node at which exported and rewritten program were compared: ``node``, or the end of the operators that
            one rewritten operator replaces; several are joined by ", ".
        why: why a ratio is missing.
    """

    op: str = ""
    at: str = ""
    why: str = ""

    @property
    def is_beyond_rounding(self) -> bool:
        """Whether the rewrite changes the output more than rounding does."""
        return self.limit_db is not None and not is_at_least(self.rewritten_db, self.limit_db)


@dataclass(frozen=True)
class Accuracy:
    """The result of :func:`accuracy`.

    Attributes:
        target: the name of the target of the rewrite; empty without one.
        input_sets: how many calls were measured.
        layers: every operator that reads a quantized weight, the worst first.
        outputs: the floating-point outputs, in order.
        notes: remarks on the whole.
        report: of the rewrite, with the ratios in ``report.accuracy``; None without a target.
    """

    target: str
    input_sets: int
    layers: tuple[MeasuredLayer, ...]
    outputs: tuple[OutputAccuracy, ...]
    notes: tuple[str, ...] = ()
    report: Report | None = None

    def below(self, decibels: float) -> list[MeasuredLayer]:
        """The layers whose rewritten form is less accurate than ``decibels``, against the exported one."""
        measured = (layer for layer in self.layers if layer.rewritten_db is not None)
        return [layer for layer in measured if not is_at_least(layer.rewritten_db, decibels)]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, without infinite numbers: see :func:`~.graph.decibels.decibels_to_json`."""
        layers = []
        for layer in self.layers:
            values = asdict(layer) | {"beyond_rounding": layer.is_beyond_rounding}
            layers.append({key: decibels_to_json(value) for key, value in values.items()})
        outputs = [{key: decibels_to_json(value) for key, value in asdict(each).items()} for each in self.outputs]
        return {
            "target": self.target,
            "input_sets": self.input_sets,
            "layers": layers,
            "outputs": outputs,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        """A short text: the outputs, the worst layers, and the layers that were not measured."""
        count = f"{self.input_sets} input set{'s' if self.input_sets != 1 else ''}"
        lines = [
            f"signal-to-noise ratios in dB, {count}",
            f"{'quantized':>10} {'rewritten':>10}  whole output, against float and against as exported",
        ]
        lines += [
            f"{decibels_text(o.quantized_db):>10} {decibels_text(o.rewritten_db):>10}  {o.name}" for o in self.outputs
        ]
        measured = [layer for layer in self.layers if not (layer.quantized_db is layer.rewritten_db is None)]
        lines.append(f"{'quantized':>10} {'rewritten':>10}  {len(measured)} of {len(self.layers)} layers, worst first")
        for layer in measured[:_SHOWN]:
            where = layer.node if layer.at in ("", layer.node) else f"{layer.node}, rewritten as {layer.at}"
            mark = f"  BEYOND ROUNDING, limit {layer.limit_db:.1f}" if layer.is_beyond_rounding else ""
            numbers = f"{decibels_text(layer.quantized_db):>10} {decibels_text(layer.rewritten_db):>10}"
            lines.append(f"{numbers}  {layer.layer} ({where}){mark}")
        hidden = len(measured) - _SHOWN
        lines += [f"{'':>21}  ... and {hidden} more"] if hidden > 0 else []
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.why:
                why = layer.why.replace(f"has no weight {layer.layer}", "has no weight of that name")
                reasons.setdefault(why, []).append(layer.layer)
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  not measured: {', '.join(names[:3])}{more}: {why}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def is_at_least(ratio: float | None, limit: float) -> bool:
    """Whether ``ratio`` is a number of at least ``limit``; NaN is not."""
    return ratio is not None and ratio >= limit


def _badness(layer: MeasuredLayer) -> tuple[Any, ...]:
    """Sorts the worst first: beyond rounding, then by the quantization, then by the rewrite; not measured last."""

    def key(ratio: float | None) -> tuple[bool, float]:
        return ratio is None, -math.inf if ratio is None or math.isnan(ratio) else ratio

    return not layer.is_beyond_rounding, key(layer.quantized_db), key(layer.rewritten_db)


# accuracy -------------------------------------------------------------------------------------------------------------


def accuracy(
    program: ExportedProgram,
    target: str | Target | None = None,
    float_program: FloatWeights | None = None,
    inputs: Sequence[Sequence[Any]] | None = None,
    seed: int | None = None,
    *,
    passes: Iterable[Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Measure the error of each quantized layer, by its quantization and by its rewrite for ``target``.

    Args:
        program: a quantized program, as for :func:`~.rewrite.rewrite`; it is not changed.
        target: the target of the rewrite; None to measure the quantization alone.
        float_program: the program of the model before its quantization, or its weights by FQN; None to measure the
            rewrite alone. Layers correspond by the FQN and the shape of their weights, so its graph may differ.
        inputs: one tuple of arguments for each call, as :meth:`.Runner.bind` takes them; None for the example inputs
            of the program.
        seed: use random inputs of the shapes of the example inputs: normally distributed floats, and integers between
            the least and the largest of the example.
        passes: the pass list of the rewrite; None for the default.
        progress: is called with the number of comparisons of layers that are done, and of all.

    Returns:
        The ratios of every layer, the worst first, and of the outputs.

    Raises:
        ValueError: there are no inputs, or they do not fit the program; no quantized weight has a floating-point one;
            neither a target nor a float program is given.
    """
    if target is None and float_program is None:
        raise UsageError("there is nothing to compare with: give a target, a float program, or both")
    quantized = QuantizedProgram(program)
    sets = input_sets(quantized.exported, quantized.runner, inputs, seed)
    floats = None if float_program is None else FloatRun(quantized, float_program)
    rewritten = None
    if target is not None:
        rewritten = RewrittenProgram(quantized, *rewrite(quantized.exported, target, passes))
    by_quantization = {candidate: Ratio() for candidate in (floats.layers if floats else ())}
    by_rewrite = {each: Ratio() for each, found in (rewritten.comparisons.items() if rewritten else ()) if found.points}
    kinds = [spec.arg.name for spec in _user_outputs(quantized.exported)]
    of_outputs = [(Ratio(), Ratio()) for _ in kinds]
    reference = _OwnRun(floats, sets) if floats else None
    points = sum(len(rewritten.comparisons[candidate].points) for candidate in by_rewrite) if rewritten else 0
    total, done = len(sets) * (len(by_quantization) + points), count(1)

    def tap(node: Node, region: Region, ratio: Ratio) -> Tap:
        """Compares the value of ``node`` with that of ``region``."""

        def see(value: Tensor, read: Any) -> Tensor:
            ratio.add(value, region.compute(read))
            progress(next(done), total)
            return value

        return Tap(node, tuple(region.reads.values()), see)

    for values in sets:
        wanted = None
        if floats and reference:
            taps = [tap(each.node, floats.layers[each], ratio) for each, ratio in by_quantization.items()]
            wanted = reference.outputs(floats.run(values, taps, seed or 0), values, seed or 0)
        taps = []
        if rewritten:
            for candidate, ratio in by_rewrite.items():
                taps += [tap(point, region, ratio) for point, region in rewritten.comparisons[candidate].points]
        got = quantized.runner.run(values, taps, seed=seed or 0)
        after = rewritten.runner.run(values, seed=seed or 0) if rewritten else None
        for index, (first, second) in enumerate(of_outputs):
            _add_output(first, wanted and wanted[index], got[index])
            _add_output(second, got[index], after and after[index])
    layers = []
    for candidate in quantized.candidates:
        layers.append(_measured(quantized, candidate, floats, by_quantization, rewritten, by_rewrite))
    layers.sort(key=_badness)
    outputs = tuple(
        OutputAccuracy(name, *(ratio.decibels for ratio in pair)) for name, pair in zip(kinds, of_outputs, strict=True)
    )
    report = None
    if rewritten:
        plain = (
            LayerAccuracy(each.layer, each.node, each.quantized_db, each.rewritten_db, each.limit_db) for each in layers
        )
        report = replace(rewritten.report, accuracy=tuple(plain), output_accuracy=outputs)
    notes = tuple(reference.finish() + _unrelated(layers)) if reference else ()
    return Accuracy(report.target if report else "", len(sets), tuple(layers), outputs, notes, report)


def _unrelated(layers: Sequence[MeasuredLayer]) -> list[str]:
    """A note about layers whose floating-point weights are hardly those that were quantized."""
    found = [layer.layer for layer in layers if layer.quantized_db is not None and -math.inf < layer.quantized_db < 0]
    if not found:
        return []
    names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return [
        f"{len(found)} quantized layer{'s differ' if len(found) > 1 else ' differs'} from the float one by more than "
        f"its signal ({names}): give the float program of the same checkpoint, from before its quantization"
    ]


def _user_outputs(program: ExportedProgram) -> list[Any]:
    return [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]


def _add_output(ratio: Ratio, wanted: Any, got: Any) -> None:
    if isinstance(wanted, Tensor) and isinstance(got, Tensor) and wanted.dtype.is_floating_point:
        ratio.add(wanted, got)


def _measured(
    quantized: QuantizedProgram,
    candidate: Candidate,
    floats: FloatRun | None,
    by_quantization: Mapping[Candidate, Ratio],
    rewritten: RewrittenProgram | None,
    by_rewrite: Mapping[Candidate, Ratio],
) -> MeasuredLayer:
    why = []
    if floats and candidate not in by_quantization:
        names = dict.fromkeys(quantized.weight_name(weight) for weight in candidate.weights if is_dequantize(weight))
        lacking = [floats.missing[name] for name in names if name in floats.missing]
        why.append(quantized.unmeasurable(candidate) or "; ".join(lacking))
    comparison = rewritten.comparisons[candidate] if rewritten else Comparison()
    if rewritten and comparison.why:
        why.append(comparison.why)
    first, second = by_quantization.get(candidate), by_rewrite.get(candidate)
    measured = bool(comparison.points)
    if second and second.lacks_numbers:
        why.append("its output is infinite or NaN everywhere, as exported too")
        measured = False
    return MeasuredLayer(
        layer=candidate.fqn,
        node=candidate.name or candidate.node.name,
        quantized_db=None if first is None else first.decibels,
        rewritten_db=None if second is None else second.decibels,
        op=op_name(candidate.node.target),
        at=", ".join(point.name for point, _ in comparison.points),
        limit_db=comparison.limit_db if measured else None,
        why="; ".join(dict.fromkeys(filter(None, why))),
    )


# Inputs and reference -------------------------------------------------------------------------------------------------


def input_sets(
    program: ExportedProgram, runner: Runner, inputs: Sequence[Sequence[Any]] | None, seed: int | None
) -> list[list[Any]]:
    """The checked inputs of each call: see :func:`accuracy`.

    Raises:
        ValueError: no inputs are known, or they do not fit the program.
    """
    if inputs is not None and seed is not None:
        raise UsageError("inputs and seed each give all inputs: give one of them")
    if inputs is not None:
        if not isinstance(inputs, (list, tuple)) or not all(isinstance(each, (list, tuple)) for each in inputs):
            raise UsageError("inputs are a list with one tuple of arguments for each call, such as [(x,)]")
        if not inputs:
            raise UsageError("inputs is empty: give the arguments of at least one call, such as [(x,)]")
        return [runner.bind(each) for each in inputs]
    if program.example_inputs is None:
        raise UsageError("the program was saved without example inputs: give inputs")
    leaves = tree_leaves(program.example_inputs)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        leaves = [_random_like(leaf, generator) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [runner.bind(leaves)]


def _random_like(example: Tensor, generator: torch.Generator) -> Tensor:
    if example.dtype.is_floating_point:
        return torch.randn(example.shape, generator=generator).to(example.dtype)
    low, high = (int(example.min()), int(example.max())) if example.numel() else (0, 1)
    return torch.randint(low, high + 1, example.shape, generator=generator).to(example.dtype)


_SAME_MODEL = 30.0
"""In dB. Two graphs of one model in bfloat16 differ less, by rounding alone."""


class _OwnRun:
    """The outputs of the float program itself; those of the float run if it has other inputs or outputs."""

    def __init__(self, floats: FloatRun, sets: Sequence[Sequence[Any]]) -> None:
        kept = ", ".join(list(floats.missing)[:3]) + (", ..." if len(floats.missing) > 3 else "")
        self.notes = [f"weights that stay quantized in the float run: {kept}"] if kept else []
        self._runner = None if floats.program is None else Runner(floats.program)
        self._agreement = Ratio()
        if self._runner is None:
            return
        try:
            for values in sets:
                self._runner.bind(values)
        except UsageError as error:
            self._give_up(f"the float program takes other inputs ({error})")

    def _give_up(self, why: str) -> None:
        self._runner = None
        self.notes.append(f"{why}: the output is compared with that of this program with floating-point weights")

    def outputs(self, computed: list[Any], values: Sequence[Any], seed: int) -> list[Any]:
        """The reference of the outputs for one input set, where the float run computed ``computed``."""
        if self._runner is None:
            return computed
        own = self._runner.run(self._runner.bind(values), seed=seed)
        if list(map(_shape, own)) != list(map(_shape, computed)):
            self._give_up("the float program has other outputs")
            return computed
        for mine, other in zip(own, computed, strict=True):
            _add_output(self._agreement, mine, other)
        return own

    def finish(self) -> list[str]:
        """The notes, after the last run."""
        agreement = self._agreement.decibels
        if agreement is not None and not is_at_least(agreement, _SAME_MODEL):
            self.notes.append(
                f"with floating-point weights this program differs from the float program "
                f"({decibels_text(agreement, ' dB')}): more than their quantized weights "
                "differs"
            )
        return self.notes


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)
