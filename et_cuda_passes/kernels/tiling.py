"""How a kernel is shaped, as data; :mod:`et_cuda_passes.kernels.choose` says which shape a weight gets."""

from dataclasses import astuple, dataclass

UNBOUNDED = 2**31 - 1
"""The bound of the last bucket of rows."""

BULK_K = 64
"""Step along K of a tiling with bulk copies: 128 bytes of a row. AOTInductor describes no tile that is wider."""


@dataclass(frozen=True)
class Tiling:
    """The kernel's shape. See :mod:`et_cuda_passes.kernels.int4_matmul`.

    Attributes:
        block_m: rows of x in a tile, or in its first piece.
        block_n: rows of the weight in a tile.
        block_k: step along K, 64, 128 or 256.
        segments: places along K that a tile works at side by side.
        waves: 0, or programs that a multiprocessor holds at once: tiles that do not fill the last wave are cut.
        warps: warps of a program.
        stages: steps whose loads are in flight.
        bulk: 1 if one thread copies a tile of x by its tensor descriptor (TMA, from sm_90 on), 0 if all copy parts of
            it. ``block_k`` is BULK_K then and ``segments`` 1.
        extra_m: rows of x in a tile's second piece, or 0. A piece has a power of two of rows, so that one piece leaves
            the sizes between them out. ``segments`` is 1 with two pieces.
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
        """Rows of x in a tile, those of both pieces."""
        return self.block_m + self.extra_m

    @property
    def row(self) -> tuple[int, ...]:
        """The numbers as a table has them: without ``extra_m`` where it is 0, as tables were before there was any."""
        numbers = astuple(self)
        return numbers if self.extra_m else numbers[:-1]

    @property
    def may_be_cut(self) -> bool:
        """Whether ``waves`` may be other than 0. Segments are another answer, and small tiles have parts too small."""
        return self.segments == 1 and self.block_m >= 16 and self.warps >= 4

    def __str__(self) -> str:
        """As in ``64x64x256, 2 segments``: BLOCK_M x BLOCK_N x BLOCK_K, and ``128+64`` for two pieces of rows."""
        rows = f"{self.block_m}+{self.extra_m}" if self.extra_m else f"{self.block_m}"
        parts = [f"{rows}x{self.block_n}x{self.block_k}"]
        parts += [f"{self.segments} segments"] * (self.segments > 1)
        parts += ["cut along K"] * (self.waves > 0)
        parts += ["bulk copies"] * self.bulk
        return ", ".join(parts)
