"""Constants of a kernel from a decoded weight: the integers packed, scales and zeros in the kernel's form."""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Notes
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.layouts import LAYOUTS, Layout
from et_cuda_passes.layouts.layout import unsigned_shift
from et_cuda_passes.quant.decoders import weight_of
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues
from et_cuda_passes.rules.plans import WeightRows, int4_plan, int4_scales_plan, table_plan
from et_cuda_passes.rules.values import (
    always,
    has_zeros,
    nonfinite_int4_scales,
    nonfinite_tables,
    of_tables,
)


def kernel_of(m: Match) -> Kernel:
    """The kernel that the match's rule packs for: its method ``kernel_of``.

    Raises:
        Unmet: the target has no such kernel.
    """
    kernel: Kernel = m.rule.kernel_of(m)
    return kernel


def supports(m: Match, kernel: Kernel, weight: QuantizedWeight) -> bool:
    """Whether ``kernel`` has the weight's group size and K and the dtype of x, and compiles where the match stands."""
    dtype = m.val(m.x).dtype
    has_dtype = dtype in kernel.dtypes or (m.rule.cast_to_bf16 and torch.bfloat16 in kernel.dtypes)
    has_group = kernel.native_group_size(weight.group_size, weight.in_features) is not None
    compiles = kernel.in_control_flow or not m.program.subgraphs.in_control_flow(m.root)
    return has_dtype and has_group and compiles and weight.in_features % kernel.in_multiple == 0


def or_plain(m: Match, kernel: Kernel) -> Kernel:
    """``kernel``, or the target's plain operators for a 4-bit weight that it does not support and that they do."""
    plain: Kernel | None = m.target.kernel("int4_plain")
    if plain is None:
        return kernel
    try:
        weight = packed_weight(m)
        is_int4 = weight.group_size > 0 and int4_shift(weight) is not None
    except Unmet:
        return kernel  # a requirement names the cause
    return plain if is_int4 and not supports(m, kernel, weight) and supports(m, plain, weight) else kernel


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

    With the rule's option ``cast_to_bf16`` it is bf16 for a dtype that the kernel lacks, if the kernel has bf16.
    """
    kernel, cast = kernel_of(m), getattr(m.rule, "cast_to_bf16", False)
    if dtype in kernel.dtypes:
        return dtype
    return torch.bfloat16 if cast and dtype.is_floating_point and torch.bfloat16 in kernel.dtypes else None


def compute_dtype(m: Match) -> torch.dtype | None:
    """:func:`kernel_dtype` for the activations x."""
    return kernel_dtype(m, m.val(m.x).dtype)


def cast_of(m: Match, dtype: torch.dtype) -> str:
    """For the report: the cast of tensors in ``dtype`` for the kernel, or an empty text."""
    return "" if kernel_dtype(m, dtype) is dtype else ", computed in bf16"


def kernel_notes(m: Match, explanation: str = "") -> Notes:
    """The kernel and its layout, and what was measured of it on a host such as this one."""
    kernel = kernel_of(m)
    note = kernel.host_notes.get(torch.backends.cpu.get_cpu_capability(), "")
    return Notes(note, explanation, kernel.name, kernel.layout)


def scale_dtype(m: Match) -> torch.dtype:
    """The dtype in which the kernel's scales are stored."""
    dtype = kernel_of(m).scale_dtype or compute_dtype(m)
    assert dtype is not None
    return dtype


def nonfinite_int4(m: Match, dtype: torch.dtype | None = None) -> int:
    """How many scales and zeros that :func:`pack_int4` would store in ``dtype`` are not finite.

    The default of ``dtype`` is :func:`scale_dtype`.
    """
    weight = packed_weight(m)
    shift = int4_shift(weight)
    assert shift is not None
    return nonfinite_int4_scales(m.program, weight, shift, dtype or scale_dtype(m))


def nonfinite_int8(m: Match, dtype: torch.dtype | None = None) -> int:
    """How many scales that :func:`pack_int8` would store, and values of the tables of its zeros, are not finite."""
    return nonfinite_tables(m.program, packed_weight(m), dtype or scale_dtype(m))


def int4_shift(weight: QuantizedWeight, layout: Layout | None = None) -> int | None:
    """The number to add to the weight's integers so that they lie in 0..15, or None if no number does.

    Without a layout it is the shift that most layouts use; whether there is one is the same for all.
    """
    return (unsigned_shift if layout is None else layout.shift)(weight.quant_min, weight.quant_max)


def _int4_form(weight: QuantizedWeight, kernel: Kernel) -> tuple[Layout, int, int]:
    """The kernel's layout, the weight's shift in it, and its native group size."""
    layout = LAYOUTS[kernel.layout]
    shift, native = int4_shift(weight, layout), kernel.native_group_size(weight.group_size, weight.in_features)
    assert shift is not None and native is not None
    return layout, shift, native


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
    layout, shift, _ = _int4_form(first, kernel)
    # Next to the name of the stack and not below it, because other readers may keep the stack.
    name += "" if first.expert is None else f"expert_{first.expert}_"
    rows = WeightRows(b.program, weights, multiple=kernel.out_multiple)
    form = (layout.name, kernel.out_multiple, shift)
    return _int4_constants(b, weights, rows, None, kernel, dtype, f"{first.fqn}.{name}", form)


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
    layout, shift, _ = _int4_form(weight, kernel)
    rows = WeightRows(b.program, [weight], weight.shape[0] // count, kernel.out_multiple)
    form = ("experts", layout.name, kernel.out_multiple, shift, count)
    return _int4_constants(b, [weight], rows, count, kernel, dtype, f"{weight.fqn}.", form)


def _int4_constants(
    b: Builder,
    weights: Sequence[QuantizedWeight],
    rows: WeightRows,
    count: int | None,
    kernel: Kernel,
    dtype: torch.dtype,
    name: str,
    form: tuple[Hashable, ...],
) -> tuple[Node, Node]:
    """The constants of ``rows``, one matrix or with ``count`` a stack of matrices."""
    first, program = weights[0], b.program
    layout, shift, native = _int4_form(first, kernel)
    zeros = any(has_zeros(program, weight, shift) for weight in weights)
    integers = (*form, *(weight.integers_key for weight in weights))
    scales = (*form, native, dtype)
    values = (*scales, zeros, *(weight.values_key for weight in weights))
    tensors = constant_tensors(program, [node for weight in weights for node in table_sources(weight)])
    data = constant_tensors(program, [weight.data for weight in weights])
    return (
        b.constant(
            f"{name}packed",
            [weight.data for weight in weights],
            integers,
            int4_plan(rows, layout, shift, first, count, data, integers),
        ),
        b.constant(
            f"{name}scale_and_zero",
            weights,
            scales,
            int4_scales_plan(rows, layout, shift, dtype, native, zeros, first, count, tensors, values),
        ),
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
    if parts.zero_point is None:
        return torch.full_like(parts.scale, shift, dtype=torch.float32)
    return parts.zero_point.float() + shift


def is_symmetric(program: Program, weight: QuantizedWeight) -> bool:
    """Whether the weight is the shifted int8 integers times their scale, without a zero."""
    shift = int8_shift(weight)
    assert shift is not None
    symmetric = of_tables(program, weight, lambda parts: parts.minimum is None and always(parts.zero_point, -shift))
    return all(symmetric)


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
    shift, repeats, program = int8_shift(weight), weight.group_size // group_size, b.program
    assert shift is not None

    def repeated(table: Tensor) -> Tensor:
        return table if repeats == 1 else table.repeat_interleave(repeats, dim=1)

    def packed(parts: WeightValues) -> Tensor:
        data = parts.data
        return data.to(torch.int16) + shift if shift else data

    def scales(parts: WeightValues) -> Tensor:
        return repeated(parts.scale.to(dtype))

    def zeros(parts: WeightValues) -> Tensor:
        zero = -_shifted_zero_point(parts, weight) * parts.scale.to(dtype).float()
        return repeated(zero if parts.minimum is None else zero - parts.minimum.float())

    form = ("int8", group_size, dtype, shift)
    name = weight.fqn + ("." if weight.expert is None else f".expert_{weight.expert}_")
    k, groups, integers = weight.in_features, weight.in_features // group_size, ("int8", shift, weight.integers_key)
    data = constant_tensors(program, (weight.data,))
    tensors, values = constant_tensors(program, table_sources(weight)), (*form, weight.values_key)
    return (
        b.constant(
            f"{name}packed",
            (weight.data,),
            integers,
            table_plan(program, weight, k, torch.int8, packed, data, integers),
        ),
        b.constant(
            f"{name}scale",
            weight,
            (*form, "scale"),
            table_plan(program, weight, groups, dtype, scales, tensors, (*values, "scale")),
        ),
        None
        if is_symmetric(program, weight)
        else b.constant(
            f"{name}zero",
            weight,
            (*form, "zero"),
            table_plan(program, weight, groups, torch.float32, zeros, tensors, (*values, "zero")),
        ),
    )


def table_sources(weight: QuantizedWeight) -> tuple[Node, ...]:
    """The constants that scales, zero points and minimums are computed from."""
    return weight.sources if weight.scale is None else weight.sources[1:]


def constant_tensors(program: Program, nodes: Iterable[Node]) -> tuple[Tensor, ...]:
    """The tensors of constants."""
    found = [program.constant(node) for node in nodes]
    return tuple(tensor.detach() for tensor in found if tensor is not None)
