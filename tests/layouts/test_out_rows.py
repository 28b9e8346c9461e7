"""out_rows: every layout appends rows of weight 0, for any size of chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.layouts import by_row, cpu, metal, mma_tiled, mps, tile_packed_to_4d

LAYOUTS = {
    "mma_tiled": (lambda q, rows, chunk: mma_tiled.pack(q, 8, out_rows=rows, chunk_bytes=chunk), 1),
    "tile_packed_to_4d": (lambda q, rows, chunk: tile_packed_to_4d.pack(q, 2, 8, out_rows=rows, chunk_bytes=chunk), 8),
    "mps": (lambda q, rows, chunk: mps.pack(q, 2, 8, out_rows=rows, chunk_bytes=chunk), 8),
    "metal": (lambda q, rows, chunk: metal.pack(q, 8, out_rows=rows, chunk_bytes=chunk), 4),
    "by_row": (lambda q, rows, chunk: by_row.pack(q, 8, out_rows=rows, chunk_bytes=chunk), 1),
    "cpu": (lambda q, rows, chunk: cpu.pack(q, 8, out_rows=rows, chunk_bytes=chunk), 16),
}
UNPACK = {
    "mma_tiled": mma_tiled,
    "tile_packed_to_4d": tile_packed_to_4d,
    "mps": mps,
    "metal": metal,
    "by_row": by_row,
    "cpu": cpu,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(st.integers(1, 150), st.integers(0, 2), st.sampled_from([1, 1 << 10, 1 << 20]))
def test_pack_pads_rows_with_weight_0(layout: str, n: int, more: int, chunk: int) -> None:
    pack, multiple = LAYOUTS[layout]
    q = torch.randint(-8, 8, (n, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(n))
    rows = -(-n // multiple) * multiple + more * multiple
    back = UNPACK[layout].unpack(pack(q, rows, chunk)).to(torch.int8) - 8
    # mma_tiled pads K, to 64 here, with the weight 0.
    assert back.shape == (rows, 64 if layout == "mma_tiled" else 32)
    assert torch.equal(back[:n, :32], q)
    assert not back[:n, 32:].any()
    assert not back[n:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_rejects_out_rows_below_n(layout: str) -> None:
    with pytest.raises(ValueError, match="out_rows must be at least q's 32 rows, got 16"):
        LAYOUTS[layout][0](torch.zeros(32, 32, dtype=torch.int8), 16, 1 << 20)
