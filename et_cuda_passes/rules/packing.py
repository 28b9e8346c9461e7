"""Constants of a kernel from a decoded weight: the integers packed, scales and zeros in the kernel's form."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Notes
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.layouts import LAYOUTS, Layout
from et_cuda_passes.layouts.layout import ZERO_OFFSET, unsigned_shift
from et_cuda_passes.quant.decoders import weight_of
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues, weight_values


def kernel_of(m: Match) -> Kernel:
    """The kernel that the match's rule packs for: its method ``kernel_of``.

    Raises:
        Unmet: the target has no such kernel.
    """
    kernel: Kernel = m.rule.kernel_of(m)
    return kernel


def packed_weight(m: Match) -> QuantizedWeight:
    """The weight that the match's rule packs, a matrix: its method ``packed_weight``, or what ``weight`` dequantizes.

    Raises:
        Unmet: it is no weight that can be packed.
    """
    own = getattr(m.rule, "packed_weight", weight_of)
    weight: QuantizedWeight = own(m)
    return weight


def kernel_dtype(m: Match, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which the kernel computes for tensors in ``dtype``: the same, or None if the kernel lacks it.

    With the rule's option ``cast_to_bf16`` it is bf16 for a dtype that the kernel lacks, or in which it is slow.
    """
    kernel, cast = kernel_of(m), getattr(m.rule, "cast_to_bf16", False)
    if dtype in kernel.dtypes and not (cast and dtype in kernel.slow_dtypes):
        return dtype
    return torch.bfloat16 if cast and dtype.is_floating_point else None


def compute_dtype(m: Match) -> torch.dtype | None:
    """:func:`kernel_dtype` for the activations x."""
    return kernel_dtype(m, m.val(m.x).dtype)


def cast_of(m: Match, dtype: torch.dtype) -> str:
    """For the report: the cast of tensors in ``dtype`` for the kernel, or an empty text."""
    return "" if kernel_dtype(m, dtype) is dtype else ", computed in bf16"


def kernel_notes(m: Match, dtype: torch.dtype, explanation: str = "") -> Notes:
    """The kernel and its layout, and what was measured of it with tensors in ``dtype`` on a host such as this one."""
    kernel, used = kernel_of(m), kernel_dtype(m, dtype)
    note = kernel.host_notes.get(torch.backends.cpu.get_cpu_capability(), "")
    if used in kernel.slow_dtypes:
        name = str(used).removeprefix("torch.")
        note = (
            f"{kernel.name} is slower in {name} than float weights: export the model in bfloat16 (--dtype bfloat16), "
            "or accept bf16 arithmetic (cast_to_bf16)"
        )
    return Notes(note, explanation, kernel.name, kernel.layout)


def scale_dtype(m: Match) -> torch.dtype:
    """The dtype in which the kernel's scales are stored."""
    dtype = kernel_of(m).scale_dtype or compute_dtype(m)
    assert dtype is not None
    return dtype


def int4_scales(m: Match, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """The scales and zeros that :func:`pack_int4` stores for the match's weight, in :func:`scale_dtype` by default."""
    weight = packed_weight(m)
    shift = int4_shift(weight)
    assert shift is not None
    for part in scale_and_zero_of(weight_values(m.program, weight), shift):
        yield part.to(dtype or scale_dtype(m))


def int8_scales(m: Match, dtype: torch.dtype | None = None) -> Iterator[Tensor | None]:
    """The scales that :func:`pack_int8` stores, and the tables that it computes the zeros from."""
    parts = weight_values(m.program, packed_weight(m))
    yield from (parts.scale.to(dtype or scale_dtype(m)), parts.zero_point, parts.minimum)


def int4_shift(weight: QuantizedWeight, layout: Layout | None = None) -> int | None:
    """The number to add to the weight's integers so that they lie in 0..15, or None if no number does.

    Without a layout it is the shift that most layouts use; whether there is one is the same for all.
    """
    return (unsigned_shift if layout is None else layout.shift)(weight.quant_min, weight.quant_max)


def scale_and_zero_of(parts: WeightValues, shift: int) -> tuple[Tensor, Tensor]:
    """``scale`` and ``zero`` of ``(q - 8) * scale + zero``, fp32 [N, K / group_size].

    With ``q = data + shift`` the weight ``(data - zero_point) * scale - minimum`` has
    ``zero = (8 - shift - zero_point) * scale - minimum``.
    """
    scale = parts.scale.float()
    steps = torch.full_like(scale, ZERO_OFFSET - shift)
    if parts.zero_point is not None:
        steps = steps - parts.zero_point.float()
    zero = steps * scale
    return scale, zero if parts.minimum is None else zero - parts.minimum.float()


def _as_bytes(q: Tensor, weight: QuantizedWeight) -> Tensor:
    return q if q.dtype in (torch.int8, torch.uint8) else q.to(torch.int8 if weight.quant_min < 0 else torch.uint8)


def _int4_form(weight: QuantizedWeight, kernel: Kernel) -> tuple[Layout, int, int, int]:
    """The kernel's layout, the weight's shift in it, its native group size, and how often each scale is repeated."""
    layout = LAYOUTS[kernel.layout]
    shift, native = int4_shift(weight, layout), kernel.native_group_size(weight.group_size, weight.in_features)
    assert shift is not None and native is not None
    return layout, shift, native, weight.group_size // native


def pack_int4(
    b: Builder, weights: Sequence[QuantizedWeight], kernel: Kernel, dtype: torch.dtype, name: str = ""
) -> tuple[Node, Node]:
    """The constants ``<fqn>.packed`` and ``<fqn>.scale_and_zero`` of ``weights`` for ``kernel``.

    The rows of several weights follow each other, in one constant under the first weight's FQN. They are padded at
    their end to the kernel's ``out_multiple``, with zeros of scale 0.

    Args:
        b: builder of the rewrite.
        weights: 4-bit, with blocks along K that a native group size divides; equal except for N, sources and the
            presence of zero points.
        kernel: the kernel that reads the constants.
        dtype: of scale_and_zero.
        name: prefix of ``packed`` and ``scale_and_zero``.
    """
    first = weights[0]
    layout, shift, native, repeats = _int4_form(first, kernel)
    rows = sum(weight.shape[0] for weight in weights)
    padding = -rows % kernel.out_multiple

    def packed() -> Tensor:
        parts = [weight_values(b.program, weight).data for weight in weights]
        q = _as_bytes(parts[0] if len(parts) == 1 else torch.cat(parts), first)
        return layout.pack(q, shift, rows + padding)

    def scales() -> Tensor:
        pairs = [scale_and_zero_of(weight_values(b.program, weight), shift) for weight in weights]
        pair = (torch.cat(column) for column in zip(*pairs, strict=True))
        scale, zero = (F.pad(part.repeat_interleave(repeats, dim=1), (0, 0, 0, padding)) for part in pair)
        return layout.pack_scales(scale, zero, dtype, first.in_features)

    form = (layout.name, kernel.out_multiple, shift)
    # Next to the name of the stack and not below it, because other readers may keep the stack.
    name += "" if first.expert is None else f"expert_{first.expert}_"
    integers = tuple(weight.integers_key for weight in weights)
    return (
        b.constant(f"{first.fqn}.{name}packed", [weight.data for weight in weights], (*form, integers), packed),
        b.constant(f"{first.fqn}.{name}scale_and_zero", weights, (*form, native, dtype), scales),
    )


def pack_experts(
    b: Builder, weight: QuantizedWeight, count: int, kernel: Kernel, dtype: torch.dtype
) -> tuple[Node, Node]:
    """The constants ``<fqn>.packed`` and ``<fqn>.scale_and_zero`` of a stack of experts, each packed like a linear's.

    Args:
        b: builder of the rewrite.
        weight: the rows of all experts as one matrix [E * N, K], with the conditions of :func:`pack_int4`.
        count: E.
        kernel: the kernel that reads the constants.
        dtype: of scale_and_zero.
    """
    layout, shift, native, repeats = _int4_form(weight, kernel)
    n, axis = weight.shape[0] // count, layout.experts_axis
    assert axis is not None
    padding = -n % kernel.out_multiple

    def packed() -> Tensor:
        q = _as_bytes(weight_values(b.program, weight).data, weight)
        return torch.stack([layout.pack(rows, shift, n + padding) for rows in q.split(n)])

    def scales() -> Tensor:
        parts = (
            part.repeat_interleave(repeats, dim=1)
            for part in scale_and_zero_of(weight_values(b.program, weight), shift)
        )
        scale, zero = (F.pad(part.view(count, n, -1), (0, 0, 0, padding)).flatten(0, 1) for part in parts)
        # All experts at once: a layout may leave out the zeros, for all experts or for none.
        pairs = layout.pack_scales(scale, zero, dtype, weight.in_features)
        # Not contiguous(), which keeps the strides of axes of size 1.
        return torch.stack(pairs.unflatten(1, (count, n + padding)).unbind(1), axis)

    form = ("experts", layout.name, kernel.out_multiple, shift, count)
    return (
        b.constant(f"{weight.fqn}.packed", [weight.data], (*form, weight.integers_key), packed),
        b.constant(f"{weight.fqn}.scale_and_zero", weight, (*form, native, dtype), scales),
    )


def int8_shift(weight: QuantizedWeight) -> int | None:
    """The number to add to the weight's integers so that they lie in -128..127, or None if neither candidate does.

    0, or -128 for 0..255: a zero point of 128 is then a zero of 0.
    """
    for shift in (0, -128):
        if weight.quant_min + shift >= -128 and weight.quant_max + shift <= 127:
            return shift
    return None


def _shifted_zero_point(parts: WeightValues, weight: QuantizedWeight) -> Tensor:
    """The zero points of the shifted int8 integers, fp32 [N, K / group_size]."""
    shift = int8_shift(weight)
    assert shift is not None
    points = torch.full_like(parts.scale, shift, dtype=torch.float32)
    return points if parts.zero_point is None else points + parts.zero_point.float()


def is_symmetric(parts: WeightValues, weight: QuantizedWeight) -> bool:
    """Whether the weight is the shifted int8 integers times their scale, without a zero."""
    return parts.minimum is None and not bool(_shifted_zero_point(parts, weight).any())


def pack_int8(
    b: Builder, weight: QuantizedWeight, group_size: int, dtype: torch.dtype
) -> tuple[Node, Node, Node | None]:
    """The constants ``<fqn>.packed`` int8 [N, K], ``<fqn>.scale`` and ``<fqn>.zero`` [N, K / group_size] of ``weight``.

    With ``q = data + shift`` the weight ``(data - zero_point) * scale - minimum`` is ``q * scale + zero`` with
    ``zero = -(zero_point + shift) * scale - minimum``, from the rounded scale, in fp32. It is None if all zeros are 0.

    Args:
        b: builder of the rewrite.
        weight: of at most 8 bits.
        group_size: of the constants; it divides that of the weight, and scales are repeated.
        dtype: of the scales.
    """
    shift, repeats = int8_shift(weight), weight.group_size // group_size
    assert shift is not None

    def packed() -> Tensor:
        data = weight_values(b.program, weight).data
        shifted = data.to(torch.int16) + shift if shift else data
        return shifted.to(torch.int8, copy=True, memory_format=torch.contiguous_format)

    def scales() -> Tensor:
        return weight_values(b.program, weight).scale.to(dtype).repeat_interleave(repeats, dim=1)

    def zeros() -> Tensor:
        parts = weight_values(b.program, weight)
        zero = -_shifted_zero_point(parts, weight) * parts.scale.to(dtype).float()
        zero = zero if parts.minimum is None else zero - parts.minimum.float()
        return zero.repeat_interleave(repeats, dim=1)

    form = ("int8", group_size, dtype, shift)
    name = weight.fqn + ("." if weight.expert is None else f".expert_{weight.expert}_")
    symmetric = is_symmetric(weight_values(b.program, weight), weight)
    return (
        b.constant(f"{name}packed", (weight.data,), ("int8", shift, weight.integers_key), packed),
        b.constant(f"{name}scale", weight, (*form, "scale"), scales),
        None if symmetric else b.constant(f"{name}zero", weight, (*form, "zero"), zeros),
    )
