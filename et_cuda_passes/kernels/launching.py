"""What the launches share: the GPU, the buckets of rows that a length can be in, and how the last wave is cut."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import known_writes
from et_cuda_passes.kernels.choose import BOUNDS, MOST_LAUNCHES, Weight, buckets, tiling_for
from et_cuda_passes.kernels.gpus import HOPPER, GpuArch, gpu_of_capability
from et_cuda_passes.kernels.known_writes import Described
from et_cuda_passes.kernels.tiles import add_parts
from et_cuda_passes.kernels.tiling import UNBOUNDED, Tiling
from et_cuda_passes.kernels.traced import has_memory_of_its_own

ALIGNMENT = 16
"""Bytes that divide the address of a tensor that has a descriptor."""

ADDED_ROWS = 8
"""Rows of a cut tile that one program of ``add_parts`` sums."""


def gpu_of(device: torch.device) -> GpuArch:
    """The GPU that is there; an H100 where none can be asked."""
    if not torch.cuda.is_available():
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return gpu_of_capability((properties.major, properties.minor), properties.multi_processor_count)


def possible(m: int | SymInt, weight: Weight, gpu: GpuArch, most: int = MOST_LAUNCHES) -> dict[int, Tiling]:
    """The buckets of rows that ``m`` can be in: one, if it is known, else ``most`` within what it can be."""
    if isinstance(m, int):
        return {UNBOUNDED: tiling_for(gpu, weight, m)}
    first = max([1, *(bound + 1 for bound in BOUNDS if statically_known_true(m > bound))])
    last = min([UNBOUNDED, *(bound for bound in BOUNDS if statically_known_true(m <= bound))])
    return dict(buckets(gpu, weight, most, first, last).tilings)


def inside(m: int | SymInt, first: int, last: int) -> int | SymInt:
    """1 if first <= m <= last, else 0, without a comparison."""
    flag: int | SymInt = torch.sym_min(1, torch.sym_max(0, m - first + 1))
    if last != UNBOUNDED:
        flag *= torch.sym_min(1, torch.sym_max(0, last + 1 - m))
    return flag


def flagged(m: int | SymInt, buckets: Mapping[int, Tiling]) -> Iterator[tuple[int | SymInt, Tiling]]:
    """Each bucket's tiling, with 1 if ``m`` is in the bucket, else 0: what its launch multiplies its grid by."""
    first = 0
    for bound, tiling in buckets.items():
        yield 1 if len(buckets) == 1 else inside(m, first, bound), tiling
        first = bound + 1


def in_blocks(x: Tensor, tiling: Tiling, height: int) -> Described | None:
    """Blocks of ``height`` rows of ``x [M, K]`` or ``[1, M, K]`` for bulk copies.

    None without bulk copies, or if no descriptor is possible.

    The last step along K may reach beyond x's columns: a descriptor reads zeros there.
    AOTInductor writes sizes and strides of a descriptor into C++ as sympy prints them, which for a floor division is a
    comment.
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
        and has_memory_of_its_own(x)
    )
    if not possible or (not isinstance(x, (FakeTensor, FunctionalTensor)) and x.data_ptr() % ALIGNMENT):
        return None
    return Described(x, (*[1] * (x.dim() - 2), height, tiling.block_k))


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
    tiles = -(-m // tiling.tile_m) * -(-n // tiling.block_n)
    steps = -(-k // tiling.block_k)
    grid, rest = tiles, tiles
    if slots:
        rest = tiles % slots
        ways = torch.sym_min(slots // torch.sym_max(rest, 1), steps)
        grid = tiles - rest + rest * ways
        if isinstance(rest, int) and (rest == 0 or ways == 1):
            slots = 0  # the last wave is full, or too full for anything to be cut
    return Wave(grid, slots, rest)


def over_buckets(
    x: Tensor,
    n: int,
    buckets: Mapping[int, Tiling],
    processors: int,
    launch: Callable[[Tensor, Tensor | None, Tiling, int | SymInt], tuple[Tensor, Tensor | None]],
) -> Tensor:
    """The launches of a linear of ``x [..., K]``, one for each bucket of rows, of which one has programs: [..., N].

    ``launch(y, parts, tiling, flag)`` returns y and parts as they are then; ``parts`` is as :func:`product` takes it.
    """
    m = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], n))
    # One for all buckets: only one of them runs, and allocating costs more time than it does space.
    most = max(tiling.waves * tiling.tile_m * tiling.block_n for tiling in buckets.values()) * processors
    parts = x.new_empty(most, dtype=torch.float32) if most else None
    for flag, tiling in flagged(m, buckets):
        y, parts = launch(y, parts, tiling, flag)
    return y


def product(
    kernel: Any,
    y: Tensor,
    parts: Tensor | None,
    tiling: Tiling,
    programs: Wave,
    flag: int | SymInt,
    arguments: Mapping[str, Any],
    adding: Mapping[str, Any],
    sizes: str,
) -> tuple[Tensor, Tensor | None]:
    """Launch ``kernel`` over ``programs`` times ``flag``, 0 or 1, and sum the parts of the tiles that it cut.

    Args:
        kernel: writes to ``y_ptr``, and to ``parts_ptr`` where tiles are cut.
        y: what is written.
        parts: fp32, as many as the cut tiles need; None where none is cut.
        tiling: of the launch.
        programs: of the launch.
        flag: 1 where the length is within the tiling's bucket.
        arguments: of the kernel, but the two pointers; ``bias_ptr`` stands for parts that are not written.
        adding: what ``add_parts`` takes of them, and more.
        sizes: see :func:`known_writes.launch`.

    Returns:
        y and parts, as they are then.
    """
    grid = (programs.grid * flag,)
    given = {**arguments, "y_ptr": y, "num_warps": tiling.warps, "num_stages": tiling.stages}
    if not programs.slots or parts is None:
        (y,) = known_writes.launch(kernel, grid, {**given, "parts_ptr": arguments["bias_ptr"]}, ["y_ptr"], sizes)
        return y, parts
    y, parts = known_writes.launch(kernel, grid, {**given, "parts_ptr": parts}, ["y_ptr", "parts_ptr"], sizes)
    height = min(tiling.tile_m, ADDED_ROWS)
    adders = (programs.rest * flag, tiling.tile_m // height)
    (y,) = known_writes.launch(
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
