"""Rows of a quantized table: looked up first, then dequantized, so that only the rows in ``ids`` are.

- ``int4_embedding_<layout>(ids, packed, scale_and_zero, group_size, in_features, dtype, rows)``: rows of
  ``(q - 8) * scale + zero`` (metal: ``q * scale + zero``), read from the packed weight of an int4 linear, so that a
  table tied to a linear is stored once. ``rows`` is the number of rows without padding, if the weight has padding;
- ``int8_embedding(ids, packed, scale, zero, group_size, dtype)``: rows of ``packed * scale + zero``, with the
  constants of ``int8_linear``.

``ids`` may have any shape; the result is [*ids.shape, K] in ``dtype``, computed in fp32 and rounded once. On every
device the operators decompose into plain operators, which Inductor fuses into one kernel.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.layouts import LAYOUTS, Layout
from et_cuda_passes.ops.int4_linear import packed_count
from et_cuda_passes.ops.registry import define

_INT4 = (
    "(Tensor ids, Tensor packed, Tensor scale_and_zero, int group_size, int in_features, ScalarType dtype, "
    "int? rows=None) -> Tensor"
)
_INT8 = "(Tensor ids, Tensor packed, Tensor scale, Tensor? zero, int group_size, ScalarType dtype) -> Tensor"


def _int4_embedding(layout: Layout) -> torch._ops.OpOverload:
    name, rows_of, scales_of = f"int4_embedding_{layout.name}", layout.rows, layout.row_scales
    assert rows_of is not None and scales_of is not None

    def check(ids: Tensor, packed: Tensor, qparams: Tensor, group_size: int, k: int, *_: object) -> None:
        count = packed_count(packed)
        if layout.check(count, tuple(qparams.shape), group_size, k) != k:
            raise ValueError(
                f"{name}: {count} packed weights, scale_and_zero {tuple(qparams.shape)}, group_size {group_size} and "
                f"in_features {k} do not fit each other"
            )

    def compute(
        ids: Tensor,
        packed: Tensor,
        qparams: Tensor,
        group_size: int,
        k: int,
        dtype: torch.dtype,
        rows: int | None = None,
    ) -> Tensor:
        # An id of a padded row is an error here, as it is for the table without padding.
        scale, zero = (part.float().unsqueeze(-1) for part in scales_of(ids, qparams[:, :rows], k // group_size))
        q = rows_of(ids, packed)[..., :k].float() - layout.zero_offset
        row: Tensor = q.unflatten(-1, (-1, group_size)) * scale + zero
        return row.flatten(-2).to(dtype)

    def fake(
        ids: Tensor, packed: Tensor, qparams: Tensor, group_size: int, k: int, dtype: torch.dtype, *_: object
    ) -> Tensor:
        return packed.new_empty((*ids.shape, k), dtype=dtype)

    return define(name, _INT4, check=check, compute=compute, fake=fake)


def _check_int8(ids: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, *_: object) -> None:
    tables = [tuple(table.shape) for table in (scale, zero) if table is not None]
    if any(table != (packed.shape[0], packed.shape[1] // group_size) for table in tables):
        raise ValueError(
            f"int8_embedding: packed {tuple(packed.shape)}, scale and zero {tables} and group_size {group_size} do not "
            "fit each other"
        )


def _int8_embedding(
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
    return packed.new_empty((*ids.shape, packed.shape[1]), dtype=dtype)


INT4_EMBEDDINGS: Mapping[str, torch._ops.OpOverload] = {
    layout.name: _int4_embedding(layout) for layout in LAYOUTS.values() if layout.rows is not None
}
"""The int4 operators by the name of the layout that they read."""

INT8_EMBEDDING: torch._ops.OpOverload = define(
    "int8_embedding", _INT8, check=_check_int8, compute=_int8_embedding, fake=_int8_fake
)
"""The int8 operator."""
