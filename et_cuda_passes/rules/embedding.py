"""Embeddings with a quantized table: only the rows that the ids select are dequantized.

``EmbeddingInt4`` and ``EmbeddingInt8`` call operators of this package. Their constants are those of the target's int4
and int8 linears wherever single rows can be read from them, so that a table tied to a linear is stored once.
``QuantizedEmbedding`` calls an operator of ExecuTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_name, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Notes, Rule, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.layouts import embedding_table
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT8_EMBEDDING
from et_cuda_passes.ops.quantized_embedding import quantized_embedding
from et_cuda_passes.quant.candidates import consumers
from et_cuda_passes.quant.decoders import dequantized, is_dequantize, weight_of
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues, weight_values
from et_cuda_passes.rules.packing import (
    cast_of,
    constant_tensors,
    kernel_dtype,
    kernel_of,
    nonfinite_int4,
    nonfinite_int8,
    pack_int4,
    pack_int8,
    table_sources,
)
from et_cuda_passes.rules.plans import embedding_plan, table_plan
from et_cuda_passes.rules.requirements import (
    dtype_names,
    integers_are_in_range,
    kernel_has_group_size,
    kernel_tiles_divide_k,
    scales_are_finite,
    weight_fits_4_bits,
    weight_fits_8_bits,
    weight_has_data,
)
from et_cuda_passes.rules.values import always, nonfinite_tables, of_tables

aten = torch.ops.aten

EXECUTORCH_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of scales and of results that ExecuTorch's quantized embeddings have."""
MAX_SCALES = 1 << 31
"""ExecuTorch's quantized embeddings count scales with an int32."""


def embedding(ids: Pattern) -> Pattern:
    """An embedding with a quantized table. The other arguments of the operator concern training."""
    return op(aten.embedding.default)(dequantized(..., name="weight", shared=True), ids, ...)


# Operators of this package -------------------------------------------------------------------------------------------


@requirement("a result in a dtype that the kernel has")
def kernel_has_result_dtype(m: Match) -> Failure | None:
    """Scales of less precision than the result lose accuracy, which the option ``cast_to_bf16`` accepts."""
    dtype = m.val(m.root).dtype
    if kernel_dtype(m, dtype) is not None:
        return None
    return Failure(dtype_names([dtype]), f"export the model in one of {dtype_names(kernel_of(m).dtypes)}")


def result_scale_dtype(m: Match) -> torch.dtype:
    """The dtype in which an int4 table stores its scales: that of the kernel, or else of its computation."""
    dtype = kernel_of(m).scale_dtype or kernel_dtype(m, m.val(m.root).dtype)
    assert dtype is not None
    return dtype


@dataclass(frozen=True)
class EmbeddingInt4(Rule):
    """embedding(dequantize(int4 table), ids) -> int4_embedding(ids, packed, scale_and_zero)

    The table is packed for the target's int4 linear if single rows can be read from that layout. A table that is tied
    to a linear is then stored once.

    Attributes:
        cast_to_bf16: if the kernel lacks the dtype of the result, store the scales in bf16, as ``LinearInt4`` does.
    """

    cast_to_bf16: bool = False

    requirements = (
        weight_has_data,
        integers_are_in_range,
        weight_fits_4_bits,
        kernel_has_group_size,
        kernel_tiles_divide_k,
        kernel_has_result_dtype,
        scales_are_finite(lambda m: nonfinite_int4(m, result_scale_dtype(m))),
    )

    def pattern(self, ids: Capture) -> Pattern:
        """An embedding."""
        return embedding(ids)

    def kernel_of(self, m: Match) -> Kernel:
        """How the target stores an int4 table.

        Raises:
            Unmet: the target has no int4 table.
        """
        kernel: Kernel | None = m.target.kernel("int4_table")
        if kernel is None:
            raise Unmet(f"target {m.target.name}, which has no int4 table")
        return kernel

    def summary(self, m: Match) -> str:
        """Scheme and layout."""
        cast = cast_of(m, m.val(m.root).dtype).replace("computed", "scales")
        return f"{weight_of(m).scheme} -> table ({kernel_of(m).layout}{cast})"

    def notes(self, *ms: Match) -> Notes:
        """The layout."""
        return Notes(kernel="table", layout=kernel_of(ms[0]).layout)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the table and call the operator."""
        weight, kernel = weight_of(m), kernel_of(m)
        packed, qparams = pack_int4(b, [weight], kernel, result_scale_dtype(m))
        group_size = kernel.native_group_size(weight.group_size, weight.in_features)
        # The operator needs the number of rows only if padding follows them, which no id may select.
        rows = [weight.out_features] if weight.out_features % kernel.out_multiple else []
        operator, dtype = INT4_EMBEDDINGS[kernel.layout], m.val(m.root).dtype
        return b.call(operator, m.ids, packed, qparams, group_size, weight.in_features, dtype, *rows)


@dataclass(frozen=True)
class EmbeddingInt8(Rule):
    """embedding(dequantize(table of at most 8 bits), ids) -> int8_embedding(ids, packed, scale, zero)

    The constants are those of an int8 linear: a table that is tied to one is stored once. The operator supports every
    group size, because it is decomposed into plain operators.
    """

    requirements = (
        weight_has_data,
        integers_are_in_range,
        weight_fits_8_bits,
        scales_are_finite(lambda m: nonfinite_int8(m, m.val(m.root).dtype)),
    )

    def pattern(self, ids: Capture) -> Pattern:
        """An embedding."""
        return embedding(ids)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"{weight_of(m).scheme} -> table (int8)"

    def notes(self, *ms: Match) -> Notes:
        """The layout."""
        return Notes(kernel="table", layout="int8")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the table and call the operator."""
        weight, dtype = weight_of(m), m.val(m.root).dtype
        packed, scale, zero = pack_int8(b, weight, weight.group_size, dtype)
        return b.call(INT8_EMBEDDING, m.ids, packed, scale, zero, weight.group_size, dtype)


# ExecuTorch's operators ----------------------------------------------------------------------------------------------


def integer_offset(weight: QuantizedWeight, bits: int) -> int | None:
    """The number to add to the integers so that they lie in 0..2**bits - 1, or None if their range is wider.

    Half of 2**bits if that fits, so that a zero point of 0 stays 0.
    """
    for candidate in (1 << bits - 1, -weight.quant_min):
        if weight.quant_min + candidate >= 0 and weight.quant_max + candidate < 1 << bits:
            return candidate
    return None


def table_bits(weight: QuantizedWeight) -> int | None:
    """The fewest bits of a table that holds the range and whose rows fill whole bytes, or None."""
    for bits in embedding_table.BITS:
        if (
            integer_offset(weight, bits) is not None
            and weight.in_features % embedding_table.weights_per_byte(bits) == 0
        ):
            return bits
    return None


def table_form(weight: QuantizedWeight) -> tuple[int, int]:
    """Bits and integer offset of the packed table, for a weight that meets ``table_fits_8_bits``."""
    bits = table_bits(weight)
    assert bits is not None
    offset = integer_offset(weight, bits)
    assert offset is not None
    return bits, offset


def _operator_name(weight: QuantizedWeight) -> str:
    name: str = quantized_embedding(table_form(weight)[0])._schema.name
    return name.partition("::")[2]


def stored_zero_points(parts: WeightValues, weight: QuantizedWeight) -> Tensor:
    """The zero points of the stored integers u, fp64 [N, K / group_size]; the kernel reads u as u - 2**(bits - 1)."""
    bits, offset = table_form(weight)
    points = torch.full(parts.scale.shape, offset - (1 << bits - 1), dtype=torch.float64)
    return points if parts.zero_point is None else points + parts.zero_point.double()


def stored_dtype(m: Match) -> torch.dtype:
    """The dtype of the stored scales and zero points: that of the scales if the result has it too, or float32.

    float32 holds every number of the other two dtypes exactly.
    """
    dtype: torch.dtype = m.val(m.root).dtype
    return dtype if weight_of(m).scale_dtype is dtype else torch.float32


@requirement("a table of at most 8 bits", hint="quantize with weight_dtype=torch.int4")
def table_fits_8_bits(m: Match) -> Failure | None:
    """One of the operators of 2, 4 and 8 bits holds the range, and the rows fill whole bytes."""
    weight = weight_of(m)
    if table_bits(weight) is not None:
        return None
    return Failure(f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}")


@requirement("groups of two and more", hint="quantize with PerGroup(32)")
def groups_have_several_weights(m: Match) -> Failure | None:
    """ExecuTorch's operator of 8 bits rejects groups of one."""
    size = weight_of(m).group_size
    return None if size > 1 else Failure(f"group size {size}")


@requirement("fewer scales than 2**31", hint="quantize with larger groups")
def scales_can_be_counted(m: Match) -> Failure | None:
    """With more scales, rows at the end would be multiplied by the scales of other rows."""
    weight = weight_of(m)
    count = weight.out_features * (weight.in_features // weight.group_size)
    return None if count < MAX_SCALES else Failure(f"{count} scales")


@requirement("scales and a result in float32, float16 or bfloat16", hint="quantize and export in one of them")
def executorch_has_dtypes(m: Match) -> Failure | None:
    """The dtypes that the kernels read and write."""
    found = (weight_of(m).scale_dtype, m.val(m.root).dtype)
    return None if all(dtype in EXECUTORCH_DTYPES for dtype in found) else Failure(dtype_names(found))


@requirement("no minimum beside the zero points", stage="values", hint="quantize the table with torchao")
def weight_has_no_minimum(m: Match) -> Failure | None:
    """As a zero point, a minimum would be rounded."""
    return None if weight_values(m.program, weight_of(m)).minimum is None else Failure("minimums")


@requirement("zero points that are exact in their dtype", stage="values", hint="keep the scales in float32")
def zero_points_are_exact(m: Match) -> Failure | None:
    """The kernels read zero points in the dtype of the scales."""
    weight = weight_of(m)

    def rounded_points(parts: WeightValues) -> int:
        points = stored_zero_points(parts, weight)
        return int((points.to(stored_dtype(m)).double() != points).sum())

    rounded = sum(of_tables(m.program, weight, rounded_points))
    return Failure(f"{rounded} that are not") if rounded else None


@dataclass(frozen=True)
class QuantizedEmbedding(Rule):
    """embedding(dequantize(table), ids) -> quantized_embedding(packed, scale, zero_point, ids)

    The operator is one of ExecuTorch's, and its kernel runs outside of any delegate. The program that loads the
    ``.pte`` needs ExecuTorch's quantized kernels: ``EXECUTORCH_BUILD_KERNELS_QUANTIZED`` in a C++ build,
    ``import executorch.kernels.quantized`` in Python.

    Attributes:
        check_ids: also look up each id in a table of zeros, one byte per row, with the kernel of a float embedding. An
            id outside of the table is then an error of that run. ExecuTorch's quantized kernels (executorch 1.5.1) do
            not check ids: those of 2 and 4 bits read any memory, and that of 8 bits ends the process.
    """

    check_ids: bool = True
    requirements = (
        weight_has_data,
        integers_are_in_range,
        table_fits_8_bits,
        groups_have_several_weights,
        scales_can_be_counted,
        executorch_has_dtypes,
        weight_has_no_minimum,
        zero_points_are_exact,
        scales_are_finite(lambda m: nonfinite_tables(m.program, weight_of(m), None)),
    )

    def pattern(self, ids: Capture) -> Pattern:
        """An embedding."""
        return embedding(ids)

    def summary(self, m: Match) -> str:
        """Scheme and operator."""
        weight = weight_of(m)
        return f"{weight.scheme} -> {_operator_name(weight)}"

    def notes(self, *ms: Match) -> Notes:
        """The kernels that the runtime needs, and the other readers of the table."""
        dequantizes = [node for node in weight_of(ms[0]).data.users if is_dequantize(node)]
        others = [reader for node in dequantizes for reader in consumers(node)]
        tied = [
            f"{op_name(reader.target)} ({reader.name})"
            for reader in others
            if op_of(reader) is not aten.embedding.default
        ]
        text = "needs ExecuTorch's quantized kernels at run time (Python: import executorch.kernels.quantized)"
        if tied:
            text += f"; the table is tied to {', '.join(tied)}, for which the weight is stored a second time"
        return Notes(text, kernel=_operator_name(weight_of(ms[0])))

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the table and call the operator."""
        weight, dtype, scale_dtype = weight_of(m), m.val(m.root).dtype, stored_dtype(m)
        bits, offset = table_form(weight)
        groups = weight.in_features // weight.group_size
        form = ("embedding_table", bits, offset)
        integers, values = (*form, weight.integers_key), (*form, scale_dtype)
        data, tensors = (constant_tensors(b.program, nodes) for nodes in ((weight.data,), table_sources(weight)))

        def table(name: str, read: Callable[[WeightValues], Tensor]) -> Node:
            key = (*values, name)
            plan = table_plan(b.program, weight, groups, scale_dtype, read, tensors, (*key, weight.values_key))
            return b.constant(f"{weight.fqn}.{name}", weight, key, plan)

        packed = b.constant(
            f"{weight.fqn}.packed",
            (weight.data,),
            integers,
            embedding_plan(b.program, weight, bits, offset, data, integers),
        )
        scale = table("scale", lambda parts: parts.scale)
        zero_point = None
        if not all(of_tables(b.program, weight, lambda parts: always(parts.zero_point, (1 << bits - 1) - offset))):
            zero_point = table("zero_point", lambda parts: stored_zero_points(parts, weight))
        # The kernels of 8 bits have int64 only.
        ids = m.ids if m.val(m.ids).dtype is torch.int64 else b.cast(m.ids, torch.int64)
        if self.check_ids:
            ids = checked_ids(b, ids, weight)
        half = 1 << bits - 1
        # The kernels end the process if zero points have another dtype than the result.
        computed = dtype if zero_point is None else scale_dtype
        rows = b.call(quantized_embedding(bits), packed, scale, zero_point, -half, half - 1, ids, dtype=computed)
        return rows if computed is dtype else b.cast(rows, dtype)


def checked_ids(b: Builder, ids: Node, weight: QuantizedWeight) -> Node:
    """``ids`` plus the zeros that the kernel of a float embedding looks up for them: it rejects ids without a row."""
    rows = weight.out_features
    zeros = b.constant(
        f"{weight.fqn}.zeros", (weight.data,), ("zeros", rows), lambda: torch.zeros(rows, 1, dtype=torch.uint8)
    )
    found = b.call(aten.embedding.default, zeros, ids)
    squeeze = aten.squeeze_copy.dims if b.program.is_edge else aten.squeeze.dims
    return b.call(aten.add.Tensor, ids, b.call(squeeze, found, [-1]))
