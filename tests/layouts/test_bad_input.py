"""Bad input to the layouts: every error names the cause and the fix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import et_cuda_passes.layouts as layouts
from et_cuda_passes.layouts import by_row, cpu, metal, mma_tiled, mps, tile_packed_to_4d

Function = Callable[..., Any]

PACKS = [
    pytest.param(partial(tile_packed_to_4d.pack, inner_k_tiles=2), id="tile_packed_to_4d"),
    pytest.param(partial(mps.pack, inner_k_tiles=2), id="mps"),
    pytest.param(metal.pack, id="metal"),
    pytest.param(by_row.pack, id="by_row"),
    pytest.param(cpu.pack, id="cpu"),
    pytest.param(mma_tiled.pack, id="mma_tiled"),
]
UNPACKS = [
    pytest.param(tile_packed_to_4d.unpack, torch.zeros(2, 1, 32, 1, dtype=torch.int32), id="tile_packed_to_4d"),
    pytest.param(mps.unpack, torch.zeros(2, 1, 32, 1, dtype=torch.int32), id="mps"),
    pytest.param(metal.unpack, torch.zeros(16, 16, dtype=torch.uint8), id="metal"),
    pytest.param(by_row.unpack, torch.zeros(16, 16, dtype=torch.uint8), id="by_row"),
    pytest.param(cpu.unpack, torch.zeros(16, 16, dtype=torch.uint8), id="cpu"),
    pytest.param(mma_tiled.unpack, torch.zeros(16, 8, dtype=torch.int32), id="mma_tiled"),
]


def weights(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_layouts_are_all_exported() -> None:
    assert set(layouts.__all__) == {
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
    }
    for name in ("embedding_table", "scale_and_zero", *layouts.LAYOUTS):
        assert callable(getattr(layouts, name).pack) and callable(getattr(layouts, name).unpack)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("value", [16, 17, 128, 255])
@pytest.mark.parametrize("place", [(0, 0), (15, 31), (7, 1)])
def test_pack_rejects_value_above_15(pack: Function, value: int, place: tuple[int, int]) -> None:
    q = weights(16, 32)
    q[place] = value
    with pytest.raises(ValueError, match=rf"must lie in 0\.\.15 \(offset 0\), found 0\.\.{value}; .* 4-bit"):
        pack(q, chunk_bytes=64)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("value", "offset"), [(-1, 0), (-8, 0), (-9, 8), (8, 8), (127, 8), (-128, 8), (-128, 15)])
def test_pack_rejects_signed_value_outside_offset_range(pack: Function, value: int, offset: int) -> None:
    q = weights(16, 32, dtype=torch.int8)
    q[9, 9] = value
    with pytest.raises(ValueError, match=rf"must lie in -?{offset}\.\.{15 - offset} .*found .*{value}"):
        pack(q, offset=offset)


@pytest.mark.parametrize("pack", PACKS)
def test_pack_rejects_unsigned_value_that_would_overflow(pack: Function) -> None:
    q = weights(16, 32)
    q[3, 3] = 250  # 250 + 8 is 2 in a byte
    with pytest.raises(ValueError, match=r"found 0\.\.250"):
        pack(q, offset=8)


@pytest.mark.parametrize("pack", PACKS)
def test_pack_suggests_offset_for_signed_weights(pack: Function) -> None:
    with pytest.raises(ValueError, match=r"pass offset=8 for weights in -8\.\.7"):
        pack(torch.full((16, 32), -3, dtype=torch.int8))


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool])
def test_pack_rejects_other_dtypes(pack: Function, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"q must be torch.uint8 or torch.int8, got {dtype}; give integer weights"):
        pack(weights(16, 32, dtype=dtype))


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("shape", [(), (32,), (1, 16, 32)])
def test_pack_rejects_other_ranks(pack: Function, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"q must be 2-D \[N, K\], got shape .* reshape"):
        pack(weights(*shape))


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("shape", [(0, 32), (16, 0)])
def test_pack_rejects_empty_weight(pack: Function, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="q is empty"):
        pack(weights(*shape))


@pytest.mark.parametrize("pack", PACKS)
def test_pack_rejects_input_without_values(pack: Function) -> None:
    with pytest.raises(TypeError, match=r"q must be a torch.Tensor, got list"):
        pack([[0] * 32] * 16)
    with pytest.raises(ValueError, match=r"q is a meta tensor and has no values; load the real weights"):
        pack(weights(16, 32).to("meta"))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(weights(16, 32))
    with pytest.raises(ValueError, match=r"q is a fake tensor and has no values.* outside of FakeTensorMode"):
        pack(fake)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("offset", [-1, 16, 8.0, True, None])
def test_pack_rejects_invalid_offset(pack: Function, offset: object) -> None:
    with pytest.raises(ValueError, match=r"offset must be an int in 0\.\.15"):
        pack(weights(16, 32), offset=offset)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("chunk_bytes", [0, -1])
def test_pack_rejects_nonpositive_chunk_bytes(pack: Function, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="chunk_bytes must be positive"):
        pack(weights(16, 32), chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("pack", [tile_packed_to_4d.pack, mps.pack])
@pytest.mark.parametrize("inner", [0, 1, 3, 16, -2, 2.0, True, None])
def test_pack_rejects_other_inner_k_tiles(pack: Function, inner: object) -> None:
    with pytest.raises(ValueError, match="inner_k_tiles must be 2, 4 or 8, got"):
        pack(weights(16, 256), inner)


@pytest.mark.parametrize("pack", [tile_packed_to_4d.pack, mps.pack])
@pytest.mark.parametrize("inner", [2, 4, 8])
def test_pack_rejects_partial_tiles(pack: Function, inner: int) -> None:
    with pytest.raises(ValueError, match="N to be a multiple of 8, got N = 12; give out_rows=16 and slice"):
        pack(weights(12, 16 * inner), inner)
    with pytest.raises(ValueError, match=rf"K to be a multiple of {16 * inner}, got K = {24 * inner}"):
        pack(weights(8, 24 * inner), inner)


def test_metal_and_cpu_pack_reject_partial_blocks() -> None:
    with pytest.raises(ValueError, match="metal needs K to be a multiple of 8, got K = 12"):
        metal.pack(weights(3, 12))
    with pytest.raises(ValueError, match="cpu needs N to be a multiple of 16, got N = 24; give out_rows=32"):
        cpu.pack(weights(24, 32))
    with pytest.raises(ValueError, match="cpu needs K to be a multiple of 2, got K = 3"):
        cpu.pack(weights(16, 3))


@pytest.mark.parametrize(("unpack", "packed"), UNPACKS)
def test_unpack_rejects_foreign_tensor(unpack: Function, packed: torch.Tensor) -> None:
    assert unpack(packed).shape == (16, 64 if unpack is mma_tiled.unpack else 32)
    with pytest.raises(TypeError, match=r"packed must be .*, got torch.int64; give the result of pack"):
        unpack(packed.to(torch.int64))
    with pytest.raises(ValueError, match="packed must have shape"):
        unpack(packed[None])
    with pytest.raises(ValueError, match="packed must have shape"):
        unpack(packed[:0])
    with pytest.raises(ValueError, match="packed is a meta tensor"):
        unpack(packed.to("meta"))
    with pytest.raises(TypeError, match=r"packed must be a torch.Tensor, got NoneType"):
        unpack(None)


@pytest.mark.parametrize("unpack", [tile_packed_to_4d.unpack, mps.unpack])
@pytest.mark.parametrize("shape", [(2, 1, 16, 1), (2, 1, 32, 3), (2, 1, 32, 8), (2, 0, 32, 1)])
def test_unpack_rejects_other_tile_shapes(unpack: Function, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[N/8, K/\(16 I\), 32, I/2\]"):
        unpack(torch.zeros(shape, dtype=torch.int32))


def test_cpu_unpack_rejects_partial_blocks_of_rows() -> None:
    with pytest.raises(ValueError, match="N a multiple of 16, got"):
        cpu.unpack(weights(24, 16))
