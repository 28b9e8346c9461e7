"""The attention kernel in Triton's interpreter, on ragged shapes, against fp64: see ``interpreted.py``."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import HERE, dtypes

BLOCK_M, BLOCK_N = 16, 32

# batch, heads, key heads, rows, keys, head dimension
SHAPES = [(1, 2, 2, rows, keys, 16) for rows, keys in product((1, 15, 16, 17), (1, 31, 32, 33, 64, 95))]
SHAPES += [(2, 6, 2, 20, 70, d) for d in (16, 32, 64, 128, 256)]
SHAPES += [(3, 4, 1, 33, 40, 32), (2, 2, 2, 3, 0, 16)]
AXES = [(1, 1, 1, 1), (2, 2, 2, 2), (2, 1, 2, 1), (1, 2, 1, 2)]
"""The axes of the heads of q, k, v and the result."""
INPUTS = ["random", "large", "rising", "falling", "equal", "negative scale", "no scale"]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention in fp64, [B, heads, rows, D]; 0 without keys."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.transpose(-2, -1) * scale
    powers = (scores - scores.amax(-1, keepdim=True)).exp() if k.shape[2] else scores
    return (powers / powers.sum(-1, keepdim=True)) @ v


def before_nan(tensor: Tensor) -> Tensor:
    """A contiguous copy, with NaN after its end in memory."""
    memory = torch.full((tensor.numel() + 2**15,), float("nan"), dtype=tensor.dtype)
    return memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def wide(tensor: Tensor, more: int) -> Tensor:
    """The same [B, rows, heads, D] as columns of a tensor that has ``more`` on either side, all NaN."""
    batch, rows, heads, d = tensor.shape
    memory = torch.full((batch, rows, heads * d + 2 * more), float("nan"), dtype=tensor.dtype)
    return memory[..., more:-more].unflatten(2, (heads, d)).copy_(tensor)


def computed(
    q: Tensor, k: Tensor, v: Tensor, scale: float, axes: tuple[int, ...] = (1, 1, 1, 1), wider: int = 0
) -> Tensor:
    """The kernel's result [B, heads, rows, D], filled with NaN before. ``wider``: operands are columns of tensors."""
    from et_cuda_passes.kernels.attention import attention

    (batch, heads, rows, d), (_, kv_heads, keys, _) = q.shape, k.shape
    given = [before_nan(t if at == 1 else t.transpose(1, 2)) for t, at in zip((q, k, v), axes, strict=False)]
    y = torch.full((batch, *((heads, rows) if axes[3] == 1 else (rows, heads)), d), float("nan"), dtype=q.dtype)
    given = [t if not wider else wide(t, wider) for t in given]
    rows_of = {f"{name}_ROW": t.stride(3 - at) for name, t, at in zip("QKVY", (*given, y), axes, strict=True)}
    attention[(batch * heads * -(-rows // BLOCK_M),)](
        *given,
        y,
        rows,
        keys,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        D=d,
        HEADS=heads,
        KV_HEADS=kv_heads,
        **rows_of,
        SCALE=abs(scale) * math.log2(math.e),
        NEGATED=scale < 0,
        USE_ASM=False,
        SALT=1,
    )
    return y if axes[3] == 1 else y.transpose(1, 2)


def random_qkv(batch: int, heads: int, kv_heads: int, rows: int, keys: int, d: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rows * keys + d)
    shapes = [(batch, heads, rows, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, d)]
    return [torch.randn(shape, generator=random) for shape in shapes]


def off(y: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a row."""
    return ((y.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@HERE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_agrees_with_fp64(shape: tuple[int, ...]) -> None:
    q, k, v = (t.half() for t in random_qkv(*shape))
    y = computed(q, k, v, shape[-1] ** -0.5)
    if shape[4] == 0:
        assert torch.equal(y, torch.zeros_like(y))
    else:
        assert off(y, exact(q, k, v, shape[-1] ** -0.5)) < 2e-3


@HERE
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_heads_may_be_on_either_axis(axes: tuple[int, ...]) -> None:
    q, k, v = (t.half() for t in random_qkv(2, 4, 2, 21, 45, 16))
    y = computed(q, k, v, 0.25, axes)
    assert torch.equal(y, computed(q, k, v, 0.25))
    assert off(y, exact(q, k, v, 0.25)) < 2e-3


@HERE
@pytest.mark.parametrize("heads", [1, 4])
def test_columns_of_wider_tensors_are_read_alone(heads: int) -> None:
    q, k, v = (t.half() for t in random_qkv(2, heads, 1, 21, 45, 16))
    assert torch.equal(computed(q, k, v, 0.25, (2, 2, 2, 2), wider=8), computed(q, k, v, 0.25))


@HERE
@dtypes(2e-3)
@pytest.mark.parametrize("kind", INPUTS)
def test_scores_of_every_kind_agree_with_fp64(kind: str, dtype: torch.dtype, most: float) -> None:
    q, k, v = random_qkv(1, 2, 2, 18, 100, 64)
    scale = {"negative scale": -0.3, "no scale": 0.0}.get(kind, 0.125)
    if kind in ("rising", "falling"):
        # Scores from -80 to 80: every block is above, or below, the previous ones.
        q[:] = 8.0
        k[:] = torch.linspace(-1.25, 1.25, 100)[:, None]
        if kind == "falling":
            k = k.flip(2)
    elif kind == "large":
        q, k = q * 9, k * 9  # scores of hundreds
    elif kind == "equal":
        k[:] = k[:, :, :1].clone()
    q, k, v = (t.to(dtype) for t in (q, k, v))
    wanted = exact(q, k, v, scale)
    assert off(computed(q, k, v, scale), wanted) < most
    if kind in ("equal", "no scale"):
        torch.testing.assert_close(wanted, v.double().mean(2, keepdim=True).expand_as(wanted))
