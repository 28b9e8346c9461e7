"""scale_and_zero: the scale and the zero of each group and output row, in one tensor.

`pack` and `unpack` are the form [K/group, N, 2], [..., 0] the scale and [..., 1] the zero, for the kernels that compute
(q - 8) * scale + zero with q in 0..15: `aten._weight_int4pack_mm` on CUDA (bf16 only) and on MPS, and
`aten._weight_int4pack_mm_for_cpu` (both in the dtype of the activations: bf16, fp16 or fp32).

mma_tiled and metal have planes instead, [1 or 2, N, at least K/group]: the scales, and then the zeros if there are any.
"""

import torch
import torch.nn.functional as F

from ._checks import require_dtype, require_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pack(scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Put scale and zero [N, K/group] into one contiguous `dtype` [K/group, N, 2], on scale's device.

    For an affine weight (q_signed - zero_point) * scale with q = q_signed + 8, zero is -zero_point * scale; None stands
    for zeros that are all 0.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32, or a scale or zero that is not floating; ValueError for
    shapes that differ or are not 2-D, and for values that are NaN or infinite, or become so in `dtype`.
    """
    scale, zero = require_pair(scale, zero, dtype)
    n, groups = scale.shape
    packed = torch.empty(groups, n, 2, dtype=dtype, device=scale.device)
    packed[..., 0].copy_(scale.t())
    if zero is None:
        packed[..., 1].zero_()
    else:
        packed[..., 1].copy_(zero.t())
    return require_finite(packed, "scale or zero")


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero of `pack`, each contiguous [N, K/group] of packed's dtype.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32, ValueError when packed is not [K/group, N, 2].
    """
    packed = require_tensor(packed, "scale_and_zero")
    require_dtype(packed, "scale_and_zero", DTYPES, "give the result of pack")
    if packed.dim() != 3 or packed.shape[2] != 2:
        raise ValueError(f"scale_and_zero must have shape [K/group, N, 2], got {tuple(packed.shape)}")
    return packed[..., 0].t().contiguous(), packed[..., 1].t().contiguous()


def pack_pairs(scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype, in_features: int) -> torch.Tensor:
    """`pack` as a layout's `pack_scales`."""
    return pack(scale, zero, dtype)


def unpack_pairs(packed: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`unpack` as a layout's `unpack_scales`."""
    return unpack(packed)


def pairs_of_rows(ids: torch.Tensor, packed: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layout's `row_scales` for the result of `pack`."""
    scale, zero = packed[:, ids].movedim(0, -2).unbind(-1)
    return scale, zero


def check_pairs(count: int, scale_shape: tuple[int, ...], group_size: int, in_features: int) -> int | None:
    """A layout's `check` where K is not padded and scale_and_zero has the form of `pack`."""
    if len(scale_shape) != 3 or scale_shape[2] != 2:
        return None
    groups, rows, _ = scale_shape
    return groups * group_size if count == rows * groups * group_size else None


def unpack_planes(packed: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero [N, groups] of planes; 0 if there is no plane of zeros."""
    scale = packed[0, :, :groups]
    return scale, packed[1, :, :groups] if packed.shape[0] == 2 else torch.zeros_like(scale)


def planes_of_rows(ids: torch.Tensor, packed: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layout's `row_scales` for planes."""
    scale = F.embedding(ids, packed[0])[..., :groups]
    return scale, F.embedding(ids, packed[1])[..., :groups] if packed.shape[0] == 2 else torch.zeros_like(scale)


def require_pair(scale: object, zero: object, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return both if they are floating [N, K/group] of the same shape, with data, and a kernel has `dtype`.

    zero may be None.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(str(d) for d in DTYPES)}, got {dtype}")
    s = require_tensor(scale, "scale")
    z = None if zero is None else require_tensor(zero, "zero")
    for t, name in ((s, "scale"), (z, "zero")):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name} must be floating, got {t.dtype}; for a zero point give zero = -zero_point * scale")
    if s.dim() != 2 or (z is not None and s.shape != z.shape):
        shapes = f"{tuple(s.shape)} and {None if z is None else tuple(z.shape)}"
        raise ValueError(f"scale and zero must both be [N, K/group], got {shapes}")
    return s, z


def require_finite(t: torch.Tensor, name: str) -> torch.Tensor:
    """Return `t` if all of it is finite; raise ValueError otherwise."""
    # The ends are NaN if any value is. They need no tensor of t's size, as isfinite does.
    if t.numel() and not all(end.isfinite() for end in torch.aminmax(t)):
        raise ValueError(
            f"{name} has NaN or infinite values in {t.dtype}; quantize again, or use bf16 or fp32 if fp16 is too narrow"
        )
    return t
