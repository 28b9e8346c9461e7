"""``int4_linear_mma_tiled``: the int4 linear of our Triton kernel, with an epilogue in the same kernel.

``int4_linear_mma_tiled(x, packed, scale_and_zero, bias, group_size, out_features, activation, factor, addend, gated,
float4)`` is ``activation(linear(x, (q - 8) * scale + zero, bias)) * factor + addend``. The last five arguments are
optional. The kernel computes in fp32 and rounds once.

With ``gated`` the weight has 2 out_features rows: in each 16 rows the first eight belong to a gate and the others to a
second linear. The result is ``activation(gate) * other * factor + addend``; out_features is a multiple of 8.

With ``float4`` the nibbles are numbers in float4_e2m1fn, in place of q - 8, and there are no zeros.

The keyword ``gpu`` is explained at :data:`~et_cuda_passes.ops.registry.TRITON_OPERATORS`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels.epilogue import ACTIVATIONS
from et_cuda_passes.kernels.linear_launch import INT4_GROUP_SIZES, Epilogue, int4_linear
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops.int4_linear import Int4Linear, check_bias, check_constants, contiguous, reference_matmul
from et_cuda_passes.ops.registry import define_triton

_LAYOUT = mma_tiled.LAYOUT
_NAME = f"int4_linear_{_LAYOUT.name}"


def split_gate(y: Tensor) -> tuple[Tensor, Tensor]:
    """The first eight columns of each 16, and the others."""
    gate, other = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return gate.flatten(-2), other.flatten(-2)


def _check(
    x: Tensor,
    packed: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    group_size: int,
    n: int,
    activation: str = "",
    factor: Tensor | None = None,
    addend: Tensor | None = None,
    gated: bool = False,
    float4: bool = False,
) -> None:
    check_constants(_LAYOUT, x, packed, qparams, group_size, n)
    check_bias(_NAME, x, bias, 2 * n if gated else n)
    if gated and (n % 8 or packed.shape[0] != 2 * n):
        raise ValueError(
            f"{_NAME}: a gated weight has 2 out_features rows, and out_features is a multiple of 8; given "
            f"{packed.shape[0]} rows and out_features {n}"
        )
    if float4 and qparams.shape[0] != 1:
        raise ValueError(f"{_NAME}: a weight in float4 has no zeros, given scale_and_zero {tuple(qparams.shape)}")
    if not gated and packed.shape[0] != n:
        raise ValueError(f"{_NAME}: {packed.shape[0]} packed rows for out_features = {n}")
    if activation and activation not in ACTIVATIONS:
        raise ValueError(f"{_NAME} has no activation {activation!r}; it has {', '.join(ACTIVATIONS)}")
    shape = (*x.shape[:-1], n)
    for other in (factor, addend):
        if other is not None and (other.dtype != x.dtype or not shapes_compatible(other.shape, shape)):
            raise ValueError(
                f"{_NAME}: factor and addend must be like the output, {x.dtype} {shape}; given {other.dtype} "
                f"{tuple(other.shape)}"
            )


def shapes_compatible(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether the shapes have the same rank and no pair of sizes is known to differ."""
    return len(shape) == len(wanted) and not any(
        statically_known_true(a != b) for a, b in zip(shape, wanted, strict=True)
    )


def _int4_linear(
    x: Tensor,
    packed: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: str = "",
    factor: Tensor | None = None,
    addend: Tensor | None = None,
    gated: bool = False,
    float4: bool = False,
    *,
    gpu: str = "",
) -> Tensor:
    _check(x, packed, scale_and_zero, bias, group_size, out_features, activation, factor, addend, gated, float4)
    if x.device.type != "cuda":
        y = reference_matmul(_LAYOUT, x, packed, scale_and_zero, group_size, float4)
        y = y if bias is None else y + bias
        y, other = split_gate(y) if gated else (y, None)
        y = ACTIVATIONS[activation](y) if activation else y
        y = y if other is None else y * other
        y = y if factor is None else y * factor
        return (y if addend is None else y + addend).contiguous()
    if (
        group_size not in INT4_GROUP_SIZES
        or scale_and_zero.dtype != x.dtype
        or x.dtype not in (torch.bfloat16, torch.half)
    ):
        raise ValueError(
            f"{_NAME}: the CUDA kernel has bf16 and fp16, with scales of the same dtype, and group sizes "
            f"{', '.join(map(str, INT4_GROUP_SIZES))}; given x {x.dtype}, scales {scale_and_zero.dtype}, "
            f"group {group_size}"
        )
    bias, factor, addend = (None if tensor is None else contiguous(tensor) for tensor in (bias, factor, addend))
    epilogue = Epilogue(bias, activation, factor, addend, gated)
    return int4_linear(contiguous(x), packed, scale_and_zero, group_size, epilogue, gpu, float4)


def _fake(x: Tensor, *rest: Any, **keywords: Any) -> Tensor:
    _check(x, *rest, **keywords)
    return x.new_empty((*x.shape[:-1], rest[4]))


MMA_TILED = Int4Linear(_LAYOUT, define_triton(_NAME, _int4_linear, _fake))
"""The int4 linear of the ``mma_tiled`` layout."""
