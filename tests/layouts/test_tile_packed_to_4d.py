"""tile_packed_to_4d against the CUDA operator's own arrays, and against the formula written out."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from et_cuda_passes.layouts import scale_and_zero, tile_packed_to_4d
from tests.layouts import reference

FROM_CUDA = load_file(Path(__file__).parents[1] / "golden_arrays" / "int4pack_cuda.safetensors")
NAMES = sorted({key.rsplit(".", 1)[0] for key in FROM_CUDA})


def inner_of(name: str) -> int:
    return int(name.split("_")[2].removeprefix("i"))


def group_of(name: str) -> int:
    return int(name.split("_")[3].removeprefix("g"))


def test_the_arrays_cover_every_inner_k_tiles_and_group_size() -> None:
    assert {inner_of(name) for name in NAMES} == {2, 4, 8}
    assert {group_of(name) for name in NAMES} == {32, 64, 128, 256}


@pytest.mark.parametrize("name", NAMES)
def test_pack_gives_the_bits_that_cuda_gives(name: str) -> None:
    packed = tile_packed_to_4d.pack(FROM_CUDA[f"{name}.q"], inner_of(name))
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert torch.equal(packed, FROM_CUDA[f"{name}.packed"])


@pytest.mark.parametrize("name", NAMES)
def test_unpack_reads_what_cuda_packed(name: str) -> None:
    q = tile_packed_to_4d.unpack(FROM_CUDA[f"{name}.packed"])
    assert q.dtype == torch.uint8
    assert torch.equal(q, FROM_CUDA[f"{name}.q"])


@pytest.mark.parametrize("name", NAMES)
def test_unpacked_arrays_explain_the_kernels_output(name: str) -> None:
    scale, zero = scale_and_zero.unpack(FROM_CUDA[f"{name}.scale_and_zero"])
    q = tile_packed_to_4d.unpack(FROM_CUDA[f"{name}.packed"])
    group = group_of(name)
    # The kernel makes bf16 weights before it multiplies, with one rounding.
    weight = (q.double() - 8) * scale.double().repeat_interleave(group, 1) + zero.double().repeat_interleave(group, 1)
    x = FROM_CUDA[f"{name}.x"].double()
    wanted = x @ weight.bfloat16().double().t()
    # Rounding the result to bf16 is at most 2^-8 of it; adding up in fp32 is far below.
    room = wanted.abs() * 2**-8 + (x.abs() @ weight.abs().t()) * 2**-20
    assert ((FROM_CUDA[f"{name}.y"].double() - wanted).abs() <= room).all()


@given(
    inner=st.sampled_from([2, 4, 8]), blocks=st.integers(1, 3), k_tiles=st.integers(1, 3), seed=st.integers(0, 2**32)
)
def test_pack_follows_the_formula(inner: int, blocks: int, k_tiles: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (8 * blocks, 16 * inner * k_tiles), dtype=torch.uint8, generator=random)
    assert torch.equal(tile_packed_to_4d.pack(q, inner), reference.tile_packed_to_4d(q, inner))


@given(
    inner=st.sampled_from([2, 4, 8]),
    blocks=st.integers(1, 20),
    k_tiles=st.integers(1, 5),
    chunk_bytes=st.integers(1, 40_000),
    offset=st.integers(0, 15),
    signed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_unpack_undoes_pack_whatever_the_chunks(
    inner: int, blocks: int, k_tiles: int, chunk_bytes: int, offset: int, signed: bool, seed: int
) -> None:
    offset = offset if signed else 0
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 16, (8 * blocks, 16 * inner * k_tiles), dtype=torch.uint8, generator=random)
    q = wanted.to(torch.int8) - offset if signed else wanted
    kept = q.clone()
    packed = tile_packed_to_4d.pack(q, inner, offset, chunk_bytes=chunk_bytes)
    assert packed.shape == (blocks, k_tiles, 32, inner // 2)
    assert torch.equal(packed, tile_packed_to_4d.pack(wanted, inner))
    assert torch.equal(tile_packed_to_4d.unpack(packed, chunk_bytes=chunk_bytes), wanted)
    assert torch.equal(q, kept)


@pytest.mark.parametrize(
    "view",
    [
        lambda q: q.t().contiguous().t(),
        lambda q: torch.cat([q, q], 1)[:, : q.shape[1]],
        lambda q: torch.cat([q.new_zeros(1), q.flatten()])[1:].view_as(q),  # 1 byte into its storage
        lambda q: torch.stack([q, q], 2)[..., 1],
    ],
    ids=["transposed", "columns of a wider one", "misaligned", "every second byte"],
)
def test_strides_and_alignment_do_not_matter(view) -> None:  # type: ignore[no-untyped-def]
    q = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    assert torch.equal(tile_packed_to_4d.pack(view(q), 4), tile_packed_to_4d.pack(q, 4))


def test_unpack_takes_a_packed_weight_that_is_not_contiguous() -> None:
    q = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    packed = tile_packed_to_4d.pack(q, 4)
    assert torch.equal(tile_packed_to_4d.unpack(packed.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)), q)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [2, 4, 8])
def test_on_a_gpu_pack_gives_the_operators_bits(inner: int) -> None:
    q = torch.randint(0, 16, (1024, 2048), dtype=torch.uint8, device="cuda")
    two_to_a_byte = q[:, 0::2] << 4 | q[:, 1::2]  # the operator's input has the even k in the high nibble
    packed = tile_packed_to_4d.pack(q, inner)
    assert packed.is_cuda
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack(two_to_a_byte, inner))
    assert torch.equal(tile_packed_to_4d.unpack(packed), q)
