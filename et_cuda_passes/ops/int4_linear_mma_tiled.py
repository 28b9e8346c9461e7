"""``int4_linear_mma_tiled``: the int4 linear of our Triton kernel, and what may follow it in the same kernel.

``int4_linear_mma_tiled(x, packed, scale_and_zero, bias, group_size, out_features, activation, factor, addend, gated)``
is ``activation(linear(x, (q - 8) * scale + zero, bias)) * factor + addend``; the four last may be left out. The kernel
computes all of it in fp32 and rounds once.

``gated``, the weight has 2 out_features rows: of every 16 the first eight are a gate's and the others another linear's,
and it is ``activation(gate) * other * factor + addend``, out_features being a multiple of 8.

A ``triton_op``: AOTInductor sees through it and compiles the kernels into the library that it builds, while export and
ExecuTorch's passes see one operator. On a device that has no Triton it computes from the packed layout.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels.epilogue import ACTIVATIONS
from et_cuda_passes.kernels.int4_launch import GROUP_SIZES, Epilogue, int4_linear
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops.int4_linear import NAMESPACE, Int4Linear, check, check_bias, dequantize, in_rows

_LAYOUT = "mma_tiled"
_NAME = f"{NAMESPACE}::int4_linear_{_LAYOUT}"
_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
}


def _reference(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    k = x.shape[-1]
    scale = qparams[0, :, : k // group_size]
    zero = qparams[1, :, : k // group_size] if qparams.shape[0] == 2 else torch.zeros_like(scale)
    weight = dequantize(mma_tiled.unpack(packed)[:, :k], scale, zero, group_size, x.dtype)
    return F.linear(x, weight)


def _halves(y: Tensor) -> tuple[Tensor, Tensor]:
    """Of every 16 columns the first eight, and the others."""
    gate, other = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return gate.flatten(-2), other.flatten(-2)


def _check(
    x: Tensor,
    packed: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    group: int,
    n: int,
    activation: str,
    gated: bool,
    *others: Tensor | None,
) -> None:
    check(_LAYOUT, x, packed, qparams, group, n)
    check_bias(f"int4_linear_{_LAYOUT}", x, bias, 2 * n if gated else n)
    if gated and (n % 8 or packed.shape[0] != 2 * n):
        raise ValueError(
            f"int4_linear_{_LAYOUT}: gated, a weight has 2 out_features rows, and out_features is a multiple of 8; "
            f"given {packed.shape[0]} rows and out_features {n}"
        )
    if not gated and packed.shape[0] != n:
        raise ValueError(f"int4_linear_{_LAYOUT}: {packed.shape[0]} packed rows for out_features = {n}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"int4_linear_{_LAYOUT} has no activation {activation!r}; it has {', '.join(ACTIVATIONS[1:])}")
    shape = (*x.shape[:-1], n)
    for other in others:
        if other is not None and (other.dtype != x.dtype or not _may_be(other.shape, shape)):
            raise ValueError(
                f"int4_linear_{_LAYOUT}: factor and addend are like the output, {x.dtype} {shape}; given {other.dtype} "
                f"{tuple(other.shape)}"
            )


def _may_be(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether the shapes are of one rank, and no size of one is known to differ from the other's."""
    return len(shape) == len(wanted) and not any(
        statically_known_true(a != b) for a, b in zip(shape, wanted, strict=True)
    )


@torch.library.triton_op(_NAME, mutates_args=())
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
) -> Tensor:
    _check(x, packed, scale_and_zero, bias, group_size, out_features, activation, gated, factor, addend)
    if x.device.type != "cuda":
        y = _reference(x, packed, scale_and_zero, group_size)
        y, other = _halves(y if bias is None else y + bias) if gated else (y if bias is None else y + bias, None)
        y = _ACTIVATE[activation](y)
        y = y if other is None else y * other
        y = y if factor is None else y * factor
        return (y if addend is None else y + addend).contiguous()
    if group_size not in GROUP_SIZES or scale_and_zero.dtype != x.dtype or x.dtype not in (torch.bfloat16, torch.half):
        raise ValueError(
            f"int4_linear_{_LAYOUT}: the CUDA kernel has bf16 and fp16, with scales of the same dtype, and group sizes "
            f"{', '.join(map(str, GROUP_SIZES))}; given x {x.dtype}, scales {scale_and_zero.dtype}, group {group_size}"
        )
    bias, factor, addend = (None if tensor is None else in_rows(tensor) for tensor in (bias, factor, addend))
    epilogue = Epilogue(bias, activation, factor, addend, gated)
    return int4_linear(in_rows(x), packed, scale_and_zero, group_size, epilogue)


def _fake(
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
) -> Tensor:
    _check(x, packed, scale_and_zero, bias, group_size, out_features, activation, gated, factor, addend)
    return x.new_empty((*x.shape[:-1], out_features))


_int4_linear.register_fake(_fake)
MMA_TILED = Int4Linear(_LAYOUT, {}, _reference, torch.ops.et_cuda_passes.int4_linear_mma_tiled.default)
