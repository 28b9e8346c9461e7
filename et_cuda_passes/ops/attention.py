"""``attention``: attention without a mask, of our Triton kernel.

``attention(q, k, v, scale, head_axes)`` is ``softmax(scale * q @ k.T) @ v`` for every head, q's head h with the keys of
head ``h // (heads / key heads)``. The kernel computes it in fp32, the weights of the values rounded to their dtype, and
rounds once more.

``head_axes`` says where q, k, v and the result have their heads, in this order: 1 for [B, heads, rows, D], as
``scaled_dot_product_attention`` takes and gives them, or 2 for [B, rows, heads, D], as linears do. So nothing is copied
for a transposition, which in ExecuTorch's edge dialect is always a copy. The result does not depend on strides; columns
of a wider tensor are read where they lie, and what lies otherwise is copied.

A ``triton_op``: AOTInductor sees through it and compiles the kernel into the library that it builds, while export and
ExecuTorch's passes see one operator. On a device that has no Triton it computes with torch's own attention.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.kernels.attention_launch import HEAD_DIMS, attention
from et_cuda_passes.ops.int4_linear import NAMESPACE

ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
"""What the kernel computes with; on a CPU the operator has any float."""


def _check(q: Tensor, k: Tensor, v: Tensor, head_axes: Sequence[int]) -> None:
    """The kernel reads what it is told is there: what does not fit together would be read past its end.

    Raises:
        ValueError: naming what does not fit.
    """
    if len(head_axes) != 4 or not set(head_axes) <= {1, 2}:
        raise ValueError(f"attention: head_axes are four, each 1 or 2, of q, k, v and the result; given {head_axes}")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention: q, k and v have four dimensions, not {q.dim()}, {k.dim()} and {v.dim()}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"attention: q, k and v are of one float dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    given = zip((q, k, v), head_axes, strict=False)
    shapes = [(t.shape[0], t.shape[at], t.shape[3 - at], t.shape[3]) for t, at in given]
    (batch, heads, _, d), keys, values = shapes
    fits = keys == values and (keys[0], keys[3]) == (batch, d) and keys[1] > 0 and heads % keys[1] == 0
    if not fits:
        raise ValueError(
            "attention: k and v have the same shape, with the batch and head dimension of q, and a number of heads "
            f"that divides q's; given [batch, heads, rows, head dimension] {', '.join(map(str, map(list, shapes)))}"
        )


@torch.library.triton_op(f"{NAMESPACE}::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int]) -> Tensor:
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
    return attention(q, k, v, scale, head_axes)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int]) -> Tensor:
    _check(q, k, v, head_axes)
    heads, rows = q.shape[head_axes[0]], q.shape[3 - head_axes[0]]
    return q.new_empty((q.shape[0], *((heads, rows) if head_axes[3] == 1 else (rows, heads)), q.shape[3]))


_attention.register_fake(_fake)
ATTENTION = torch.ops.et_cuda_passes.attention.default
