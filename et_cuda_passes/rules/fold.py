"""Quantized tensors become floats again, for a backend that has no kernel for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_name, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Notes, Rule, requirement
from et_cuda_passes.ops import DEQUANTIZE_FLOAT4, DEQUANTIZE_FLOAT8
from et_cuda_passes.quant.activations import QUANTIZE, decode_dynamic, quantized_activation_of
from et_cuda_passes.quant.candidates import consumers
from et_cuda_passes.quant.decoders import DEQUANTIZE, dequantized, weight_of
from et_cuda_passes.rules.requirements import (
    backend_has_dtype,
    dtype_names,
    scales_are_finite,
    stored_scales,
    weight_has_data,
)
from et_cuda_passes.rules.values import nonfinite

aten = torch.ops.aten
_ADVISED_READERS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.embedding.default,
)


@requirement(
    "readers of float activations",
    hint="a float weight under quantized activations has no kernel either: meet the requirements of the rules that "
    "keep such a linear",
)
def readers_have_float_activations(m: Match) -> Failure | None:
    """The delegate quantizes an activation only as a part of a linear that it computes as a whole."""
    kept = m.program.kept
    found = (quantized_activation_of(reader) for reader in consumers(m.weight) if reader not in kept)
    text = next(filter(None, found), "")
    return Failure(text) if text else None


_REQUIREMENTS = (
    weight_has_data,
    backend_has_dtype,
    readers_have_float_activations,
    scales_are_finite(lambda m: nonfinite(stored_scales(m))),
)


def _folded(m: Match) -> str:
    return f"{weight_of(m).scheme} -> float weight"


def _notes(m: Match) -> Notes:
    effect = f"folded to {dtype_names([m.val(m.weight).dtype])}, as large as before it was quantized"
    if m.unmet and not weight_of(m).numbers:
        # The target has a kernel for the scheme, and this layer does not meet its requirements.
        return Notes(f"{effect}: {'. '.join(map(str, m.unmet))}")
    advised = m.target.advised
    readers = [op_of(reader) for reader in consumers(m.weight)]
    others = sorted({op_name(read) for read in readers if read not in _ADVISED_READERS and read is not None})
    if others and not weight_of(m).numbers:
        # The advised scheme is for linears and embeddings.
        return Notes(
            f"target {m.target.name} has no kernel for {', '.join(others)} with this {weight_of(m).scheme} weight: "
            f"{effect}; leave this layer unquantized"
        )
    table = advised.table and all(read is aten.embedding.default for read in readers)
    scheme = advised.for_bits(weight_of(m).bits)
    instead = (
        f"for a quantized embedding quantize with {advised.table}"
        if table
        else f"for {'a 4-bit' if scheme == advised.four_bits else 'an 8-bit'} kernel quantize with {scheme}"
    )
    return Notes(f"target {m.target.name} has no kernel for this {weight_of(m).scheme} weight: {effect}; {instead}")


def _fold(b: Builder, m: Match) -> Node:
    weight, node = weight_of(m), m.root
    operator: Callable[..., Tensor] = cast(Any, op_of(node))

    def value(argument: Node) -> Tensor:
        tensor = b.program.constant(argument)
        assert tensor is not None
        return tensor.detach()

    def fold() -> Tensor:
        return operator(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    # The arguments that are not constants, by name: two dequantize nodes with equal ones share the result.
    given = [(name, "" if isinstance(each, Node) else repr(each)) for name, each in arguments(node).items()]
    return b.constant(f"{weight.fqn}.dequantized", weight.sources, ("dequantized", operator, tuple(given)), fold)


@dataclass(frozen=True)
class FoldDequantize(Rule):
    """dequantize(constant) -> a float constant, computed at compile time

    It is for a target that has no kernel for a quantized weight and would compute something else without an error, or
    fail. The weight becomes as large as before it was quantized. The report says so, and names the scheme that avoids
    it.
    """

    requirements = _REQUIREMENTS

    def pattern(self) -> Pattern:
        """Any dequantized weight, with any readers."""
        return dequantized(..., name="weight")

    def summary(self, m: Match) -> str:
        """The scheme that is given up."""
        return _folded(m)

    def notes(self, *ms: Match) -> Notes:
        """The cost of the fold, and the scheme that avoids it."""
        return _notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Run the dequantize operator itself on the constants, so that it rounds as before."""
        return _fold(b, m)


@dataclass(frozen=True)
class FoldFloats(Rule):
    """dequantize(constant of 8-bit or 4-bit floats) -> a float constant, computed at compile time

    It is for a target that has kernels for integers, and compiles the dequantize of those that they do not support. The
    dequantize of floats would be computed in every call.
    """

    requirements = _REQUIREMENTS

    def pattern(self) -> Pattern:
        """A weight in floats, with any readers."""
        return op(DEQUANTIZE_FLOAT8, DEQUANTIZE_FLOAT4)(..., name="weight")

    def summary(self, m: Match) -> str:
        """The scheme that is given up."""
        return _folded(m)

    def notes(self, *ms: Match) -> Notes:
        """The cost of the fold, and the scheme that avoids it."""
        return _notes(ms[0])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Run the dequantize operator itself on the constants, so that it rounds as before."""
        return _fold(b, m)


@requirement("an activation that is quantized while the program runs, to the same dtype")
def quantization_can_be_dropped(m: Match) -> Failure | None:
    """Its scale comes from the activation itself, and a reader gets the dtype that it got before."""
    m.memoize(decode_dynamic, "activation")
    before, after = m.val(m.x).dtype, m.val(m.activation).dtype
    return None if before is after else Failure(f"{before} quantized and dequantized to {after}")


@requirement("a reader that no earlier rule keeps")
def has_a_reader_that_is_not_kept(m: Match) -> Failure | None:
    """A linear that is kept reads the quantized activation."""
    readers = list(m.root.users)
    return None if any(reader not in m.program.kept for reader in readers) else Failure(", ".join(map(str, readers)))


@dataclass(frozen=True)
class DropActivationQuantization(Rule):
    """dequantize(quantize(x)) -> x, where torchao quantizes x while the program runs

    It is for a target that computes linears with float activations. The results are those of the same weights without
    the rounding of the activations to 8 bits. On cuda, metal and cpu operators round them, unless a rule's option
    ``drop_activation_quantization`` is set. A linear that an earlier rule keeps reads
    the quantized activation.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (quantization_can_be_dropped, has_a_reader_that_is_not_kept)

    def pattern(self, x: Capture) -> Pattern:
        """A quantized activation."""
        return op(DEQUANTIZE)(op(QUANTIZE)(x, ..., shared=True), ..., name="activation")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The activation itself."""
        x: Node = m.x
        return x
