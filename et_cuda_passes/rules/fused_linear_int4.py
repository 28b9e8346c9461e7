"""linear(x, weight 1), linear(x, weight 2), ... -> slices of int4_linear(x, their rows packed as one)

For the q, k and v of attention, and for gate and up of a feed-forward layer: one kernel that reads x once, and more
rows to spread over the device. Each slice is a tensor of its own, as the linear's result was. ``LinearInt4``, behind it
in ``passes``, takes the linears that are left.
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
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Answer, GroupRule, requirement
from et_cuda_passes.quant.affine import weight_of
from et_cuda_passes.quant.dynamic import decode_dynamic
from et_cuda_passes.rules.int4_activation import activation_of
from et_cuda_passes.rules.int4_combine import COMBINED, combinable
from et_cuda_passes.rules.linear_int4 import LinearInt4
from et_cuda_passes.rules.packed_linear import is_vector
from et_cuda_passes.rules.packing import int4_shift

aten = torch.ops.aten


@dataclass(frozen=True)
class FusedLinearInt4(GroupRule, LinearInt4):
    """linear(x, weight 1), linear(x, weight 2), ... -> slices of int4_linear(x, their rows packed as one)

    Its requires are those of ``LinearInt4``, and some more.

    Attributes:
        drop_activation_quantization: as for ``LinearInt4``.
        kernel: as for ``LinearInt4``.
        cast_to_bf16: as for ``LinearInt4``.
        max_out_features: linears with more are left to ``LinearInt4``; None takes all. Many rows fill a device alone.
        max_together: so many are packed as one at most; None for any number. Their results are in memory at one time,
            which counts where all layers' k and v are computed from one encoding.
        leave_epilogues: linears behind which an activation function, a product or a sum stands alone (gate and up) are
            left to ``LinearInt4``: on cuda the Triton kernel of such a linear computes that as well.
    """

    max_out_features: int | None = None
    max_together: int | None = None
    leave_epilogues: bool = False
    shared_captures: ClassVar[tuple[str, ...]] = ("x",)
    before: ClassVar[tuple[str, ...]] = ("linear_int4",)
    alone: ClassVar[str] = "linear_int4"
    partner: ClassVar[str] = "another linear of this input, its weight of one scheme, dtype and group size"

    def __post_init__(self) -> None:
        if self.max_together is not None and self.max_together < 2:
            raise ValueError(f"max_together={self.max_together} leaves nothing to take together: 2 or more, or None")

    @requirement("no more out_features than max_out_features", hint="a larger linear fills the device alone")
    def small(self, m: Match) -> Answer:
        """Weights are packed together at no gain then."""
        n = weight_of(m).shape[0]
        return self.max_out_features is None or n <= self.max_out_features, f"{n}"

    @requirement("with leave_epilogues, nothing behind it that its own kernel computes", hint="LinearInt4 takes it")
    def bare(self, m: Match) -> Answer:
        """What is fused with others has several results, and nothing is computed behind those."""
        follower = _epilogue(m) if self.leave_epilogues else None
        return follower is None, f"{follower.name if follower else ''}, which alone reads it"

    @requirement("a weight that only this linear reads", hint="a tied weight is packed once, by LinearInt4")
    def read_once(self, m: Match) -> Answer:
        """Packed with others it could not be shared, and would be there twice."""
        data = m.program.constant(weight_of(m).data)
        assert data is not None
        readers = m.program.memoize(_readers, m.program.graph.output_node())[tensor_identity(data)]
        others = [node for node in readers if node is not m.match.bindings["weight"]]
        inside = {*m.match.owned, *m.match.shared}
        decoded = [node for node in m.match.shared if node not in _quantization(m)]
        others += [user for node in decoded for user in node.users if user not in inside]
        return not others, f"{others[0].name if others else ''}, which reads it too"

    @requirement("no bias, or a constant one [N] in the dtype of the activations")
    def constant_bias(self, m: Match) -> Answer:
        """The biases are put together at compile time."""
        if m.bias is None:
            return True, ""
        bias = m.val(m.bias)
        good = is_vector(bias, weight_of(m).shape[0]) and bias.dtype == m.val(m.x).dtype
        kind = "constant" if m.program.constant(m.bias) is not None else "computed"
        return good and kind == "constant", f"{m.bias.name}, a {kind} one {list(bias.shape)} in {bias.dtype}"

    @property
    def max_group_size(self) -> int | None:
        """As many as the option says."""
        return self.max_together

    def group_key(self, m: Match) -> Hashable:
        """The input, whatever view of it the linear reads, and all of the weight's form but N."""
        weight, x = weight_of(m), m.x
        while op_of(x) is aten.view.default:
            x = cast(Node, x.args[0])
        form = (weight.group_size, weight.quant_min, weight.quant_max, weight.storage_dtype, weight.scale_dtype)
        # Of what is multiplied: ``x``, or the view of it that stands behind its quantization where that is dropped.
        rows = m.val(m.rows if "rows" in m.match.bindings else m.x)
        return (x, str(tuple(rows.shape)), rows.dtype, weight.in_features, int4_shift(weight), *form)

    def rewrite_group(self, b: Builder, ms: Sequence[Match]) -> Sequence[Node]:
        """One linear of all rows, cut where one weight ends and the next begins."""
        weights = [weight_of(m) for m in ms]
        y = self.packed_linear(b, ms[0], weights, _bias(b, ms), "fused_")
        results, start = [], 0
        for m, weight in zip(ms, weights, strict=True):
            end = start + weight.shape[0]
            # No view: what reads the result was exported for a contiguous one, and may write it.
            results.append(b.for_match(m).slice_last_axis(y, start, end))
            start = end
        return results


def _epilogue(m: Match) -> Node | None:
    """What alone reads the linear's result, or views of it, and can be computed by its kernel; else None."""
    node = m.root
    while len(node.users) == 1:
        (user,) = node.users
        if activation_of(user) is not None:
            return user
        if op_of(user) in COMBINED:
            others = [other for other in user.all_input_nodes if other is not node]
            return user if others and combinable(others[0], m.val(node)) else None
        if op_of(user) is not aten.view.default:
            return None
        node = user
    return None


def _quantization(m: Match) -> set[Node]:
    """The nodes of the match that quantize the activations, where that is dropped: other linears read them too."""
    if "activation" not in m.match.bindings:
        return set()
    found = {*m.memoize(decode_dynamic, "activation").nodes}
    return found | {m.rows} if "rows" in m.match.bindings else found


def _bias(b: Builder, ms: Sequence[Match]) -> Node | None:
    """The biases one behind the other, zeros where a linear has none; None where none has one."""
    biases = [m.bias for m in ms]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    rows = [weight_of(m).shape[0] for m in ms]

    def joined() -> torch.Tensor:
        like = cast(torch.Tensor, b.program.constant(given[0])).detach()
        held = [None if bias is None else cast(torch.Tensor, b.program.constant(bias)).detach() for bias in biases]
        return torch.cat([like.new_zeros(n) if part is None else part for n, part in zip(rows, held, strict=True)])

    form = ("fused_bias", tuple((n, bias is not None) for n, bias in zip(rows, biases, strict=True)))
    return b.constant(f"{weight_of(ms[0]).fqn}.fused_bias", given, form, joined)


def _readers(program: Program, _: Node) -> dict[Hashable, list[Node]]:
    """What reads each constant, under any of its names and in any graph."""
    readers: dict[Hashable, list[Node]] = defaultdict(list)
    nodes = list(program.subgraphs.nodes())
    handed = {node: found for node in nodes if (found := program.subgraphs.captured_operands(node))}
    for node in nodes:
        if (held := program.constant(node)) is not None:
            reading = (
                user
                for user in node.users
                if op_of(user) is not ACCESS_SUBCLASS_TENSOR and node not in handed.get(user, ())
            )
            readers[tensor_identity(held)].extend(reading)
    return readers
