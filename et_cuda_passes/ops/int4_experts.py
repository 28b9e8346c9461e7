"""The int4 products of experts, whose weights [E, N, K] are packed in one tensor; two operators per layout.

- ``int4_bmm_<layout>(x, packed, scale_and_zero, ids, group_size, out_features)``: batches of rows ``x [B, M, K]``, each
  times the matrix of its expert, [S, M, N]. Batch s has expert ``ids[s]`` (of any integer dtype; negative ones count
  from the last), or expert s where ``ids`` is None, and reads ``x[s // (S / B)]``: B divides S.
- ``int4_grouped_mm_<layout>(x, packed, scale_and_zero, offs, group_size, out_features)``: rows ``x [M, K]`` sorted by
  expert, those of expert e ending before ``offs[e]``, [M, N]. Rows after the last offset give 0.

The constants are those of the layout's int4 linear, stacked: ``packed [E, ...]``, and ``scale_and_zero`` along the
layout's ``experts_axis``.

For mma_tiled on CUDA the product is our Triton kernel, which reads only the experts in ``ids``. The other layouts call
the kernel of their int4 linear expert by expert. That kernel needs its expert before the program runs, so each expert
multiplies all grouped rows and keeps its own. Elsewhere mma_tiled dequantizes the experts in ``ids`` only.

The keyword ``gpu`` is explained at :data:`~et_cuda_passes.ops.registry.TRITON_OPERATORS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import experts_launch
from et_cuda_passes.kernels.linear_launch import INT4_GROUP_SIZES
from et_cuda_passes.layouts import LAYOUTS, Layout, mma_tiled
from et_cuda_passes.ops.int4_linear import packed_count, reference_matmul, scale_and_shift
from et_cuda_passes.ops.registry import define, define_triton

_SCHEMA = "(Tensor x, Tensor packed, Tensor scale_and_zero, Tensor{}, int group_size, int out_features) -> Tensor"
_BMM, _GROUPED_MM = f"int4_bmm_{mma_tiled.LAYOUT.name}", f"int4_grouped_mm_{mma_tiled.LAYOUT.name}"


@dataclass(frozen=True)
class Int4Experts:
    """The two operators of a layout.

    Attributes:
        layout: the layout of the packed weights.
        bmm: ``int4_bmm_<layout>``.
        grouped_mm: ``int4_grouped_mm_<layout>``.
    """

    layout: Layout
    bmm: torch._ops.OpOverload
    grouped_mm: torch._ops.OpOverload


def _check_constants(
    name: str, layout: Layout, x: Tensor, packed: Tensor, qparams: Tensor, group_size: int, n: int
) -> int:
    """The number of experts, if the constants fit each other: a kernel that reads past its scales returns NaN.

    Raises:
        ValueError: the message names the arguments that do not fit.
    """
    experts, k = packed.shape[0] if packed.dim() else 0, x.shape[-1] if x.dim() else 0
    scale_shape, axis = list(qparams.shape), layout.experts_axis
    assert axis is not None
    fits = group_size > 0 and experts > 0 and len(scale_shape) == 4 and scale_shape.pop(axis) == experts
    if fits:
        rows = scale_shape[1]
        fits = 0 < n <= rows and (packed.dim() != 3 or packed.shape[1] == rows)
        fits = fits and layout.check(packed_count(packed) // experts, tuple(scale_shape), group_size, k) == k
    if not fits:
        raise ValueError(
            f"{name}: x {tuple(x.shape)}, packed {tuple(packed.shape)}, scale_and_zero {tuple(qparams.shape)}, "
            f"group_size {group_size} and out_features {n} do not fit each other"
        )
    return experts


def _check_index(name: str, argument: str, index: Tensor) -> None:
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: {argument} {index.dtype} {tuple(index.shape)}; wanted 1-D, int32 or int64")


def _check_bmm(
    layout: Layout, x: Tensor, packed: Tensor, qparams: Tensor, ids: Tensor | None, group_size: int, n: int
) -> None:
    name = f"int4_bmm_{layout.name}"
    experts = _check_constants(name, layout, x, packed, qparams, group_size, n)
    if x.dim() != 3:
        raise ValueError(f"{name}: x {tuple(x.shape)}; wanted [B, M, K]")
    if ids is not None:
        _check_index(name, "ids", ids)
    batches, count = x.shape[0], experts if ids is None else ids.shape[0]
    # Zero batches and zero ids are allowed: a router can receive no tokens.
    known = isinstance(batches, int) and isinstance(count, int) and batches != count
    if known and (batches == 0 or count % batches):
        raise ValueError(f"{name}: x has {batches} batches for {count} matrices, which they do not divide")


def _check_grouped_mm(
    layout: Layout, x: Tensor, packed: Tensor, qparams: Tensor, offs: Tensor, group_size: int, n: int
) -> None:
    name = f"int4_grouped_mm_{layout.name}"
    experts = _check_constants(name, layout, x, packed, qparams, group_size, n)
    if x.dim() != 2:
        raise ValueError(f"{name}: x {tuple(x.shape)}; wanted [M, K]")
    _check_index(name, "offs", offs)
    if offs.shape[0] != experts:
        raise ValueError(f"{name}: {offs.shape[0]} offs for {experts} experts")


def _fake_bmm(x: Tensor, packed: Tensor, qparams: Tensor, ids: Tensor | None, group_size: int, n: int) -> Tensor:
    return x.new_empty((packed.shape[0] if ids is None else ids.shape[0], x.shape[1], n))


def _fake_grouped_mm(x: Tensor, packed: Tensor, qparams: Tensor, offs: Tensor, group_size: int, n: int) -> Tensor:
    return x.new_empty((x.shape[0], n))


def repeat_batches(x: Tensor, count: Any) -> Tensor:
    """x [B, M, K] as [count, M, K]: each batch repeated for the matrices that read it."""
    batches, m, k = x.shape
    if statically_known_true(batches == count):
        return x
    return x.unsqueeze(1).expand(batches, count // batches, m, k).reshape(count, m, k)


def _grouped(x: Tensor, offs: Tensor, n: int, multiply: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Multiply all rows by every expert and keep each row's own result: only the run knows the rows of an expert."""
    row = torch.arange(x.shape[0], device=x.device)
    y = x.new_zeros((x.shape[0], n))
    start: Any = 0
    for expert in range(offs.shape[0]):
        inside = (row >= start) & (row < offs[expert])
        y = torch.where(inside.unsqueeze(-1), multiply(x, expert), y)
        start = offs[expert]
    return y


# Layouts that multiply with the kernel of their int4 linear ---------------------------------------------------------


def _define(layout: Layout) -> Int4Experts:
    axis = layout.experts_axis
    assert axis is not None

    def reference(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
        return reference_matmul(layout, x, packed, qparams, group_size)

    def multiplier(
        x: Tensor, packed: Tensor, qparams: Tensor, group_size: int, n: int
    ) -> Callable[[Tensor, int], Tensor]:
        matmul = layout.kernels.get(x.device.type, reference)
        return lambda rows, expert: matmul(rows, packed[expert], qparams.select(axis, expert).contiguous(), group_size)[
            :, :n
        ]

    def check_bmm(*arguments: Any) -> None:
        if arguments[3] is not None:
            raise ValueError(f"int4_bmm_{layout.name}: its layout cannot be read by ids; give them to {_BMM}")
        _check_bmm(layout, *arguments)

    def bmm(x: Tensor, packed: Tensor, qparams: Tensor, ids: None, group_size: int, n: int) -> Tensor:
        multiply, experts = multiplier(x, packed, qparams, group_size, n), packed.shape[0]
        rows = repeat_batches(x, experts).contiguous()
        return torch.stack([multiply(rows[expert], expert) for expert in range(experts)])

    def grouped_mm(x: Tensor, packed: Tensor, qparams: Tensor, offs: Tensor, group_size: int, n: int) -> Tensor:
        return _grouped(x.contiguous(), offs, n, multiplier(x, packed, qparams, group_size, n))

    return Int4Experts(
        layout,
        define(f"int4_bmm_{layout.name}", _SCHEMA.format("? ids"), check=check_bmm, compute=bmm, fake=_fake_bmm),
        define(
            f"int4_grouped_mm_{layout.name}",
            _SCHEMA.format(" offs"),
            check=lambda *arguments: _check_grouped_mm(layout, *arguments),
            compute=grouped_mm,
            fake=_fake_grouped_mm,
        ),
    )


# mma_tiled, which our Triton kernel reads ----------------------------------------------------------------------------


def _matrices(words: Tensor, pair: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Matrices [S, N, K] from words [S, N, K / 8] and scales, and zeros, [1 or 2, S, N, row]; rounded once."""
    (count, n, _), groups = words.shape, k // group_size
    scale, zero = mma_tiled.LAYOUT.unpack_scales(pair.flatten(1, 2), groups)
    q = mma_tiled.unpack_words(words)[..., :k].reshape(count * n, k).float() - mma_tiled.LAYOUT.zero_offset
    return scale_and_shift(q, scale, zero, group_size).view(count, n, k).to(dtype)


def _check_kernel(name: str, x: Tensor, qparams: Tensor, group_size: int) -> None:
    if group_size not in INT4_GROUP_SIZES or qparams.dtype != x.dtype or x.dtype not in (torch.bfloat16, torch.half):
        raise ValueError(
            f"{name}: the CUDA kernel has bf16 and fp16, with scales of the same dtype, and group sizes "
            f"{', '.join(map(str, INT4_GROUP_SIZES))}; given x {x.dtype}, scales {qparams.dtype}, group {group_size}"
        )


def _check_rows(name: str, packed: Tensor, n: int) -> None:
    """The Triton kernel writes every packed row."""
    if packed.shape[1] != n:
        raise ValueError(f"{name}: {packed.shape[1]} packed rows for out_features = {n}")


def _bmm(
    x: Tensor,
    packed: Tensor,
    scale_and_zero: Tensor,
    ids: Tensor | None,
    group_size: int,
    out_features: int,
    *,
    gpu: str = "",
) -> Tensor:
    _check_bmm(mma_tiled.LAYOUT, x, packed, scale_and_zero, ids, group_size, out_features)
    _check_rows(_BMM, packed, out_features)
    if x.device.type == "cuda":
        _check_kernel(_BMM, x, scale_and_zero, group_size)
        experts = ids if ids is None else ids.contiguous()
        return experts_launch.bmm(x.contiguous(), packed, scale_and_zero, experts, group_size, gpu)
    words, pair = (packed, scale_and_zero) if ids is None else (packed[ids], scale_and_zero[:, ids])
    weight = _matrices(words, pair, x.shape[-1], group_size, x.dtype)
    return torch.bmm(repeat_batches(x, weight.shape[0]), weight.transpose(1, 2))


def _grouped_mm(
    x: Tensor,
    packed: Tensor,
    scale_and_zero: Tensor,
    offs: Tensor,
    group_size: int,
    out_features: int,
    *,
    gpu: str = "",
) -> Tensor:
    _check_grouped_mm(mma_tiled.LAYOUT, x, packed, scale_and_zero, offs, group_size, out_features)
    _check_rows(_GROUPED_MM, packed, out_features)
    if x.device.type == "cuda":
        _check_kernel(_GROUPED_MM, x, scale_and_zero, group_size)
        return experts_launch.grouped_mm(x.contiguous(), packed, scale_and_zero, offs.contiguous(), group_size, gpu)

    def multiply(x: Tensor, expert: int) -> Tensor:
        one = slice(expert, expert + 1)
        return F.linear(x, _matrices(packed[one], scale_and_zero[:, one], x.shape[-1], group_size, x.dtype)[0])

    return _grouped(x, offs, out_features, multiply)


def _checked_fake_bmm(*arguments: Any) -> Tensor:
    _check_bmm(mma_tiled.LAYOUT, *arguments)
    _check_rows(_BMM, arguments[1], arguments[5])
    return _fake_bmm(*arguments)


def _checked_fake_grouped_mm(*arguments: Any) -> Tensor:
    _check_grouped_mm(mma_tiled.LAYOUT, *arguments)
    _check_rows(_GROUPED_MM, arguments[1], arguments[5])
    return _fake_grouped_mm(*arguments)


_MMA_TILED = Int4Experts(
    mma_tiled.LAYOUT,
    define_triton(_BMM, _bmm, _checked_fake_bmm),
    define_triton(_GROUPED_MM, _grouped_mm, _checked_fake_grouped_mm),
)
INT4_EXPERTS: Mapping[str, Int4Experts] = {
    layout.name: _MMA_TILED if layout is mma_tiled.LAYOUT else _define(layout)
    for layout in LAYOUTS.values()
    if layout.experts_axis is not None
}
"""The operators for experts by the name of the layout that they read."""
