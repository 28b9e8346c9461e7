"""The launch of attention, and the blocks for a GPU, a head dimension and a number of rows.

An unknown number of rows has the blocks for many rows. For a second launch with the blocks for few rows, Inductor would
write copies of q, k and v.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import triton_launch
from et_cuda_passes.kernels.attention import attention as kernel
from et_cuda_passes.kernels.device import SHARED_MEMORY_LIMIT, gpu_for
from et_cuda_passes.kernels.gpus import GPUS, HOPPER, GpuArch

HEAD_DIMS = (16, 32, 64, 128, 256)
FEW_ROWS = 64


@dataclass(frozen=True)
class Blocks:
    """A program's rows M, the keys of one step, the warps, and the number of stages whose loads are in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Largest head dimension -> blocks for few rows, and for many rows. They were chosen by their machine code: no registers
# are spilled, and with a head dimension of up to 64 two programs fit on a multiprocessor of Hopper, so that one
# multiplies while the other computes powers. With more rows in a block, keys are read fewer times.
_HOPPER = {
    64: (Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3)),
    128: (Blocks(64, 64, 4, 2), Blocks(128, 128, 8, 2)),
    256: (Blocks(64, 32, 4, 2), Blocks(128, 32, 8, 2)),
}
# These fit in the shared memory of every GPU.
_LEAST_MEMORY = min(gpu.program_memory for gpu in GPUS.values())
_OTHER = {
    64: (Blocks(64, 32, 4, 3), Blocks(128, 64, 8, 3)),
    128: (Blocks(32, 32, 4, 2), Blocks(128, 32, 8, 2)),
    256: (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
}


def blocks(gpu: GpuArch, head_dim: int, rows: int | SymInt) -> Blocks:
    """The blocks for a head dimension of :data:`HEAD_DIMS` and a known or unknown number of rows.

    Raises:
        ValueError: kernels may use less shared memory than any GPU has.
    """
    if gpu.program_memory < _LEAST_MEMORY:
        raise ValueError(
            f"attention needs up to {_LEAST_MEMORY} bytes of shared memory, and {SHARED_MEMORY_LIMIT} allows "
            f'{gpu.program_memory}: raise it, or pass UnmaskedAttention(kernel="backend")'
        )
    table = _HOPPER if gpu.wgmma and gpu.program_memory == HOPPER.program_memory else _OTHER
    few, many = table[min(bound for bound in table if head_dim <= bound)]
    return few if statically_known_true(rows <= FEW_ROWS) else many


def row_length(tensor: Tensor, head_axis: int) -> int | None:
    """The row stride of a head in ``tensor``, if the kernel can read it without a copy; else None.

    The kernel reads two forms. In the first, the heads of a row are adjacent, and the row stride is any multiple of 16
    bytes: columns of a wider tensor, as a fused linear writes them. In the second, the tensor is contiguous with the
    heads before the rows.
    """
    batch, d = tensor.shape[0], tensor.shape[3]
    heads, rows = tensor.shape[head_axis], tensor.shape[3 - head_axis]
    of_batch, of_head, of_row = tensor.stride(0), tensor.stride(head_axis), tensor.stride(3 - head_axis)

    if any(statically_known_true(size == 0) for size in (batch, heads, rows)):
        return int(d)  # an empty tensor has arbitrary strides

    def lies(*pairs: tuple[int | SymInt, int | SymInt, int | SymInt]) -> bool:
        return all(statically_known_true(size == 1) or statically_known_true(a == b) for size, a, b in pairs)

    if not lies((d, tensor.stride(3), 1)):
        return None
    if isinstance(of_row, int) and of_row % 8 == 0 and of_row >= heads * d and lies((heads, of_head, d)):
        return of_row if lies((batch, of_batch, rows * of_row)) else None
    first = lies((rows, of_row, d), (heads, of_head, rows * d), (batch, of_batch, heads * rows * d))
    return int(d) if first else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int], gpu_name: str = "") -> Tensor:
    """Attention without a mask on CUDA, of bf16 or fp16 tensors; see :mod:`et_cuda_passes.ops.attention`.

    A tensor in a form that the kernel cannot read is copied.
    """
    q, k, v = (
        t if row_length(t, at) is not None else t.clone(memory_format=torch.contiguous_format)
        for t, at in zip((q, k, v), head_axes, strict=False)
    )
    rows = q.shape[3 - head_axes[0]]
    return launch(q, k, v, scale, head_axes, blocks(gpu_for(q, gpu_name), q.shape[3], rows))


def launch(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int], chosen: Blocks) -> Tensor:
    """:func:`attention` with the blocks ``chosen``; every tensor has a :func:`row_length`."""
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
    (y,) = triton_launch.launch(kernel, grid, arguments, ["y_ptr"], f"{batch} {rows} {length}")
    return y
