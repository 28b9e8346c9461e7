"""The patterns that several rules share: each form in which an operator stands in an exported graph."""

import torch

from et_cuda_passes.graph.pattern import AnyOf, Call, Pattern, any_of, op

aten = torch.ops.aten


def transposed(weight: Pattern) -> AnyOf:
    """A matrix [N, K] as [K, N], by each operator that transposes."""
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
    """``x @ weight.T + bias`` with an optional bias, as written or decomposed.

    ``run_decompositions`` puts views around the matrix product of an x of more dimensions. The pattern does not
    contain them: they stay, as views of the new operator's input and output, until ``RemoveLinearViews``.
    """
    columns = transposed(weight)
    return any_of(
        op(aten.linear.default)(x, weight, bias),
        op(aten.addmm.default)(bias, x, columns),
        op(aten.mm.default)(x, columns),
        op(aten.matmul.default)(x, columns),
    )


def convolution(x: Pattern, weight: Pattern, bias: Pattern | None) -> Call:
    """A convolution of one, two or three dimensions, with any stride, padding, dilation and groups."""
    operators = op(
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.convolution.default,
    )
    return operators(x, weight, bias, ...)
