"""``accuracy``: the error of each quantized layer, by its quantization and by its rewrite, and of the whole output.

Every number is a signal-to-quantization-noise ratio in dB, ``10 log10(sum of wanted^2 / sum of (got - wanted)^2)`` over
all elements of all input sets:

- **quantized against float.** The *float run* executes the graph of the quantized program with the floating-point
  weights, and without the quantization of activations. At each layer the quantized layer gets the inputs that the float
  layer has there. So a ratio is the error of one layer alone, and does not contain the errors of the layers before it.
  The ratio of the whole output contains all of them.
- **rewritten against exported.** The *exported run* executes the quantized program as it was exported. At each layer the
  rewritten operators get the values of that run. The ratio is that of rounding; :func:`rounding_limit` says how small it
  may be.

A ratio is infinite if there is no noise ("exact"), minus infinity if there is noise and no signal ("no signal"), and
NaN if only one of the two values is finite somewhere, or nothing is ("not finite").
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from et_cuda_passes.graph.aliasing import mutated_operands
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.interpret import Region, Runner, Tap
from et_cuda_passes.graph.operators import op_name, op_of
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import LayerAccuracy, Report, decibels_to_json
from et_cuda_passes.quant.activations import is_quantize
from et_cuda_passes.quant.candidates import find_candidates, forwards_weight
from et_cuda_passes.quant.decoders import dequantized_data, is_dequantize
from et_cuda_passes.quant.unsupported import unwrapped
from et_cuda_passes.rewrite import rewrite
from et_cuda_passes.targets.target import Target

aten = torch.ops.aten
_SHOWN = 20
"""The layers that the text of a result lists."""

FloatWeights = ExportedProgram | Mapping[str, Tensor]
"""The program before its quantization, or its weights by FQN."""


# Results --------------------------------------------------------------------------------------------------------------


class Ratio:
    """Sums the powers of a signal and of its noise."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self._compared = False
        self._odd = False

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
        self._odd |= a.numel() == 0
        self.signal += _power(a)
        self.noise += _power(b - a)

    @property
    def decibels(self) -> float | None:
        """The ratio; None if no element was compared."""
        if self._odd:
            return math.nan
        return to_decibels(self.signal, self.noise) if self._compared else None


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
        limit_db: the smallest ratio by rounding alone; None where the rewrite was not measured.
        why: why a ratio is missing.
    """

    op: str = ""
    at: str = ""
    limit_db: float | None = None
    why: str = ""

    @property
    def is_beyond_rounding(self) -> bool:
        """Whether the rewrite changes the output more than rounding does."""
        return self.limit_db is not None and not is_at_least(self.rewritten_db, self.limit_db)


@dataclass(frozen=True)
class OutputAccuracy:
    """The ratios of one output of the program, with the accumulated error of all layers."""

    name: str
    quantized_db: float | None
    rewritten_db: float | None


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
        """The result as plain data, without infinite numbers: see :func:`~.graph.report.decibels_to_json`."""
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
        lines += [f"{_text(o.quantized_db):>10} {_text(o.rewritten_db):>10}  {o.name}" for o in self.outputs]
        measured = [layer for layer in self.layers if not (layer.quantized_db is layer.rewritten_db is None)]
        lines.append(f"{'quantized':>10} {'rewritten':>10}  {len(measured)} of {len(self.layers)} layers, worst first")
        for layer in measured[:_SHOWN]:
            where = layer.node if layer.at in ("", layer.node) else f"{layer.node}, rewritten as {layer.at}"
            mark = f"  BEYOND ROUNDING, limit {layer.limit_db:.1f}" if layer.is_beyond_rounding else ""
            numbers = f"{_text(layer.quantized_db):>10} {_text(layer.rewritten_db):>10}"
            lines.append(f"{numbers}  {layer.layer} ({where}){mark}")
        hidden = len(measured) - _SHOWN
        lines += [f"{'':>21}  ... and {hidden} more"] if hidden > 0 else []
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.why:
                reasons.setdefault(layer.why, []).append(layer.layer)
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  not measured: {', '.join(names[:3])}{more}: {why}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def is_at_least(ratio: float | None, limit: float) -> bool:
    """Whether ``ratio`` is a number of at least ``limit``; NaN is not."""
    return ratio is not None and ratio >= limit


def _text(decibels: float | None) -> str:
    shown = decibels_to_json(decibels)
    return "" if shown is None else f"{shown:.1f}" if isinstance(shown, float) else str(shown)


def _badness(layer: MeasuredLayer) -> tuple[Any, ...]:
    """Sorts the worst first: beyond rounding, then by the quantization, then by the rewrite; not measured last."""

    def key(ratio: float | None) -> tuple[bool, float]:
        return ratio is None, -math.inf if ratio is None or math.isnan(ratio) else ratio

    return not layer.is_beyond_rounding, key(layer.quantized_db), key(layer.rewritten_db)


# Rounding -------------------------------------------------------------------------------------------------------------


def rounding_limit(dtypes: Iterable[torch.dtype], fused: int, terms: int) -> float:
    """The smallest ratio of a rewritten layer that rounding explains, in dB.

    Both forms round to the dtype of the activations or of the scales, the coarser of the two. With its unit roundoff u
    (2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32), these are the relative errors in the 2-norm, at most:

    - u each for the scale, for the zero, for the output as exported and for the output as rewritten, which the two
      forms may round differently;
    - u for each further operator that was fused, because the exported program rounds its result;
    - sqrt(K) 2^-24 each for two sums of K terms in float32, in different orders.

    They are independent, so their powers add up. With K = 4096 the limit is 42.1 dB in bfloat16, 60.2 in float16 and
    105.4 in float32.

    Args:
        dtypes: those of the activations and of the packed constants.
        fused: the number of further operators that the rewritten operator replaces.
        terms: K, in_features.
    """
    infos = [torch.finfo(dtype) for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    coarsest = max((info.eps for info in infos), default=torch.finfo(torch.float32).eps) / 2
    double = bool(infos) and all(info.bits == 64 for info in infos)
    summed = torch.finfo(torch.float64 if double else torch.float32).eps / 2
    return -10 * math.log10((4 + fused) * coarsest**2 + 2 * max(terms, 1) * summed**2)


# Layers of the quantized program --------------------------------------------------------------------------------------


class QuantizedProgram:
    """A quantized program with its layers.

    Attributes:
        exported: the program with its weights unwrapped.
        runner: runs it.
        candidates: the operators that read a quantized weight.
    """

    def __init__(self, program: ExportedProgram) -> None:
        if not isinstance(program, ExportedProgram):
            raise TypeError(
                f"accuracy needs a torch.export.ExportedProgram, not {type(program).__name__}; export the model with "
                "torch.export.export(model, args) first"
            )
        self.exported, why = unwrapped(program)
        self.runner = Runner(self.exported)
        self.candidates: list[Candidate] = find_candidates(self.program, wrapped=why)
        if not self.candidates:
            raise UsageError(
                "the program has no quantized weight that an operator reads, so there is nothing to measure"
            )

    @property
    def program(self) -> Program:
        """The copy of the program whose nodes are measured."""
        return self.runner.program

    def weight_name(self, dequantize: Node) -> str:
        """The FQN of the weight that ``dequantize`` reads."""
        data = dequantized_data(dequantize)
        while data is not None and self.program.fqn(data) is None and data.all_input_nodes:
            data = data.all_input_nodes[0]
        return (data is not None and self.program.fqn(data)) or dequantize.name

    def unmeasurable(self, candidate: Candidate) -> str:
        """Why the output of a candidate cannot be measured; empty if it can."""
        if candidate.node.graph is not self.program.graph:
            return "it is inside control flow, of which only the whole output is measured"
        if not all(is_dequantize(weight) for weight in candidate.weights) or not candidate.weights:
            return candidate.unreachable_reason or "its weight has no dequantize"
        value = candidate.node.meta.get("val")
        return "" if isinstance(value, Tensor) else "its result is not one tensor"


class FloatRun:
    """The quantized program with floating-point weights, without the quantization of activations.

    Attributes:
        program: the float program, or None if only weights are given.
        weights: the floating-point tensor of each dequantize that is replaced.
        missing: why a weight has no floating-point tensor, by FQN.
        replaced: functions that compute the replaced nodes.
        layers: the candidates whose quantized form can be computed from values of the run, each with that form.
    """

    def __init__(self, quantized: QuantizedProgram, floats: FloatWeights) -> None:
        self.quantized = quantized
        self.program = floats if isinstance(floats, ExportedProgram) else None
        self._tensors: Mapping[str, Any] = _tensors(floats) if isinstance(floats, ExportedProgram) else floats
        self._from_left = _left_stored(floats) if isinstance(floats, ExportedProgram) else set()
        self.weights: dict[Node, Tensor] = {}
        self.missing: dict[str, str] = {}
        read = {weight for each in quantized.candidates for weight in each.weights if is_dequantize(weight)}
        for node in sorted(read & set(quantized.program.graph.nodes), key=quantized.program.order.__getitem__):
            name = quantized.weight_name(node)
            found = self._find(name, node)
            if isinstance(found, str):
                self.missing[name] = found
            else:
                self.weights[node] = found
        if not self.weights and read:
            names = [name for name, value in self._tensors.items() if isinstance(value, Tensor)]
            raise UsageError(
                f"none of the quantized weights has a floating-point one ({next(iter(self.missing.items()))!r}); the "
                f"names given are {', '.join(names[:5]) or 'none'}{', ...' if len(names) > 5 else ''}: export the model "
                "of the same class before it is quantized"
            )
        self.replaced: dict[Node, Any] = {
            node: lambda *_, node=node, **__: self.float_weight(node) for node in self.weights
        }
        self.replaced |= dict(_activations(quantized.program))
        self.layers: dict[Candidate, Region] = {}
        for candidate in quantized.candidates:
            if not quantized.unmeasurable(candidate) and self.weights.keys() >= set(candidate.weights):
                self.layers[candidate] = self._region(candidate.node)

    def float_weight(self, dequantize: Node) -> Tensor:
        """The floating-point weight in the dtype of the dequantized one."""
        return self.weights[dequantize].detach().to(dequantize.meta["val"].dtype)

    def _find(self, name: str, dequantize: Node) -> Tensor | str:
        """The floating-point tensor for ``dequantize``, or why there is none."""
        tensor = self._tensors.get(name)
        shape = tuple(dequantize.meta["val"].shape)
        if not isinstance(tensor, Tensor):
            return f"the float program has no weight {name}"
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.dtype.is_floating_point:
            return f"{name} of the float program is {type(tensor).__name__} in {tensor.dtype}, not floating-point"
        # A Conv1D of transformers stores [K, N]; the quantized linear that replaces it has [N, K].
        turned = tensor.dim() == 2 and name in self._from_left and not _is_right_operand(dequantize)
        tensor = tensor.t() if turned else tensor
        if tuple(tensor.shape) != shape:
            return f"{name} is {list(tensor.shape)} in the float program and {list(shape)} in this one"
        return tensor

    def _region(self, root: Node) -> Region:
        """The quantized form of candidate ``root``: itself, its dequantized weights, and quantized activations."""
        program = self.quantized.program
        found: dict[Node, bool] = {root: True}

        def is_inner(node: Node) -> bool:
            if node not in found:
                moves = forwards_weight(node) and any([is_inner(source) for source in node.all_input_nodes])
                found[node] = node in self.replaced or moves
            return found[node]

        inner, work = {root}, [root]
        while work:
            for source in work.pop().all_input_nodes:
                if source not in inner and is_inner(source):
                    inner.add(source)
                    work.append(source)
        nodes = tuple(sorted(inner, key=program.order.__getitem__))
        return Region(
            nodes, {source: source for node in nodes for source in node.all_input_nodes if source not in inner}
        )

    def run(self, inputs: Sequence[Any], taps: Sequence[Tap] = (), seed: int = 0) -> list[Any]:
        """Run the program with floating-point weights."""
        return self.quantized.runner.run(inputs, taps, self.replaced, seed)


def _tensors(program: ExportedProgram) -> dict[str, Any]:
    return {**program.constants, **program.state_dict}


def _left_stored(program: ExportedProgram) -> set[str]:
    """The weights that a program multiplies as they are stored, [K, N]."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = (node for node in program.graph.find_nodes(op="placeholder") if node.name in names)
    return {names[node.name] for node in nodes if _is_right_operand(node)}


_PRODUCTS = {aten.mm.default: 1, aten.matmul.default: 1, aten.bmm.default: 1, aten.addmm.default: 2}
"""The position of the right operand, which is [K, N]."""


def _is_right_operand(weight: Node) -> bool:
    return any(
        op_of(user) in _PRODUCTS and user.args[_PRODUCTS[op_of(user)] :][:1] == (weight,) for user in weight.users
    )


def _activations(program: Program) -> Iterator[tuple[Node, Any]]:
    """Functions that pass activations through their quantization."""
    for node in program.graph.nodes:
        data = dequantized_data(node)
        if data is not None and is_quantize(data) and all(map(is_dequantize, data.users)):
            dtype = node.meta["val"].dtype
            yield data, lambda x, *_, **__: x
            yield node, lambda x, *_, dtype=dtype, **__: x.to(dtype)


# The rewritten program ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Where a layer of the exported program is compared with its rewritten form.

    Attributes:
        points: nodes of the exported program, each with the rewritten nodes that compute its value.
        limit_db: see :func:`rounding_limit`.
        why: why the layer is not compared; empty if it is.
    """

    points: tuple[tuple[Node, Region], ...] = ()
    limit_db: float = math.nan
    why: str = ""


class RewrittenProgram:
    """The rewritten form of a quantized program, compared with it layer by layer.

    A rewrite gives the name of each operator that it replaces to the replacement. So an activation that both programs
    have by one name is the same value in both. What stands between such nodes of the rewritten program, and every
    value that constants alone determine, is computed from values of the exported run.
    """

    def __init__(self, quantized: QuantizedProgram, rewritten: ExportedProgram, report: Report) -> None:
        self.quantized, self.report = quantized, report
        self.runner = Runner(rewritten)
        self._before = {node.name: node for node in quantized.program.graph.nodes}
        self._after = {node.name: node for node in self.runner.program.graph.nodes}
        self._varying = _varying(self.runner.program)
        statuses = {outcome.node: outcome.status for outcome in report.outcomes}
        self.comparisons = {
            each: self._compared(each, statuses.get(each.name or each.node.name, "missed"))
            for each in quantized.candidates
        }

    def _counterpart(self, node: Node) -> Node | None:
        """The node of the rewritten program with the value of ``node``; None if it has no such node."""
        other = self._after.get(node.name)
        if other is None or other.op != node.op:
            return None
        stands_for = any(source.name == node.name for source in other.meta.get("from_node", ()))
        return other if op_of(other) is op_of(node) or stands_for else None

    def _is_shared(self, node: Node) -> bool:
        """Whether the value of rewritten ``node`` can be read in the exported run."""
        before = self._before.get(node.name)
        return before is not None and self._counterpart(before) is node and self._is_read(node)

    def _is_read(self, node: Node) -> bool:
        return node.op == "placeholder" or node in self._varying

    def _compared(self, candidate: Candidate, status: str) -> Comparison:
        if candidate.node.graph is not self.quantized.program.graph:
            return Comparison(why="it is inside control flow, of which only the whole output is measured")
        points, gone = self._points(candidate.node)
        if not points:
            return Comparison(why="nothing that the rewritten program computes depends on it")
        found: list[tuple[Node, Region]] = []
        for point in points:
            region = self._region(cast(Node, self._counterpart(point)))
            if isinstance(region, str):
                return Comparison(why=region)
            if not all(map(self._is_unchanged, region.nodes)):
                found.append((point, region))
        if not found:
            return Comparison(why=f"{status}, so it is as exported")
        nodes = [candidate.node, *gone, *(node for _, region in found for node in region.nodes)]
        values = [node.meta.get("val") for node in nodes]
        held = [tensor for _, region in found for tensor in region.constants.values()]
        dtypes = {value.dtype for value in (*values, *held) if isinstance(value, Tensor)}
        terms = max((weight.meta["val"].shape[-1] for weight in candidate.weights if "val" in weight.meta), default=1)
        return Comparison(tuple(found), rounding_limit(dtypes, max(0, len(gone) - 1 + len(points)), int(terms)))

    def _points(self, node: Node) -> tuple[list[Node], list[Node]]:
        """The first nodes from ``node`` on that both programs have, and the nodes before them that are gone."""
        points: dict[Node, None] = {}
        gone: dict[Node, None] = {}
        work = [node]
        while work:
            here = work.pop()
            if self._counterpart(here) is not None and isinstance(here.meta.get("val"), Tensor):
                points[here] = None
            elif here not in gone:
                gone[here] = None
                work.extend(here.users)
        return sorted(points, key=self.quantized.program.order.__getitem__), list(gone)

    def _region(self, root: Node) -> Region | str:
        """The rewritten nodes that compute ``root`` from shared values, or why they cannot be computed again."""
        program = self.runner.program
        inner: dict[Node, None] = {root: None}
        reads: dict[Node, Node] = {}
        constants: dict[Node, Tensor] = {}
        work = [root]
        while work:
            node = work.pop()
            if mutated_operands(node):
                return f"its rewritten form mutates a value ({node.name})"
            for source in node.all_input_nodes:
                if source in inner or source in reads or source in constants:
                    continue
                if self._is_shared(source):
                    reads[source] = self._before[source.name]
                elif source.op == "call_function":
                    inner[source] = None
                    work.append(source)
                elif (tensor := program.constant(source)) is not None:
                    constants[source] = tensor
                else:
                    return f"its rewritten form reads {source.name}, which is neither a value nor a constant"
        return Region(tuple(sorted(inner, key=program.order.__getitem__)), reads, constants)

    def _is_unchanged(self, node: Node) -> bool:
        """Whether the exported program has the same operator with the same operands."""
        before = self._before.get(node.name)
        if before is None or op_of(before) is not op_of(node):
            return False
        return [each.name for each in before.all_input_nodes] == [each.name for each in node.all_input_nodes]


def _varying(program: Program) -> set[Node]:
    """The nodes whose values depend on the inputs of the program, or on memory that it mutates."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            varies = program.constant(node) is None or node in program.mutated
        else:
            varies = node in program.mutated or not found.isdisjoint(node.all_input_nodes)
        if varies:
            found.add(node)
    return found


# accuracy -------------------------------------------------------------------------------------------------------------


def accuracy(
    program: ExportedProgram,
    target: str | Target | None = None,
    float_program: FloatWeights | None = None,
    inputs: Sequence[Sequence[Any]] | None = None,
    seed: int | None = None,
    *,
    passes: Iterable[Any] | None = None,
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
    for values in sets:
        wanted = None
        if floats and reference:
            taps = [_tap(each.node, floats.layers[each], ratio) for each, ratio in by_quantization.items()]
            wanted = reference.outputs(floats.run(values, taps, seed or 0), values, seed or 0)
        taps = []
        if rewritten:
            for candidate, ratio in by_rewrite.items():
                points = rewritten.comparisons[candidate].points
                taps += [_tap(point, region, ratio) for point, region in points]
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
        plain = (LayerAccuracy(each.layer, each.node, each.quantized_db, each.rewritten_db) for each in layers)
        report = replace(rewritten.report, accuracy=tuple(plain))
    notes = tuple(reference.finish()) if reference else ()
    return Accuracy(report.target if report else "", len(sets), tuple(layers), outputs, notes, report)


def _user_outputs(program: ExportedProgram) -> list[Any]:
    return [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]


def _tap(node: Node, region: Region, ratio: Ratio) -> Tap:
    """Compares the value of ``node`` with that of ``region``."""

    def see(value: Tensor, read: Any) -> Tensor:
        ratio.add(value, region.compute(read))
        return value

    return Tap(node, tuple(region.reads.values()), see)


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
    return MeasuredLayer(
        layer=candidate.fqn,
        node=candidate.name or candidate.node.name,
        quantized_db=first and first.decibels,
        rewritten_db=second and second.decibels,
        op=op_name(candidate.node.target),
        at=", ".join(point.name for point, _ in comparison.points),
        limit_db=comparison.limit_db if comparison.points else None,
        why="; ".join(dict.fromkeys(filter(None, why))),
    )


# Inputs and reference -------------------------------------------------------------------------------------------------


def input_sets(
    program: ExportedProgram, runner: Runner, inputs: Sequence[Sequence[Any]] | None, seed: int | None
) -> list[list[Any]]:
    """The checked inputs of each call: see :func:`accuracy`.

    Raises:
        ValueError: there are none, or they do not fit the program.
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
    """The outputs of the float program itself; those of the float run where its inputs or outputs are others."""

    def __init__(self, floats: FloatRun, sets: Sequence[Sequence[Any]]) -> None:
        self.notes: list[str] = []
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
                f"with floating-point weights this program differs from the float program by {_text(agreement)} dB: "
                "more than their quantized weights differs"
            )
        return self.notes


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)
