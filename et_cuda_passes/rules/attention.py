"""Attention without a mask, for ExecuTorch's CUDA backend: our own operator, or a mask for the backend's kernel.

The backend (executorch 1.5, ``backends/cuda/triton/kernels/sdpa.py``) computes attention with its own Triton kernel.
Where the head dimension is a power of two, that kernel reads keys in blocks of up to 128. In the last block, the places
behind the last key get the score 0 instead of minus infinity. Without a mask, the outputs are then too small by the
weight of those places.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Failure, Rule, requirement
from et_cuda_passes.kernels.attention_launch import HEAD_DIMS
from et_cuda_passes.ops import ATTENTION, ATTENTION_DTYPES
from et_cuda_passes.rules.requirements import same_dtype

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
KERNELS = ("triton", "backend")
_BLOCK = 128
"""The largest number of keys in one step of the backend's kernel."""
_SWAPS = ((1, 2), (2, 1), (-3, -2), (-2, -3))


@requirement("neither a mask nor is_causal")
def attention_is_unmasked(m: Match) -> Failure | None:
    """A mask and is_causal both exclude the places behind the last key."""
    given = arguments(m.root)
    found = [name for name in ("attn_mask", "is_causal") if given[name]]
    return Failure(", ".join(found)) if found else None


@requirement("four dimensions, [batch, heads, rows, head dimension], and a head dimension that is a power of two")
def head_dimension_is_power_of_two(m: Match) -> Failure | None:
    """The backend has a second kernel for other head dimensions, and that kernel is correct."""
    shape = m.val(m.q).shape
    features = shape[-1]
    if len(shape) == 4 and isinstance(features, int) and features & (features - 1) == 0:
        return None
    return Failure(f"{list(shape)}")


@requirement(f"a number of keys that is not a multiple of {_BLOCK}, or a dynamic one")
def last_block_is_partial(m: Match) -> Failure | None:
    """The backend's kernel is correct for whole blocks. Where our kernel applies, it is used for those too."""
    keys = m.val(m.k).shape[-2]
    if uses_our_operator(m) or not statically_known_true(keys % _BLOCK == 0):
        return None
    return Failure(f"{keys} keys")


def uses_our_operator(m: Match) -> bool:
    """Whether the rule's option selects our kernel and the kernel computes this attention."""
    q, k, v = (m.val(node) for node in (m.q, m.k, m.v))
    given = arguments(m.root)
    if m.rule.kernel != "triton" or given["dropout_p"] or not q.dim() == k.dim() == v.dim() == 4:
        return False
    if not q.dtype == k.dtype == v.dtype or q.dtype not in ATTENTION_DTYPES:
        return False
    heads, kv_heads, features = q.shape[1], k.shape[1], q.shape[3]
    if not isinstance(features, int) or features not in HEAD_DIMS:
        return False
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or kv_heads == 0:
        return False
    heads_fit = heads == kv_heads or (given["enable_gqa"] and heads % kv_heads == 0)
    # Sizes that broadcast are excluded: the kernel reads batches and keys one to one.
    equal = zip((*k.shape, q.shape[0], q.shape[3]), (*v.shape, k.shape[0], k.shape[3]), strict=True)
    return heads_fit and all(statically_known_true(a == b) for a, b in equal)


@dataclass(frozen=True)
class UnmaskedAttention(Rule):
    """attention(q, k, v) -> our own operator, or attention(q, k, v, mask of ones)

    The backend's kernel compares every mask with the number of keys, so that a mask of ones excludes the places behind
    the last key.

    Attributes:
        kernel: "triton" is our kernel, for any number of keys. It has bf16 and fp16, head dimensions from 16 to 256 and
            numbers of key heads that divide the number of heads, and no dropout. Any other attention gets the backend's
            kernel with a mask. "backend" is always the backend's kernel, with a mask where the keys do not fill whole
            blocks.
    """

    kernel: str = "triton"

    requirements = (
        attention_is_unmasked,
        same_dtype("q", "k", "v"),
        head_dimension_is_power_of_two,
        last_block_is_partial,
    )

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"there is no attention kernel {self.kernel!r}; there is: {', '.join(KERNELS)}")

    def pattern(self, q: Capture, k: Capture, v: Capture) -> Pattern:
        """Attention with any further arguments."""
        return op(SDPA)(q, k, v, ...)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Our operator, or the same attention with a mask [batch, 1, rows, keys] of ones."""
        given = arguments(m.root)
        if uses_our_operator(m):
            scale = m.val(m.q).shape[3] ** -0.5 if given["scale"] is None else given["scale"]
            operands = [_before_transpose(m, node) for node in (m.q, m.k, m.v)]
            axes = [axis for _, axis in operands]
            return b.call(ATTENTION, *(node for node, _ in operands), float(scale), [*axes, 1])
        sizes = [b.size(m.q, 0), 1, b.size(m.q, 2), b.size(m.k, 2)]
        mask = b.call(aten.full.default, sizes, True, dtype=torch.bool, device=m.val(m.q).device, pin_memory=False)
        rest = {name: given[name] for name in ("scale", "enable_gqa")}
        return b.call(SDPA, m.q, m.k, m.v, mask, given["dropout_p"], **rest)


@requirement("operands in another floating-point dtype than bf16")
def attention_is_not_in_bf16(m: Match) -> Failure | None:
    """The backend's kernel has bf16 only."""
    dtype = m.val(m.q).dtype
    return None if dtype.is_floating_point and dtype is not torch.bfloat16 else Failure(str(dtype))


@requirement("no mask, or one of bools", hint="give the model a mask of bools, which say where to attend")
def mask_is_boolean(m: Match) -> Failure | None:
    """The backend's kernel has no other, and in bf16 the lowest number of float32 would be minus infinity."""
    mask = arguments(m.root)["attn_mask"]
    return None if mask is None or m.val(mask).dtype is torch.bool else Failure(str(m.val(mask).dtype))


@dataclass(frozen=True)
class CastAttention(Rule):
    """attention(q, k, v) -> attention(q, k, v in bf16), cast back to the dtype of q

    The backend (executorch 1.5.1) has no kernel for another dtype than bf16, and its lowering fails. THE NUMBERS
    CHANGE: they have the precision of bf16. The rule is therefore in no list by default, and stands before
    ``UnmaskedAttention`` in a list of the caller's.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (same_dtype("q", "k", "v"), attention_is_not_in_bf16, mask_is_boolean)

    def pattern(self, q: Capture, k: Capture, v: Capture) -> Pattern:
        """Attention with any further arguments."""
        return op(SDPA)(q, k, v, ...)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same attention between casts."""
        operands = [b.cast(node, torch.bfloat16) for node in (m.q, m.k, m.v)]
        return b.cast(b.call(SDPA, *operands, *m.root.args[3:], **m.root.kwargs), m.val(m.q).dtype)


def _before_transpose(m: Match, node: Node) -> tuple[Node, int]:
    """The tensor [B, rows, heads, D] that ``node`` transposes with its head axis, 2; for any other, ``node`` and 1."""
    given = list(arguments(node).values())
    swapped = op_of(node) is aten.transpose.int and {given[1] % 4, given[2] % 4} == {1, 2}
    swapped |= op_of(node) is aten.permute.default and [dim % 4 for dim in given[1]] == [0, 2, 1, 3]
    # An input of a preserved module must stay its input.
    fixed = node in m.program.mutated or node in m.program.boundary_nodes
    if not swapped or fixed or given[0] in m.program.mutated:
        return node, 1
    return given[0], 2


@dataclass(frozen=True)
class FuseAttentionTranspose(Rule):
    """transpose(attention(q, k, v), 1, 2) -> attention(q, k, v), its result [B, rows, heads, D]

    The operator can write its result in either order. In the edge dialect each transposition is a copy. In nearly every
    model attention is followed by one, and then by a linear.
    """

    def pattern(self, q: Capture) -> Pattern:
        """Up to three transpositions of heads and rows, each the only reader of the one before it."""
        once = _transposed(op(ATTENTION)(q, ..., name="attention"))
        twice = _transposed(once)
        # The longest chain comes first, so that a second rewrite finds nothing left.
        return any_of(_transposed(twice), twice, once)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same attention, with the other head axis in its result after an odd number of transpositions."""
        q, k, v, scale, head_axes, _ = arguments(m.attention).values()
        axis = head_axes[3] if (len(m.match.owned) - 1) % 2 == 0 else 3 - head_axes[3]
        return b.call(ATTENTION, q, k, v, scale, [*head_axes[:3], axis])


def _transposed(attention: Pattern) -> Pattern:
    swapped = (op(aten.transpose.int)(attention, *swap) for swap in _SWAPS)
    return any_of(*swapped, op(aten.permute.default)(attention, [0, 2, 1, 3]))
