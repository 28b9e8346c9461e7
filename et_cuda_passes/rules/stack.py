"""A stack of experts' matrices as a pattern: every form in which one operand of a product holds it."""

import torch

from et_cuda_passes.graph.pattern import AnyOf, Pattern, any_of, op

aten = torch.ops.aten
TURNED = "turned"
"""Bound where a stack's two last axes change places."""


def turned(stack: Pattern) -> AnyOf:
    """[E, N, K] as [E, K, N], in each way that torch has to say it."""
    pairs = ((first, second) for first in (1, -2) for second in (2, -1))
    return any_of(
        op(aten.mT.default)(stack, name=TURNED, shared=True),
        op(aten.permute.default)(stack, [0, 2, 1], name=TURNED, shared=True),
        *(
            op(aten.transpose.int)(stack, *axes, name=TURNED, shared=True)
            for pair in pairs
            for axes in (pair, pair[::-1])
        ),
    )


def operand(stack: Pattern) -> AnyOf:
    """A stack as it is, or turned, behind the views that ``run_decompositions`` makes of a matmul."""
    forms = any_of(turned(stack), stack)
    expanded = op(aten.expand.default)(forms, ..., name="expanded", shared=True)
    return any_of(forms, op(aten.view.default)(expanded, ..., name="viewed", shared=True))


def chosen(stack: Pattern, ids: Pattern) -> AnyOf:
    """The matrices of a stack that a tensor of experts' numbers chooses."""
    return any_of(
        op(aten.index.Tensor)(stack, [ids], shared=True),
        op(aten.index_select.default)(stack, 0, ids, shared=True),
    )
