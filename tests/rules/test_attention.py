"""UnmaskedAttention and FuseAttentionTranspose: where they apply, and the same numbers as before."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.rules.attention import SDPA, CastAttention
from et_cuda_passes.testing import assert_rewrites

BACKEND = [ecp.UnmaskedAttention(kernel="backend")]
TRITON = [ecp.UnmaskedAttention(), ecp.FuseAttentionTranspose()]


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


def operators(program: ExportedProgram) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.graph.nodes if node.op == "call_function"]


def our_operators(program: ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if "et_cuda_passes.attention" in str(node.target)]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition in fp64."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return (q.double() @ k.transpose(-2, -1) * scale).softmax(-1) @ v


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


# Attention in bf16, by option.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_cast_to_bf16_before_the_kernel_is_chosen(dtype: torch.dtype, masked: bool) -> None:
    inputs = tuple(each.to(dtype) for each in qkv())
    mask = torch.ones(5, 7).tril().bool()
    model = Attention(**({"attn_mask": mask} if masked else {}))
    passes = ecp.default_passes("cuda").insert_before("unmasked_attention", CastAttention())
    program, report = ecp.rewrite(torch.export.export(model, inputs), "cuda", passes)
    assert report.applied["cast_attention"] == 1
    assert (len(attentions(program)), len(our_operators(program))) == ((1, 0) if masked else (0, 1))
    (attention,) = attentions(program) or our_operators(program)
    assert attention.args[0].meta["val"].dtype is torch.bfloat16
    got = program.module()(*inputs)
    assert got.dtype is dtype
    assert relative_error(got, model(*inputs)) < 2.0**-7
    again = ecp.rewrite(program, "cuda", passes)[1]
    assert "cast_attention" not in again.applied


def test_attention_with_a_mask_of_numbers_is_not_cast() -> None:
    """In bf16 the lowest number of float32 would be minus infinity, and a row without a key would be NaN."""
    mask = torch.full((5, 7), torch.finfo(torch.float32).min)
    program, report = ecp.rewrite(torch.export.export(Attention(attn_mask=mask), qkv()), "cuda", [CastAttention()])
    assert report.applied == {}
    assert attentions(program)[0].args[0].meta["val"].dtype is torch.float32


# The backend's kernel with a mask.


@pytest.mark.parametrize(
    ("options", "kv_heads"), [({}, 4), ({"scale": 0.5}, 4), ({"enable_gqa": True, "scale": 0.1}, 2)]
)
def test_mask_covers_rows_and_keys_and_changes_no_number(options: dict[str, Any], kv_heads: int) -> None:
    inputs = qkv(kv_heads=kv_heads)
    before = torch.export.export(Attention(**options), inputs)
    program, _ = ecp.rewrite(before, "cuda", BACKEND)
    (attention,) = attentions(program)
    mask = attention.args[3].meta["val"]
    assert (tuple(mask.shape), mask.dtype) == ((2, 1, 5, 7), torch.bool)
    got = program.module()(*inputs)
    torch.testing.assert_close(got, before.module()(*inputs))
    torch.testing.assert_close(got.double(), exact(*inputs, options.get("scale", 16**-0.5)), rtol=1e-5, atol=1e-5)
    again, _ = ecp.rewrite(program, "cuda", BACKEND)
    assert str(again.graph) == str(program.graph)


@pytest.mark.parametrize("edge", [False, True])
def test_mask_fits_dynamic_lengths(edge: bool) -> None:
    length, keys = Dim("length", min=2, max=512), Dim("keys", min=2, max=512)
    shapes = {"q": {2: length}, "k": {2: keys}, "v": {2: keys}}
    program = torch.export.export(Attention(), qkv(), dynamic_shapes=shapes)
    if edge:
        config = EdgeCompileConfig(preserve_ops=[SDPA], _check_ir_validity=False)
        program = to_edge(program, compile_config=config).exported_program()
    rewritten, _ = ecp.rewrite(program, "cuda", BACKEND)
    (attention,) = attentions(rewritten)
    assert attention.args[3] is not None
    for rows, others in ((2, 9), (300, 128)):
        inputs = qkv(rows, others)
        torch.testing.assert_close(rewritten.module()(*inputs), F.scaled_dot_product_attention(*inputs))


# Near misses.


def rejection(model: nn.Module, inputs: tuple[Any, ...], passes: list[Any], shapes: Any = None) -> str:
    """The reasons for which ``unmasked_attention`` rejects the one attention, which stays as it is."""
    before = torch.export.export(model, inputs, dynamic_shapes=shapes)
    program, report = ecp.rewrite(before, "cuda", passes)
    assert str(program.graph) == str(before.graph)
    return "\n".join(report.rejected["unmasked_attention"])


MASK = torch.ones(1, 1, 5, 7, dtype=torch.bool)


@pytest.mark.parametrize("passes", [BACKEND, TRITON], ids=["backend", "triton"])
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"is_causal": True}, "is_causal"),
        ({"attn_mask": MASK}, "attn_mask"),
    ],
    ids=["causal", "masked"],
)
def test_masked_attention_is_rejected(options: dict[str, Any], found: str, passes: list[Any]) -> None:
    inputs = tuple(t.bfloat16() for t in qkv())
    reason = rejection(Attention(**options), inputs, passes)
    assert reason.endswith(f": unmasked_attention wanted neither a mask nor is_causal, found {found}")


@pytest.mark.parametrize("passes", [BACKEND, TRITON], ids=["backend", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_head_dimension_that_is_no_power_of_two_is_rejected(passes: list[Any], dynamic: bool) -> None:
    inputs = tuple(t.bfloat16() for t in qkv(features=24))
    features = {3: Dim("features", min=2, max=64)}
    shapes = {"q": features, "k": features, "v": features} if dynamic else None
    reason = rejection(Attention(), inputs, passes, shapes)
    assert "a head dimension that is a power of two, found [2, 4, 5, " in reason
    assert reason.endswith("24]") is not dynamic


@pytest.mark.parametrize("passes", [BACKEND, TRITON], ids=["backend", "triton"])
def test_attention_of_three_dimensions_is_rejected(passes: list[Any]) -> None:
    inputs = tuple(t[0].bfloat16() for t in qkv())
    reason = rejection(Attention(), inputs, passes)
    assert "wanted four dimensions, " in reason and reason.endswith("found [4, 5, 16]")


@pytest.mark.parametrize(
    ("passes", "features"), [(BACKEND, 16), (TRITON, 8)], ids=["backend", "triton with small heads"]
)
def test_whole_blocks_of_keys_are_rejected(passes: list[Any], features: int) -> None:
    inputs = tuple(t.bfloat16() for t in qkv(keys=256, features=features))
    reason = rejection(Attention(), inputs, passes)
    assert reason.endswith("wanted a number of keys that is not a multiple of 128, or a dynamic one, found 256 keys")


def test_attention_under_autocast_is_rejected() -> None:
    class Autocast(Attention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(q, k, v)

    reason = rejection(Autocast(), qkv(), TRITON)
    assert "q, k, v and result of one dtype, found float32, float32, float32 for a result in bfloat16" in reason


# Our operator.


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
def test_our_operator_replaces_attention_of_any_length(
    options: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype
) -> None:
    inputs = tuple(t.to(dtype) for t in qkv(**sizes))
    before = torch.export.export(Attention(**options), inputs)
    program, _ = ecp.rewrite(before, "cuda", TRITON)
    assert operators(program) == ["et_cuda_passes.attention"]
    (attention,) = our_operators(program)
    scale = options.get("scale", inputs[0].shape[-1] ** -0.5)
    assert attention.args[3:] == (scale, [1, 1, 1, 1])
    bound = 6e-3 if dtype is torch.bfloat16 else 1e-3
    assert relative_error(program.module()(*inputs), exact(*inputs, scale)) < bound


@pytest.mark.parametrize(
    ("options", "sizes", "dtype"),
    [
        ({}, {}, torch.float32),
        ({}, {"features": 8}, torch.bfloat16),
        ({}, {"features": 512}, torch.bfloat16),
        ({"dropout_p": 0.5}, {}, torch.bfloat16),
        ({}, {"kv_heads": 1}, torch.bfloat16),
    ],
    ids=["dtype", "small heads", "large heads", "dropout", "heads broadcast without enable_gqa"],
)
def test_attention_that_our_kernel_lacks_gets_a_mask(
    options: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype
) -> None:
    """Without the mask, the backend would compute it wrongly."""
    before = torch.export.export(Attention(**options), tuple(t.to(dtype) for t in qkv(**sizes)))
    triton, _ = ecp.rewrite(before, "cuda", TRITON)
    backend, _ = ecp.rewrite(before, "cuda", BACKEND)
    assert attentions(triton)[0].args[3] is not None
    assert str(triton.graph) == str(backend.graph)


def test_values_with_more_features_than_keys_get_a_mask() -> None:
    q, k, v = (t.bfloat16() for t in qkv())
    before = torch.export.export(Attention(), (q, k, torch.cat((v, v), -1)))
    program, _ = ecp.rewrite(before, "cuda", TRITON)
    assert not our_operators(program)
    assert attentions(program)[0].args[3] is not None


# The transpositions around our operator.


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
def test_transpositions_become_head_axes_of_our_operator(form: str, axes: list[int], dynamic: bool) -> None:
    x = torch.randn(2, 60, 48).bfloat16()
    # With a minimum of 1, the export may not assume that a size differs from 1.
    sizes = {0: Dim("batch", min=1, max=8), 1: Dim("length", min=1, max=512)} if dynamic else None
    before = torch.export.export(Layer(form).eval(), (x,), dynamic_shapes=(sizes,))
    expect = {"unmasked_attention": 1, **({} if form == "read twice" else {"fuse_attention_transpose": 1})}
    program, _ = assert_rewrites(before, "cuda", TRITON, expect=expect, inputs=(x,))
    (attention,) = our_operators(program)
    assert attention.args[4] == axes
    left = [name for name in operators(program) if "transpose" in name or "permute" in name]
    assert len(left) == axes.count(1)
    assert program.range_constraints == before.range_constraints
    for rows, batch in ((1, 1), (2, 3), (127, 2), (128, 1), (300, 2)) if dynamic else ():
        other = torch.randn(batch, rows, 48).bfloat16()
        assert relative_error(program.module()(other), before.module()(other).double()) < 1e-2
    if dynamic:
        return
    # In the edge dialect, each transposition that is left is a copy.
    edge = to_edge(program).exported_program()
    copies = [n for n in edge.graph.nodes if "permute_copy" in str(n.target) and "val" in n.meta]
    assert sum(n.meta["val"].dim() == 4 for n in copies) == axes.count(1)


def test_transpositions_fuse_in_the_edge_dialect() -> None:
    x = torch.randn(2, 60, 48).bfloat16()
    length = {1: Dim("length", min=2, max=512)}
    before = torch.export.export(Layer("transpose").eval(), (x,), dynamic_shapes=(length,))
    kept = EdgeCompileConfig(preserve_ops=[SDPA], _check_ir_validity=False)
    program, _ = ecp.rewrite(to_edge(before, compile_config=kept).exported_program(), "cuda", TRITON)
    (attention,) = our_operators(program)
    assert attention.args[4] == [2, 2, 2, 2]
    for rows in (2, 60, 129):
        x = torch.randn(2, rows, 48).bfloat16()
        assert relative_error(program.module()(x), before.module()(x).double()) < 1e-2


@pytest.mark.parametrize(("count", "axis"), [(1, 2), (2, 1), (3, 2)])
def test_chain_of_transpositions_fuses_into_one_head_axis(count: int, axis: int) -> None:
    class Chain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(q, k, v)
            for _ in range(count):
                y = y.transpose(1, 2)
            return y

    inputs = tuple(t.bfloat16() for t in qkv())
    before = torch.export.export(Chain(), inputs)
    program, _ = assert_rewrites(before, "cuda", TRITON, expect={"fuse_attention_transpose": 1}, inputs=inputs)
    assert operators(program) == ["et_cuda_passes.attention"]
    assert our_operators(program)[0].args[4] == [1, 1, 1, axis]


def test_transposition_of_other_axes_is_not_fused() -> None:
    class Other(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v).transpose(2, 3)

    inputs = tuple(t.bfloat16() for t in qkv())
    program, _ = assert_rewrites(
        torch.export.export(Other(), inputs), "cuda", TRITON, {"fuse_attention_transpose": 0}, inputs
    )
    assert operators(program) == ["et_cuda_passes.attention", "aten.transpose.int"]


def test_mutated_buffer_is_read_before_and_after_its_mutation() -> None:
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
    program, _ = assert_rewrites(before, "cuda", TRITON, inputs=(q, new))
    assert len(our_operators(program)) == 2


def test_unknown_attention_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match="no attention kernel 'flash'; there is: triton, backend"):
        ecp.UnmaskedAttention(kernel="flash")


def test_attention_rules_are_default_passes_of_cuda_alone() -> None:
    having = [name for name in ecp.targets() if set(TRITON) & set(ecp.default_passes(name))]
    assert having == ["cuda"]
    assert set(TRITON) <= set(ecp.default_passes("cuda"))
