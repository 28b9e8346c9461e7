"""The blocks in which attention is computed, by the GPU, the head dimension and the rows, and the launch.

A number of rows that is not known has the blocks for many: of a second launch for few, Inductor would write copies of
q, k and v where they are computed in place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import known_writes
from et_cuda_passes.kernels.attention import attention as kernel
from et_cuda_passes.kernels.gpus import GpuArch
from et_cuda_passes.kernels.launching import gpu_of

HEAD_DIMS = (16, 32, 64, 128, 256)
FEW_ROWS = 64


@dataclass(frozen=True)
class Blocks:
    """A program's rows M and the keys of one step, its warps, and in how many buffers keys are loaded ahead."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Head dimensions up to -> blocks for few rows, and for more. Chosen by the machine code: no registers are spilled, and
# those of up to 64 on Hopper leave room for two programs on a multiprocessor, one of which multiplies while the other
# takes powers. More rows read the keys fewer times.
_HOPPER = {
    64: (Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3)),
    128: (Blocks(64, 64, 4, 2), Blocks(128, 128, 8, 2)),
    256: (Blocks(64, 32, 4, 2), Blocks(128, 32, 8, 2)),
}
# In the 99 KB of shared memory that the smallest of them have.
_OTHER = {
    64: (Blocks(64, 32, 4, 3), Blocks(128, 64, 8, 3)),
    128: (Blocks(32, 32, 4, 2), Blocks(128, 32, 8, 2)),
    256: (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
}


def blocks(gpu: GpuArch, head_dim: int, rows: int | SymInt) -> Blocks:
    """The blocks for a head dimension of :data:`HEAD_DIMS` and a number of rows, known or not."""
    table = _HOPPER if gpu.wgmma else _OTHER
    few, many = table[min(bound for bound in table if head_dim <= bound)]
    return few if statically_known_true(rows <= FEW_ROWS) else many


def row_length(tensor: Tensor, head_axis: int) -> int | None:
    """Elements from a row of one head to the next, where the kernel can read ``tensor`` as it lies; None where not.

    It can where the heads of a row lie side by side, these rows at any distance, 16 bytes wide each: columns of a wider
    tensor, as a linear that was fused with others leaves them. And where everything is contiguous, heads first.
    """
    batch, d = tensor.shape[0], tensor.shape[3]
    heads, rows = tensor.shape[head_axis], tensor.shape[3 - head_axis]
    of_batch, of_head, of_row = tensor.stride(0), tensor.stride(head_axis), tensor.stride(3 - head_axis)

    if any(statically_known_true(size == 0) for size in (batch, heads, rows)):
        return int(d)  # of nothing, nothing is read: its strides say nothing

    def lies(*pairs: tuple[int | SymInt, int | SymInt, int | SymInt]) -> bool:
        return all(statically_known_true(size == 1) or statically_known_true(a == b) for size, a, b in pairs)

    if not lies((d, tensor.stride(3), 1)):
        return None
    if isinstance(of_row, int) and of_row % 8 == 0 and of_row >= heads * d and lies((heads, of_head, d)):
        return of_row if lies((batch, of_batch, rows * of_row)) else None
    first = lies((rows, of_row, d), (heads, of_head, rows * d), (batch, of_batch, heads * rows * d))
    return int(d) if first else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int]) -> Tensor:
    """Attention without a mask on CUDA, of bf16 or fp16 tensors; see :mod:`et_cuda_passes.ops.attention`.

    What the kernel cannot read as it lies is copied.
    """
    q, k, v = (
        t if row_length(t, at) is not None else t.clone(memory_format=torch.contiguous_format)
        for t, at in zip((q, k, v), head_axes, strict=False)
    )
    rows = q.shape[3 - head_axes[0]]
    return launch(q, k, v, scale, head_axes, blocks(gpu_of(q.device), q.shape[3], rows))


def launch(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int], chosen: Blocks) -> Tensor:
    """:func:`attention` in one choice of blocks, of tensors that have a :func:`row_length`."""
    batch, heads, rows = q.shape[0], q.shape[head_axes[0]], q.shape[3 - head_axes[0]]
    length = k.shape[3 - head_axes[1]]
    y = q.new_empty((batch, *((heads, rows) if head_axes[3] == 1 else (rows, heads)), q.shape[3]))
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "y_ptr": y,
        "M": rows,
        "L": length,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "D": q.shape[3],
        "HEADS": heads,
        "KV_HEADS": k.shape[head_axes[1]],
        **{f"{name}_ROW": row_length(t, at) for name, t, at in zip("QKVY", (q, k, v, y), head_axes, strict=True)},
        "SCALE": abs(scale) * math.log2(math.e),
        "NEGATED": scale < 0,
        "USE_ASM": True,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    grid = (batch * heads * -(-rows // chosen.block_m),)
    (y,) = known_writes.launch(kernel, grid, arguments, ["y_ptr"], f"{batch} {rows} {length}")
    return y
