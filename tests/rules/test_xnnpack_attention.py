"""AttentionOfGroups: attention for XNNPACK, in the graph and in ExecuTorch's runtime."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.delegate.files import read_pte
from et_cuda_passes.delegate.plan import Kernel, read_plans
from et_cuda_passes.executorch.lower import lower
from tests.xnnpack import output

KEYS, WIDTH = 24, 16
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """Attention as transformers exports it, with each key and value head read by ``repeats`` heads."""

    def __init__(self, repeats: int = 1, value_repeats: int | None = None, **options: Any) -> None:
        super().__init__()
        self.repeats, self.value_repeats, self.options = repeats, value_repeats or repeats, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """As torch's function."""
        k, v = repeated(k, self.repeats), repeated(v, self.value_repeats)
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


class Cached(Attention):
    """As above; keys and values are first written to a cache, and after the attention if ``late``."""

    def __init__(self, repeats: int, late: bool = False) -> None:
        super().__init__(repeats)
        self.late = late
        self.register_buffer("keys", example(1, 2, KEYS, WIDTH))
        self.register_buffer("values", example(1, 2, KEYS, WIDTH))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.late:
            self.keys[:, :, :6] = k
        k, v = repeated(self.keys, self.repeats), repeated(self.values, self.repeats)
        if self.late:
            self.keys.zero_()
            k = k + 0
        return F.scaled_dot_product_attention(q, k, v, mask)


def repeated(x: Tensor, repeats: int) -> Tensor:
    if repeats == 1:
        return x
    batch, heads, rows, width = x.shape
    return x[:, :, None].expand(batch, heads, repeats, rows, width).reshape(batch, heads * repeats, rows, width)


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs(rows: int, heads: int = 2, repeats: int = 1, batch: int = 1, keys: int = KEYS) -> tuple[Tensor, ...]:
    q = example(batch, heads * repeats, rows, WIDTH)
    mask = torch.rand(batch, 1, rows, keys, generator=torch.Generator().manual_seed(rows)) > 0.5
    mask[0, 0, 1] = False  # a row without any key
    return q, example(batch, heads, keys, WIDTH), example(batch, heads, keys, WIDTH + 4), mask


def exported(model: nn.Module, arguments: tuple[Any, ...], rows: Any = None) -> ExportedProgram:
    shapes = None if rows is None else ({2: rows}, None, None, {2: rows})
    return torch.export.export(model.eval(), arguments, dynamic_shapes=shapes)


def attentions(program: ExportedProgram) -> int:
    return len(program.graph.find_nodes(op="call_function", target=SDPA))


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("repeats", "dynamic"),
    [(1, False), (3, True), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(1, True), (3, False)])],
)
def test_attention_with_a_mask_is_right_in_executorch_for_every_length(
    repeats: int, dynamic: bool, tmp_path: Path
) -> None:
    model = Attention(repeats, scale=0.3)
    program = exported(model, inputs(6, 2, repeats), Dim("rows", min=2, max=20) if dynamic else None)
    rewritten, _ = ecp.rewrite(program, "xnnpack", expect={"attention_of_groups": 1})
    assert attentions(rewritten) == 0
    (path,) = lower(rewritten, "xnnpack", tmp_path, "model")
    for rows in (2, 6, 20) if dynamic else (6,):
        given = inputs(rows, 2, repeats)
        wanted = model(*given)
        assert not wanted[0, :, 1].any()
        near(rewritten.module()(*given), wanted)
        near(output(path.read_bytes(), *given), wanted)
    (plan,) = read_plans(read_pte(path)).values()
    outside = [step.name for step in plan.steps if isinstance(step, Kernel)]
    # The operators outside the delegate depend on the mask alone: one call of each serves all layers.
    assert set(outside) <= {"aten::_to_copy.out", "aten::amax.out", "aten::unsqueeze_copy.out"}


@pytest.mark.parametrize("repeats", [1, 4])
def test_attention_without_a_mask_is_right_in_executorch(repeats: int, tmp_path: Path) -> None:
    model = Attention(repeats)
    given = inputs(7, 2, repeats, batch=3)[:3]
    rewritten, _ = ecp.rewrite(exported(model, given), "xnnpack", expect={"attention_of_groups": 1})
    (path,) = lower(rewritten, "xnnpack", tmp_path, "model")
    near(output(path.read_bytes(), *given), model(*given))


def test_attention_with_enable_gqa_reads_each_key_head_once() -> None:
    model = Attention(enable_gqa=True)
    q, k, v, mask = inputs(5, 2, 3)
    rewritten, _ = ecp.rewrite(exported(model, (q, k, v, mask)), "xnnpack", expect={"attention_of_groups": 1})
    near(rewritten.module()(q, k, v, mask), model(q, k, v, mask))
    assert not rewritten.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)


def test_layers_share_what_depends_on_the_mask() -> None:
    class Layers(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            once = F.scaled_dot_product_attention(q, k, v, mask)
            return F.scaled_dot_product_attention(once, k, v, mask)

    q, k, _, mask = inputs(5)
    rewritten, _ = ecp.rewrite(exported(Layers(), (q, k, k, mask)), "xnnpack", expect={"attention_of_groups": 2})
    near(rewritten.module()(q, k, k, mask), Layers()(q, k, k, mask))
    for target in (torch.ops.aten.amax.default, torch.ops.aten.sub.Tensor, torch.ops.aten.unsqueeze.default):
        assert len(rewritten.graph.find_nodes(op="call_function", target=target)) == 1


@pytest.mark.parametrize(("late", "expanded"), [(False, 0), (True, 2)])
def test_cache_is_read_before_its_next_update(late: bool, expanded: int) -> None:
    q, k, v, mask = inputs(6, 2, 3)
    k, v = k[:, :, :6].clone(), v[..., :WIDTH].clone()
    program = exported(Cached(3, late), (q, k, v, mask))
    wanted = Cached(3, late)(q, k, v, mask)
    rewritten, _ = ecp.rewrite(program, "xnnpack", expect={"attention_of_groups": 1})
    near(rewritten.module()(q, k, v, mask), wanted)
    assert len(rewritten.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)) == expanded


def changed(index: int, value: Tensor) -> tuple[Tensor, ...]:
    given = list(inputs(6))
    given[index] = value
    return tuple(given)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        pytest.param(Attention(is_causal=True), inputs(6)[:3], id="is_causal"),
        pytest.param(Attention(dropout_p=0.5), inputs(6), id="dropout"),
        pytest.param(Attention(), tuple(x.half() if x.is_floating_point() else x for x in inputs(6)), id="float16"),
        pytest.param(Attention(), changed(3, torch.zeros(1, 1, 6, KEYS)), id="float mask"),
        pytest.param(Attention(), changed(3, torch.ones(6, KEYS, dtype=torch.bool)), id="mask of two dimensions"),
        pytest.param(Attention(), changed(3, torch.ones(1, 2, 6, KEYS, dtype=torch.bool)), id="mask of each head"),
        pytest.param(Attention(), changed(1, example(1, 1, KEYS, WIDTH)), id="key head that broadcasts"),
    ],
)
def test_other_attention_stays(model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    rewritten, _ = ecp.rewrite(exported(model, arguments), "xnnpack")
    assert attentions(rewritten) == 1


def test_keys_and_values_repeated_differently_are_not_merged() -> None:
    # Six heads of the key, each read by one of the value's two.
    q, _, v, mask = inputs(5, 2, 3)
    k = example(1, 6, KEYS, WIDTH)
    model = Attention(1, 3)
    rewritten, _ = ecp.rewrite(exported(model, (q, k, v, mask)), "xnnpack", expect={"attention_of_groups": 1})
    near(rewritten.module()(q, k, v, mask), model(q, k, v, mask))


def test_dynamic_batch_stays() -> None:
    given = inputs(6, batch=2)
    shapes = tuple({0: Dim("batch", min=2, max=8)} for _ in given)
    program = torch.export.export(Attention().eval(), given, dynamic_shapes=shapes)
    rewritten, _ = ecp.rewrite(program, "xnnpack")
    assert attentions(rewritten) == 1


@pytest.mark.parametrize("score", [1e20, 1e33])
def test_excluded_key_with_a_huge_score_is_excluded(score: float) -> None:
    q, k, v, mask = inputs(5)
    k[..., 3, :] *= score
    mask[...] = True
    mask[..., 3] = False
    rewritten, _ = ecp.rewrite(exported(Attention(), (q, k, v, mask)), "xnnpack", expect={"attention_of_groups": 1})
    near(rewritten.module()(q, k, v, mask), Attention()(q, k, v, mask))


class RepeatedOtherwise(nn.Module):
    """Keys that look repeated by heads: an expansion of another axis, or a reshape to another order."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Two key heads of KEYS keys become two heads of twice as many, or four heads of half as many."""
        batch, heads, keys, width = k.shape
        expanded = (x[:, :, None].expand(batch, heads, 2, keys, width) for x in (k, v))
        shape = (batch, heads, 2 * keys, width) if self.form == "keys" else (batch, 4 * heads, keys // 2, width)
        k, v = (x.reshape(shape) for x in expanded)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(("form", "heads"), [("keys", 2), ("heads", 8)])
def test_keys_that_are_repeated_otherwise_are_right(form: str, heads: int) -> None:
    q, k = example(1, heads, 5, WIDTH), example(1, 2, KEYS, WIDTH)
    model = RepeatedOtherwise(form)
    rewritten, _ = ecp.rewrite(exported(model, (q, k, k + 1)), "xnnpack", expect={"attention_of_groups": 1})
    near(rewritten.module()(q, k, k + 1), model(q, k, k + 1))
