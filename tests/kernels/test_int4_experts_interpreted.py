"""The experts' kernel in Triton's interpreter, against fp64: in order, indexed and grouped, on ragged shapes."""

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from et_cuda_passes.layouts import mma_tiled
from tests.kernels.interpreted import HERE, dtypes

# experts, N, K, group size, block_m, block_n, block_k, zeros
SHAPES = [
    (3, 16, 64, 32, 8, 16, 64, False),
    (4, 40, 96, 32, 8, 16, 64, True),
    (5, 33, 384, 128, 16, 16, 128, True),
    (1, 24, 192, 64, 8, 32, 128, False),
]
# rows of a batch, batches that read the same rows (0: all), the expert of each batch, or None for all in order
BATCHES = [
    (1, 1, None),
    (9, 0, None),
    (9, 3, [0, 2, 2, 1, -1, 0]),
    (1, 1, [2, 2, 0, 1]),
]
RAGGED = (5, 40, 96, 32, 8, 16, 64, True)
# the end of each expert's rows, the total number of rows, and the weights
GROUPS = [
    ([3, 3, 20, 21, 21], 21, RAGGED),
    ([0, 0, 0, 0, 9], 12, RAGGED),
    ([0, 0, 0, 0, 0], 4, RAGGED),
    ([5, 6, 7, 8, 9], 9, RAGGED),
    ([0, 1, 1, 1, 1], 1, RAGGED),
    ([3, 9, 9, 26, 30], 33, (5, 33, 384, 128, 8, 16, 64, True)),
]


class Experts:
    """Random packed weights, and their values in fp64 [E, N, K]."""

    def __init__(self, shape: tuple, dtype: torch.dtype) -> None:
        self.e, self.n, self.k, self.group, *self.blocks, zeros = shape
        random = torch.Generator().manual_seed(self.n * self.k)
        q = torch.randint(0, 16, (self.e * self.n, self.k), dtype=torch.uint8, generator=random)
        scale = torch.rand(self.e * self.n, self.k // self.group, generator=random) * 0.05 + 0.01
        zero = torch.randn(scale.shape, generator=random) * 0.05 * zeros
        self.packed = mma_tiled.pack(q)
        self.qparams = mma_tiled.scale_and_zero(scale, zero, dtype, self.k)
        s, z = (part.to(dtype).double().repeat_interleave(self.group, dim=1) for part in (scale, zero))
        self.weight = ((q.double() - 8) * s + z).view(self.e, self.n, self.k)

    def launch(self, x: Tensor, chosen: Tensor | None, y: Tensor, *sizes: int, tiles: int, grouped: bool) -> None:
        from et_cuda_passes.kernels.int4_experts import int4_experts

        block_m, block_n, block_k = self.blocks
        shape = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_SIZE": self.group, "SALT": 1}
        form = {"EVEN_K": self.k % block_k == 0, "HAS_ZERO": self.qparams.shape[0] == 2, "GROUPED": grouped}
        form |= {"HAS_IDS": chosen is not None and not grouped, "WIDTH": 1 << self.e.bit_length()}
        constants = (self.packed, self.qparams, self.packed if chosen is None else chosen)
        across, more = -(-self.n // block_n), (self.e, self.n, self.k // 32)
        grid = (tiles * across,) if grouped else (tiles, across)
        # A descriptor reads zeros beyond K, up to the padding of the words.
        described = grouped and (form["EVEN_K"] or block_k == mma_tiled.BLOCK)
        results, before = [], y.clone()
        for bulk in (0, 2) if described else (0,):
            given = TensorDescriptor.from_tensor(x, [block_m, block_k]) if bulk else x
            form |= {"BULK": bulk, "EVEN_K": form["EVEN_K"] or bulk > 0}
            int4_experts[grid](given, *constants, y, *sizes, *more, **shape, **form, USE_ASM=False, WGMMA=False)
            results.append(y.clone())
            y.copy_(before)
        y.copy_(results[0])
        for result in results:
            torch.testing.assert_close(result, y, rtol=0, atol=0, equal_nan=True)


def off(y: Tensor, wanted: Tensor) -> float:
    return float((y.double() - wanted).norm() / wanted.norm())


@HERE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@dtypes()
def test_batches_agree_with_fp64(shape: tuple, batch: tuple, dtype: torch.dtype, most: float) -> None:
    experts, (m, share, ids) = Experts(shape, dtype), batch
    # An id that is out of range is replaced by a valid one.
    given = ids and torch.tensor([i if i < experts.e else 0 for i in ids])
    chosen = list(range(experts.e)) if ids is None else [int(i) % experts.e for i in given]
    share = share or len(chosen)
    x = torch.randn(len(chosen) // share, m, experts.k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.full((len(chosen), m, experts.n), float("nan"), dtype=dtype)
    experts.launch(x, given, y, m, share, tiles=len(chosen) * -(-m // experts.blocks[0]), grouped=False)
    wanted = torch.bmm(x.double().repeat_interleave(share, dim=0), experts.weight[chosen].transpose(1, 2))
    assert off(y, wanted) < most


@HERE
@pytest.mark.parametrize("group", GROUPS, ids=str)
@dtypes()
def test_groups_agree_with_fp64(group: tuple, dtype: torch.dtype, most: float) -> None:
    ends, m, shape = group
    experts = Experts(shape, dtype)
    x = torch.randn(m, experts.k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.full((m, experts.n), float("nan"), dtype=dtype)
    experts.launch(x, torch.tensor(ends, dtype=torch.int32), y, m, 1, tiles=m // 8 + 6, grouped=True)
    whole = torch.cat([experts.weight, torch.zeros(1, experts.n, experts.k, dtype=torch.float64)])
    wanted = torch.stack([whole[sum(end <= row for end in ends)] @ x[row].double() for row in range(m)])
    # Rows without an expert are exactly 0.
    assert (y.double() - wanted).norm() <= most * wanted.norm()
    assert not y[ends[-1] :].any()


@HERE
def test_expert_out_of_range_gives_nan() -> None:
    experts = Experts((3, 16, 64, 32, 8, 16, 64, False), torch.float16)
    x, y = torch.ones(3, 1, 64, dtype=torch.float16), torch.zeros(3, 1, 16, dtype=torch.float16)
    experts.launch(x, torch.tensor([1, 3, -4]), y, 1, 1, tiles=3, grouped=False)
    assert off(y[0], x[0].double() @ experts.weight[1].T) < 1e-3
    assert y[1:].isnan().all()


@HERE
def test_invalid_offsets_stay_within_the_rows() -> None:
    experts = Experts((3, 16, 64, 32, 8, 16, 64, False), torch.float16)
    x = torch.ones(4, 64, dtype=torch.float16)
    held = torch.full((12, 16), 7.0, dtype=torch.float16)
    experts.launch(x, torch.tensor([9, -5, 100]), held[4:8], 4, 1, tiles=4, grouped=True)
    assert (held[:4] == 7).all() and (held[8:] == 7).all()
