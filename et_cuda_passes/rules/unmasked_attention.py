"""attention(q, k, v) -> attention(q, k, v, mask of ones), for ExecuTorch's CUDA backend

The backend computes attention with a Triton kernel of its own. Where the head dimension is a power of two, that kernel
(executorch 1.5, ``backends/cuda/triton/kernels/sdpa.py``) takes keys in blocks of up to 128, and gives the places of
the last block that no key fills the score 0, not minus infinity: without a mask, the outputs are too small by whatever
weight those places get. A mask, even one that hides nothing, is compared with the number of keys, and excludes them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.context import MatchContext
from et_cuda_passes.graph.ops import arguments
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, Rule, require

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
_BLOCK = 128


@dataclass(frozen=True)
class UnmaskedAttention(Rule):
    """attention(q, k, v) -> attention(q, k, v, mask of ones)"""

    def pattern(self, q: Capture, k: Capture, v: Capture) -> Pattern:
        """Attention, whatever else it is given."""
        return op(ATTENTION)(q, k, v, ...)

    @require("neither a mask nor is_causal")
    def unmasked(self, m: MatchContext) -> Answer:
        """Either of them excludes the places behind the last key."""
        given = arguments(m.root)
        found = [name for name in ("attn_mask", "is_causal") if given[name]]
        return not found, ", ".join(found)

    @require("[batch, heads, rows, head dimension], the last a power of two")
    def taken(self, m: MatchContext) -> Answer:
        """The backend's kernel has four dimensions, and for other heads a second form, which is right."""
        shape = m.val(m.q).shape
        features = shape[-1]
        good = len(shape) == 4 and isinstance(features, int) and features & (features - 1) == 0
        return good, f"{list(shape)}"

    @require(f"a number of keys that is not a multiple of {_BLOCK}, or not known to be")
    def ragged(self, m: MatchContext) -> Answer:
        """Whole blocks need no mask."""
        keys = m.val(m.k).shape[-2]
        return not statically_known_true(keys % _BLOCK == 0), f"{keys} keys"

    def emit(self, b: Builder, m: MatchContext) -> Node:
        """The same attention, with a mask [batch, 1, rows, keys] of ones."""
        given = arguments(m.root)
        q = m.val(m.q)
        sizes = [self._size(b, m.q, 0), 1, self._size(b, m.q, 2), self._size(b, m.k, 2)]
        mask = b.call(aten.full.default, sizes, True, dtype=torch.bool, device=q.device, pin_memory=False)
        rest = {name: value for name, value in given.items() if name in ("scale", "enable_gqa")}
        return b.call(ATTENTION, m.q, m.k, m.v, mask, given["dropout_p"], **rest)

    @staticmethod
    def _size(b: Builder, node: Any, dim: int) -> int | Node:
        """The size of an axis: a number, or the node that computes it."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else b.call(aten.sym_size.int, node, dim)
