"""``suggest_recipe``: the layers to move from 4 to 8 bits, so that the whole output reaches a signal-to-noise ratio.

First, each layer is quantized alone, in a program with floating-point weights. The noise that this causes at the whole
output gives an order: the layer with the most dB per byte is first. This is a greedy choice, and need not lead to the
smallest set of layers.

Then the program runs with the first n layers in 8 bits, with the weights that an export would give them, and a
bisection finds n. The ratio of a suggestion is that of such a run. A sum of the layers' noises would predict it badly:
with 4 bits in every layer the noise is so large that the layers do not act independently.
"""

import glob
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

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
        alone_db: the ratio of the whole output if this layer alone is quantized with 4 bits.
        more_bytes: how much larger its weight becomes.
    """

    layer: str
    scheme: str
    alone_db: float
    more_bytes: int


@dataclass(frozen=True)
class Suggestion:
    """The result of :func:`suggest_recipe`.

    Attributes:
        moves: the layers, in the order in which they were chosen.
        before_db: the ratio of the whole output without the moves.
        predicted_db: the ratio with the moves, on the same inputs.
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
        """A short text: the ratios, the bytes, and the layers."""
        size = f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        lines = [
            f"suggestion: {len(self.moves)} layer{'s' if len(self.moves) != 1 else ''} to 8 bits, weights {size}; "
            f"whole output {self.before_db:.1f} dB, predicted {self.predicted_db:.1f} dB"
        ]
        if self.moves:
            lines.append("the layers were chosen greedily, by dB per byte:")
        lines += [
            f"  {move.layer}: {move.scheme}, {move.more_bytes:,} bytes more; quantized alone {move.alone_db:.1f} dB"
            for move in self.moves
        ]
        return "\n".join(lines)


@dataclass
class _Layer:
    """A weight, its noise at each output if it alone is quantized, and its 8-bit form if it can be moved.

    ``factor`` is the noise with 8 bits over that with 4, at the output of the layer.
    """

    name: str
    candidates: list[Candidate]
    weight: QuantizedWeight
    scheme: Scheme | None
    noise: list[float] = field(default_factory=list)
    wide: Tensor | None = None
    factor: float = 1.0

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def dequantizes(self) -> list[Node]:
        return [weight for candidate in self.candidates for weight in candidate.weights]

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
    part: Callable[[int, int], None] = lambda done, total: None,
) -> Suggestion:
    """Suggest the layers to move from 4 to 8 bits with one scale per row.

    The program runs once for each quantized weight and input set, and a few times more.

    Args:
        program: a quantized program.
        float_program: the program before its quantization, or its weights by FQN.
        target_snr: as for :meth:`NoiseModel.suggest`.
        max_bytes: as for :meth:`NoiseModel.suggest`.
        inputs: as for :func:`~et_cuda_passes.accuracy.accuracy`.
        seed: as for it.
        algorithm: how the 8-bit scales are chosen: that of the export.
        progress: is called with the name of each step: the whole output, the layers, the choice.
        part: is called after each layer with the number of measured layers, and of all.

    Raises:
        ValueError: neither ``target_snr`` nor ``max_bytes`` is given, the inputs do not fit, no weight has a
            floating-point one, or the ratio cannot be reached within the bytes; the message says what can be.
    """
    _check_aim(target_snr, max_bytes)
    model = NoiseModel(program, float_program, inputs, seed, algorithm=algorithm, progress=progress, part=part)
    progress("choosing layers")
    return model.suggest(target_snr, max_bytes)


def _check_aim(target_snr: float | None, max_bytes: int | None) -> None:
    if target_snr is None and max_bytes is None:
        raise UsageError("a suggestion needs a ratio to reach or a limit of bytes: give target_snr, max_bytes, or both")


class NoiseModel:
    """The noise of each layer of a program, measured once for several suggestions.

    Attributes:
        layers: each weight, with its noise at each output.
        total_bytes: the bytes of all weights, packed.
        before_db: the ratio of the whole output, with all layers quantized.
    """

    def __init__(
        self,
        program: ExportedProgram,
        float_program: FloatWeights,
        inputs: Sequence[Sequence[Any]] | None = None,
        seed: int | None = None,
        *,
        algorithm: str = "hqq",
        progress: Callable[[str], None] = lambda step: None,
        part: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """The arguments are those of :func:`suggest_recipe`."""
        self._quantized = QuantizedProgram(program)
        self._floats = FloatRun(self._quantized, float_program)
        self._sets = input_sets(self._quantized.exported, self._quantized.runner, inputs, seed)
        self._seed = seed or 0
        progress("measuring the whole output")
        self._wanted = [self._floats.run(values, seed=self._seed) for values in self._sets]
        self._signal, self._noise = self._simulated(())
        self.before_db = self._ratio(self._noise)
        self.layers = _layers(self._quantized, self._floats)
        self.total_bytes = _total_bytes(self._quantized, self.layers)
        progress(f"measuring {len(self.layers)} layers one by one")
        for done, layer in enumerate(self.layers, 1):
            self._measure(layer, algorithm)
            part(done, len(self.layers))

    def suggest(self, target_snr: float | None = None, max_bytes: int | None = None) -> Suggestion:
        """Choose layers.

        Args:
            target_snr: the signal-to-noise ratio of the whole output to reach, in dB; of the output with the lowest one
                if there are several. None for all layers that fit into ``max_bytes``.
            max_bytes: the most bytes of all weights: those with 4 bits in half a byte each, with a scale and a zero for
                each group; those with 8 bits in a byte each, with a scale for each row; others as they are. The layout
                of a target may add padding. None for any number.

        Raises:
            ValueError: neither is given, or they cannot be reached; the message says what can be.
        """
        _check_aim(target_snr, max_bytes)
        if max_bytes is not None and self.total_bytes > max_bytes:
            raise UsageError(
                f"the weights have {self.total_bytes:,} bytes without any move, more than max_bytes={max_bytes:,}"
            )
        order, size = [], self.total_bytes
        for layer in sorted((each for each in self.layers if each.factor < 1), key=self._gain_per_byte, reverse=True):
            if max_bytes is None or size + layer.more_bytes <= max_bytes:
                order.append(layer)
                size += layer.more_bytes
        reached = {0: self.before_db}
        count = 0
        if order and (target_snr is None or self.before_db < target_snr):
            count = len(order)
            reached[count] = self._ratio(self._simulated(order)[1])
        if target_snr is not None and reached[count] < target_snr:
            limit = "" if max_bytes is None else f" within max_bytes={max_bytes:,}"
            raise UsageError(
                f"target_snr={target_snr:g} is out of reach{limit}: with {count} layers in 8 bits, {size:,} bytes, it "
                f"is {reached[count]:.1f} dB; give a lower ratio or more bytes, or leave layers in floating point by a "
                "recipe"
            )
        too_few = 0
        while target_snr is not None and count - too_few > 1:
            middle = (too_few + count) // 2
            reached[middle] = self._ratio(self._simulated(order[:middle])[1])
            too_few, count = (too_few, middle) if reached[middle] >= target_snr else (middle, count)
        moves = tuple(
            Move(each.module, cast(Scheme, each.scheme).name, self._ratio(each.noise), each.more_bytes)
            for each in order[:count]
        )
        more = sum(move.more_bytes for move in moves)
        return Suggestion(moves, self.before_db, reached[count], self.total_bytes, self.total_bytes + more)

    def _gain_per_byte(self, layer: _Layer) -> float:
        """The dB for each byte that a layer gains if noises add up, at the output where it gains most."""
        totals = [sum(each.noise[index] for each in self.layers) for index in range(len(self._signal))]
        saved = [noise * (1 - layer.factor) for noise in layer.noise]
        share = max((part / total for part, total in zip(saved, totals, strict=True) if total), default=0.0)
        # The last layer with noise would gain without limit.
        return -10 * math.log10(max(1 - share, 1e-12)) / max(layer.more_bytes, 1)

    def _ratio(self, noise: Sequence[float]) -> float:
        """The lowest ratio of an output."""
        return min(to_decibels(*pair) for pair in zip(self._signal, noise, strict=True) if pair[0])

    def _simulated(self, moved: Sequence[_Layer]) -> tuple[list[float], list[float]]:
        """The power of the signal and of the noise of each output, with the layers ``moved`` in 8 bits."""
        replaced: dict[Node, Callable[..., Tensor]] = {}
        for layer in moved:
            for node in layer.dequantizes:
                replaced[node] = lambda *_, layer=layer, node=node, **__: _dequantized(layer, node)
        run = self._quantized.runner.run
        return _powers(self._wanted, [run(values, (), replaced, self._seed) for values in self._sets])

    def _measure(self, layer: _Layer, algorithm: str) -> None:
        """Measure the noise of a layer that is quantized alone, and how much smaller it is with 8 bits."""
        if layer.scheme is not None:
            layer.wide = _wide(self._floats.float_weight(layer.dequantizes[0]), layer.scheme, algorithm)
        narrow_here, wide_here = Ratio(), Ratio()

        def tap(candidate: Candidate, region: Region) -> Tap:
            def see(value: Tensor, read: Any) -> Tensor:
                if layer.wide is not None:
                    wide = {node: _dequantized(layer, node) for node in candidate.weights}
                    wide_here.add(value, region.compute(read, wide))
                changed: Tensor = region.compute(read)
                narrow_here.add(value, changed)
                return changed

            return Tap(candidate.node, tuple(region.reads.values()), see)

        taps = [tap(candidate, self._floats.layers[candidate]) for candidate in layer.candidates]
        runs = [self._floats.run(values, taps, self._seed) for values in self._sets]
        layer.noise = _powers(self._wanted, runs)[1]
        if layer.wide is not None and narrow_here.noise:
            layer.factor = wide_here.noise / narrow_here.noise


# Measuring ------------------------------------------------------------------------------------------------------------


def _powers(wanted: Sequence[list[Any]], got: Sequence[list[Any]]) -> tuple[list[float], list[float]]:
    """The power of the signal and of the noise of each floating-point output, over all input sets.

    Raises:
        ValueError: an output has no ratio, or no output has a signal.
    """
    ratios: dict[int, Ratio] = {}
    for first, second in zip(wanted, got, strict=True):
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if isinstance(a, Tensor) and a.dtype.is_floating_point:
                ratios.setdefault(index, Ratio()).add(a, b)
    for index, ratio in ratios.items():
        if ratio.decibels is not None and math.isnan(ratio.decibels):
            raise UsageError(f"output {index} is infinite or NaN where the float program's is finite, or everywhere")
    if not any(ratio.signal for ratio in ratios.values()):
        raise UsageError("the program has no floating-point output that is not 0, so its accuracy is not defined")
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
        found[candidate.fqn] = _Layer(candidate.fqn, [candidate], weight, scheme)
    return list(found.values())


def _wide(weight: Tensor, scheme: Scheme, algorithm: str) -> Tensor:
    """The 8-bit form of a weight: the integers and scales that an export with the scheme has."""
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, scheme.config(PER_AXIS, algorithm))
    return cast(Tensor, linear.weight)


def _dequantized(layer: _Layer, dequantize: Node) -> Tensor:
    """The weight in 8 bits, in place of what ``dequantize`` computes."""
    wide: Any = layer.wide
    found: Tensor = wide.dequantize().to(dequantize.meta["val"].dtype)
    return found


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
