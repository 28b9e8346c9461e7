"""Small exported programs by scheme: a linear, a gated layer, attention, an embedding, experts.

The weights are random and the same each time. The programs are quantized with torchao's configurations, except the
experts, for which torchao has none.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from et_cuda_passes.hf.schemes import quantize_model_
from et_cuda_passes.testing.modules import BF16, Experts, export, floats

LONGEST = 64
"""The upper bound of a dynamic axis."""


def linear(
    scheme: str | None = "4w",
    group_size: int = 32,
    dtype: torch.dtype = BF16,
    dynamic: bool = False,
    shared: bool = False,
    *,
    in_features: int = 64,
    out_features: int = 96,
    bias: bool = True,
    use: Callable[[Tensor], Any] | None = None,
) -> ExportedProgram:
    """``linear(x)`` of x [3, in_features].

    Args:
        scheme: one of the schemes of :func:`et_cuda_passes.quantize_model_`, such as "4w", "8w" or "8da4w"; None for
            a weight that is not quantized.
        group_size: weights along K that share a scale; 0 for one scale per row.
        dtype: of the model.
        dynamic: the number of rows is dynamic.
        shared: a second linear has the same weight, and its result is added.
        in_features: K.
        out_features: N.
        bias: whether the linear has one.
        use: what is computed of the result, ``torch.relu`` for example.
    """
    model = _Linear(in_features, out_features, bias, shared, use)
    return _exported(model, scheme, group_size, dtype, (floats(3, in_features, dtype=dtype),), 0 if dynamic else None)


class _Linear(nn.Module):
    def __init__(self, k: int, n: int, bias: bool, shared: bool, use: Callable[[Tensor], Any] | None) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n, bias=bias)
        self.second = nn.Linear(k, n, bias=False) if shared else None
        if self.second is not None:
            self.second.weight = self.linear.weight
        self.use = use

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        if self.second is not None:
            y = y + self.second(x * 2)
        return y if self.use is None else self.use(y)


def gated_layer(
    scheme: str | None = "4w",
    group_size: int = 32,
    dtype: torch.dtype = BF16,
    dynamic: bool = False,
    shared: bool = False,
    *,
    features: int = 64,
    hidden: int = 96,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> ExportedProgram:
    """``down(activation(gate(x)) * up(x))`` of x [3, features]: a feed-forward layer of most decoders.

    The arguments are those of :func:`linear`. With ``shared``, gate and up have the same weight.
    """
    model = _Gated(features, hidden, activation, shared)
    return _exported(model, scheme, group_size, dtype, (floats(3, features, dtype=dtype),), 0 if dynamic else None)


class _Gated(nn.Module):
    def __init__(self, features: int, hidden: int, activation: Callable[[Tensor], Tensor], shared: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(features, hidden, bias=False), nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features, bias=False)
        if shared:
            self.up.weight = self.gate.weight
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return result


def attention(
    scheme: str | None = "4w",
    group_size: int = 32,
    dtype: torch.dtype = BF16,
    dynamic: bool = False,
    shared: bool = False,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    causal: bool = False,
) -> ExportedProgram:
    """``o(attention(q(x), k(x), v(x)))`` of x [2, 5, heads * head_dim].

    The arguments are those of :func:`linear`. With ``dynamic``, the length is dynamic; with ``shared``, k and v have
    the same weight. Each of the ``kv_heads`` serves ``heads / kv_heads`` heads.
    """
    model = _Attention(heads, kv_heads, head_dim, causal, shared)
    x = floats(2, 5, heads * head_dim, dtype=dtype)
    return _exported(model, scheme, group_size, dtype, (x,), 1 if dynamic else None)


class _Attention(nn.Module):
    def __init__(self, heads: int, kv_heads: int, head_dim: int, causal: bool, shared: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        features = heads * head_dim
        self.q, self.o = nn.Linear(features, features), nn.Linear(features, features, bias=False)
        self.k, self.v = nn.Linear(features, kv_heads * head_dim), nn.Linear(features, kv_heads * head_dim)
        if shared:
            self.v.weight = self.k.weight

    def forward(self, x: Tensor) -> Tensor:
        batch, length, features = x.shape
        q, k, v = (
            y.view(batch, length, heads, features // self.heads).transpose(1, 2)
            for y, heads in ((self.q(x), self.heads), (self.k(x), self.kv_heads), (self.v(x), self.kv_heads))
        )
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, features))
        return result


def embedding(
    scheme: str | None = "4w",
    group_size: int = 32,
    dtype: torch.dtype = BF16,
    dynamic: bool = False,
    shared: bool = False,
    *,
    rows: int = 32,
    features: int = 64,
) -> ExportedProgram:
    """``embedding(ids)`` of ids [2, 3].

    The arguments are those of :func:`linear`. With ``dynamic``, the number of ids is dynamic; with ``shared``, a linear
    with the table as its weight, a tied lm_head, reads the result.
    """
    model = _Embedding(rows, features, shared)
    ids = torch.tensor([[1, 3, 5], [0, 2, rows - 1]])
    return _exported(model, scheme, group_size, dtype, (ids,), 1 if dynamic else None, embedding=True)


class _Embedding(nn.Module):
    def __init__(self, rows: int, features: int, shared: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, features)
        self.head = nn.Linear(features, rows, bias=False) if shared else None
        if self.head is not None:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.table(ids)
        return y if self.head is None else self.head(y)


def experts(
    scheme: str = "4w",
    group_size: int = 32,
    dtype: torch.dtype = BF16,
    dynamic: bool = False,
    shared: bool = False,
    *,
    count: int = 4,
    in_features: int = 96,
    out_features: int = 40,
) -> ExportedProgram:
    """``bmm(weight[ids], x)``: for each of 6 rows of x the product with the expert that it selects.

    The arguments are those of :func:`linear`; the schemes are "4w" and "8w". With ``shared``, a second product reads
    the stack of the experts [count, out_features, in_features].

    Raises:
        ValueError: ``scheme`` is another one.
    """
    bits = {"4w": 4, "8w": 8}.get(scheme)
    if bits is None:
        raise ValueError(
            f"experts are quantized with 4w or 8w, not with {scheme!r}: torchao has no other form of a stack"
        )

    def product(weight: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        y = torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)
        return y + torch.bmm(weight[ids.flip(0)], x.unsqueeze(-1)).squeeze(-1) if shared else y

    low = -(1 << (bits - 1))
    block = (1, 1, group_size or in_features)
    model = Experts(product, block, low, -low - 1, dtype=dtype, shape=(count, out_features, in_features))
    ids = torch.arange(6) % count
    rows = Dim("rows", min=2, max=LONGEST) if dynamic else None
    shapes = None if rows is None else ({0: rows}, {0: rows})
    return export(model, floats(6, in_features, dtype=dtype), ids, dynamic=shapes)


def _exported(
    model: nn.Module,
    scheme: str | None,
    group_size: int,
    dtype: torch.dtype,
    inputs: tuple[Tensor, ...],
    axis: int | None,
    embedding: bool = False,
) -> ExportedProgram:
    """The quantized model, exported with ``axis`` of its first input dynamic."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    model = model.to(dtype).eval()
    if scheme is not None:
        options: dict[str, Any] = (
            {"qembedding": scheme, "qembedding_group_size": group_size}
            if embedding
            else {"qlinear": scheme, "qlinear_group_size": group_size}
        )
        quantize_model_(model, algorithm="affine", group_size_fallback="error", **options)
    dynamic = None if axis is None else ({axis: Dim("length", min=2, max=LONGEST)},)
    return export(model, *inputs, dynamic=dynamic)
