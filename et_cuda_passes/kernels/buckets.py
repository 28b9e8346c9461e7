"""Shared by the launches: the buckets of rows, tensor descriptors, and the stream-K schedule of the last wave.

With a known number of rows there is one launch. With an unknown one each bucket of rows is a launch whose grid is
multiplied by 0 or 1; a grid without programs is skipped. A comparison of the length in Python would specialise the
graph, and a branch of the graph would need a synchronisation.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import triton_launch
from et_cuda_passes.kernels.choose import BOUNDS, MOST_LAUNCHES, Weight, buckets, tiling_for
from et_cuda_passes.kernels.gpus import GpuArch
from et_cuda_passes.kernels.tiles import add_parts
from et_cuda_passes.kernels.tiling import UNBOUNDED, Tiling
from et_cuda_passes.kernels.triton_launch import TensorDescriptorArg, is_materialized

ALIGNMENT = 16
"""The address of a tensor with a descriptor is a multiple of so many bytes."""

ADDED_ROWS = 8
"""Rows of a split tile that one program of ``add_parts`` sums."""


def buckets_for(m: int | SymInt, weight: Weight, gpu: GpuArch, most: int = MOST_LAUNCHES) -> dict[int, Tiling]:
    """The buckets of rows that ``m`` can be in: one if ``m`` is known, else at most ``most`` within its range."""
    if isinstance(m, int):
        return {UNBOUNDED: tiling_for(gpu, weight, m)}
    first = max([1, *(bound + 1 for bound in BOUNDS if statically_known_true(m > bound))])
    last = min([UNBOUNDED, *(bound for bound in BOUNDS if statically_known_true(m <= bound))])
    return dict(buckets(gpu, weight, most, first, last).tilings)


def in_bucket(m: int | SymInt, first: int, last: int) -> int | SymInt:
    """1 if first <= m <= last, else 0, without a comparison."""
    flag: int | SymInt = torch.sym_min(1, torch.sym_max(0, m - first + 1))
    if last != UNBOUNDED:
        flag *= torch.sym_min(1, torch.sym_max(0, last + 1 - m))
    return flag


def bucket_flags(m: int | SymInt, buckets: Mapping[int, Tiling]) -> Iterator[tuple[int | SymInt, Tiling]]:
    """Each bucket's tiling, with the factor of its launch's grid: 1 if ``m`` is in the bucket, else 0."""
    first = 0
    for bound, tiling in buckets.items():
        yield 1 if len(buckets) == 1 else in_bucket(m, first, bound), tiling
        first = bound + 1


def tma_descriptor(x: Tensor, tiling: Tiling, height: int) -> TensorDescriptorArg | None:
    """A descriptor of blocks of ``height`` rows of ``x [M, K]`` or ``[1, M, K]`` for bulk copies.

    None if the tiling has no bulk copies, or if no descriptor is possible. The last step along K may reach beyond x's
    columns: a descriptor reads zeros there. AOTInductor writes the sizes of a descriptor into C++ as sympy prints them.
    A floor division is printed as ``//``, which is a comment in C++; so such a number of rows gets no descriptor.
    """
    rows, k = x.shape[-2:] if x.dim() > 1 else (1, x.shape[-1])
    offset = x.storage_offset() * x.element_size()
    possible = (
        tiling.bulk
        and x.dim() in (2, 3)
        and statically_known_true(math.prod(x.shape[:-2]) == 1)
        and statically_known_true(rows > 0)
        and isinstance(k, int)
        and k * x.element_size() % ALIGNMENT == 0
        and statically_known_true(offset % ALIGNMENT == 0)
        and (isinstance(rows, int) or rows.node.expr.is_polynomial())
        and is_materialized(x)
    )
    if not possible or (not isinstance(x, (FakeTensor, FunctionalTensor)) and x.data_ptr() % ALIGNMENT):
        return None
    return TensorDescriptorArg(x, (*[1] * (x.dim() - 2), height, tiling.block_k))


@dataclass(frozen=True)
class Schedule:
    """The programs of a launch: whole tiles, and tiles of the last wave that are split along K (stream-K).

    Attributes:
        grid: number of programs.
        slots: SLOTS of the kernel; 0 if no tile is split.
        rest: number of tiles that do not fill the last wave, which are split.
    """

    grid: int | SymInt
    slots: int
    rest: int | SymInt


def stream_k_schedule(tiling: Tiling, m: int | SymInt, n: int, k: int, processors: int) -> Schedule:
    """The programs of ``tiling`` for [m, n] from k, computed as the kernels do: see ``tiles.tile_part``."""
    slots = tiling.waves * processors
    tiles = -(-m // tiling.tile_m) * -(-n // tiling.block_n)
    steps = -(-k // tiling.block_k)
    grid, rest = tiles, tiles
    if slots:
        rest = tiles % slots
        ways = torch.sym_min(slots // torch.sym_max(rest, 1), steps)
        grid = tiles - rest + rest * ways
        if isinstance(rest, int) and (rest == 0 or ways == 1):
            slots = 0  # the last wave is full, or has no idle programs for the parts of a tile
    return Schedule(grid, slots, rest)


def launch_buckets(
    x: Tensor,
    n: int,
    buckets: Mapping[int, Tiling],
    processors: int,
    launch: Callable[[Tensor, Tensor | None, Tiling, int | SymInt], tuple[Tensor, Tensor | None]],
) -> Tensor:
    """Launch a linear of ``x [..., K]`` once for each bucket of rows; only one launch has programs. Returns [..., N].

    ``launch(y, parts, tiling, flag)`` returns the mutated y and parts; see :func:`launch_matmul` for ``parts``.
    """
    m = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], n))
    # All buckets share one buffer: only one of them runs, and an allocation costs time.
    most = max(tiling.waves * tiling.tile_m * tiling.block_n for tiling in buckets.values()) * processors
    parts = x.new_empty(most, dtype=torch.float32) if most else None
    for flag, tiling in bucket_flags(m, buckets):
        y, parts = launch(y, parts, tiling, flag)
    return y


def launch_matmul(
    kernel: Any,
    y: Tensor,
    parts: Tensor | None,
    tiling: Tiling,
    programs: Schedule,
    flag: int | SymInt,
    arguments: Mapping[str, Any],
    adding: Mapping[str, Any],
    sizes: str,
) -> tuple[Tensor, Tensor | None]:
    """Launch ``kernel`` over ``programs`` times ``flag``, 0 or 1, and sum the parts of the tiles that it split.

    Args:
        kernel: mutates ``y_ptr``, and ``parts_ptr`` if tiles are split.
        y: the output.
        parts: fp32 buffer for the parts of the split tiles; None if no tiling splits tiles.
        tiling: the tiling of the launch.
        programs: the programs of the launch.
        flag: 1 if the length is within the tiling's bucket, else 0.
        arguments: arguments of the kernel, without the two pointers. ``bias_ptr`` is also passed as ``parts_ptr`` if
            the kernel writes no parts.
        adding: arguments of ``add_parts``.
        sizes: see :func:`triton_launch.launch`.

    Returns:
        The mutated y and parts.
    """
    grid = (programs.grid * flag,)
    given = {**arguments, "y_ptr": y, "num_warps": tiling.warps, "num_stages": tiling.stages}
    if not programs.slots or parts is None:
        (y,) = triton_launch.launch(kernel, grid, {**given, "parts_ptr": arguments["bias_ptr"]}, ["y_ptr"], sizes)
        return y, parts
    y, parts = triton_launch.launch(kernel, grid, {**given, "parts_ptr": parts}, ["y_ptr", "parts_ptr"], sizes)
    height = min(tiling.tile_m, ADDED_ROWS)
    adders = (programs.rest * flag, tiling.tile_m // height)
    (y,) = triton_launch.launch(
        add_parts,
        adders,
        {
            **adding,
            "parts_ptr": parts,
            "y_ptr": y,
            "TILE_M": tiling.tile_m,
            "HEIGHT": height,
            "BULK": arguments.get("BULK", 0),
        },
        ["y_ptr"],
        sizes,
    )
    return y, parts
