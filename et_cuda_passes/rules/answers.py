"""Answers that several rules give to what they require of a weight, its kernel and the activations."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.quant.affine import QuantizedWeight, weight_values
from et_cuda_passes.rules.packing import int4_shift, scale_and_zero_of


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """As in ``bfloat16, float16``."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def one_dtype(m: Match, *read: Node) -> Answer:
    """Whether all of ``read`` is of the result's dtype: under autocast an operator converts it, a kernel does not."""
    wanted = m.val(m.root).dtype
    dtypes = [m.val(node).dtype for node in read]
    name = dtype_names([wanted])
    hint = f"autocast converts unseen: export the model outside of it, in {name}, or, where the weights are in that "
    hint += "already, run_decompositions({}) first, which writes the conversions into the graph"
    return all(dtype is wanted for dtype in dtypes), f"{dtype_names(dtypes)} for a result in {name}", hint


def four_bits(weight: QuantizedWeight) -> Answer:
    """Whether the range fits 0..15 once shifted."""
    return int4_shift(weight) is not None, f"{weight.bits} bits, {weight.quant_min}..{weight.quant_max}"


def whole_tiles(weight: QuantizedWeight, multiple: int, what: str = "this layer") -> Answer:
    """Whether K is a multiple of what the kernel's tiles take; ``what`` is left unquantized where it is not."""
    k = weight.in_features
    return k % multiple == 0, f"K = {k}", f"K must be a multiple of {multiple}: leave {what} unquantized"


def compiled_there(m: Match, kernel: Kernel) -> Answer:
    """Whether the kernel is compiled where the root stands: some are not inside control flow."""
    subgraphs = m.program.subgraphs
    good = kernel.in_control_flow or not subgraphs.in_control_flow(m.root)
    return good, f"control flow at {subgraphs.path(m.root)}"


def in_range(m: Match, weight: QuantizedWeight) -> Answer:
    """Whether all integers are in the quantized range."""
    low, high = (int(end) for end in torch.aminmax(weight_values(m.program, weight).data))
    inside = weight.quant_min <= low and high <= weight.quant_max
    return inside, f"integers {low}..{high} for a range of {weight.quant_min}..{weight.quant_max}"


def finite(tables: Iterable[Tensor | None]) -> Answer:
    """Whether no number of the tables that there are is NaN or infinite."""
    bad = sum(int((~torch.isfinite(table)).sum()) for table in tables if table is not None)
    return bad == 0, f"{bad} that are NaN or infinite"


def finite_pair(m: Match, weight: QuantizedWeight, dtype: torch.dtype) -> Answer:
    """Whether the scales and zeros of an int4 kernel are finite in their dtype."""
    shift = int4_shift(weight)
    assert shift is not None
    return finite(part.to(dtype) for part in scale_and_zero_of(weight_values(m.program, weight), shift))
