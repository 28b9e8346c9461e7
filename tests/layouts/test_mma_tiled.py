"""The mma_tiled layout: its formula, its padding, and its scales and zeros."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.layouts import mma_tiled
from tests.layouts import reference


@given(
    n=st.integers(1, 20),
    thirtieth=st.integers(1, 7),
    chunk_bytes=st.integers(1, 5_000),
    signed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_mma_tiled_follows_formula_and_unpack_inverts_pack(
    n: int, thirtieth: int, chunk_bytes: int, signed: bool, seed: int
) -> None:
    k = 32 * thirtieth
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=random)
    q, offset = (wanted.to(torch.int8) - 8, 8) if signed else (wanted, 0)
    packed = mma_tiled.pack(q, offset, chunk_bytes=chunk_bytes)
    whole = -(-k // 64) * 64
    assert packed.shape == (n, whole // 8) and packed.dtype == torch.int32 and packed.is_contiguous()
    assert packed.tolist() == reference.mma_tiled(wanted)
    back = mma_tiled.unpack(packed)
    assert back.shape == (n, whole) and back.dtype == torch.uint8
    assert torch.equal(back[:, :k], wanted)


@pytest.mark.parametrize("offset", [0, 3, 8, 15])
def test_mma_tiled_padding_along_k_is_weight_0(offset: int) -> None:
    """The kernel subtracts 8 and x is 0 in the padding, so either one alone makes the product there 0."""
    q = torch.full((3, 96), 5 - offset, dtype=torch.int8)
    back = mma_tiled.unpack(mma_tiled.pack(q, offset))
    assert back[:, :96].unique().tolist() == [5]
    assert back[:, 96:].shape == (3, 32)
    assert back[:, 96:].unique().tolist() == [8]


def test_mma_tiled_word_holds_columns_of_one_thread_in_four_steps() -> None:
    """Word 2 lane + parity of a block: columns 2 lane + parity + 8 half of each of four steps of 16."""
    for lane in range(4):
        for parity in range(2):
            columns = [16 * step + 8 * half + 2 * lane + parity for step in range(4) for half in range(2)]
            for place, column in enumerate(columns):
                q = torch.zeros(1, 64, dtype=torch.uint8)
                q[0, column] = 1
                wanted = [0] * 8
                wanted[2 * lane + parity] = 1 << (4 * place)
                assert mma_tiled.pack(q).tolist() == [wanted]


def test_mma_tiled_rejects_k_not_multiple_of_16() -> None:
    with pytest.raises(ValueError, match="mma_tiled needs K to be a multiple of 16, got K = 40"):
        mma_tiled.pack(torch.zeros(2, 40, dtype=torch.uint8))


# Scales and zeros ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "group", "row"),
    [(32, 32, 8), (64, 64, 8), (160, 32, 16), (192, 32, 16), (512, 64, 16), (4096, 32, 136), (4096, 128, 40)],
)
def test_mma_tiled_scale_rows_are_aligned_and_fit_a_load_of_four(k: int, group: int, row: int) -> None:
    groups = k // group
    scale = torch.rand(5, groups) + 0.5
    rows = mma_tiled.scale_and_zero(scale, torch.zeros(5, groups), torch.bfloat16, k)
    assert rows.shape == (1, 5, row) and rows.dtype == torch.bfloat16 and rows.is_contiguous()
    assert row * rows.element_size() % 16 == 0
    assert torch.equal(rows[0, :, :groups], scale.bfloat16())
    assert not rows[0, :, groups:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mma_tiled_scales_have_plane_of_zeros_if_any_is_not_0(dtype: torch.dtype) -> None:
    scale, zero = torch.rand(4, 3) + 0.5, torch.zeros(4, 3)
    zero[3, 1] = -0.375
    rows = mma_tiled.scale_and_zero(scale, zero, dtype, 96)
    assert rows.shape == (2, 4, 8) and rows.dtype == dtype
    assert torch.equal(rows[0, :, :3], scale.to(dtype))
    assert torch.equal(rows[1, :, :3], zero.to(dtype))
    assert not rows[:, :, 3:].any()


def test_mma_tiled_scales_accept_any_strides() -> None:
    scale, zero = torch.rand(4, 8).t(), torch.rand(4, 8).t()
    rows = mma_tiled.scale_and_zero(scale, zero, torch.float32, 128)
    assert torch.equal(rows[0, :, :4], scale) and torch.equal(rows[1, :, :4], zero)


def test_mma_tiled_scales_reject_bad_input() -> None:
    scale, zero = torch.ones(4, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="3 groups, which do not divide K = 64"):
        mma_tiled.scale_and_zero(scale, zero, torch.bfloat16, 64)
    with pytest.raises(ValueError, match="0 groups, which do not divide K = 64"):
        mma_tiled.scale_and_zero(scale[:, :0], zero[:, :0], torch.bfloat16, 64)
    with pytest.raises(ValueError):
        mma_tiled.scale_and_zero(scale, zero[:, :2], torch.bfloat16, 96)
    with pytest.raises(TypeError):
        mma_tiled.scale_and_zero(scale, zero, torch.int8, 96)
    with pytest.raises(TypeError):
        mma_tiled.scale_and_zero(scale.int(), zero, torch.bfloat16, 96)
    for bad in (float("nan"), float("inf"), 1e6):
        with pytest.raises(ValueError, match="scale or zero"):
            mma_tiled.scale_and_zero(torch.full((4, 3), bad), zero, torch.float16, 96)
