"""The reference of the attention benchmark, and its counts of operations and bytes."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.attention import CASES, Case, error, exact, sweep_blocks
from et_cuda_passes.kernels.attention_launch import HEAD_DIMS, blocks
from et_cuda_passes.kernels.gpus import HOPPER


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_reference_agrees_with_attention_of_torch(kv_heads: int) -> None:
    q, k, v = (torch.randn(2, n, heads, 16) for n, heads in ((5, 4), (7, kv_heads), (7, kv_heads)))
    y = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
    torch.testing.assert_close(exact(q, k, v), y.transpose(1, 2))
    assert error(y.transpose(1, 2), exact(q, k, v)) < 1e-12
    assert not error(torch.full_like(y.transpose(1, 2), float("nan")), exact(q, k, v)) < 1


def test_operations_and_bytes_of_one_attention_are_counted() -> None:
    assert CASES["Voxtral encoder"].operations == pytest.approx(11.52e9)
    # q and the result of 4 heads x 5 rows, k and v of 2 heads x 7 keys, two bytes each.
    assert Case(3, 4, 2, 5, 7, 16).nbytes == 3 * 16 * 2 * (2 * 4 * 5 + 2 * 2 * 7)


def test_sweep_contains_the_blocks_in_use() -> None:
    for d in HEAD_DIMS:
        assert {blocks(HOPPER, d, rows) for rows in (1, 1500)} <= set(sweep_blocks(d))
