"""The functions of every Layout object agree with each other."""

import pytest
import torch

from et_cuda_passes.layouts import LAYOUTS, Layout
from et_cuda_passes.layouts.layout import unsigned_shift

N, K, GROUP = 48, 192, 32


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def constants(layout: Layout, k: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight q [N, K] in 0..15, and it and its scales packed."""
    random = torch.Generator().manual_seed(k)
    q = torch.randint(0, 16, (N, k), dtype=torch.uint8, generator=random)
    scale, zero = torch.rand(2, N, k // GROUP, generator=random)
    return q, layout.pack(q, 0, N), layout.pack_scales(scale, zero, torch.float32, k)


def count(packed: torch.Tensor) -> int:
    return packed.numel() * packed.element_size() * 2


@pytest.mark.parametrize("k", [192, 96])
def test_layout_rows_equal_unpacked_rows(layout: Layout, k: int) -> None:
    if layout.rows is None or layout.row_scales is None:
        assert layout.rows is layout.row_scales is None
        return
    q, packed, pair = constants(layout, k)
    ids = torch.tensor([[3, 0], [47, 3]])
    assert torch.equal(layout.rows(ids, packed)[..., :k].to(torch.uint8), q[ids])
    assert torch.equal(layout.unpack(packed)[:, :k], q)
    whole, rows = layout.unpack_scales(pair, k // GROUP), layout.row_scales(ids, pair, k // GROUP)
    for table, row in zip(whole, rows, strict=True):
        assert table.shape == (N, k // GROUP)
        assert torch.equal(row, table[ids])


def test_layout_scales_and_zero_offset_give_the_weight(layout: Layout) -> None:
    q = torch.full((N, K), 11, dtype=torch.uint8)
    pair = layout.pack_scales(torch.full((N, K // GROUP), 0.5), torch.full((N, K // GROUP), 2.0), torch.float32, K)
    scale, zero = layout.unpack_scales(pair, K // GROUP)
    weight = (layout.unpack(layout.pack(q, 0, N))[:, :K:GROUP] - float(layout.zero_offset)) * scale + zero
    assert torch.equal(weight, torch.full((N, K // GROUP), (11 - 8) * 0.5 + 2))


def test_layout_check_returns_k_of_fitting_constants(layout: Layout) -> None:
    _, packed, pair = constants(layout)
    shape = tuple(pair.shape)
    assert layout.check(count(packed), shape, GROUP, K) == K
    assert layout.check(count(packed), shape, GROUP, K + 64) == K
    assert layout.check(count(packed) // 2, shape, GROUP, K) != K
    assert layout.check(count(packed), shape, GROUP * 8, K) != K
    assert layout.check(count(packed), shape, GROUP * 2, K) is None
    assert layout.check(count(packed), shape[1:], GROUP, K) is None


def test_mma_tiled_check_rejects_groups_that_do_not_divide_k() -> None:
    layout = LAYOUTS["mma_tiled"]
    _, packed, pair = constants(layout)
    assert K % 128 and layout.check(count(packed), tuple(pair.shape), 128, K) is None


@pytest.mark.parametrize(
    ("low", "high", "shift"),
    [(-8, 7, 8), (-7, 7, 8), (-1, 0, 8), (0, 15, 0), (0, 3, 8), (-2, 13, 2), (-8, 8, None), (-15, 0, 15), (3, 15, 0)],
)
def test_unsigned_shift_prefers_8(low: int, high: int, shift: int | None) -> None:
    assert unsigned_shift(low, high) == shift


@pytest.mark.parametrize(("low", "high", "shift"), [(-8, 7, 8), (-4, 3, 4), (-1, 0, 1), (0, 3, 0), (-3, 12, 3)])
def test_metal_shift_prefers_smallest_power_of_two(low: int, high: int, shift: int) -> None:
    assert LAYOUTS["metal"].shift(low, high) == shift
