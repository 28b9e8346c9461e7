"""From a decoded weight to the constants of an int8 linear: the integers, the scales, and zeros where there are any."""

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.kernels.int8 import Int8Kernel
from et_cuda_passes.quant.affine import QuantizedWeight, WeightValues, weight_values


def offset(weight: QuantizedWeight) -> int | None:
    """What is added to the weight's integers so that they lie in -128..127; None where nothing does it.

    0 where they do, -128 for 0..255: a zero point of 128 is then a zero of 0.
    """
    for candidate in (0, -128):
        if weight.quant_min + candidate >= -128 and weight.quant_max + candidate <= 127:
            return candidate
    return None


def _points(parts: WeightValues, weight: QuantizedWeight) -> Tensor:
    """The zero points of the shifted integers, fp32 [N, K / group_size]."""
    shift = offset(weight)
    assert shift is not None
    points = torch.full_like(parts.scale, shift, dtype=torch.float32)
    return points if parts.zero_point is None else points + parts.zero_point.float()


def is_symmetric(parts: WeightValues, weight: QuantizedWeight) -> bool:
    """Whether the shifted integers are multiplied by their scale and no more."""
    return parts.minimum is None and not bool(_points(parts, weight).any())


def pack(b: Builder, weight: QuantizedWeight, kernel: Int8Kernel, dtype: torch.dtype) -> tuple[Node, Node, Node | None]:
    """The constants ``<fqn>.packed`` int8 [N, K], ``<fqn>.scale`` and ``<fqn>.zero`` [N, K / group] of ``weight``.

    With ``q = data + shift`` the weight ``(data - zero_point) * scale - minimum`` is ``q * scale + zero`` with
    ``zero = -(zero_point + shift) * scale - minimum``, from the scale as it was rounded, in fp32; none where all are 0.

    Args:
        b: builder of the rewrite.
        weight: of at most 8 bits, with a group size of the kernel's or multiples of one.
        kernel: the kernel that will read them.
        dtype: of the scales.
    """
    native, shift = kernel.native_group_size(weight.group_size, weight.in_features), offset(weight)
    assert native is not None and shift is not None
    repeats = weight.group_size // native

    def packed() -> Tensor:
        data = weight_values(b.program, weight).data
        shifted = data.to(torch.int16) + shift if shift else data
        return shifted.to(torch.int8, copy=True, memory_format=torch.contiguous_format)

    def scales() -> Tensor:
        return weight_values(b.program, weight).scale.to(dtype).repeat_interleave(repeats, dim=1)

    def zeros() -> Tensor:
        parts = weight_values(b.program, weight)
        zero = -_points(parts, weight) * parts.scale.to(dtype).float()
        zero = zero if parts.minimum is None else zero - parts.minimum.float()
        return zero.repeat_interleave(repeats, dim=1)

    form = ("int8", native, dtype, shift, weight.values_key)
    name = weight.fqn + ("." if weight.expert is None else f".expert_{weight.expert}_")
    symmetric = is_symmetric(weight_values(b.program, weight), weight)
    return (
        b.constant(f"{name}packed", (weight.data,), ("int8", shift, weight.integers_key), packed),
        b.constant(f"{name}scale", weight.sources, (*form, "scale"), scales),
        None if symmetric else b.constant(f"{name}zero", weight.sources, (*form, "zero"), zeros),
    )
