"""Which tensors are read through a descriptor."""

import pytest
import torch

from et_cuda_passes.kernels.known_writes import Described
from et_cuda_passes.kernels.launching import in_blocks
from et_cuda_passes.kernels.tiling import Tiling

BULK = Tiling(128, 64, 64, 1, 0, 4, 4, 1)


@pytest.mark.parametrize(("shape", "block"), [((5, 128), (128, 64)), ((1, 5, 128), (1, 128, 64)), ((5, 96), (128, 64))])
def test_rows_that_lie_in_one_piece(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = in_blocks(x, BULK, BULK.block_m)
    assert isinstance(found, Described) and found.tensor is x and found.shape == block


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 5, 128),  # a tile would reach over the first batch's end
        torch.randn(1, 1, 5, 128),  # more dimensions than the kernel has
        torch.randn(128),
        torch.randn(5, 98),  # rows that do not begin at multiples of 16 bytes
        torch.randn(0, 128),  # a descriptor of nothing is an error of the driver
        torch.randn(5 * 128 + 1).bfloat16()[1:].view(5, 128),  # not at a multiple of 16 bytes
    ],
    ids=lambda x: str(tuple(x.shape)),
)
def test_others_are_not(x: torch.Tensor) -> None:
    assert in_blocks(x, BULK, BULK.block_m) is None


def test_a_tiling_without_bulk_copies_has_none() -> None:
    assert in_blocks(torch.randn(5, 128), Tiling(128, 64, 64, 1, 0, 4, 4), 128) is None
