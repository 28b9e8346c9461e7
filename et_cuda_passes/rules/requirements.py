"""The requirements that several rules share.

Their pattern binds the dequantize node of the weight to ``weight`` and the activations to ``x``. A rule that packs for
a kernel of the target has a method ``kernel_of(m)``, and one that does not pack ``weight`` itself a method
``packed_weight(m)``; see :mod:`et_cuda_passes.rules.packing`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.rule import Failure, Requirement, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.quant.decoders import weight_of
from et_cuda_passes.quant.weight import QuantizedWeight, has_data, weight_values
from et_cuda_passes.rules.packing import compute_dtype, int4_shift, int8_shift, kernel_of, packed_weight
from et_cuda_passes.rules.values import integer_ends


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """As in ``bfloat16, float16``."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_vector(tensor: Tensor, length: int) -> bool:
    """Whether the tensor is known to have the shape [length]."""
    return tensor.dim() == 1 and statically_known_true(tensor.shape[0] == length)


def stored_scales(m: Match) -> Tensor:
    """The scales of the weight, as many as it has; those of a weight with a loader are computed."""
    weight = weight_of(m)
    if weight.constant_qparams is not None:
        return torch.tensor(weight.constant_qparams[0])
    scale = None if weight.scale is None or weight.loader is not None else m.program.constant(weight.scale)
    return weight_values(m.program, weight).scale if scale is None else scale


@requirement("a constant weight that holds data")
def weight_has_data(m: Match) -> Failure | None:
    """Values are needed at compile time."""
    if has_data(m.program, weight_of(m)):
        return None
    return Failure("meta or fake tensors", "export with real weights, not on the meta device or under FakeTensorMode")


@requirement(
    "integers within the quantized range", stage="values", hint="the checkpoint is damaged or of another scheme"
)
def integers_are_in_range(m: Match) -> Failure | None:
    """An integer outside of the range would overwrite its neighbour, or wrap."""
    weight = packed_weight(m)
    low, high = integer_ends(m.program, weight)
    if weight.quant_min <= low and high <= weight.quant_max:
        return None
    return Failure(f"integers {low}..{high} for a range of {weight.quant_min}..{weight.quant_max}")


def same_dtype(*captures: str) -> Requirement:
    """The captures that are bound have the dtype of the result.

    They differ only under autocast: there an operator converts what it reads, and a kernel does not.
    """
    names = ["activations" if name == "x" else name for name in captures]

    @requirement(f"{', '.join(names)} and result of one dtype")
    def same_dtype(m: Match) -> Failure | None:
        wanted = m.val(m.root).dtype
        dtypes = [m.val(node).dtype for name in captures if (node := getattr(m, name)) is not None]
        if all(dtype is wanted for dtype in dtypes):
            return None
        name = dtype_names([wanted])
        return Failure(
            f"{dtype_names(dtypes)} for a result in {name}",
            "autocast converts between dtypes without a node in the graph: export the model outside of autocast, in "
            f"{name}. If the weights are in {name} already, run_decompositions({{}}) first, which writes the "
            "conversions into the graph",
        )

    return same_dtype


@requirement(
    "a weight [N, K] quantized in groups along K",
    hint="quantize with granularity PerGroup or PerAxis(0)",
)
def weight_is_grouped_along_k(m: Match) -> Failure | None:
    """A scale is that of a row and group; one that several rows share is repeated for each."""
    weight = weight_of(m)
    try:
        weight.group_size  # noqa: B018  (raises for a weight without groups)
    except Unmet as unmet:
        # No granularity makes a matrix of a convolution's larger kernels.
        return Failure(str(unmet), "" if any(size != 1 for size in weight.shape[2:]) else None)
    return None


@requirement("a weight of at most 4 bits", hint="quantize with weight_dtype=torch.int4")
def weight_fits_4_bits(m: Match) -> Failure | None:
    """The range fits 0..15 once shifted."""
    weight = packed_weight(m)
    return None if int4_shift(weight) is not None else _too_wide(weight)


@requirement("a weight of at most 8 bits", hint="quantize with weight_dtype=torch.int8")
def weight_fits_8_bits(m: Match) -> Failure | None:
    """The range fits -128..127 once shifted."""
    weight = packed_weight(m)
    return None if int8_shift(weight) is not None else _too_wide(weight)


def _too_wide(weight: QuantizedWeight) -> Failure:
    return Failure(weight.numbers or f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}")


@requirement("a group size that the kernel has")
def kernel_has_group_size(m: Match) -> Failure | None:
    """One scale per row, or groups that one of the kernel's group sizes divides."""
    weight, kernel = packed_weight(m), kernel_of(m)
    if kernel.native_group_size(weight.group_size, weight.in_features) is not None:
        return None
    return Failure(f"group size {weight.group_size}", _group_size_hint(weight, kernel))


def _group_size_hint(weight: QuantizedWeight, kernel: Kernel) -> str:
    k, size = weight.in_features, weight.group_size
    if not kernel.group_sizes:
        in_groups = ", or in groups with torch.int4" if weight.bits > 4 else ""
        return f"{kernel.name} has one scale per row: quantize with PerAxis(0){in_groups}"
    # One that divides K too, if there is any.
    nearest = min(kernel.group_sizes, key=lambda native: (k % native != 0, abs(native - size), native))
    known = f"{kernel.name} has {', '.join(map(str, kernel.group_sizes))} and their multiples"
    return known if k % nearest else f"{known}: quantize with PerGroup({nearest})"


@requirement("in_features that the kernel's tiles divide")
def kernel_tiles_divide_k(m: Match) -> Failure | None:
    """K is a multiple of the kernel's ``in_multiple``; it is never padded."""
    k, multiple = packed_weight(m).in_features, kernel_of(m).in_multiple
    if k % multiple == 0:
        return None
    return Failure(f"K = {k}", f"K must be a multiple of {multiple}: leave this layer unquantized")


@requirement("a place where the kernel compiles", hint="take the layer out of the control flow")
def kernel_runs_in_control_flow(m: Match) -> Failure | None:
    """Some kernels do not compile inside control flow."""
    subgraphs = m.program.subgraphs
    if kernel_of(m).in_control_flow or not subgraphs.in_control_flow(m.root):
        return None
    return Failure(f"control flow at {subgraphs.path(m.root)}")


@requirement("activations of a dtype that the kernel has")
def kernel_has_activation_dtype(m: Match) -> Failure | None:
    """One of the kernel's dtypes, or with the rule's option ``cast_to_bf16`` any floating-point dtype."""
    kernel, dtype = kernel_of(m), m.val(m.x).dtype
    if compute_dtype(m) is not None:
        return None
    hint = f"{kernel.name} has {dtype_names(kernel.dtypes)}: export the model in one of these"
    # A 4-bit weight is the matter of a rule for 4 bits.
    narrow = int4_shift(packed_weight(m)) is not None
    can_cast = torch.bfloat16 in kernel.dtypes and getattr(m.rule, "cast_to_bf16", None) is False
    if can_cast and narrow == (weight_fits_4_bits in m.rule.requirements):
        option = f"{type(m.rule).__name__}(cast_to_bf16=True)"
        hint += f", or accept bf16 arithmetic with {option} in place of the default {m.rule.name}"
    return Failure(dtype_names([dtype]), hint)


def scales_are_finite(count: Callable[[Match], int]) -> Requirement:
    """``count`` returns how many of the numbers that the rewrite stores are NaN or infinite: none.

    Otherwise a whole group of the weight would be NaN or infinite, and no error would say so.
    """

    @requirement("scales and zeros that are finite where they are stored", "quantize the weight again", "values")
    def scales_are_finite(m: Match) -> Failure | None:
        bad = count(m)
        return Failure(f"{bad} that are NaN or infinite") if bad else None

    return scales_are_finite


# Requirements of rules that keep a weight for the kernel of a backend, which reads the pattern as it stands.


@requirement(
    "a place outside control flow",
    hint="the backend reads a weight as a constant of the method: move the layer out of the control flow",
)
def stands_in_main_graph(m: Match) -> Failure | None:
    """In a subgraph a weight is an operand, and the backends delegate no control flow."""
    subgraphs = m.program.subgraphs
    return Failure(subgraphs.path(m.root)) if subgraphs.in_control_flow(m.root) else None


@requirement("a dtype that the backend has")
def backend_has_dtype(m: Match) -> Failure | None:
    """The dequantized weight has one of the target's dtypes."""
    dtype, dtypes = m.val(m.weight).dtype, m.target.dtypes
    if not dtypes or dtype in dtypes:
        return None
    return Failure(dtype_names([dtype]), f"{m.target.name} has {dtype_names(dtypes)}: export the model in one of these")


@requirement("integers that are stored as int8", hint="quantize with torchao's IntxWeightOnlyConfig")
def storage_is_int8(m: Match) -> Failure | None:
    """The backend reads one signed byte for each integer."""
    weight = weight_of(m)
    return None if weight.storage_dtype is torch.int8 else Failure(f"{dtype_names([weight.storage_dtype])} storage")


@requirement("a tensor of zero points", hint="quantize with torchao's IntxWeightOnlyConfig")
def zero_points_are_a_tensor(m: Match) -> Failure | None:
    """The backend fails on a missing argument."""
    return None if weight_of(m).zero_point is not None else Failure("none")


@requirement("a dequantize with its range as arguments", hint="give quant_min and quant_max to dequantize_affine")
def range_is_given(m: Match) -> Failure | None:
    """The lowering fails where the operator's defaults stand for it."""
    given = arguments(m.weight)
    ends = given.get("quant_min"), given.get("quant_max")
    return Failure(f"{ends[0]}..{ends[1]}") if None in ends else None


@requirement("a matrix with scales for groups along K", hint="quantize with granularity PerGroup or PerAxis(0)")
def each_row_has_its_scales(m: Match) -> Failure | None:
    """Blocks of [1, group], so that no rows share a scale."""
    weight = weight_of(m)
    matrix = len(weight.shape) == 2
    if matrix and weight.block_size[0] == 1:
        return None
    # No granularity makes a matrix of a convolution's weight.
    hint = None if matrix else "leave this layer unquantized"
    return Failure(f"a weight {list(weight.shape)} in blocks of {list(weight.block_size)}", hint)


@requirement("no bias, or a constant vector of out_features", hint="add such a bias behind the linear")
def bias_is_a_constant_vector(m: Match) -> Failure | None:
    """The backend reads out_features numbers of a constant."""
    if m.bias is None:
        return None
    if m.program.constant(m.bias) is None:
        return Failure(f"{m.bias.name}, which the program computes")
    value = m.val(m.bias)
    return None if is_vector(value, m.val(m.weight).shape[0]) else Failure(f"{m.bias.name} {list(value.shape)}")


@requirement("zero points that are all 0", stage="values", hint="quantize with a symmetric mapping type")
def zero_points_are_all_zero(m: Match) -> Failure | None:
    """The kernel of the backend has none."""
    weight = weight_of(m)
    points = None if weight.zero_point is None else m.program.constant(weight.zero_point)
    count = 0 if points is None else int((points != 0).sum())
    return Failure(f"{count} that are not") if count else None


def scales_fit(dtype: torch.dtype, reason: str) -> Requirement:
    """The scales are positive, finite and normal numbers of ``dtype``; those of blocks of zeros may be smaller.

    A scale below would be rounded to a multiple of the smallest number, or to 0. torchao gives a block of zeros, such
    as the row of an embedding's padding, a scale of 1.2e-7.
    """

    @requirement(
        f"scales that are finite, positive and normal in {dtype_names([dtype])}, {reason}",
        hint="quantize the weight again, or leave this layer unquantized",
        stage="values",
    )
    def scales_fit(m: Match) -> Failure | None:
        info = torch.finfo(dtype)
        stored = stored_scales(m).double()
        if bool(((stored >= info.smallest_normal) & (stored <= info.max)).all()):
            return None
        values = weight_values(m.program, weight_of(m))
        scale, points = values.scale.double().unsqueeze(-1), values.zero_point
        groups = values.data.reshape(*values.scale.shape, -1)
        integers = (groups != (0 if points is None else points.unsqueeze(-1))).any(-1, keepdim=True)
        good = (scale >= info.smallest_normal * integers) & (scale <= info.max)
        return None if bool(good.all()) else Failure(f"{int((~good).sum())} that are not")

    return scales_fit
