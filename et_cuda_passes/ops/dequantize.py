"""Operators that dequantize weights for which neither torchao nor ExecuTorch registers one.

Rewrites put them in place of a product with a packed weight, or of the arithmetic that a tensor subclass exports. The
rules that follow replace them; what is left of them, Inductor decomposes into plain operators.

- ``dequantize_int4_tiles(packed, scale_and_zero, group_size, in_features)``: [N, in_features] in the dtype of
  scale_and_zero, from the layout ``tile_packed_to_4d``: ``(q - 8) * scale + zero``, with the columns beyond in_features
  left out;
- ``dequantize_int4_nested(qdata, scale, scale_step, zero_point, zero_point_step, group_size, output_dtype)``: [N, K]
  from two integers a byte: ``(q - zero_point * zero_point_step) * scale * scale_step`` with codes scale and zero_point
  uint8 [N, K / group_size] and steps [N, S];
- ``dequantize_float8(data, scale, output_dtype)``: [N, K] from float8_e4m3fn or float8_e5m2, with scales [N / n, K / k]
  for blocks of n x k, or one scale;
- ``dequantize_float4(qdata, scale, per_tensor_scale, block_size, output_dtype)``: [N, K] from two float4_e2m1fn a byte,
  the bytes as uint8 or uint32, with scales [N, K / block_size] in float8_e4m3fn (nvfp4), also given as uint8, or in
  float8_e8m0fnu (mxfp4), and one scale for all or None.

All compute in fp32 and round once.
"""

import torch
from torch import Tensor

from et_cuda_passes.layouts import tile_packed_to_4d
from et_cuda_passes.layouts.layout import ZERO_OFFSET
from et_cuda_passes.ops.int4_linear import packed_count
from et_cuda_passes.ops.registry import define
from et_cuda_passes.quant.float_forms import FLOAT8, float4_numbers


def _fits(name: str, fits: bool, given: str) -> None:
    if not fits:
        raise ValueError(f"{name}: {given} do not fit each other")


# int4 -----------------------------------------------------------------------------------------------------------------


def _check_tiles(packed: Tensor, pairs: Tensor, group_size: int, k: int) -> None:
    columns = packed_count(packed) // (8 * packed.shape[0])
    fits = (
        tuple(pairs.shape) == (columns // group_size, 8 * packed.shape[0], 2) and k <= columns and k % group_size == 0
    )
    given = (
        f"packed {tuple(packed.shape)}, scale_and_zero {tuple(pairs.shape)}, group_size {group_size}, in_features {k}"
    )
    _fits("dequantize_int4_tiles", fits, given)


def _tiles(packed: Tensor, pairs: Tensor, group_size: int, k: int) -> Tensor:
    rows = tile_packed_to_4d.LAYOUT.rows
    assert rows is not None
    q = rows(torch.arange(8 * packed.shape[0], device=packed.device), packed)[:, :k]
    scale, zero = (part.t().float().unsqueeze(-1) for part in pairs[: k // group_size].unbind(-1))
    weight: Tensor = (q - ZERO_OFFSET).unflatten(1, (-1, group_size)) * scale + zero
    return weight.flatten(1).to(pairs.dtype)


DEQUANTIZE_INT4_TILES = define(
    "dequantize_int4_tiles",
    "(Tensor packed, Tensor scale_and_zero, int group_size, int in_features) -> Tensor",
    check=_check_tiles,
    compute=_tiles,
    fake=lambda packed, pairs, group_size, k: pairs.new_empty((8 * packed.shape[0], k)),
)


def _check_nested(
    q: Tensor, scale: Tensor, step: Tensor, zero: Tensor, zero_step: Tensor, group_size: int, dtype: torch.dtype
) -> None:
    groups = (q.shape[0], 2 * q.shape[1] // group_size)
    fits = tuple(scale.shape) == tuple(zero.shape) == groups and step.shape == zero_step.shape
    tables = [tuple(table.shape) for table in (q, scale, step, zero, zero_step)]
    _fits("dequantize_int4_nested", fits and groups[1] % step.shape[1] == 0, f"{tables} and group_size {group_size}")


def _nested(
    q: Tensor, scale: Tensor, step: Tensor, zero: Tensor, zero_step: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    data = q.view(torch.uint8)
    integers = torch.stack((data & 15, data >> 4), dim=-1).view(q.shape[0], -1, group_size).float()
    times = scale.shape[1] // step.shape[1]
    scales, zeros = (
        (codes.float() * steps.float().repeat_interleave(times, dim=1)).unsqueeze(-1)
        for codes, steps in ((scale, step), (zero, zero_step))
    )
    return ((integers - zeros) * scales).flatten(1).to(dtype)


DEQUANTIZE_INT4_NESTED = define(
    "dequantize_int4_nested",
    "(Tensor qdata, Tensor scale, Tensor scale_step, Tensor zero_point, Tensor zero_point_step, int group_size, "
    "ScalarType output_dtype) -> Tensor",
    check=_check_nested,
    compute=_nested,
    fake=lambda q, *rest: q.new_empty((q.shape[0], 2 * q.shape[1]), dtype=rest[-1]),
)

# floats ---------------------------------------------------------------------------------------------------------------


def _check_float8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    blocks = zip(data.shape, scale.shape, strict=False)
    divides = scale.dim() == data.dim() and all(size % count == 0 for size, count in blocks)
    fits = data.dtype in FLOAT8 and (scale.numel() == 1 or divides)
    _fits("dequantize_float8", fits, f"data {data.dtype} {tuple(data.shape)} and scale {tuple(scale.shape)}")


def _float8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    table = scale.float()
    if scale.numel() == 1:
        table = table.reshape(())
    else:
        for axis, (size, count) in enumerate(zip(data.shape, scale.shape, strict=True)):
            if count not in (1, size):
                table = table.repeat_interleave(size // count, dim=axis)
    return (data.float() * table).to(dtype)


DEQUANTIZE_FLOAT8 = define(
    "dequantize_float8",
    "(Tensor data, Tensor scale, ScalarType output_dtype) -> Tensor",
    check=_check_float8,
    compute=_float8,
    fake=lambda data, scale, dtype: data.new_empty(tuple(data.shape), dtype=dtype),
)


def _check_float4(q: Tensor, scale: Tensor, whole: Tensor | None, block_size: int, dtype: torch.dtype) -> None:
    fits = q.dtype in (torch.uint8, torch.uint32) and q.dim() == 2 and (whole is None or whole.numel() == 1)
    fits = fits and scale.numel() * block_size == 2 * q.numel() * q.element_size()
    _fits("dequantize_float4", fits, f"qdata {q.dtype} {tuple(q.shape)}, scale {tuple(scale.shape)}, {block_size}")


def _float4(q: Tensor, scale: Tensor, whole: Tensor | None, block_size: int, dtype: torch.dtype) -> Tensor:
    data = q.view(torch.uint8)
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)
    scale = scale.view(torch.float8_e4m3fn) if scale.dtype is torch.uint8 else scale
    scales = scale.reshape(q.shape[0], -1, 1).float()
    scales = scales if whole is None else whole.float() * scales
    weight: Tensor = float4_numbers(codes).unflatten(1, (-1, block_size)) * scales
    return weight.flatten(1).to(dtype)


DEQUANTIZE_FLOAT4 = define(
    "dequantize_float4",
    "(Tensor qdata, Tensor scale, Tensor? per_tensor_scale, int block_size, ScalarType output_dtype) -> Tensor",
    check=_check_float4,
    compute=_float4,
    fake=lambda q, scale, whole, block_size, dtype: q.new_empty(
        (q.shape[0], 2 * q.element_size() * q.shape[1]), dtype=dtype
    ),
)
