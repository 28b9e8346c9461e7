"""attention(q, k, v) -> our own operator, or attention(q, k, v, mask of ones), for ExecuTorch's CUDA backend

The backend computes attention with a Triton kernel of its own. Where the head dimension is a power of two, that kernel
(executorch 1.5, ``backends/cuda/triton/kernels/sdpa.py``) takes keys in blocks of up to 128, and gives the places of
the last block that no key fills the score 0, not minus infinity: without a mask, the outputs are too small by whatever
weight those places get. The operator of :mod:`et_cuda_passes.ops.attention` is right, and faster. Where that does not
have the dtype or the head dimension, the backend's kernel is given a mask: even one that hides nothing is compared with
the number of keys, and excludes those places.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.kernels.attention_launch import HEAD_DIMS
from et_cuda_passes.ops import ATTENTION as OURS
from et_cuda_passes.ops import ATTENTION_DTYPES
from et_cuda_passes.rules import answers

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
KERNELS = ("triton", "backend")
_BLOCK = 128


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return statically_known_true(a == b)


@dataclass(frozen=True)
class UnmaskedAttention(Rule):
    """attention(q, k, v) -> our own operator, or attention(q, k, v, mask of ones)

    Attributes:
        kernel: "triton", ours, for any number of keys: it has bf16 and fp16, head dimensions from 16 to 256, key heads
            that divide the others, and no dropout, and what it lacks is left to the backend's, with the mask; or
            "backend", the one that ExecuTorch's backend has, which needs a mask where keys fill no whole block.
    """

    kernel: str = "triton"

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"there is no attention kernel {self.kernel!r}; there is: {', '.join(KERNELS)}")

    def pattern(self, q: Capture, k: Capture, v: Capture) -> Pattern:
        """Attention, whatever else it is given."""
        return op(ATTENTION)(q, k, v, ...)

    @requirement("neither a mask nor is_causal")
    def unmasked(self, m: Match) -> Answer:
        """Either of them excludes the places behind the last key."""
        given = arguments(m.root)
        found = [name for name in ("attn_mask", "is_causal") if given[name]]
        return not found, ", ".join(found)

    @requirement("q, k, v and result of one dtype")
    def one_dtype(self, m: Match) -> Answer:
        """As they are but under autocast."""
        return answers.one_dtype(m, m.q, m.k, m.v)

    @requirement("[batch, heads, rows, head dimension], the last a power of two")
    def taken(self, m: Match) -> Answer:
        """The backend's kernel has four dimensions, and for other heads a second form, which is right."""
        shape = m.val(m.q).shape
        features = shape[-1]
        good = len(shape) == 4 and isinstance(features, int) and features & (features - 1) == 0
        return good, f"{list(shape)}"

    @requirement(f"a number of keys that is not a multiple of {_BLOCK}, or not known to be")
    def ragged(self, m: Match) -> Answer:
        """Whole blocks need no mask. Our kernel takes them as well."""
        keys = m.val(m.k).shape[-2]
        return self._is_ours(m) or not statically_known_true(keys % _BLOCK == 0), f"{keys} keys"

    def _is_ours(self, m: Match) -> bool:
        """Whether our kernel is asked for and has this: nothing dropped or broadcast, and numbers of heads known."""
        q, k, v = (m.val(node) for node in (m.q, m.k, m.v))
        given = arguments(m.root)
        if self.kernel != "triton" or given["dropout_p"] or not q.dim() == k.dim() == v.dim() == 4:
            return False
        if not q.dtype == k.dtype == v.dtype or q.dtype not in ATTENTION_DTYPES:
            return False
        heads, kv_heads, features = q.shape[1], k.shape[1], q.shape[3]
        if not isinstance(features, int) or features not in HEAD_DIMS:
            return False
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or kv_heads == 0:
            return False
        shared = heads == kv_heads or (given["enable_gqa"] and heads % kv_heads == 0)
        alike = all(_same(a, b) for a, b in zip(k.shape, v.shape, strict=True))
        return shared and alike and _same(q.shape[0], k.shape[0]) and _same(q.shape[3], k.shape[3])

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same attention: by our operator, or with a mask [batch, 1, rows, keys] of ones."""
        given = arguments(m.root)
        if self._is_ours(m):
            return self._ours(b, m, given)
        q = m.val(m.q)
        sizes = [b.size(m.q, 0), 1, b.size(m.q, 2), b.size(m.k, 2)]
        mask = b.call(aten.full.default, sizes, True, dtype=torch.bool, device=q.device, pin_memory=False)
        rest = {name: value for name, value in given.items() if name in ("scale", "enable_gqa")}
        return b.call(ATTENTION, m.q, m.k, m.v, mask, given["dropout_p"], **rest)

    @staticmethod
    def _ours(b: Builder, m: Match, given: Mapping[str, Any]) -> Node:
        scale = given["scale"]
        if scale is None:
            scale = m.val(m.q).shape[3] ** -0.5
        read = [_before_transposition(m, node) for node in (m.q, m.k, m.v)]
        return b.call(OURS, *(node for node, _ in read), float(scale), [*(at for _, at in read), 1])


def _before_transposition(m: Match, node: Node) -> tuple[Node, int]:
    """What ``node`` [B, heads, rows, D] is the transposition of, and 2, the axis of the heads there; or it, and 1."""
    given = list(arguments(node).values())
    swapped = op_of(node) is aten.transpose.int and {given[1] % 4, given[2] % 4} == {1, 2}
    swapped |= op_of(node) is aten.permute.default and [dim % 4 for dim in given[1]] == [0, 2, 1, 3]
    # What a preserved module is given is read as it is given.
    stays = node in m.program.mutated or node in m.program.boundary_nodes
    if not swapped or stays or given[0] in m.program.mutated:
        return node, 1
    return given[0], 2
