"""The embedding_table layout: against its formula and against ExecuTorch's own packing."""

import executorch.exir  # noqa: F401  (registers the operators)
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from et_cuda_passes.layouts import embedding_table


def bit_by_bit(u: Tensor, bits: int) -> Tensor:
    """The bytes of the layout's formula, from weights in 0..2**bits - 1, one weight at a time."""
    n, k = u.shape
    per_byte = 8 // bits
    packed = torch.zeros(n, k // per_byte, dtype=torch.int64)
    for row in range(n):
        for column in range(k):
            place = column % per_byte
            shift = {2: 2 * place, 4: 4 * (1 - place), 8: 0}[bits]
            packed[row, column // per_byte] += int(u[row, column]) << shift
    return packed - 128 if bits == 8 else packed


@given(
    n=st.integers(1, 5),
    quarters=st.integers(1, 8),
    bits=st.sampled_from([2, 4, 8]),
    chunk_bytes=st.integers(1, 100),
    dtype=st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.int64]),
    seed=st.integers(0, 2**32),
)
def test_embedding_table_follows_formula_and_unpack_inverts_pack(
    n: int, quarters: int, bits: int, chunk_bytes: int, dtype: torch.dtype, seed: int
) -> None:
    u = torch.randint(0, 1 << bits, (n, 4 * quarters), generator=torch.Generator().manual_seed(seed))
    offset = 0 if dtype is torch.uint8 else 1 << bits - 1
    packed = embedding_table.pack((u - offset).to(dtype), bits, offset, chunk_bytes=chunk_bytes)
    assert packed.dtype is (torch.int8 if bits == 8 else torch.uint8) and packed.is_contiguous()
    assert torch.equal(packed.long(), bit_by_bit(u, bits))
    assert torch.equal(embedding_table.unpack(packed, bits), u.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 4])
def test_embedding_table_equals_executorch_packing(bits: int) -> None:
    half = 1 << bits - 1
    q = torch.randint(-half, half, (7, 24), dtype=torch.int8)
    wanted = torch.ops.quant_fusion._pack_embedding_weight.default(q, bits)
    assert torch.equal(embedding_table.pack(q, bits, half), wanted)


def test_embedding_table_rejects_bad_input() -> None:
    q = torch.zeros(2, 6, dtype=torch.int8)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        embedding_table.pack(q, 3)
    with pytest.raises(ValueError, match="K to be a multiple of 4, got K = 6"):
        embedding_table.pack(q, 2)
    with pytest.raises(ValueError, match=r"lie in -8..7 \(offset 8\), found -8..8"):
        embedding_table.pack(torch.tensor([[-8, 8]]), 4, 8)
    with pytest.raises(ValueError, match=r"must be 2-D \[N, K\] and not empty, got shape \(6,\)"):
        embedding_table.pack(q[0], 4)
    with pytest.raises(TypeError, match="must hold integers, one per element, got torch.float32"):
        embedding_table.pack(q.float(), 4)
    with pytest.raises(ValueError, match="q is a meta tensor"):
        embedding_table.pack(q.to("meta"), 4)
    with pytest.raises(TypeError, match="packed must be torch.int8, got torch.uint8"):
        embedding_table.unpack(torch.zeros(2, 2, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="packed must be 2-D and not empty"):
        embedding_table.unpack(torch.zeros(2, dtype=torch.uint8), 4)
