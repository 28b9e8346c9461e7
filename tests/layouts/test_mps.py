"""The mps layout: row-major bytes under tile_packed_to_4d's nominal shape."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.layouts import mps
from tests.layouts import reference


def test_mps_byte_has_even_k_in_low_nibble() -> None:
    q = torch.zeros(8, 32, dtype=torch.uint8)
    q[0, 0], q[0, 1], q[0, 8], q[7, 31] = 1, 2, 3, 15
    packed = mps.pack(q, 2)
    assert packed.shape == (1, 1, 32, 1) and packed.dtype == torch.int32
    words = packed.flatten().tolist()
    # A row of 32 weights is 4 words.
    assert words[0] == 0x21 and words[1] == 0x03 and words[7 * 4 + 3] == 0xF0000000 - (1 << 32)
    assert sum(word != 0 for word in words) == 3


@given(
    inner=st.sampled_from([2, 4, 8]),
    blocks=st.integers(1, 6),
    k_tiles=st.integers(1, 4),
    chunk_bytes=st.integers(1, 5_000),
    signed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_mps_follows_formula_and_unpack_inverts_pack(
    inner: int, blocks: int, k_tiles: int, chunk_bytes: int, signed: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 16, (8 * blocks, 16 * inner * k_tiles), dtype=torch.uint8, generator=random)
    q, offset = (wanted.to(torch.int8) - 8, 8) if signed else (wanted, 0)
    packed = mps.pack(q, inner, offset, chunk_bytes=chunk_bytes)
    assert packed.shape == (blocks, k_tiles, 32, inner // 2) and packed.is_contiguous()
    assert reference.little_endian_bytes(packed) == reference.row_major_bytes(wanted)
    assert torch.equal(mps.unpack(packed), wanted)


def test_mps_bytes_do_not_depend_on_inner_k_tiles() -> None:
    q = torch.randint(0, 16, (16, 256), dtype=torch.uint8)
    flat = [mps.pack(q, inner).flatten() for inner in (2, 4, 8)]
    assert torch.equal(flat[0], flat[1]) and torch.equal(flat[1], flat[2])


def test_mps_accepts_any_strides() -> None:
    q = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    assert torch.equal(mps.pack(q.t().contiguous().t(), 4), mps.pack(q, 4))
    packed = mps.pack(q, 4)
    assert torch.equal(mps.unpack(packed.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)), q)
