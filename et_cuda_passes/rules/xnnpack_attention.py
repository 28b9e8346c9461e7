"""Attention in operators that XNNPACK's delegate has, with each key and value head read once.

ExecuTorch decomposes attention for the delegate. The decomposition scales queries and keys by the root of the scale,
and replaces NaN in the result of a softmax. It needs eight operators that the delegate does not have, and most of them
run over all keys or all scores. Models with fewer key heads than heads also copy each key and value head once for every
head that reads it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.aliasing import alias_root, mutated_operands, storage_ptrs
from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Failure, Rule, requirement
from et_cuda_passes.rules.requirements import dtype_names, same_dtype

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

_EXCLUDED = torch.finfo(torch.float32).min / 2
"""Added to the scores that a mask excludes. Their exponentials are 0, as with minus infinity, but a row without any
key gives no NaN."""


@requirement("attention without is_causal and dropout")
def attention_is_plain(m: Match) -> Failure | None:
    """Models of transformers with a cache have a mask instead."""
    given = arguments(m.root)
    found = [name for name in ("is_causal", "dropout_p") if given[name]]
    return Failure(", ".join(found)) if found else None


@requirement("activations in float32")
def attention_is_fp32(m: Match) -> Failure | None:
    """The delegate's products of two activations have this dtype."""
    dtype = m.val(m.q).dtype
    return None if dtype == torch.float32 else Failure(dtype_names([dtype]))


@requirement("no mask, or one of booleans with four dimensions and one head")
def mask_is_boolean(m: Match) -> Failure | None:
    """A row of a float mask may contain minus infinity alone, for which attention gives 0."""
    mask = _mask(m)
    if mask is None:
        return None
    value = m.val(mask)
    if value.dtype == torch.bool and value.dim() == 4 and statically_known_true(value.shape[1] == 1):
        return None
    return Failure(f"{list(value.shape)} in {dtype_names([value.dtype])}")


@requirement("[batch, heads, rows, head dimension] with static batch, heads and head dimension, and heads that divide")
def heads_are_static(m: Match) -> Failure | None:
    """A view of the delegate has one dynamic size."""
    q, k, v = (m.val(node).shape for node in (m.q, m.k, m.v))
    if not len(q) == len(k) == len(v) == 4:
        return Failure(f"{len(q)}, {len(k)} and {len(v)} dimensions")
    static = [*q[:2], q[3], *k[:2], k[3], *v[:2], v[3]]
    if not all(isinstance(size, int) for size in static) or 0 in static:
        return Failure(f"{list(q)}, {list(k)} and {list(v)}")
    repeated = q[1] if not arguments(m.root)["enable_gqa"] else k[1]
    fit = q[0] == k[0] == v[0] and q[3] == k[3] and k[1] == v[1] == repeated and q[1] % k[1] == 0
    return None if fit and statically_known_true(k[2] == v[2]) else Failure(f"{list(q)}, {list(k)} and {list(v)}")


def _mask(m: Match) -> Node | None:
    mask = arguments(m.root)["attn_mask"]
    return mask if isinstance(mask, Node) else None


@dataclass(frozen=True)
class AttentionOfGroups(Rule):
    """attention(q, repeated k, repeated v, mask) -> softmax(q k^T + mask) v, for the heads of one key head together

    The result differs in rounding only. A row whose mask excludes all keys gives 0, as in attention.
    """

    reports_misses: ClassVar[bool] = False

    requirements = (
        attention_is_plain,
        same_dtype("q", "k", "v"),
        attention_is_fp32,
        mask_is_boolean,
        heads_are_static,
    )

    def pattern(self, q: Capture, k: Capture, v: Capture) -> Pattern:
        """Attention with any further arguments."""
        return op(SDPA)(q, k, v, ...)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Products of [batch x key heads] matrices."""
        given, (batch, heads, _, width) = arguments(m.root), m.val(m.q).shape
        key, value = _heads(m)
        kv_heads, v_width = m.val(key).shape[1], m.val(value).shape[3]
        repeats = heads // kv_heads
        scale = width**-0.5 if given["scale"] is None else given["scale"]
        rows, keys = b.size(m.q, 2), b.size(m.k, 2)

        def merged(node: Node, size: Any, last: int) -> Node:
            """[batch, key heads, size, last] as [batch x key heads, size, last]."""
            return b.call(aten.reshape.default, node, [batch * kv_heads, size, last])

        def of_groups(size: Any) -> Any:
            return -1 if repeats > 1 and isinstance(size, Node) else repeats * size if isinstance(size, int) else size

        q = merged(b.call(aten.mul.Tensor, m.q, scale), of_groups(rows), width)
        k, v = merged(key, keys, width), merged(value, keys, v_width)
        scores = b.call(aten.bmm.default, q, b.call(aten.transpose.int, k, 1, 2))
        mask = _mask(m)
        if mask is not None:
            scores = b.call(aten.reshape.default, scores, [batch, kv_heads, repeats, rows, keys])
            kept = _once(b, aten._to_copy.default, mask, dtype=torch.float32)
            # 0 where the mask is True.
            excluded = _once(b, aten.mul.Tensor, _once(b, aten.sub.Tensor, kept, 1.0), -_EXCLUDED)
            scores = b.call(aten.add.Tensor, scores, _once(b, aten.unsqueeze.default, excluded, 2))
        weights = b.call(aten._softmax.default, scores, -1, False)
        if mask is not None:
            weights = b.call(aten.reshape.default, weights, [batch * kv_heads, of_groups(rows), keys])
        y = b.call(aten.reshape.default, b.call(aten.bmm.default, weights, v), [batch, heads, rows, v_width])
        if mask is None:
            return y
        return b.call(aten.mul.Tensor, y, _once(b, aten.amax.default, kept, [-1], True))


def _heads(m: Match) -> tuple[Node, Node]:
    """Keys and values with each head once, or as they are, where the program does not repeat both in the same way."""
    key, value = (_before_repeat(m, node) for node in (m.k, m.v))
    once = key is not None and value is not None and m.val(key).shape[1] == m.val(value).shape[1]
    return (cast(Node, key), cast(Node, value)) if once else (m.k, m.v)


def _before_repeat(m: Match, node: Node) -> Node | None:
    """[batch, key heads, keys, width], where ``node`` repeats each head for the heads that read it; else None.

    The form is ``repeat_kv`` of transformers: ``x[:, :, None].expand(...).reshape(...)``.
    """
    chain = [node]
    for form in ((aten.reshape.default, aten.view.default), (aten.expand.default,), (aten.unsqueeze.default,)):
        if op_of(chain[-1]) not in form:
            return None
        chain.append(cast(Node, chain[-1].args[0]))
    _, expanded, inserted, source = chain
    shape = m.val(source).shape
    if len(shape) != 4 or inserted.args[1] != 2:
        return None
    repeats = m.val(expanded).shape[2]
    wanted = [*shape[:2], repeats, *shape[2:], shape[0], shape[1] * repeats, *shape[2:]]
    found = [*m.val(expanded).shape, *m.val(node).shape]
    if len(found) != len(wanted) or not all(statically_known_true(a == b) for a, b in zip(found, wanted, strict=True)):
        return None
    return None if _may_change(m, source, inserted) else source


def _may_change(m: Match, value: Node, first: Node) -> bool:
    """Whether a node from ``first`` to the attention may mutate ``value``: most models update their cache before."""
    program, here = m.program, first
    owner = alias_root(value, program.subgraphs.views)
    memory = storage_ptrs(program.constant(owner))
    while here is not m.root:
        if isinstance(here.target, torch._ops.HigherOrderOperator):
            return True
        for operand in mutated_operands(here):
            other = alias_root(operand, program.subgraphs.views)
            if other is owner or memory & storage_ptrs(program.constant(other)):
                return True
        here = here.next
    return False


def _once(b: Builder, target: Any, source: Node, *args: Any, **kwargs: Any) -> Node:
    """As ``b.call``, or an earlier node of the same call, which another layer has for its equal mask."""
    (root,) = b.roots
    for user in source.users:
        same = op_of(user) is target and user.args == (source, *args) and user.kwargs == kwargs
        if same and user.graph is root.graph and user < root:
            return user
    return b.call(target, source, *args, **kwargs)
