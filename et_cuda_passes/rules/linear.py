"""``linear`` as a pattern: every form in which a linear stands in an exported graph, as written and as decomposed."""

import torch

from et_cuda_passes.graph.pattern import AnyOf, Pattern, any_of, op

aten = torch.ops.aten


def transposed(weight: Pattern) -> AnyOf:
    """A matrix [N, K] as [K, N], in each way that torch has to say it."""
    return any_of(
        op(aten.t.default, aten.numpy_T.default, aten.mT.default)(weight, shared=True),
        op(aten.permute.default)(weight, [1, 0], shared=True),
        op(aten.permute.default)(weight, [-1, -2], shared=True),
        *(
            op(aten.transpose.int)(weight, first, second, shared=True)
            for first, second in ((0, 1), (1, 0), (-2, -1), (-1, -2), (0, -1), (-1, 0), (1, -2), (-2, 1))
        ),
    )


def linear(x: Pattern, weight: Pattern, bias: Pattern | None) -> AnyOf:
    """``x @ weight.T + bias`` with an optional bias.

    The views that ``run_decompositions`` puts around a matrix product of more dimensions are no part of the pattern:
    they stay, as views of the new operator's input and output, until :mod:`et_cuda_passes.rules.linear_views`.
    """
    return any_of(
        op(aten.linear.default)(x, weight, bias),
        op(aten.addmm.default)(bias, x, transposed(weight)),
        op(aten.mm.default)(x, transposed(weight)),
        op(aten.matmul.default)(x, transposed(weight)),
    )
