"""UnmaskedAttention: a mask of ones where ExecuTorch's CUDA kernel needs one, and the same numbers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.rules.unmasked_attention import ATTENTION, UnmaskedAttention
from et_cuda_passes.testing import assert_rewrites

PASSES = [ecp.UnmaskedAttention(kernel="backend")]


class Attention(nn.Module):
    """Attention with any options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def qkv(rows: int = 5, keys: int = 7, features: int = 16, heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, heads, rows, features), (2, kv_heads, keys, features), (2, kv_heads, keys, features))
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


def attentions(program: ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]


@pytest.mark.parametrize(
    ("options", "kv_heads"), [({}, 4), ({"scale": 0.5}, 4), ({"enable_gqa": True, "scale": 0.1}, 2)]
)
def test_the_mask_covers_rows_and_keys_and_changes_no_number(options: dict[str, Any], kv_heads: int) -> None:
    inputs = qkv(kv_heads=kv_heads)
    before = torch.export.export(Attention(**options), inputs)
    program, _ = ecp.rewrite(before, "cuda", PASSES)
    (attention,) = attentions(program)
    mask = attention.args[3].meta["val"]
    assert (tuple(mask.shape), mask.dtype) == ((2, 1, 5, 7), torch.bool)
    torch.testing.assert_close(program.module()(*inputs), before.module()(*inputs))
    q, k, v = (t.double() for t in inputs)
    k, v = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
    weights = (q @ k.transpose(-2, -1) * options.get("scale", 16**-0.5)).softmax(-1)
    torch.testing.assert_close(program.module()(*inputs).double(), weights @ v, rtol=1e-5, atol=1e-5)
    again, _ = ecp.rewrite(program, "cuda", PASSES)
    assert str(again.graph) == str(program.graph)


def test_a_head_dimension_that_is_not_known_is_left_alone() -> None:
    features = {3: Dim("features", min=2, max=64)}
    inputs = tuple(t.bfloat16() for t in qkv())
    program = torch.export.export(Attention(), inputs, dynamic_shapes=dict.fromkeys("qkv", features))
    for passes in (PASSES, [ecp.UnmaskedAttention()]):
        rewritten, report = ecp.rewrite(program, "cuda", passes)
        assert not report.applied and str(rewritten.graph) == str(program.graph)


def test_lengths_that_are_not_known_and_the_edge_dialect() -> None:
    length, keys = Dim("length", min=2, max=512), Dim("keys", min=2, max=512)
    shapes = {"q": {2: length}, "k": {2: keys}, "v": {2: keys}}
    before = torch.export.export(Attention(), qkv(), dynamic_shapes=shapes)
    kept = EdgeCompileConfig(preserve_ops=[ATTENTION], _check_ir_validity=False)
    for program in (before, to_edge(before, compile_config=kept).exported_program()):
        rewritten, _ = ecp.rewrite(program, "cuda", PASSES)
        (attention,) = attentions(rewritten)
        assert attention.args[3] is not None
        for rows, others in ((2, 9), (300, 128)):
            inputs = qkv(rows, others)
            torch.testing.assert_close(rewritten.module()(*inputs), F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"is_causal": True}, {"rows": 7}),
        ({"attn_mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)}, {}),
        ({}, {"keys": 256}),
        ({}, {"features": 24}),  # the backend's other form of the kernel, which is right
    ],
    ids=["causal", "masked", "whole blocks", "head dimension"],
)
def test_what_needs_no_mask_is_left_alone(options: dict[str, Any], sizes: dict[str, int]) -> None:
    before = torch.export.export(Attention(**options), qkv(**sizes))
    program, _ = ecp.rewrite(before, "cuda", PASSES)
    assert str(program.graph) == str(before.graph)


OURS = [ecp.UnmaskedAttention(), ecp.AttentionViews()]


def operators(program: ExportedProgram) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.graph.nodes if node.op == "call_function"]


def ours(program: ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is ecp.ops.ATTENTION]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return (q.double() @ k.transpose(-2, -1) * scale).softmax(-1) @ v


def off(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, {}),
        ({"scale": -0.5}, {"keys": 256}),
        ({"enable_gqa": True, "scale": 0.1}, {"kv_heads": 2, "rows": 1}),
        ({"enable_gqa": True}, {"kv_heads": 1, "keys": 128, "features": 256}),
        ({"attn_mask": None, "is_causal": False}, {"features": 128}),
    ],
    ids=str,
)
def test_our_kernel_takes_any_length(options: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype) -> None:
    inputs = tuple(t.to(dtype) for t in qkv(**sizes))
    before = torch.export.export(Attention(**options), inputs)
    program, _ = ecp.rewrite(before, "cuda", OURS)
    assert operators(program) == ["et_cuda_passes.attention"]
    (attention,) = ours(program)
    scale = options.get("scale", inputs[0].shape[-1] ** -0.5)
    assert attention.args[3:] == (scale, [1, 1, 1, 1])
    assert off(program.module()(*inputs), exact(*inputs, scale)) < (6e-3 if dtype is torch.bfloat16 else 1e-3)


class Layer(nn.Module):
    """An encoder's attention: linears, heads, attention, and a linear."""

    def __init__(self, form: str, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.form, self.sizes = form, (heads, kv_heads, kv_heads)
        self.qkv = nn.ModuleList(nn.Linear(48, n * 16, dtype=torch.bfloat16) for n in self.sizes)
        self.out = nn.Linear(heads * 16, 48, dtype=torch.bfloat16)

    def swap(self, x: Tensor) -> Tensor:
        if self.form == "permute":
            return x.permute(0, 2, 1, 3)
        return x.transpose(-2, -3) if self.form == "from the end" else x.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = [linear(x).unflatten(-1, (n, 16)) for linear, n in zip(self.qkv, self.sizes, strict=True)]
        q, k, v = (self.swap(t) for t in heads)
        if self.form == "rotated":
            q, k = q * 2, k * 0.5
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        more = y.sum() if self.form == "read twice" else 0
        return self.out(self.swap(y).flatten(2)) + more


@pytest.mark.parametrize(
    ("form", "axes"),
    [
        ("transpose", [2, 2, 2, 2]),
        ("permute", [2, 2, 2, 2]),
        ("from the end", [2, 2, 2, 2]),
        ("rotated", [1, 1, 2, 2]),
        ("read twice", [2, 2, 2, 1]),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_transpositions_become_the_operators_own(form: str, axes: list[int], dynamic: bool) -> None:
    x = torch.randn(2, 60, 48).bfloat16()
    # From 1 on: no size is asked whether it is 1.
    sizes = {0: Dim("batch", min=1, max=8), 1: Dim("length", min=1, max=512)} if dynamic else None
    before = torch.export.export(Layer(form).eval(), (x,), dynamic_shapes=(sizes,))
    program, _ = assert_rewrites(before, "cuda", OURS, inputs=(x,))
    (attention,) = ours(program)
    assert attention.args[4] == axes
    left = [name for name in operators(program) if "transpose" in name or "permute" in name]
    assert len(left) == axes.count(1)
    assert program.range_constraints == before.range_constraints
    for rows, batch in ((1, 1), (2, 3), (127, 2), (128, 1), (300, 2)) if dynamic else ():
        other = torch.randn(batch, rows, 48).bfloat16()
        assert off(program.module()(other), before.module()(other).double()) < 1e-2
    # The edge dialect, whose transpositions are copies, has the operator as it is.
    edge = to_edge(program).exported_program()
    copies = [n for n in edge.graph.nodes if "permute_copy" in str(n.target) and "val" in n.meta]
    assert sum(n.meta["val"].dim() == 4 for n in copies) == axes.count(1)


def test_our_operator_in_the_edge_dialect_too() -> None:
    x = torch.randn(2, 60, 48).bfloat16()
    length = {1: Dim("length", min=2, max=512)}
    before = torch.export.export(Layer("transpose").eval(), (x,), dynamic_shapes=(length,))
    kept = EdgeCompileConfig(preserve_ops=[ATTENTION], _check_ir_validity=False)
    program, _ = ecp.rewrite(to_edge(before, compile_config=kept).exported_program(), "cuda", OURS)
    (attention,) = [node for node in program.graph.nodes if "et_cuda_passes.attention" in str(node.target)]
    assert attention.args[4] == [2, 2, 2, 2]
    for rows in (2, 60, 129):
        x = torch.randn(2, rows, 48).bfloat16()
        assert off(program.module()(x), before.module()(x).double()) < 1e-2


def test_memory_that_is_written_is_read_where_it_was() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.randn(2, 7, 4, 16).bfloat16())

        def forward(self, q: Tensor, new: Tensor) -> Tensor:
            old = self.keys.transpose(1, 2).clone()
            self.keys.copy_(new)
            keys = self.keys.transpose(1, 2)
            return F.scaled_dot_product_attention(q, old, old) + F.scaled_dot_product_attention(q, keys, keys)

    q, new = torch.randn(2, 4, 5, 16).bfloat16(), torch.randn(2, 7, 4, 16).bfloat16()
    before = torch.export.export(Cache(), (q, new))
    program, _ = assert_rewrites(before, "cuda", OURS, inputs=(q, new))
    assert len(ours(program)) == 2


@pytest.mark.parametrize(
    ("options", "sizes", "dtype"),
    [
        ({}, {}, torch.float32),
        ({}, {"features": 8}, torch.bfloat16),
        ({}, {"features": 512}, torch.bfloat16),
        ({"dropout_p": 0.5}, {}, torch.bfloat16),
        ({}, {"kv_heads": 1}, torch.bfloat16),  # broadcast, without enable_gqa
    ],
    ids=["dtype", "small heads", "large heads", "dropout", "broadcast"],
)
def test_what_our_kernel_lacks_has_the_mask(options: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype) -> None:
    """Not left alone: without a mask the backend would compute it wrongly."""
    before = torch.export.export(Attention(**options), tuple(t.to(dtype) for t in qkv(**sizes)))
    triton, _ = ecp.rewrite(before, "cuda", OURS)
    backend, _ = ecp.rewrite(before, "cuda", PASSES)
    assert attentions(triton)[0].args[3] is not None
    assert str(triton.graph) == str(backend.graph)


def test_values_of_other_features_have_the_mask() -> None:
    q, k, v = (t.bfloat16() for t in qkv())
    before = torch.export.export(Attention(), (q, k, torch.cat((v, v), -1)))
    program, _ = ecp.rewrite(before, "cuda", OURS)
    assert not ours(program)
    assert attentions(program)[0].args[3] is not None


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"is_causal": True}, {"rows": 7}),
        ({"attn_mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)}, {}),
        ({}, {"features": 24}),
        ({}, {"features": 8, "keys": 128}),
    ],
    ids=["causal", "masked", "head dimension", "whole blocks of small heads"],
)
def test_what_is_right_without_is_left_alone(options: dict[str, Any], sizes: dict[str, int]) -> None:
    before = torch.export.export(Attention(**options), tuple(t.bfloat16() for t in qkv(**sizes)))
    program, _ = ecp.rewrite(before, "cuda", OURS)
    assert str(program.graph) == str(before.graph)


def test_a_kernel_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="no attention kernel 'flash'; there is: triton, backend"):
        ecp.UnmaskedAttention(kernel="flash")


def test_it_is_among_the_passes_for_cuda_alone() -> None:
    having = [name for name in ecp.targets() if UnmaskedAttention() in ecp.default_passes(name)]
    assert having == ["cuda"]
