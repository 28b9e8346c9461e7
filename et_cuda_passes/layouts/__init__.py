"""Packed weight layouts: pure tensor functions, one layout a file.

Every layout module has `pack` and `unpack`; packing takes integer weights q [N, K] in 0..15 (N out_features,
K in_features), unpacking gives them back as uint8. `scale_and_zero` packs the numbers that go with them.
"""

from . import cpu, embedding_table, metal, mma_tiled, mps, scale_and_zero, tile_packed_to_4d

__all__ = ["cpu", "embedding_table", "metal", "mma_tiled", "mps", "scale_and_zero", "tile_packed_to_4d"]
