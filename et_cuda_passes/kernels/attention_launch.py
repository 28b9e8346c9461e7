"""The blocks in which attention is computed, and its launches: one for many rows, one for few.

As for the linears, a number of rows that is known picks its launch now, and one that is not is a branch at run time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import SymInt, Tensor

from et_cuda_passes.kernels import known_writes
from et_cuda_passes.kernels.attention import attention as kernel
from et_cuda_passes.kernels.launching import flagged, gpu_of, within
from et_cuda_passes.kernels.tiling import HOPPER, UNBOUNDED, Family

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


def blocks(gpu: Family, head_dim: int) -> dict[int, Blocks]:
    """The blocks for a head dimension of :data:`HEAD_DIMS`, by the most rows that each serves."""
    table = _HOPPER if gpu == HOPPER else _OTHER
    few, many = table[min(bound for bound in table if head_dim <= bound)]
    return {UNBOUNDED: many} if few == many else {FEW_ROWS: few, UNBOUNDED: many}


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, head_axes: Sequence[int]) -> Tensor:
    """Attention without a mask on CUDA, of contiguous bf16 or fp16 tensors; see :mod:`et_cuda_passes.ops.attention`."""
    rows = q.shape[3 - head_axes[0]]
    gpu, _ = gpu_of(q.device)
    heads = q.shape[head_axes[0]]
    sizes = (heads, rows) if head_axes[3] == 1 else (rows, heads)
    y = q.new_empty((q.shape[0], *sizes, q.shape[3]))
    for flag, chosen in flagged(rows, within(rows, blocks(gpu, q.shape[3]))):
        y = launch(q, k, v, y, scale, head_axes, chosen, flag)
    return y


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    scale: float,
    head_axes: Sequence[int],
    chosen: Blocks,
    flag: int | SymInt = 1,
) -> Tensor:
    """Launch one choice of blocks over a grid multiplied by ``flag``, 0 or 1: y, as it is then."""
    batch, heads, rows = q.shape[0], q.shape[head_axes[0]], q.shape[3 - head_axes[0]]
    length = k.shape[3 - head_axes[1]]
    grid = batch * heads * -(-rows // chosen.block_m) * flag
    tensors: Mapping[str, Tensor] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "y_ptr": y}
    arguments = {
        **tensors,
        "M": rows,
        "L": length,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "D": q.shape[3],
        "HEADS": heads,
        "KV_HEADS": k.shape[head_axes[1]],
        "Q_ROWS_FIRST": head_axes[0] == 2,
        "K_ROWS_FIRST": head_axes[1] == 2,
        "V_ROWS_FIRST": head_axes[2] == 2,
        "Y_ROWS_FIRST": head_axes[3] == 2,
        "SCALE": abs(scale) * math.log2(math.e),
        "NEGATED": scale < 0,
        "USE_ASM": True,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    (y,) = known_writes.launch(kernel, (grid,), arguments, ["y_ptr"], f"{batch} {rows} {length}")
    return y
