"""Tensors that are read through a descriptor, and tensors that are not."""

import pytest
import torch

from et_cuda_passes.kernels.buckets import tma_descriptor
from et_cuda_passes.kernels.tiling import Tiling
from et_cuda_passes.kernels.triton_launch import TensorDescriptorArg

BULK = Tiling(128, 64, 64, 1, 0, 4, 4, 1)


@pytest.mark.parametrize(("shape", "block"), [((5, 128), (128, 64)), ((1, 5, 128), (1, 128, 64)), ((5, 96), (128, 64))])
def test_contiguous_aligned_tensor_has_a_descriptor(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = tma_descriptor(x, BULK, BULK.block_m)
    assert isinstance(found, TensorDescriptorArg) and found.tensor is x and found.shape == block


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 5, 128),  # a tile would cross the end of the first batch
        torch.randn(1, 1, 5, 128),  # more dimensions than the kernel supports
        torch.randn(128),
        torch.randn(5, 98),  # rows that are not aligned to 16 bytes
        torch.randn(0, 128),  # the driver rejects an empty descriptor
        torch.randn(5 * 128 + 1).bfloat16()[1:].view(5, 128),  # an address that is not aligned to 16 bytes
    ],
    ids=lambda x: str(tuple(x.shape)),
)
def test_other_tensors_have_no_descriptor(x: torch.Tensor) -> None:
    assert tma_descriptor(x, BULK, BULK.block_m) is None


def test_tiling_without_bulk_copies_has_no_descriptor() -> None:
    assert tma_descriptor(torch.randn(5, 128), Tiling(128, 64, 64, 1, 0, 4, 4), 128) is None
