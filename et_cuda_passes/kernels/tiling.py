"""The tiling of a kernel, as data; :mod:`et_cuda_passes.kernels.choose` chooses the tiling of a weight."""

from dataclasses import astuple, dataclass

UNBOUNDED = 2**31 - 1
"""The bound of the last bucket of rows."""

BULK_K = 64
"""Step along K of a tiling with bulk copies: 128 bytes of a row. AOTInductor has no descriptors of wider tiles."""


@dataclass(frozen=True)
class Tiling:
    """A kernel's tiling. See :mod:`et_cuda_passes.kernels.int4_matmul`.

    Attributes:
        block_m: rows of x in a tile, or in its first piece.
        block_n: rows of the weight in a tile.
        block_k: step along K, 64, 128 or 256.
        segments: number of segments along K that a tile computes side by side.
        waves: 0, or the number of programs that a multiprocessor holds at once; then tiles that do not fill the last
            wave are split along K.
        warps: warps of a program.
        stages: steps whose loads are in flight.
        bulk: 1 if one thread copies a tile of x by its tensor descriptor (TMA, from sm_90 on), 0 if every thread copies
            a part of it. With 1, ``block_k`` is BULK_K and ``segments`` is 1.
        extra_m: rows of x in the second piece of a tile, or 0. The rows of a piece are a power of two; a second piece
            gives the numbers of rows between the powers. With it, ``segments`` is 1.
    """

    block_m: int
    block_n: int
    block_k: int
    segments: int
    waves: int
    warps: int
    stages: int
    bulk: int = 0
    extra_m: int = 0

    @property
    def tile_m(self) -> int:
        """Rows of x in both pieces of a tile."""
        return self.block_m + self.extra_m

    @property
    def row(self) -> tuple[int, ...]:
        """The numbers of a table's entry: without ``extra_m`` if it is 0, as in tables of one piece."""
        numbers = astuple(self)
        return numbers if self.extra_m else numbers[:-1]

    @property
    def may_be_cut(self) -> bool:
        """Whether ``waves`` may be other than 0: not with segments, which serve the same end, nor in small tiles."""
        return self.segments == 1 and self.block_m >= 16 and self.warps >= 4

    def __str__(self) -> str:
        """A text like ``64x64x256, 2 segments``: BLOCK_M x BLOCK_N x BLOCK_K, with ``128+64`` for two pieces."""
        rows = f"{self.block_m}+{self.extra_m}" if self.extra_m else f"{self.block_m}"
        parts = [f"{rows}x{self.block_n}x{self.block_k}"]
        parts += [f"{self.segments} segments"] * (self.segments > 1)
        parts += ["cut along K"] * (self.waves > 0)
        parts += ["bulk copies"] * self.bulk
        return ", ".join(parts)
