"""Weights of experts, stacked in one tensor: all of them as one matrix of their rows, and one of them alone.

Reading them so, every layout and every rule of a matrix serves experts too.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import AnyOf, Call, Pattern, any_of, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.forms import decoder_for
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues, load_plain

aten = torch.ops.aten

_SQUEEZES = frozenset({aten.squeeze.dim, aten.squeeze.dims})
_unbound: Callable[..., Call] = op(operator.getitem)


def selected_expert(stack: Pattern, name: str) -> AnyOf:
    """One expert [N, K] of ``stack`` [E, N, K], by an index or as a part of a split, bound to ``name``."""
    parts = (
        op(aten.slice.Tensor)(stack, 0, ..., shared=True),
        _unbound(op(aten.split.Tensor)(stack, 1, shared=True), ..., shared=True),
        _unbound(op(aten.split_with_sizes.default)(stack, ..., shared=True), ..., shared=True),
    )
    return any_of(
        op(aten.select.int)(stack, 0, ..., name=name, shared=True),
        _unbound(op(aten.unbind.int)(stack, shared=True), ..., name=name, shared=True),
        *(op(aten.squeeze.dim)(part, 0, name=name, shared=True) for part in parts),
        *(op(aten.squeeze.dims)(part, [0], name=name, shared=True) for part in parts),
    )


def decode_expert(program: Program, node: Node) -> QuantizedWeight:
    """The matrix [N, K] of the expert that ``node``, matched by :func:`selected_expert`, picks.

    Raises:
        Unmet: the expert is chosen while the program runs, or the stack is none that could be packed.
    """
    source, index = _picked(node)
    stack = as_matrix(program, source)
    count = num_experts(program, source)
    if not isinstance(index, int):
        raise Unmet(
            f"an expert whose number is computed while the program runs ({index}); look several up at once, as in "
            "weight[ids] with a tensor ids, and multiply with bmm"
        )
    expert, n = index % count, stack.shape[0] // count
    rows = slice(expert * n, (expert + 1) * n)

    def read(program: Program, _: QuantizedWeight) -> WeightValues:
        whole = (stack.loader or load_plain)(program, stack)
        points = None if whole.zero_point is None else whole.zero_point[rows]
        return WeightValues(lambda: whole.data[rows], whole.scale[rows], points)

    block = (min(stack.block_size[0], n), stack.block_size[1])
    return replace(stack, shape=(n, stack.shape[1]), block_size=block, loader=read, encoding="expert", expert=expert)


def _picked(node: Node) -> tuple[Node, Any]:
    """The dequantize node that ``node`` reads one expert of, and the expert's number.

    Raises:
        Unmet: it reads several experts, or something across them.
    """
    target = op_of(node)
    if target in _SQUEEZES:
        part = node.all_input_nodes[0]
        if op_of(part) is aten.slice.Tensor:
            return _sliced(part)
        pieces = part.all_input_nodes[0]
        sizes = arguments(pieces).get("split_sizes")
        index: Any = part.args[1]
        if sizes is None:  # in pieces of one expert
            return pieces.all_input_nodes[0], index
        if arguments(pieces)["dim"] != 0 or sizes[index] != 1:
            raise Unmet(f"{pieces.name}, which does not split the stack into single experts")
        return pieces.all_input_nodes[0], sum(sizes[:index])
    if target is operator.getitem:
        return node.all_input_nodes[0].all_input_nodes[0], node.args[1]
    if target is not aten.select.int:
        raise TypeError(f"{node.name} calls no operator that dequantizes")
    bound = arguments(node)
    return bound["self"], bound["index"]


def _sliced(node: Node) -> tuple[Node, Any]:
    bound = arguments(node)
    start = 0 if bound["start"] is None else bound["start"]
    source, count = bound["self"], bound["self"].meta["val"].shape[0]
    # A slice, unlike an index, may begin before the first and end behind the last.
    if not isinstance(start, int) or not -count <= start < count or node.meta["val"].shape[0] != 1:
        raise Unmet(f"{node.name}, which is not one expert")
    return source, start


def num_experts(program: Program, node: Node) -> int:
    """E, the number of experts in the stack that dequantize ``node`` gives."""
    return _whole(program, node).shape[0]


def as_matrix(program: Program, node: Node) -> QuantizedWeight:
    """The weight [E, N, K] that dequantize ``node`` gives, as the matrix [E * N, K] of all experts' rows.

    Raises:
        Unmet: it is no such weight, or its blocks are not the rows of whole experts.
    """
    whole = _whole(program, node)
    experts, n, k = whole.shape
    return replace(whole, shape=(experts * n, k), block_size=(_rows(whole, 1), whole.block_size[2]))


def as_transposed_matrix(program: Program, node: Node) -> QuantizedWeight:
    """As :func:`as_matrix`, of a weight that is stored as [E, K, N].

    Raises:
        Unmet: as there.
    """
    whole = _whole(program, node)
    experts, k, n = whole.shape

    def turned(part: Tensor, *shape: int) -> Tensor:
        return part.detach().reshape(shape).transpose(1, 2)

    def read(program: Program, weight: QuantizedWeight) -> WeightValues:
        data, scale, *rest = (program.constant(node) for node in whole.sources)
        assert data is not None and scale is not None
        blocks = [size // block for size, block in zip(whole.shape, whole.block_size, strict=True)]

        def table(part: Tensor) -> Tensor:
            return turned(part, *blocks).reshape(-1, blocks[1]).repeat_interleave(weight.block_size[0], dim=0)

        points = next((table(part) for part in rest if part is not None), None)
        return WeightValues(lambda: turned(data, experts, k, n).reshape(-1, k), table(scale), points)

    if whole.scale is None:  # one number for all weights, whichever way they lie
        raise Unmet("a scale that is no tensor: quantize in blocks of (1, group size, 1)")
    block = (_rows(whole, 2), whole.block_size[1])
    return replace(whole, shape=(experts * n, k), block_size=block, loader=read, encoding="columns")


def _whole(program: Program, node: Node) -> QuantizedWeight:
    decoder = decoder_for(op_of(node))
    if decoder is None:
        raise TypeError(f"{node.name} calls no operator that dequantizes")
    whole = decoder(program, node)
    if len(whole.shape) != 3:
        matrix = ": write a product with a matrix [N, K] as linear(x, weight)" if len(whole.shape) == 2 else ""
        raise Unmet(f"a weight of shape {list(whole.shape)}, which is no stack of experts [E, N, K]{matrix}")
    return whole


def _rows(whole: QuantizedWeight, axis: int) -> int:
    """How many rows of all experts' rows share their scales; ``axis`` is that of N."""
    experts, n = whole.block_size[0], whole.block_size[axis]
    if experts != 1 and n != whole.shape[axis]:
        raise Unmet(
            f"scales in blocks of {list(whole.block_size)}, which several experts share in part: quantize in blocks of "
            "(1, 1, group size)"
        )
    return experts * n
