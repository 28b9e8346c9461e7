"""The attention operator on a CPU: against fp64, with heads on either axis, compiled, and its errors."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from et_cuda_passes.ops import ATTENTION

AXES = [(1, 1, 1, 1), (2, 2, 2, 2), (1, 2, 1, 2), (2, 1, 2, 1)]


def random_qkv(heads: int = 6, kv_heads: int = 2, rows: int = 5, keys: int = 9, d: int = 24) -> list[Tensor]:
    shapes = [(2, heads, rows, d), (2, kv_heads, keys, d), (2, kv_heads, keys, d)]
    return [torch.randn(shape) for shape in shapes]


def laid_out(tensors: list[Tensor], axes: tuple[int, ...]) -> list[Tensor]:
    """Tensors [B, heads, rows, D] with their heads moved to ``axes``."""
    return [t if at == 1 else t.transpose(1, 2).contiguous() for t, at in zip(tensors, axes, strict=False)]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return (q.double() @ k.transpose(-2, -1) * scale).softmax(-1) @ v


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("scale", [0.2, -0.7, 0.0])
def test_attention_matches_fp64(axes: tuple[int, ...], kv_heads: int, scale: float) -> None:
    q, k, v = random_qkv(kv_heads=kv_heads)
    y = ATTENTION(*laid_out([q, k, v], axes), scale, axes)
    assert y.is_contiguous()
    got = y if axes[3] == 1 else y.transpose(1, 2)
    torch.testing.assert_close(got.double(), exact(q, k, v, scale), rtol=1e-5, atol=1e-5)


def test_attention_without_keys_is_0_and_without_rows_is_empty() -> None:
    assert torch.equal(ATTENTION(*random_qkv(keys=0), 0.2, [1, 1, 1, 1]), torch.zeros(2, 6, 5, 24))
    assert ATTENTION(*random_qkv(rows=0), 0.2, [1, 1, 1, 2]).shape == (2, 0, 6, 24)


def test_attention_accepts_views() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in random_qkv())
    assert not q.is_contiguous()
    torch.testing.assert_close(
        ATTENTION(q, k, v, 0.2, [1, 1, 1, 1]).double(), exact(q, k, v, 0.2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("axes", AXES[:3], ids=str)
def test_attention_passes_opcheck(axes: tuple[int, ...]) -> None:
    given = (*laid_out(random_qkv(), axes), 0.2, list(axes))
    torch.library.opcheck(ATTENTION, given, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_matches_fp64_when_compiled(dynamic: bool) -> None:
    compiled = torch.compile(lambda q, k, v: ATTENTION(q, k, v, 0.2, [1, 1, 1, 2]) * 2, dynamic=dynamic, fullgraph=True)
    # Without dynamic sizes every shape is compiled anew.
    for rows, keys in ((5, 9), (1, 4), (33, 2))[: None if dynamic else 1]:
        q, k, v = random_qkv(rows=rows, keys=keys)
        wanted = 2 * exact(q, k, v, 0.2).transpose(1, 2)
        torch.testing.assert_close(compiled(q, k, v).double(), wanted, rtol=1e-5, atol=1e-5)


def _changed(which: int, change: Any) -> list[Tensor]:
    tensors = random_qkv()
    tensors[which] = change(tensors[which])
    return tensors


@pytest.mark.parametrize(
    ("tensors", "axes", "text"),
    [
        (random_qkv(), [1, 1, 1], "head_axes are four numbers, each 1 or 2"),
        (random_qkv(), [1, 1, 1, 3], "head_axes are four numbers, each 1 or 2"),
        (_changed(0, lambda q: q[0]), [1, 1, 1, 1], "four dimensions, not 3, 4 and 4"),
        (_changed(1, lambda k: k.half()), [1, 1, 1, 1], "the same float dtype"),
        ([t.int() for t in random_qkv()], [1, 1, 1, 1], "the same float dtype"),
        (_changed(2, lambda v: v[:, :, :-1]), [1, 1, 1, 1], "k and v have the same shape"),
        (_changed(2, lambda v: v[..., :-8]), [1, 1, 1, 1], "k and v have the same shape"),
        (_changed(0, lambda q: q[:1]), [1, 1, 1, 1], "with the batch and head dimension of q"),
        (_changed(0, lambda q: q[..., :16]), [1, 1, 1, 1], "with the batch and head dimension of q"),
        (_changed(0, lambda q: q[:, :5]), [1, 1, 1, 1], "a number of heads that divides q's"),
        (random_qkv(kv_heads=0), [1, 1, 1, 1], "a number of heads that divides q's"),
        (random_qkv(), [1, 2, 1, 1], "k and v have the same shape"),
    ],
)
def test_attention_rejects_arguments_that_do_not_fit(tensors: list[Tensor], axes: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ATTENTION(*tensors, 0.2, axes)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=text):
        ATTENTION(*tensors, 0.2, axes)


def test_attention_uses_each_of_head_axes() -> None:
    """All sixteen lists, so that a swap of two axes shows."""
    q, k, v = random_qkv()
    for axes in product((1, 2), repeat=4):
        y = ATTENTION(*laid_out([q, k, v], axes), 0.2, axes)
        got = y if axes[3] == 1 else y.transpose(1, 2)
        torch.testing.assert_close(got.double(), exact(q, k, v, 0.2), rtol=1e-5, atol=1e-5)
