"""tile_packed_to_4d against arrays from the CUDA operator, and against its formula."""

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


def test_golden_arrays_cover_inner_k_tiles_and_group_sizes() -> None:
    assert {inner_of(name) for name in NAMES} == {2, 4, 8}
    assert {group_of(name) for name in NAMES} == {32, 64, 128, 256}


@pytest.mark.parametrize("name", NAMES)
def test_pack_equals_cuda_operator(name: str) -> None:
    packed = tile_packed_to_4d.pack(FROM_CUDA[f"{name}.q"], inner_of(name))
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert torch.equal(packed, FROM_CUDA[f"{name}.packed"])


@pytest.mark.parametrize("name", NAMES)
def test_unpack_inverts_cuda_operator(name: str) -> None:
    q = tile_packed_to_4d.unpack(FROM_CUDA[f"{name}.packed"])
    assert q.dtype == torch.uint8
    assert torch.equal(q, FROM_CUDA[f"{name}.q"])


@pytest.mark.parametrize("name", NAMES)
def test_unpacked_arrays_give_cuda_kernel_output(name: str) -> None:
    scale, zero = scale_and_zero.unpack(FROM_CUDA[f"{name}.scale_and_zero"])
    q = tile_packed_to_4d.unpack(FROM_CUDA[f"{name}.packed"])
    group = group_of(name)
    # The kernel rounds each weight to bf16 once before it multiplies.
    weight = (q.double() - 8) * scale.double().repeat_interleave(group, 1) + zero.double().repeat_interleave(group, 1)
    x = FROM_CUDA[f"{name}.x"].double()
    wanted = x @ weight.bfloat16().double().t()
    # Rounding the result to bf16 changes it by at most 2^-8; the sum in fp32 adds far less.
    room = wanted.abs() * 2**-8 + (x.abs() @ weight.abs().t()) * 2**-20
    assert ((FROM_CUDA[f"{name}.y"].double() - wanted).abs() <= room).all()


@given(
    inner=st.sampled_from([2, 4, 8]), blocks=st.integers(1, 3), k_tiles=st.integers(1, 3), seed=st.integers(0, 2**32)
)
def test_pack_follows_formula(inner: int, blocks: int, k_tiles: int, seed: int) -> None:
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
def test_unpack_inverts_pack_for_any_chunks(
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
    ids=["transposed", "columns of a wider tensor", "misaligned", "every second byte"],
)
def test_pack_accepts_any_strides_and_alignment(view) -> None:  # type: ignore[no-untyped-def]
    q = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    assert torch.equal(tile_packed_to_4d.pack(view(q), 4), tile_packed_to_4d.pack(q, 4))


def test_unpack_accepts_noncontiguous_packed_weight() -> None:
    q = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    packed = tile_packed_to_4d.pack(q, 4)
    assert torch.equal(tile_packed_to_4d.unpack(packed.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)), q)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [2, 4, 8])
def test_pack_on_gpu_equals_cuda_operator(inner: int) -> None:
    q = torch.randint(0, 16, (1024, 2048), dtype=torch.uint8, device="cuda")
    two_per_byte = q[:, 0::2] << 4 | q[:, 1::2]  # the operator's input has the even k in the high nibble
    packed = tile_packed_to_4d.pack(q, inner)
    assert packed.is_cuda
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack(two_per_byte, inner))
    assert torch.equal(tile_packed_to_4d.unpack(packed), q)
