"""The int4 products of experts, whose weights [E, N, K] are packed in one tensor; one operator a form and layout.

- ``int4_bmm_<layout>(x, packed, scale_and_zero, ids, group_size, out_features)``: batches of rows ``x [B, M, K]``, each
  times the matrix of its expert, [S, M, N]. Batch s has expert ``ids[s]`` (of any integer dtype; negative ones count
  from the last), or expert s where ``ids`` is None, and reads ``x[s // (S / B)]``: B divides S.
- ``int4_grouped_mm_<layout>(x, packed, scale_and_zero, offs, group_size, out_features)``: rows ``x [M, K]`` sorted by
  expert, those of expert e ending before ``offs[e]``, [M, N]. Rows beyond the last offset give 0.

The constants of a layout are those of its int4 linear, for each expert: ``packed [E, ...]`` and ``scale_and_zero``
[1 or 2, E, N, S] (mma_tiled) or [E, K / group_size, N, 2] (cpu).

On CUDA, mma_tiled is our Triton kernel, which reads the experts that are asked for. On the CPU the cpu layout has the
kernel of ``int4_linear_cpu``, expert by expert; that kernel needs to know its expert before the program runs, so that
grouped rows go through all of them and keep their own. What ``ids`` choose is mma_tiled there too: it can be read
expert by expert, and only those that are chosen are dequantized.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import register_decomposition
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import experts_launch
from et_cuda_passes.kernels.int4_launch import GROUP_SIZES
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops.int4_linear import NAMESPACE, affine

_SCHEMA = "(Tensor x, Tensor packed, Tensor scale_and_zero, Tensor{}, int group_size, int out_features) -> Tensor"

# Kept for the life of the process: a Library takes its operators with it when it is collected.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Int4Experts:
    """The two operators of a layout.

    Attributes:
        layout: name of the layout of the packed weights.
        bmm: ``int4_bmm_<layout>``.
        grouped_mm: ``int4_grouped_mm_<layout>``.
    """

    layout: str
    bmm: torch._ops.OpOverload
    grouped_mm: torch._ops.OpOverload


def _check(name: str, x: Tensor, packed: Tensor, qparams: Tensor, chosen: Tensor | None, group: int, n: int) -> None:
    """The constants must fit each other: a kernel that reads past too few scales gives no error, but NaN.

    Raises:
        ValueError: naming what does not fit.
    """
    grouped = name.startswith("int4_grouped_mm")
    k = x.shape[-1] if x.dim() else 0
    experts, rows, width = packed.shape if packed.dim() == 3 else (0, 0, 0)
    whole = group > 0 and k % group == 0
    if name.endswith("mma_tiled"):
        whole = whole and width * 8 == mma_tiled.padded(k) and rows == n
        whole = whole and tuple(qparams.shape[1:]) == (experts, n, mma_tiled.scale_row(k, group))
    else:
        whole = whole and width * 2 == k and 0 < n <= rows
        whole = whole and tuple(qparams.shape) == (experts, k // group, rows, 2)
    if not whole:
        raise ValueError(
            f"{name}: x {tuple(x.shape)}, packed {tuple(packed.shape)}, scale_and_zero {tuple(qparams.shape)}, "
            f"group_size {group} and out_features {n} do not fit each other"
        )
    if x.dim() != (2 if grouped else 3):
        raise ValueError(f"{name}: x {tuple(x.shape)}; wanted [{'M' if grouped else 'B, M'}, K]")
    if chosen is not None and (chosen.dim() != 1 or chosen.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"{name}: {'offs' if grouped else 'ids'} {chosen.dtype} {tuple(chosen.shape)}; wanted 1-D, int32 or int64"
        )
    if grouped:
        assert chosen is not None
        if chosen.shape[0] != experts:
            raise ValueError(f"{name}: {chosen.shape[0]} offs for {experts} experts")
        return
    batches, count = x.shape[0], experts if chosen is None else chosen.shape[0]
    # Without tokens there are neither.
    known = isinstance(batches, int) and isinstance(count, int) and batches != count
    if known and (batches == 0 or count % batches):
        raise ValueError(f"{name}: x has {batches} batches for {count} matrices, which they do not divide")


def _shared(x: Tensor, count: Any) -> Tensor:
    """x [B, M, K] as [S, M, K], each batch repeated for those that read it."""
    batches, m, k = x.shape
    if statically_known_true(batches == count):
        return x
    return x.unsqueeze(1).expand(batches, count // batches, m, k).reshape(count, m, k)


def _grouped(x: Tensor, offs: Tensor, n: int, times: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Every expert over all rows, each row keeping its own: which rows an expert has is known only at run time."""
    row = torch.arange(x.shape[0], device=x.device)
    y = x.new_zeros((x.shape[0], n))
    start: Any = 0
    for expert in range(offs.shape[0]):
        inside = (row >= start) & (row < offs[expert])
        y = torch.where(inside.unsqueeze(-1), times(x, expert), y)
        start = offs[expert]
    return y


def _nibbles(words: Tensor) -> Tensor:
    """0..15 of int32 words [..., K / 8] in the mma_tiled layout, [..., padded K]."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    q = (words.unflatten(-1, (-1, 8, 1)) >> shifts) & 15
    # Bits 4 p and up of word w of a block are its weight 8 p + w.
    joined: Tensor = q.transpose(-1, -2).flatten(-3)
    return joined


def _tiled_matrices(words: Tensor, pair: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Matrices [S, N, K] from words [S, N, K / 8] and scales, and zeros, [1 or 2, S, N, row]; rounded once."""
    (count, n, _), groups = words.shape, k // group_size
    scale = pair[0, ..., :groups].reshape(count * n, groups)
    zero = pair[1, ..., :groups].reshape(count * n, groups) if pair.shape[0] == 2 else torch.zeros_like(scale)
    q = _nibbles(words)[..., :k].reshape(count * n, k).float() - 8
    return affine(q, scale, zero, group_size).view(count, n, k).to(dtype)


def _require_kernel(name: str, x: Tensor, qparams: Tensor, group_size: int) -> None:
    if group_size not in GROUP_SIZES or qparams.dtype != x.dtype or x.dtype not in (torch.bfloat16, torch.half):
        raise ValueError(
            f"{name}: the CUDA kernel has bf16 and fp16, with scales of the same dtype, and group sizes "
            f"{', '.join(map(str, GROUP_SIZES))}; given x {x.dtype}, scales {qparams.dtype}, group {group_size}"
        )


@torch.library.triton_op(f"{NAMESPACE}::int4_bmm_mma_tiled", mutates_args=())
def _tiled_bmm(
    x: Tensor, packed: Tensor, scale_and_zero: Tensor, ids: Tensor | None, group_size: int, out_features: int
) -> Tensor:
    name = "int4_bmm_mma_tiled"
    _check(name, x, packed, scale_and_zero, ids, group_size, out_features)
    if x.device.type == "cuda":
        _require_kernel(name, x, scale_and_zero, group_size)
        chosen = ids if ids is None else ids.contiguous()
        return experts_launch.bmm(x.contiguous(), packed, scale_and_zero, chosen, group_size)
    words, pair = (packed, scale_and_zero) if ids is None else (packed[ids], scale_and_zero[:, ids])
    weight = _tiled_matrices(words, pair, x.shape[-1], group_size, x.dtype)
    return torch.bmm(_shared(x, weight.shape[0]), weight.transpose(1, 2))


@torch.library.triton_op(f"{NAMESPACE}::int4_grouped_mm_mma_tiled", mutates_args=())
def _tiled_grouped_mm(
    x: Tensor, packed: Tensor, scale_and_zero: Tensor, offs: Tensor, group_size: int, out_features: int
) -> Tensor:
    name = "int4_grouped_mm_mma_tiled"
    _check(name, x, packed, scale_and_zero, offs, group_size, out_features)
    if x.device.type == "cuda":
        _require_kernel(name, x, scale_and_zero, group_size)
        return experts_launch.grouped_mm(x.contiguous(), packed, scale_and_zero, offs.contiguous(), group_size)

    def times(x: Tensor, expert: int) -> Tensor:
        one = slice(expert, expert + 1)
        return F.linear(x, _tiled_matrices(packed[one], scale_and_zero[:, one], x.shape[-1], group_size, x.dtype)[0])

    return _grouped(x, offs, out_features, times)


def _cpu_times(packed: Tensor, qparams: Tensor, group_size: int, n: int) -> Callable[[Tensor, int], Tensor]:
    def times(x: Tensor, expert: int) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x, packed[expert], group_size, qparams[expert].contiguous()
        )
        return y[:, :n]

    return times


def _cpu_bmm(x: Tensor, packed: Tensor, qparams: Tensor, ids: Tensor | None, group_size: int, n: int) -> Tensor:
    _check("int4_bmm_cpu", x, packed, qparams, ids, group_size, n)
    if ids is not None:
        raise ValueError("int4_bmm_cpu: its layout cannot be read by ids; give them to int4_bmm_mma_tiled")
    times, experts = _cpu_times(packed, qparams, group_size, n), packed.shape[0]
    rows = _shared(x, experts).contiguous()
    return torch.stack([times(rows[expert], expert) for expert in range(experts)])


def _cpu_grouped_mm(x: Tensor, packed: Tensor, qparams: Tensor, offs: Tensor, group_size: int, n: int) -> Tensor:
    _check("int4_grouped_mm_cpu", x, packed, qparams, offs, group_size, n)
    return _grouped(x.contiguous(), offs, n, _cpu_times(packed, qparams, group_size, n))


def _fake_bmm(x: Tensor, packed: Tensor, qparams: Tensor, ids: Tensor | None, group_size: int, n: int) -> Tensor:
    _check("int4_bmm_" + _layout_of(packed), x, packed, qparams, ids, group_size, n)
    return x.new_empty((packed.shape[0] if ids is None else ids.shape[0], x.shape[1], n))


def _fake_grouped_mm(x: Tensor, packed: Tensor, qparams: Tensor, offs: Tensor, group_size: int, n: int) -> Tensor:
    _check("int4_grouped_mm_" + _layout_of(packed), x, packed, qparams, offs, group_size, n)
    return x.new_empty((x.shape[0], n))


def _layout_of(packed: Tensor) -> str:
    return "mma_tiled" if packed.dtype is torch.int32 else "cpu"


def _define_cpu(
    name: str, chosen: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> torch._ops.OpOverload:
    _LIBRARY.define(name + _SCHEMA.format(chosen), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    register_decomposition(op)(compute)
    return op


_tiled_bmm.register_fake(_fake_bmm)
_tiled_grouped_mm.register_fake(_fake_grouped_mm)
_OPS = torch.ops.et_cuda_passes
INT4_EXPERTS: Mapping[str, Int4Experts] = {
    "mma_tiled": Int4Experts("mma_tiled", _OPS.int4_bmm_mma_tiled.default, _OPS.int4_grouped_mm_mma_tiled.default),
    "cpu": Int4Experts(
        "cpu",
        _define_cpu("int4_bmm_cpu", "? ids", _cpu_bmm, _fake_bmm),
        _define_cpu("int4_grouped_mm_cpu", " offs", _cpu_grouped_mm, _fake_grouped_mm),
    ),
}
"""The operators by the layout that they read."""
