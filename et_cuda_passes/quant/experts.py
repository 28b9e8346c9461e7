"""Weights of experts, which are stacked in one tensor.

A stack becomes one matrix of all experts' rows, and one expert of it a matrix of its own. So every layout and every
rule of a matrix serves experts too.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import AnyOf, Call, Pattern, any_of, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.weight import QuantizedWeight, RowReader, WeightValues, per_row, read_plain

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


def find_expert(node: Node) -> tuple[Node, Any]:
    """The stack that ``node``, matched by :func:`selected_expert`, reads one expert of, and the expert's index.

    Raises:
        Unmet: ``node`` reads several experts, or slices across them.
        TypeError: ``node`` selects no expert.
    """
    target = op_of(node)
    if target in _SQUEEZES:
        part = node.all_input_nodes[0]
        if op_of(part) is aten.slice.Tensor:
            return _find_sliced(part)
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


def _find_sliced(node: Node) -> tuple[Node, Any]:
    bound = arguments(node)
    start = 0 if bound["start"] is None else bound["start"]
    source, count = bound["self"], bound["self"].meta["val"].shape[0]
    # A slice, unlike an index, may begin before the first expert and end behind the last.
    if not isinstance(start, int) or not -count <= start < count or node.meta["val"].shape[0] != 1:
        raise Unmet(f"{node.name}, which is not one expert")
    return source, start


def expert_weight(stack: QuantizedWeight, index: Any) -> QuantizedWeight:
    """The matrix [N, K] of the expert numbered ``index`` in ``stack`` [E, N, K].

    Raises:
        Unmet: ``index`` is computed while the program runs, or ``stack`` cannot be read as a matrix.
    """
    matrix = as_matrix(stack)
    count = num_experts(stack)
    if not isinstance(index, int):
        raise Unmet(
            f"an expert whose number is computed while the program runs ({index}); look several up at once, as in "
            "weight[ids] with a tensor ids, and multiply with bmm"
        )
    expert, n = index % count, matrix.shape[0] // count

    def reader(program: Program, _: QuantizedWeight) -> RowReader:
        read = (matrix.loader or read_plain)(program, matrix)

        def read_expert(rows: slice) -> WeightValues:
            first, last, _ = rows.indices(n)
            return read(slice(expert * n + first, expert * n + last))

        return read_expert

    block = (min(matrix.block_size[0], n), matrix.block_size[1])
    return replace(
        matrix, shape=(n, matrix.shape[1]), block_size=block, loader=reader, encoding="expert", expert=expert
    )


def num_experts(stack: QuantizedWeight) -> int:
    """E of a stack [E, N, K].

    Raises:
        Unmet: the weight is no stack of matrices.
    """
    _check_stack(stack)
    return stack.shape[0]


def as_matrix(stack: QuantizedWeight) -> QuantizedWeight:
    """A stack [E, N, K] as the matrix [E * N, K] of all experts' rows.

    Raises:
        Unmet: the weight is no stack of matrices, or several experts share a scale in part.
    """
    _check_stack(stack)
    experts, n, k = stack.shape
    return replace(stack, shape=(experts * n, k), block_size=(_rows_per_scale(stack, 1), stack.block_size[2]))


def as_transposed_matrix(stack: QuantizedWeight) -> QuantizedWeight:
    """A stack that is stored as [E, K, N], as the matrix [E * N, K] of all experts' rows.

    Raises:
        Unmet: as :func:`as_matrix`, or the scale is a number.
    """
    _check_stack(stack)
    experts, k, n = stack.shape

    def transposed(part: Tensor, *shape: int) -> Tensor:
        return part.detach().reshape(shape).transpose(1, 2)

    def reader(program: Program, weight: QuantizedWeight) -> RowReader:
        data, scale, *rest = (program.constant(node) for node in stack.sources)
        assert data is not None and scale is not None
        blocks = [size // block for size, block in zip(stack.shape, stack.block_size, strict=True)]
        integers = transposed(data, experts, k, n)

        def table(part: Tensor) -> Tensor:
            return transposed(part, *blocks).reshape(-1, blocks[1])

        scales, points = table(scale), next((table(part) for part in rest if part is not None), None)

        def read(rows: slice) -> WeightValues:
            first, last, _ = rows.indices(experts * n)
            # A view of the rows of each expert: those of one lie beside each other in no memory.
            ends = [*range(first // n * n, last, n), last]
            parts = [integers[start // n, max(first, start) % n : (end - 1) % n + 1] for start, end in pairwise(ends)]
            zero_points = None if points is None else per_row(weight, points, rows)
            return WeightValues(
                lambda: parts[0] if len(parts) == 1 else torch.cat(parts), per_row(weight, scales, rows), zero_points
            )

        return read

    if stack.scale is None:
        raise Unmet("a scale that is no tensor: quantize in blocks of (1, group size, 1)")
    block = (_rows_per_scale(stack, 2), stack.block_size[1])
    return replace(stack, shape=(experts * n, k), block_size=block, loader=reader, encoding="columns")


def _check_stack(weight: QuantizedWeight) -> None:
    if len(weight.shape) != 3:
        matrix = ": write a product with a matrix [N, K] as linear(x, weight)" if len(weight.shape) == 2 else ""
        raise Unmet(f"a weight of shape {list(weight.shape)}, which is no stack of experts [E, N, K]{matrix}")


def _rows_per_scale(stack: QuantizedWeight, n_axis: int) -> int:
    """The number of rows of the matrix of all experts that share a scale."""
    experts, n = stack.block_size[0], stack.block_size[n_axis]
    if experts != 1 and n != stack.shape[n_axis]:
        raise Unmet(
            f"scales in blocks of {list(stack.block_size)}, which several experts share in part: quantize in blocks of "
            "(1, 1, group size)"
        )
    return experts * n
