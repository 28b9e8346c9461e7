"""Attention without a mask on a GPU: our kernel alone, and both kernels through ExecuTorch's CUDA backend."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.delegate import load
from et_cuda_passes.kernels.attention_launch import FEW_ROWS, HEAD_DIMS, blocks, launch
from et_cuda_passes.kernels.device import gpu_of
from et_cuda_passes.ops import ATTENTION

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 33, 60, 127, 128, 129, 300, 1500)
MOST = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative error: weights and result are rounded to the dtype."""


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention in fp64, of [B, heads, rows, D]."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return (q.double() @ k.transpose(-2, -1) * scale).softmax(-1) @ v


def off(y: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a row; a NaN makes it infinite or NaN."""
    return ((y.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


def random_qkv(heads: int, kv_heads: int, rows: int, keys: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(2, heads, rows, d), (2, kv_heads, keys, d), (2, kv_heads, keys, d)]
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_kernel_agrees_with_fp64_and_repeats_bit_for_bit(d: int, dtype: torch.dtype, kv_heads: int) -> None:
    gpu = gpu_of(torch.device("cuda"))
    both = {blocks(gpu, d, 1), blocks(gpu, d, FEW_ROWS + 1)}
    pairs = [(length, length) for length in LENGTHS] + [(1, 1500), (300, 1), (70, 97), (129, 31), (64, 192)]
    for rows, keys in pairs:
        q, k, v = random_qkv(6, kv_heads, rows, keys, d, dtype)
        wanted = exact(q, k, v, d**-0.5)
        for chosen in both:
            poison = torch.full_like(q, float("nan"))
            del poison  # the output will probably reuse this memory
            y = launch(q, k, v, d**-0.5, (1, 1, 1, 1), chosen)
            assert y.shape == q.shape
            assert off(y, wanted) < MOST[dtype], (rows, keys, chosen)
            again = (launch(q, k, v, d**-0.5, (1, 1, 1, 1), chosen) for _ in range(3))
            assert all(torch.equal(y, other) for other in again), (rows, keys, chosen)


@pytest.mark.parametrize("axes", [(2, 2, 2, 2), (1, 2, 1, 2), (2, 1, 2, 1)], ids=str)
def test_heads_on_either_axis_give_the_same_bits(axes: tuple[int, ...]) -> None:
    tensors = random_qkv(6, 2, 150, 190, 64, torch.bfloat16)
    wanted = ATTENTION(*tensors, 0.125, [1, 1, 1, 1])
    given = [t if at == 1 else t.transpose(1, 2).contiguous() for t, at in zip(tensors, axes, strict=False)]
    y = ATTENTION(*given, 0.125, list(axes))
    assert y.is_contiguous()
    assert torch.equal(y if axes[3] == 1 else y.transpose(1, 2), wanted)


@pytest.mark.parametrize("heads", [1, 5])
def test_columns_of_one_tensor_give_the_same_bits(heads: int) -> None:
    x = torch.randn(2, 190, 3 * heads * 64, device="cuda").bfloat16()
    q, k, v = (part.unflatten(2, (heads, 64)) for part in x.split(heads * 64, dim=2))
    assert not q.is_contiguous()
    wanted = ATTENTION(*(t.contiguous() for t in (q, k, v)), 0.125, [2, 2, 2, 2])
    assert torch.equal(ATTENTION(q, k, v, 0.125, [2, 2, 2, 2]), wanted)
    assert torch.equal(ATTENTION(*(t.transpose(1, 2) for t in (q, k, v)), 0.125, [1, 1, 1, 2]), wanted)


@pytest.mark.parametrize("kind", ["large", "rising", "falling", "equal", "negative scale", "no scale"])
def test_scores_of_every_kind_agree_with_fp64(kind: str) -> None:
    q, k, v = random_qkv(2, 2, 150, 700, 64, torch.bfloat16)
    scale = {"negative scale": -0.3, "no scale": 0.0}.get(kind, 0.125)
    if kind in ("rising", "falling"):
        # Scores from -80 to 80: every block is above, or below, the previous ones.
        q[:] = 8.0
        k[:] = torch.linspace(-1.25, 1.25, 700, device="cuda")[:, None]
        k = k.flip(2) if kind == "falling" else k
    elif kind == "large":
        q, k = q * 9, k * 9  # scores of hundreds
    elif kind == "equal":
        k[:] = k[:, :, :1].clone()
    assert off(ATTENTION(q, k, v, scale, [1, 1, 1, 1]), exact(q, k, v, scale)) < MOST[torch.bfloat16]


def test_attention_without_keys_is_0_and_without_rows_empty() -> None:
    q, k, v = random_qkv(2, 2, 3, 0, 64, torch.bfloat16)
    assert torch.equal(ATTENTION(q, k, v, 0.1, [1, 1, 1, 1]), torch.zeros_like(q))
    assert ATTENTION(v, q, q, 0.1, [1, 1, 1, 1]).shape == v.shape


def test_tensors_beyond_32_bit_offsets_agree_with_fp64() -> None:
    """First only the last of 17 million keys has a weight. Then 600,000 rows of 64 heads attend to a single key."""
    keys = 17_000_000
    k, v = (torch.zeros(2, keys, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert k.numel() > 2**31
    k[:, -1], v[:, -1] = 4.0, torch.randn(2, 1, 64, device="cuda").bfloat16()
    y = ATTENTION(torch.ones(2, 5, 1, 64, device="cuda").bfloat16(), k, v, 1.0, [2, 2, 2, 2])
    assert torch.equal(y, v[:, -1:].expand_as(y))
    del k, v
    q = torch.zeros(1, 64, 600_000, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 64, 1, 64, device="cuda").bfloat16()
    for axes in ([1, 1, 1, 1], [2, 1, 1, 2]):
        y = ATTENTION(q.view(1, 600_000, 64, 64) if axes[0] == 2 else q, k, k, 1.0, axes)
        assert bool((y == (k.transpose(1, 2) if axes[3] == 2 else k)).all())
        del y


class Attention(nn.Module):
    def __init__(self, shared_keys: bool = False) -> None:
        super().__init__()
        self.shared_keys = shared_keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.shared_keys)


def lowered(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any, kernel: str, folder: Path) -> Any:
    """``module``, lowered by the backend, as a function of CUDA tensors; ``kernel`` computes its attention."""
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    passes = [ecp.UnmaskedAttention(kernel=kernel), ecp.FuseAttentionTranspose()]
    with torch.no_grad():
        built = to_edge_transform_and_lower(program, partitioner=[ecp.CudaPartitioner([], passes=passes)])
        saved = built.to_executorch()
    saved.save(str(folder / "model.pte"))
    saved.write_tensor_data_to_file(str(folder))
    return load(folder / "model.pte")


@pytest.mark.parametrize("dynamic", [False, True])
def test_kernel_of_the_backend_applies_a_mask(dynamic: bool, tmp_path: Path) -> None:
    example = tuple(t.cpu() for t in random_qkv(4, 4, 60, 60, 32, torch.bfloat16))
    shapes = ({2: Dim("length", min=2, max=512)},) * 3 if dynamic else None
    run = lowered(Attention(), example, shapes, "backend", tmp_path)
    for rows in (2, 33, 60, 128, 300) if dynamic else (60,):
        q, k, v = random_qkv(4, 4, rows, rows, 32, torch.bfloat16)
        wanted = exact(q, k, v, 32**-0.5)
        assert (run(q, k, v)[0].double() - wanted).norm() < 8e-3 * wanted.norm(), rows


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_our_kernel_runs_with_a_dynamic_length(kv_heads: int, tmp_path: Path) -> None:
    example = tuple(t.cpu() for t in random_qkv(4, kv_heads, 60, 60, 64, torch.bfloat16))
    length = {2: Dim("length", min=1, max=2048)}
    run = lowered(Attention(kv_heads < 4), example, (length,) * 3, "triton", tmp_path)
    for rows in LENGTHS:
        q, k, v = random_qkv(4, kv_heads, rows, rows, 64, torch.bfloat16)
        (y,) = run(q, k, v)
        assert y.shape == q.shape
        assert off(y, exact(q, k, v, 64**-0.5)) < MOST[torch.bfloat16], rows
        assert all(torch.equal(run(q, k, v)[0], y) for _ in range(3))


@pytest.mark.parametrize(("rows", "keys"), [(1, 300), (33, 33), (60, 60), (128, 128), (129, 127), (1500, 1500)])
def test_our_kernel_runs_with_a_known_length(rows: int, keys: int, tmp_path: Path) -> None:
    q, k, v = random_qkv(4, 4, rows, keys, 64, torch.bfloat16)
    (y,) = lowered(Attention(), (q.cpu(), k.cpu(), v.cpu()), None, "triton", tmp_path)(q, k, v)
    assert y.shape == q.shape
    assert off(y, exact(q, k, v, 64**-0.5)) < MOST[torch.bfloat16]


class Encoder(nn.Module):
    """Two layers of attention between linears, on transposed views."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128).bfloat16() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for first in (0, 4):
            q, k, v = (self.layers[first + i](x).unflatten(-1, (2, 64)).transpose(1, 2) for i in range(3))
            x = x + self.layers[first + 3](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("dynamic", [False, True])
def test_transposed_views_run_through_the_backend(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, sizes = Encoder().eval(), {0: Dim("batch", min=1, max=4), 1: Dim("length", min=1, max=2048)}
    exactly = Encoder().double()
    exactly.load_state_dict(module.state_dict())
    exactly.cuda()
    run = lowered(module, (torch.randn(2, 60, 128).bfloat16(),), (sizes,) if dynamic else None, "triton", tmp_path)
    for rows in LENGTHS if dynamic else (60,):
        x = torch.randn(2, rows, 128, device="cuda").bfloat16()
        with torch.no_grad():
            assert off(run(x)[0], exactly(x.double())) < 1.5e-2, rows


class OfOne(nn.Module):
    """q, k and v are columns of the result of a pointwise operator, whose layout the compiler may change."""

    def forward(self, x: Tensor) -> Tensor:
        parts = (x * 2).split(x.shape[-1] // 3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_columns_of_a_computed_tensor_run_through_the_backend(dynamic: bool, tmp_path: Path) -> None:
    sizes = ({1: Dim("length", min=2, max=1024)},) if dynamic else None
    run = lowered(OfOne(), (torch.randn(2, 60, 3 * 128).bfloat16(),), sizes, "triton", tmp_path)
    for rows in (60, 129, 300) if dynamic else (60,):
        x = torch.randn(2, rows, 3 * 128, device="cuda").bfloat16()
        q, k, v = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in (x * 2).split(128, dim=-1))
        assert off(run(x)[0].transpose(1, 2), exact(q, k, v, 64**-0.5)) < MOST[torch.bfloat16], rows
