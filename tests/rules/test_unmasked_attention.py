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

PASSES = [ecp.UnmaskedAttention()]


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


def test_it_is_among_the_passes_for_cuda_alone() -> None:
    having = [name for name in ecp.targets() if UnmaskedAttention() in ecp.default_passes(name)]
    assert having == ["cuda"]
