"""What the launches share: the GPU, the buckets of rows that a length can be in, and how the last wave is cut."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import known_writes
from et_cuda_passes.kernels.tiles import add_parts
from et_cuda_passes.kernels.tiling import DYNAMIC_ROWS, HOPPER, UNBOUNDED, Family, Tiling, family, tiling_for, tilings

ADDED_ROWS = 8
"""Rows of a cut tile that one program of ``add_parts`` sums."""


def gpu_of(device: torch.device) -> tuple[Family, int]:
    """The family and the number of multiprocessors of a GPU; those of an H100 where none can be asked."""
    if not torch.cuda.is_available():
        return HOPPER, 132
    properties = torch.cuda.get_device_properties(device)
    return family((properties.major, properties.minor)), properties.multi_processor_count


def possible(m: int | SymInt, n: int, k: int, group_size: int, gpu: Family, bits: int = 4) -> dict[int, Tiling]:
    """The buckets of rows that ``m`` can be in: one, if it is known."""
    if isinstance(m, int):
        return {UNBOUNDED: tiling_for(gpu, n, k, group_size, m, bits)}
    buckets: dict[int, Tiling] = {}
    for bound, tiling in tilings(gpu, n, k, group_size, DYNAMIC_ROWS, bits).items():
        if buckets or not statically_known_true(m > bound):
            buckets[bound] = tiling
        if statically_known_true(m <= bound):
            break
    return buckets


def inside(m: int | SymInt, first: int, last: int) -> int | SymInt:
    """1 if first <= m <= last, else 0, without a comparison."""
    flag: int | SymInt = torch.sym_min(1, torch.sym_max(0, m - first + 1))
    if last != UNBOUNDED:
        flag *= torch.sym_min(1, torch.sym_max(0, last + 1 - m))
    return flag


@dataclass(frozen=True)
class Wave:
    """A launch's programs.

    Attributes:
        grid: how many there are.
        slots: SLOTS of the kernel: 0 where no tile is cut.
        rest: the tiles that do not fill the last wave, which are cut.
    """

    grid: int | SymInt
    slots: int
    rest: int | SymInt


def wave(tiling: Tiling, m: int | SymInt, n: int, k: int, processors: int) -> Wave:
    """The programs of ``tiling`` for [m, n] from k, counted as the kernels count: see ``tiles.tile_part``."""
    slots = tiling.waves * processors
    tiles = -(-m // tiling.block_m) * -(-n // tiling.block_n)
    steps = -(-k // tiling.block_k)
    grid, rest = tiles, tiles
    if slots:
        rest = tiles % slots
        ways = torch.sym_min(slots // torch.sym_max(rest, 1), steps)
        grid = tiles - rest + rest * ways
        if isinstance(rest, int) and (rest == 0 or ways == 1):
            slots = 0  # the last wave is full, or too full for anything to be cut
    return Wave(grid, slots, rest)


def add(
    y: Tensor, parts: Tensor, tiling: Tiling, programs: Wave, flag: int | SymInt, arguments: Mapping[str, Any]
) -> Tensor:
    """Sum the parts of the cut tiles into ``y``: behind a launch over ``programs``, with its arguments and ``flag``.

    Returns:
        y as it is then.
    """
    height = min(tiling.block_m, ADDED_ROWS)
    grid = (programs.rest * flag, tiling.block_m // height)
    given = {**arguments, "parts_ptr": parts, "y_ptr": y, "HEIGHT": height}
    (y,) = known_writes.launch(add_parts, grid, given, ["y_ptr"])
    return y
