"""``attention``: attention without a mask, with our Triton kernel.

``attention(q, k, v, scale, head_axes)`` is ``softmax(scale * q @ k.T) @ v`` for every head, where head h of q uses the
keys of head ``h // (heads / key heads)``. The kernel computes in fp32, rounds the probabilities to the dtype of the
values, and rounds the result once.

``head_axes`` gives the axis of the heads in q, k, v and the result: 1 for [B, heads, rows, D], as in
``scaled_dot_product_attention``, or 2 for [B, rows, heads, D], as linears produce. No transposition is then needed; in
ExecuTorch's edge dialect each one is a copy. The result does not depend on strides: the kernel reads columns of a wider
tensor in place, and a tensor with other strides is copied first.

On a device without Triton the operator computes with torch's own attention.

The keyword ``gpu`` is explained at :data:`~et_cuda_passes.ops.registry.TRITON_OPERATORS`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.kernels.attention_launch import HEAD_DIMS, attention
from et_cuda_passes.ops.registry import define_triton

ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes of the CUDA kernel; on a CPU the operator has every float dtype."""


def _check(q: Tensor, k: Tensor, v: Tensor, head_axes: Sequence[int]) -> None:
    """Check that shapes and dtypes fit each other, or the kernel would read past the end of a tensor.

    Raises:
        ValueError: the message names the arguments that do not fit.
    """
    if len(head_axes) != 4 or not set(head_axes) <= {1, 2}:
        raise ValueError(
            f"attention: head_axes are four numbers, each 1 or 2, for q, k, v and the result; given {head_axes}"
        )
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention: q, k and v have four dimensions, not {q.dim()}, {k.dim()} and {v.dim()}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"attention: q, k and v have the same float dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    given = zip((q, k, v), head_axes, strict=False)
    shapes = [(t.shape[0], t.shape[at], t.shape[3 - at], t.shape[3]) for t, at in given]
    (batch, heads, _, d), keys, values = shapes
    fits = keys == values and (keys[0], keys[3]) == (batch, d) and keys[1] > 0 and heads % keys[1] == 0
    if not fits:
        raise ValueError(
            "attention: k and v have the same shape, with the batch and head dimension of q, and a number of heads "
            f"that divides q's; given [batch, heads, rows, head dimension] {', '.join(map(str, map(list, shapes)))}"
        )


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int], *, gpu: str = "") -> Tensor:
    _check(q, k, v, head_axes)
    if q.device.type != "cuda":
        q, k, v = (t if at == 1 else t.transpose(1, 2) for t, at in zip((q, k, v), head_axes, strict=False))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        return (y if head_axes[3] == 1 else y.transpose(1, 2)).clone(memory_format=torch.contiguous_format)
    if q.dtype not in ATTENTION_DTYPES or q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"attention: the CUDA kernel has bf16 and fp16 and head dimensions {', '.join(map(str, HEAD_DIMS))}; given "
            f"{q.dtype} and {q.shape[3]}"
        )
    return attention(q, k, v, scale, head_axes, gpu)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int]) -> Tensor:
    _check(q, k, v, head_axes)
    heads, rows = q.shape[head_axes[0]], q.shape[3 - head_axes[0]]
    return q.new_empty((q.shape[0], *((heads, rows) if head_axes[3] == 1 else (rows, heads)), q.shape[3]))


ATTENTION = define_triton("attention", _attention, _fake)
"""The registered overload."""
