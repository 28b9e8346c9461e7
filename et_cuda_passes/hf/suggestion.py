"""``suggest_recipe``: the layers to move from 4 to 8 bits, so that the whole output reaches a signal-to-noise ratio.

Each layer is quantized alone, in a program with floating-point weights, and the noise that this causes at the output is
measured. Two assumptions predict the noise of any choice of layers:

- the powers of the layers' noises add up, as those of independent errors do. The sum is scaled by one factor, by which
  it becomes the noise that was measured with all layers quantized;
- with 8 bits instead of 4, the noise of a layer at the whole output shrinks by the factor by which it shrinks at the
  output of the layer.

The choice is greedy: the layer with the most dB per byte is next. It need not be the smallest set.
"""

import glob
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torchao.quantization import quantize_

from et_cuda_passes.accuracy import Ratio, input_sets, to_decibels
from et_cuda_passes.comparison import FloatRun, FloatWeights, QuantizedProgram
from et_cuda_passes.graph.constants import tensor_identity
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.interpret import Region, Tap
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.hf.recipe import Recipe
from et_cuda_passes.hf.support import PER_AXIS, SCHEMES, Scheme
from et_cuda_passes.quant.activations import is_quantize
from et_cuda_passes.quant.decoders import decode, is_dequantize
from et_cuda_passes.quant.weight import QuantizedWeight

_NARROW = 4
"""Bits of the weights that can be moved."""


@dataclass(frozen=True)
class Move:
    """A layer that gets 8 bits.

    Attributes:
        layer: the FQN of the module.
        scheme: the name of its new scheme.
        more_bytes: how much larger its weight becomes.
        predicted_db: the predicted ratio of the whole output after this move and those before it.
    """

    layer: str
    scheme: str
    more_bytes: int
    predicted_db: float


@dataclass(frozen=True)
class Suggestion:
    """The result of :func:`suggest_recipe`.

    Attributes:
        moves: the layers, in the order in which they were chosen.
        before_db: the measured ratio of the whole output.
        predicted_db: the ratio that is predicted with the moves.
        bytes_before: the bytes of all weights, packed.
        bytes_after: the same with the moves.
    """

    moves: tuple[Move, ...]
    before_db: float
    predicted_db: float
    bytes_before: int
    bytes_after: int

    @property
    def recipe(self) -> Recipe:
        """An entry for each move; a recipe without an entry is an error."""
        entries = [
            {"pattern": glob.escape(move.layer), "scheme": move.scheme, "group_size": PER_AXIS} for move in self.moves
        ]
        return Recipe.load({"layer": entries})

    def __str__(self) -> str:
        size = f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        lines = [
            f"suggestion: {len(self.moves)} layers to 8 bits, weights {size}; whole output {self.before_db:.1f} dB, "
            f"predicted {self.predicted_db:.1f} dB",
            "the choice is greedy, by dB per byte",
        ]
        lines += [f"  {move.layer}: {move.scheme}, then {move.predicted_db:.2f} dB" for move in self.moves]
        return "\n".join(lines)


@dataclass
class _Layer:
    """A weight with its noise at each output: as it is quantized, and with 8 bits if it can be moved."""

    name: str
    candidates: list[Candidate]
    weight: QuantizedWeight
    scheme: Scheme | None
    noise: list[float]
    wider: list[float]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def more_bytes(self) -> int:
        return 0 if self.scheme is None else _bytes(self.weight, 8, self.weight.shape[0]) - _packed_bytes(self.weight)


def suggest_recipe(
    program: ExportedProgram,
    float_program: FloatWeights,
    target_snr: float | None = None,
    max_bytes: int | None = None,
    inputs: Sequence[Sequence[Any]] | None = None,
    seed: int | None = None,
    *,
    algorithm: str = "hqq",
    progress: Callable[[str], None] = lambda step: None,
) -> Suggestion:
    """Suggest the layers to move from 4 to 8 bits with one scale per row.

    The program runs once for each quantized weight and input set.

    Args:
        program: a quantized program.
        float_program: the program before its quantization, or its weights by FQN.
        target_snr: as for :meth:`NoiseModel.suggest`.
        max_bytes: as for :meth:`NoiseModel.suggest`.
        inputs: as for :func:`~et_cuda_passes.accuracy.accuracy`.
        seed: as for it.
        algorithm: how the 8-bit scales are chosen: that of the export.
        progress: is called with the name of each step.

    Raises:
        ValueError: neither ``target_snr`` nor ``max_bytes`` is given, the inputs do not fit, no weight has a
            floating-point one, or the ratio cannot be reached within the bytes; the message says what can be.
    """
    _check_aim(target_snr, max_bytes)
    return measure_noise(program, float_program, inputs, seed, algorithm=algorithm, progress=progress).suggest(
        target_snr, max_bytes
    )


def measure_noise(
    program: ExportedProgram,
    float_program: FloatWeights,
    inputs: Sequence[Sequence[Any]] | None = None,
    seed: int | None = None,
    *,
    algorithm: str = "hqq",
    progress: Callable[[str], None] = lambda step: None,
) -> "NoiseModel":
    """Measure what each layer adds to the noise of the outputs: see :func:`suggest_recipe`."""
    quantized = QuantizedProgram(program)
    floats = FloatRun(quantized, float_program)
    sets = input_sets(quantized.exported, quantized.runner, inputs, seed)
    progress("measuring the whole output")
    wanted = [floats.run(values, seed=seed or 0) for values in sets]
    got = [quantized.runner.run(values, seed=seed or 0) for values in sets]
    signal, noise = _powers(wanted, got)
    if not any(signal):
        raise UsageError("the program has no floating-point output that is not 0, so its accuracy is not defined")
    layers = _layers(quantized, floats)
    progress(f"measuring {len(layers)} layers one by one")
    for layer in layers:
        _measure(layer, floats, sets, wanted, seed or 0, algorithm)
    return NoiseModel(tuple(layers), tuple(signal), tuple(noise), _total_bytes(quantized, layers))


def _check_aim(target_snr: float | None, max_bytes: int | None) -> None:
    if target_snr is None and max_bytes is None:
        raise UsageError("a suggestion needs a ratio to reach or a limit of bytes: give target_snr, max_bytes, or both")


@dataclass(frozen=True)
class NoiseModel:
    """Predicts the noise of the outputs for any choice of layers with 8 bits.

    Attributes:
        layers: each weight, with its noise at each output.
        signal: the power of each output.
        noise: the measured power of the noise of each output, with all layers quantized.
        total_bytes: the bytes of all weights, packed.
    """

    layers: tuple[_Layer, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    total_bytes: int

    def suggest(self, target_snr: float | None = None, max_bytes: int | None = None) -> Suggestion:
        """Choose layers greedily, by dB per byte.

        Args:
            target_snr: the signal-to-noise ratio of the whole output to reach, in dB; of the output with the lowest one
                if there are several. None for the largest one within ``max_bytes``.
            max_bytes: the most bytes of all weights: those with 4 bits in half a byte each, with a scale and a zero for
                each group; those with 8 bits in a byte each, with a scale for each row; others as they are. None for
                any.

        Raises:
            ValueError: neither is given, or they cannot be reached; the message says what can be.
        """
        _check_aim(target_snr, max_bytes)
        budget = math.inf if max_bytes is None else max_bytes
        size = self.total_bytes
        if size > budget:
            raise UsageError(f"the weights have {size:,} bytes without any move, more than max_bytes={max_bytes:,}")
        noise = self.noise
        moves: list[Move] = []
        left = [layer for layer in self.layers if layer.scheme is not None]
        while target_snr is None or self._ratio(noise) < target_snr:
            fitting = [layer for layer in left if size + layer.more_bytes <= budget]
            gains = {id(layer): self._ratio(self._moved(layer, noise)) - self._ratio(noise) for layer in fitting}
            best = max(fitting, key=lambda layer: gains[id(layer)] / max(layer.more_bytes, 1), default=None)
            if best is None or gains[id(best)] <= 0:
                break
            left.remove(best)
            noise = self._moved(best, noise)
            size += best.more_bytes
            assert best.scheme is not None
            moves.append(Move(best.module, best.scheme.name, best.more_bytes, self._ratio(noise)))
        reached = self._ratio(noise)
        if target_snr is not None and reached < target_snr:
            limit = "" if max_bytes is None else f" within max_bytes={max_bytes:,}"
            raise UsageError(
                f"target_snr={target_snr:g} is out of reach{limit}: with {len(moves)} layers in 8 bits, {size:,} bytes, "
                f"{reached:.1f} dB are predicted; give a lower ratio or more bytes, or leave layers in floating point "
                "by a recipe"
            )
        return Suggestion(tuple(moves), self._ratio(self.noise), reached, self.total_bytes, size)

    def _ratio(self, noise: Sequence[float]) -> float:
        """The lowest ratio of an output."""
        return min(to_decibels(*pair) for pair in zip(self.signal, noise, strict=True) if pair[0])

    def _moved(self, layer: _Layer, noise: Sequence[float]) -> tuple[float, ...]:
        """The noise of each output after a move of ``layer``, which had ``noise`` before."""
        found = []
        for index, power in enumerate(noise):
            alone = sum(each.noise[index] for each in self.layers)
            factor = self.noise[index] / alone if alone else 0.0
            # Rounding of the sums must not give a negative power.
            found.append(max(power - factor * (layer.noise[index] - layer.wider[index]), 0.0))
        return tuple(found)


# Measuring ------------------------------------------------------------------------------------------------------------


def _powers(wanted: Sequence[list[Any]], got: Sequence[list[Any]]) -> tuple[list[float], list[float]]:
    """The power of the signal and of the noise of each floating-point output, over all input sets."""
    ratios: dict[int, Ratio] = {}
    for first, second in zip(wanted, got, strict=True):
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if isinstance(a, Tensor) and a.dtype.is_floating_point:
                ratios.setdefault(index, Ratio()).add(a, b)
    for index, ratio in ratios.items():
        if ratio.decibels is not None and math.isnan(ratio.decibels):
            raise UsageError(f"output {index} is infinite or NaN where the float program's is finite, or everywhere")
    return [ratio.signal for ratio in ratios.values()], [ratio.noise for ratio in ratios.values()]


def _layers(quantized: QuantizedProgram, floats: FloatRun) -> list[_Layer]:
    found: dict[str, _Layer] = {}
    for candidate, region in floats.layers.items():
        if candidate.fqn in found:
            found[candidate.fqn].candidates.append(candidate)
            continue
        weight = decode(quantized.program, next(filter(is_dequantize, candidate.weights)))
        movable = weight.bits <= _NARROW and len(weight.shape) == 2 and candidate.fqn.endswith(".weight")
        dynamic = any(map(is_quantize, region.nodes))
        scheme = SCHEMES["8da8w" if dynamic else "8w"] if movable and ", " not in candidate.fqn else None
        found[candidate.fqn] = _Layer(candidate.fqn, [candidate], weight, scheme, [], [])
    return list(found.values())


def _measure(
    layer: _Layer, floats: FloatRun, sets: Sequence[Any], wanted: Sequence[list[Any]], seed: int, algorithm: str
) -> None:
    """Measure the noise of a layer that is quantized alone, and estimate that of its 8-bit form."""
    nodes = [weight for candidate in layer.candidates for weight in candidate.weights]
    wider: dict[Node, Tensor] = {}
    if layer.scheme is not None:
        wider = {node: _wider(floats.float_weight(node), layer.scheme, algorithm) for node in nodes}
    narrow_here, wide_here = Ratio(), Ratio()

    def tap(candidate: Candidate, region: Region) -> Tap:
        def see(value: Tensor, read: Any) -> Tensor:
            if wider:
                wide_here.add(value, region.compute(read, wider))
            changed: Tensor = region.compute(read)
            narrow_here.add(value, changed)
            return changed

        return Tap(candidate.node, tuple(region.reads.values()), see)

    taps = [tap(candidate, floats.layers[candidate]) for candidate in layer.candidates]
    _, layer.noise = _powers(wanted, [floats.run(values, taps, seed) for values in sets])
    factor = wide_here.noise / narrow_here.noise if wider and narrow_here.noise else 1.0
    layer.wider = [noise * factor for noise in layer.noise]


def _wider(weight: Tensor, scheme: Scheme, algorithm: str) -> Tensor:
    """The 8-bit form of a weight, dequantized: the numbers that an export with the scheme has."""
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, scheme.config(PER_AXIS, algorithm))
    dequantized: Tensor = linear.weight.dequantize()
    return dequantized.to(weight.dtype)


# Bytes ----------------------------------------------------------------------------------------------------------------


def _bytes(weight: QuantizedWeight, bits: int, scales: int, of_scale: int = 1) -> int:
    return math.prod(weight.shape) * bits // 8 + scales * of_scale * weight.scale_dtype.itemsize


def _packed_bytes(weight: QuantizedWeight) -> int:
    """The bytes of a weight: 4 bits with a scale and a zero for each block, or 8 bits with a scale."""
    blocks = math.prod(size // block for size, block in zip(weight.shape, weight.block_size, strict=True))
    return _bytes(weight, _NARROW, blocks, 2) if weight.bits <= _NARROW else _bytes(weight, 8, blocks)


def _total_bytes(quantized: QuantizedProgram, layers: Sequence[_Layer]) -> int:
    """The bytes of all weights of the program, packed."""
    program = quantized.program
    packed = {layer.name: _packed_bytes(layer.weight) for layer in layers}
    others: dict[Any, int] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        held = program.constant(node)
        if held is not None and program.fqn(node) not in packed:
            others[tensor_identity(held)] = held.numel() * held.element_size()
    return sum(packed.values()) + sum(others.values())


# The file -----------------------------------------------------------------------------------------------------------


def recipe_text(recipe: Recipe, comment: str = "") -> str:
    """A recipe as the TOML file that :meth:`.Recipe.load` reads."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for entry in recipe.to_dict()["layer"]:
        # A JSON text, number or boolean is TOML too.
        lines += ["", "[[layer]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    return "\n".join(lines).lstrip("\n") + "\n"
