"""Rows of a quantized table, dequantized after they are looked up: only those that are asked for.

- ``int4_embedding_<layout>(ids, packed, scale_and_zero, group_size, in_features, dtype, rows)``: rows of
  ``(q - 8) * scale + zero`` (metal: ``q * scale + zero``), read from the packed weight of an int4 linear: a table tied
  to one is held once; ``rows`` is how many it has where some of the packed ones are padding;
- ``int8_embedding(ids, packed, scale, zero, group_size, dtype)``: rows of ``packed * scale + zero``, with the
  constants of ``int8_linear``.

``ids`` may have any shape; the result is [*ids.shape, K] in ``dtype``, computed in fp32 and rounded once. On every
device they decompose into plain operators, which Inductor fuses into one kernel.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from et_cuda_passes.ops.int4_linear import NAMESPACE

_INT4 = (
    "(Tensor ids, Tensor packed, Tensor scale_and_zero, int group_size, int in_features, ScalarType dtype, "
    "int? rows=None) -> Tensor"
)
_INT8 = "(Tensor ids, Tensor packed, Tensor scale, Tensor? zero, int group_size, ScalarType dtype) -> Tensor"

# Kept for the life of the process: a Library takes its operators with it when it is collected.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _tile_packed_rows(ids: Tensor, packed: Tensor) -> Tensor:
    """Row n of int32 [N / 8, K / (16 I), 32, I / 2] is the words 4 (n % 8) to 4 (n % 8) + 3 of its tiles."""
    blocks, tiles, _, words = packed.shape
    row = packed.view(blocks, tiles, 8, 4, words)[ids // 8, :, ids % 8]
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    # [..., k tile, b, j, p] with p = a + 4 c and k % 32 = 8 a + 2 b + c, as the layout's own module says.
    nibbles = ((row.unsqueeze(-1) >> shifts) & 15).unflatten(-1, (2, 4))
    joined: Tensor = nibbles.movedim((-3, -1, -4, -2), (-4, -3, -2, -1)).flatten(-5)
    return joined


def _mps_rows(ids: Tensor, packed: Tensor) -> Tensor:
    """Row by row two to a byte, the even k in the low nibble, whatever the nominal shape."""
    row = F.embedding(ids, packed.view(torch.uint8).reshape(packed.shape[0] * 8, -1))
    return torch.stack((row & 15, row >> 4), dim=-1).flatten(-2)


def _metal_rows(ids: Tensor, packed: Tensor) -> Tensor:
    """The same bytes in their own shape, [N, K / 2]."""
    row = F.embedding(ids, packed)
    return torch.stack((row & 15, row >> 4), dim=-1).flatten(-2)


def _mma_tiled_rows(ids: Tensor, packed: Tensor) -> Tensor:
    """A row is the words [K / 64, 8]; bits 4 p and up of word w of a block are its weight 8 p + w."""
    row = F.embedding(ids, packed).unflatten(-1, (-1, 8, 1))
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    joined: Tensor = ((row >> shifts) & 15).transpose(-1, -2).flatten(-3)
    return joined


def _pairs(layout: str, ids: Tensor, qparams: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row and group, fp32 [*ids.shape, groups, 1]."""
    if layout in ("mma_tiled", "metal"):
        scale = F.embedding(ids, qparams[0])[..., :groups]
        zero = F.embedding(ids, qparams[1])[..., :groups] if qparams.shape[0] == 2 else torch.zeros_like(scale)
    else:
        scale, zero = qparams[:, ids].movedim(0, -2).unbind(-1)
    return scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)


_ROWS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mma_tiled": _mma_tiled_rows,
    "tile_packed_to_4d": _tile_packed_rows,
    "mps": _mps_rows,
    "metal": _metal_rows,
}


def _define(
    name: str, schema: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> torch._ops.OpOverload:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    register_decomposition(op)(compute)
    return op


def _int4(layout: str) -> torch._ops.OpOverload:
    name, rows_of = f"int4_embedding_{layout}", _ROWS[layout]

    def compute(
        ids: Tensor,
        packed: Tensor,
        qparams: Tensor,
        group_size: int,
        k: int,
        dtype: torch.dtype,
        rows: int | None = None,
    ) -> Tensor:
        scale, zero = _pairs(layout, ids, qparams[:, :rows], k // group_size)
        # Metal's zero is that of q * scale + zero.
        q = rows_of(ids, packed)[..., :k].float() - (0 if layout == "metal" else 8)
        row: Tensor = q.unflatten(-1, (-1, group_size)) * scale + zero
        return row.flatten(-2).to(dtype)

    def fake(
        ids: Tensor,
        packed: Tensor,
        qparams: Tensor,
        group_size: int,
        k: int,
        dtype: torch.dtype,
        rows: int | None = None,
    ) -> Tensor:
        weights, there = packed.numel() * packed.element_size() * 2, qparams.shape[1]
        if layout == "mma_tiled":
            fits = weights == there * -(-k // 64) * 64 and qparams.shape[2] * group_size >= k
        else:
            fits = weights == there * k and qparams.shape[2 if layout == "metal" else 0] * group_size == k
        if not fits:
            raise ValueError(
                f"{name}: {weights} packed weights, scale_and_zero {tuple(qparams.shape)}, group_size {group_size} and "
                f"in_features {k} do not fit each other"
            )
        return packed.new_empty((*ids.shape, k), dtype=dtype)

    return _define(name, _INT4, compute, fake)


def _int8_compute(
    ids: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    row: Tensor = F.embedding(ids, packed).float().unflatten(-1, (-1, group_size))
    row = row * F.embedding(ids, scale).float().unsqueeze(-1)
    if zero is not None:
        row = row + F.embedding(ids, zero).float().unsqueeze(-1)
    return row.flatten(-2).to(dtype)


def _int8_fake(
    ids: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    tables = [tuple(table.shape) for table in (scale, zero) if table is not None]
    if any(table != (packed.shape[0], packed.shape[1] // group_size) for table in tables):
        raise ValueError(
            f"int8_embedding: packed {tuple(packed.shape)}, scale and zero {tables} and group_size {group_size} do not "
            "fit each other"
        )
    return packed.new_empty((*ids.shape, packed.shape[1]), dtype=dtype)


INT4_EMBEDDINGS: Mapping[str, torch._ops.OpOverload] = {layout: _int4(layout) for layout in _ROWS}
"""The int4 operators by the layout that they read."""

INT8_EMBEDDING: torch._ops.OpOverload = _define("int8_embedding", _INT8, _int8_compute, _int8_fake)
"""The int8 operator."""
