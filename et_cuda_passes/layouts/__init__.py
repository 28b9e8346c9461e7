"""Packed layouts of weights: pure tensor functions on any device, one layout per file.

``LAYOUTS`` has every layout of int4 weights by name. To add one, write its file and add its ``LAYOUT`` to the list;
``ops`` builds the operators from it.
"""

from collections.abc import Mapping

from . import by_row, cpu, embedding_table, metal, mma_tiled, mps, scale_and_zero, tile_packed_to_4d
from .layout import Layout

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        mma_tiled.LAYOUT,
        tile_packed_to_4d.LAYOUT,
        mps.LAYOUT,
        metal.LAYOUT,
        cpu.LAYOUT,
        by_row.LAYOUT,
    )
}
"""Every layout of int4 weights by its name."""

__all__ = [
    "LAYOUTS",
    "Layout",
    "by_row",
    "cpu",
    "embedding_table",
    "metal",
    "mma_tiled",
    "mps",
    "scale_and_zero",
    "tile_packed_to_4d",
]
