"""The launches of the experts' kernel, one for each bucket of rows (see :mod:`et_cuda_passes.kernels.buckets`).

The number of rows of each expert is data, so the average number of rows selects the bucket.
"""

from collections.abc import Iterator

from torch import SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import triton_launch
from et_cuda_passes.kernels.buckets import bucket_flags, buckets_for, tma_descriptor
from et_cuda_passes.kernels.choose import Weight
from et_cuda_passes.kernels.device import gpu_for
from et_cuda_passes.kernels.int4_experts import int4_experts
from et_cuda_passes.kernels.tiling import Tiling

MOST_LAUNCHES = 3
"""Maximum number of buckets for an unknown number of rows: few, since a model has experts in many layers."""

Size = int | SymInt


def bmm(x: Tensor, packed: Tensor, qparams: Tensor, ids: Tensor | None, group_size: int, gpu_name: str = "") -> Tensor:
    """``x [B, M, K]`` times the matrix of expert ``ids[s]``, or of expert s without ids: [S, M, N] on CUDA.

    All are contiguous. Batch s reads ``x[s // (S / B)]``.
    """
    (batches, m, _), experts = x.shape, packed.shape[0]
    count = experts if ids is None else ids.shape[0]
    # With empty ids both counts are 0, and 0 must not be a divisor.
    share: Size = 1 if statically_known_true(batches == count) else count // batches
    y = x.new_empty((count, m, packed.shape[1]))
    for flag, tiling, wgmma in _buckets(x, m, packed, group_size, count, False, gpu_name):
        tiles = count * -(-m // tiling.block_m)
        y = _launch(x, packed, qparams, ids, y, m, share, tiles * flag, tiling, group_size, False, wgmma)
    return y


def grouped_mm(x: Tensor, packed: Tensor, qparams: Tensor, offs: Tensor, group_size: int, gpu_name: str = "") -> Tensor:
    """``x [M, K]``, in groups of rows that end at ``offs [E]``, each times its expert's matrix: [M, N] on CUDA."""
    m, experts = x.shape[0], packed.shape[0]
    y = x.new_empty((m, packed.shape[1]))
    for flag, tiling, wgmma in _buckets(x, -(-m // experts), packed, group_size, experts, True, gpu_name):
        # Every group, and the rows without an expert, may end in a tile that is not full.
        tiles = m // tiling.block_m + experts + 1
        y = _launch(x, packed, qparams, offs, y, m, 1, tiles * flag, tiling, group_size, True, wgmma)
    return y


def _buckets(
    x: Tensor, rows: Size, packed: Tensor, group_size: int, count: Size, grouped: bool, gpu_name: str
) -> Iterator[tuple[Size, Tiling, bool]]:
    """For ``rows`` rows of each expert: (1 if within the bucket, else 0; tiling; whether wgmma is used)."""
    gpu = gpu_for(x, gpu_name)
    batch = count if isinstance(count, int) else packed.shape[0]
    weight = Weight(packed.shape[1], x.shape[-1], group_size, batch=max(1, batch), experts=True, grouped=grouped)
    for flag, tiling in bucket_flags(rows, buckets_for(rows, weight, gpu, MOST_LAUNCHES)):
        yield flag, tiling, gpu.wgmma


def _launch(
    x: Tensor,
    packed: Tensor,
    qparams: Tensor,
    chosen: Tensor | None,
    y: Tensor,
    m: Size,
    share: Size,
    tiles: Size,
    tiling: Tiling,
    group_size: int,
    grouped: bool,
    wgmma: bool,
) -> Tensor:
    """Launch one tiling over ``tiles`` tiles of rows; returns the mutated y."""
    experts, n, k = packed.shape[0], packed.shape[1], x.shape[-1]
    sizes = f"{m} {share} {experts} {n} {k} {grouped} {chosen is not None}"
    described = tma_descriptor(x, tiling, tiling.block_m) if grouped else None
    arguments = {
        "x_ptr": described or x,
        "words_ptr": packed,
        "qparams_ptr": qparams,
        # A pointer that the kernel does not read must still be a tensor.
        "expert_ptr": packed if chosen is None else chosen,
        "y_ptr": y,
        "M": m,
        "SHARE": share,
        "E": experts,
        "N": n,
        "K32": k // 32,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "GROUP_SIZE": group_size,
        # As for the linear, a descriptor reads zeros beyond x.
        "EVEN_K": described is not None or k % tiling.block_k == 0,
        "BULK": 0 if described is None else x.dim(),
        "HAS_ZERO": qparams.shape[0] == 2,
        "GROUPED": grouped,
        "HAS_IDS": chosen is not None and not grouped,
        "WIDTH": 1 << experts.bit_length(),
        "USE_ASM": True,
        "WGMMA": wgmma,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    across = -(-n // tiling.block_n)
    grid = (tiles * across,) if grouped else (tiles, across)
    (y,) = triton_launch.launch(int4_experts, grid, arguments, ["y_ptr"], sizes)
    return y
