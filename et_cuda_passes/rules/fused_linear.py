"""Several int4 linears of one input become one linear of all their rows, followed by slices.

It serves the q, k and v of attention, and the gate and up of a feed-forward layer: one kernel reads x once and has more
rows to spread over the device. Each slice is a tensor of its own, as the result of each linear was.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.constants import tensor_identity
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Failure, GroupRule, Notes, requirement
from et_cuda_passes.quant.activations import decode_dynamic
from et_cuda_passes.quant.decoders import dequantized_matrix, weight_of
from et_cuda_passes.rules.epilogue import ELEMENTWISE_OPS, activation_of, can_fuse_elementwise
from et_cuda_passes.rules.linear import (
    LinearInt4,
    activations,
    int4_kernel,
    int4_notes,
    int4_summary,
    kernel_input,
    packed_int4_linear,
)
from et_cuda_passes.rules.packing import int4_shift
from et_cuda_passes.rules.patterns import linear
from et_cuda_passes.rules.requirements import is_vector

aten = torch.ops.aten


# Requirements ---------------------------------------------------------------------------------------------------------


@requirement("no more out_features than max_out_features", hint="a larger linear fills the device alone")
def within_max_out_features(m: Match) -> Failure | None:
    """To fuse larger weights gains nothing."""
    n, limit = weight_of(m).shape[0], m.rule.max_out_features
    return None if limit is None or n <= limit else Failure(f"{n}")


@requirement("with leave_epilogues, nothing after it that its own kernel can compute", hint="LinearInt4 rewrites it")
def no_epilogue_is_lost(m: Match) -> Failure | None:
    """The fused linear has several results, and the kernel computes no epilogue on one of them."""
    follower = _epilogue(m) if m.rule.leave_epilogues else None
    return None if follower is None else Failure(f"{follower.name}, which alone reads it")


@requirement("a weight that only this linear reads", hint="a tied weight is packed once, by LinearInt4")
def weight_has_one_reader(m: Match) -> Failure | None:
    """A weight packed with others cannot be shared, so it would be stored twice."""
    data = m.program.constant(weight_of(m).data)
    assert data is not None
    readers = m.program.memoize(_readers, m.program.graph.output_node())[tensor_identity(data)]
    others = [node for node in readers if node is not m.match.bindings["weight"]]
    inside = {*m.match.owned, *m.match.shared}
    decoded = [node for node in m.match.shared if node not in _quantization(m)]
    others += [user for node in decoded for user in node.users if user not in inside]
    return Failure(f"{others[0].name}, which reads it too") if others else None


@requirement("no bias, or a constant one [N] in the dtype of the activations")
def bias_is_constant_vector(m: Match) -> Failure | None:
    """The biases are concatenated by the rewrite."""
    if m.bias is None:
        return None
    bias, is_constant = m.val(m.bias), m.program.constant(m.bias) is not None
    if is_constant and is_vector(bias, weight_of(m).shape[0]) and bias.dtype == m.val(m.x).dtype:
        return None
    kind = "constant" if is_constant else "computed"
    return Failure(f"{m.bias.name}, a {kind} one {list(bias.shape)} in {bias.dtype}")


@dataclass(frozen=True)
class FusedLinearInt4(GroupRule):
    """linear(x, weight 1), linear(x, weight 2), ... -> slices of int4_linear(x, their rows packed as one)

    Its requirements are those of ``LinearInt4`` and some more. ``LinearInt4``, after it in the pass list, rewrites the
    linears that are left.

    Attributes:
        kernel: as for ``LinearInt4``.
        cast_to_bf16: as for ``LinearInt4``.
        max_out_features: a linear with more is left to ``LinearInt4``, because many rows fill a device alone; None for
            no limit.
        max_together: how many linears are fused at most; None for any number. Their results are in memory at one time,
            which matters if the k and v of all layers are computed from one encoding.
        leave_epilogues: a linear that is followed only by an activation function, a product or a sum (gate and up) is
            left to ``LinearInt4``: on cuda its Triton kernel computes that as well.
        drop_activation_quantization: as for ``LinearInt4``.
    """

    kernel: str | None = None
    cast_to_bf16: bool = False
    max_out_features: int | None = None
    max_together: int | None = None
    leave_epilogues: bool = False
    drop_activation_quantization: bool = False

    shared_captures: ClassVar[tuple[str, ...]] = ("x",)
    requirements = (
        *LinearInt4.requirements,
        within_max_out_features,
        no_epilogue_is_lost,
        weight_has_one_reader,
        bias_is_constant_vector,
    )
    kernel_of = staticmethod(int4_kernel)

    def __post_init__(self) -> None:
        if self.max_together is not None and self.max_together < 2:
            raise ValueError(f"max_together={self.max_together} leaves nothing to fuse: use 2 or more, or None")

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear as ``LinearInt4`` matches it."""
        return linear(activations(x, self.drop_activation_quantization), dequantized_matrix(), bias)

    @property
    def max_group_size(self) -> int | None:
        """The option ``max_together``."""
        return self.max_together

    def group_key(self, m: Match) -> Hashable:
        """The input below all views of it, and the form of the weight except N."""
        weight, x = weight_of(m), m.x
        while op_of(x) is aten.view.default:
            x = cast(Node, x.args[0])
        form = (weight.group_size, weight.quant_min, weight.quant_max, weight.storage_dtype, weight.scale_dtype)
        # The kernel multiplies x, or the view of it after its quantization if that is dropped.
        rows = m.val(m.rows if "rows" in m.match.bindings else m.x)
        return (x, str(tuple(rows.shape)), rows.dtype, weight.in_features, int4_shift(weight), *form)

    def summary(self, m: Match) -> str:
        """Scheme, kernel and layout."""
        return int4_summary(m)

    def notes(self, *ms: Match) -> Notes:
        """Measurements of the kernel, and its tilings for all rows."""
        return int4_notes(*ms)

    def rewrite_group(self, b: Builder, ms: Sequence[Match]) -> Sequence[Node]:
        """One linear of all rows, and a slice of its result for each match."""
        weights = [weight_of(m) for m in ms]
        y = packed_int4_linear(b, ms[0], kernel_input(b, ms[0]), weights, _fused_bias(b, ms), "fused_")
        results, start = [], 0
        for m, weight in zip(ms, weights, strict=True):
            end = start + weight.shape[0]
            # A copy, not a view: the readers of the result were exported for a contiguous tensor, and may mutate it.
            results.append(b.for_match(m).slice_last_axis(y, start, end))
            start = end
        return results


def _epilogue(m: Match) -> Node | None:
    """The only reader of the linear's result, or of a view of it, if the linear's kernel can compute it; else None."""
    node = m.root
    while len(node.users) == 1:
        (user,) = node.users
        if activation_of(user) is not None:
            return user
        if op_of(user) in ELEMENTWISE_OPS:
            others = [other for other in user.all_input_nodes if other is not node]
            return user if others and can_fuse_elementwise(others[0], m.val(node)) else None
        if op_of(user) is not aten.view.default:
            return None
        node = user
    return None


def _quantization(m: Match) -> set[Node]:
    """The nodes of the match that quantize the activations, if that is dropped: other linears read them too."""
    if "activation" not in m.match.bindings:
        return set()
    found = {*m.memoize(decode_dynamic, "activation").nodes}
    return found | {m.rows} if "rows" in m.match.bindings else found


def _fused_bias(b: Builder, ms: Sequence[Match]) -> Node | None:
    """The concatenated biases, with zeros for a linear without one; None if no linear has one."""
    biases = [m.bias for m in ms]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    rows = [weight_of(m).shape[0] for m in ms]

    def concatenated() -> torch.Tensor:
        like = cast(torch.Tensor, b.program.constant(given[0])).detach()
        held = [None if bias is None else cast(torch.Tensor, b.program.constant(bias)).detach() for bias in biases]
        return torch.cat([like.new_zeros(n) if part is None else part for n, part in zip(rows, held, strict=True)])

    form = ("fused_bias", tuple((n, bias is not None) for n, bias in zip(rows, biases, strict=True)))
    return b.constant(f"{weight_of(ms[0]).fqn}.fused_bias", given, form, concatenated)


def _readers(program: Program, _: Node) -> dict[Hashable, list[Node]]:
    """The readers of each constant, under any of its names and in any graph."""
    readers: dict[Hashable, list[Node]] = defaultdict(list)
    nodes = list(program.subgraphs.nodes())
    captured = {node: found for node in nodes if (found := program.subgraphs.captured_operands(node))}
    for node in nodes:
        if (held := program.held(node)) is not None:
            reading = (
                user
                for user in node.users
                if op_of(user) is not ACCESS_SUBCLASS_TENSOR and node not in captured.get(user, ())
            )
            readers[tensor_identity(held)].extend(reading)
    return readers
