"""The finish stage: views are repaired after replacements with other strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import et_cuda_passes as ecp
from et_cuda_passes.testing import Quantized, assert_rewrites, assert_same_results

aten = torch.ops.aten


class Tokens(nn.Module):
    """Patches of an image as tokens, with a residual: [B, C, H, W] -> [B, C H W], with the channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4).bfloat16()
        self.linear = Quantized(32, 32)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        return (tokens + F.linear(tokens, self.linear.weight())).transpose(1, 2).reshape(tokens.shape[0], -1)


class Heads(nn.Module):
    """Attention with two readers of its result: one transposes and flattens it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.view(x.shape[0], 5, 4, 32).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads)
        return y.transpose(1, 2).reshape(x.shape[0], 5, 128), y.amax()


class Kept(nn.Module):
    """Elementwise operators keep the strides for the view after them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Quantized(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return torch.sin(x + F.linear(x, self.linear.weight())).neg().transpose(1, 2).reshape(x.shape[0], -1)


def copies(program: ExportedProgram) -> int:
    return sum(node.target is aten.clone.default for node in program.graph.nodes)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Tokens(), torch.randn(2, 3, 16, 16).bfloat16()),
        (Heads(), torch.randn(2, 5, 128).bfloat16()),
        (Kept(), torch.randn(2, 32, 6).bfloat16()),
    ],
    ids=["conv tokens", "attention read twice", "pointwise"],
)
def test_input_of_an_impossible_view_is_copied(model: nn.Module, x: Tensor, dynamic: bool) -> None:
    shapes = ({0: Dim("n", min=1, max=64)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).run_decompositions({})
    rewritten, _ = assert_rewrites(program, "cuda")
    assert copies(rewritten) == copies(program) + 1
    if dynamic:
        more = torch.cat([x, x, x])
        for got, wanted in zip(rewritten.module()(more), program.module()(more), strict=True):
            torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-6)


def test_values_after_a_replacement_have_its_strides() -> None:
    program = torch.export.export(Kept(), (torch.randn(2, 32, 6).bfloat16(),)).run_decompositions({})
    rewritten, _ = assert_rewrites(program, "cuda")
    strides = {node.target: node.meta["val"].stride() for node in rewritten.graph.nodes if node.op == "call_function"}
    assert strides[aten.neg.default] == (192, 32, 1)
    assert strides[aten.clone.default] == (192, 6, 1)


def test_possible_view_of_a_replacement_is_left_alone() -> None:
    model = Quantized(32, 64, form=lambda x, w, b: F.linear(x, w, b).reshape(-1, 16))
    program = torch.export.export(model, (torch.randn(4, 64).bfloat16(),)).run_decompositions({})
    rewritten, _ = assert_rewrites(program, "cuda", expect={"linear_int4": 1})
    assert copies(rewritten) == copies(program)


def test_node_without_a_value_is_left_to_the_verifier() -> None:
    """The error of the verifier names the node."""

    def adds(module: torch.fx.GraphModule) -> None:
        last = next(node for node in module.graph.nodes if node.target is aten.neg.default)
        (sine,) = last.all_input_nodes
        with module.graph.inserting_before(last):
            other = module.graph.call_function(aten.neg.default, sine.args, name="mute")
        last.target, last.args = aten.add.Tensor, (sine, other)

    program = torch.export.export(Kept(), (torch.randn(2, 32, 6).bfloat16(),)).run_decompositions({})
    with pytest.raises(SpecViolationError, match="Node.meta mute is missing val field"):
        ecp.rewrite(program, "cuda", [*ecp.default_passes("cuda"), adds])


class Behind(nn.Module):
    """``body`` of a sum whose strides are those of ``o`` transposed; the fused sum is contiguous."""

    def __init__(self, body: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.q = Quantized(64, 64)
        self.body = body

    def forward(self, x: Tensor, o: Tensor) -> Any:
        return self.body(o.transpose(1, 2) + F.linear(x, self.q.weight()))


def write_a_contiguous_copy(z: Tensor) -> tuple[Tensor, Tensor]:
    c = z.contiguous()
    c.mul_(2)
    return z, c


def write_a_view_made_by_reshape(z: Tensor) -> Tensor:
    z.transpose(1, 2).reshape(-1).mul_(2)
    return z


def write_a_copy_of_what_follows(z: Tensor) -> tuple[Tensor, Tensor]:
    y = z * 3
    c = y.contiguous()
    c.add_(1)
    return y, c


def draw_in_its_order(z: Tensor) -> tuple[Tensor, Tensor]:
    return F.dropout(z, 0.5, True), z * 0 + torch.randn_like(z)


def read_its_memory(z: Tensor) -> Tensor:
    return torch.as_strided(z, (2, 4096), (4096, 1))


def ask_for_its_strides(z: Tensor) -> Tensor:
    return z * (z.stride(1) + 1)


def view_one_of_several_results(z: Tensor) -> Tensor:
    return F.dropout(z, 0.5, True).transpose(1, 2).reshape(2, -1)


def view_it_in_a_branch(z: Tensor) -> Tensor:
    first, second = (lambda p, n=n: p.transpose(1, 2).reshape(2, -1) * n for n in (2, 3))
    return torch.cond(z.sum() > 0, first, second, (z,))


def split_and_view(z: Tensor) -> Tensor:
    first, second = z.transpose(1, 2).split(32, 1)
    return first.reshape(2, -1) + second.reshape(2, -1)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        write_a_contiguous_copy,
        write_a_view_made_by_reshape,
        write_a_copy_of_what_follows,
        draw_in_its_order,
        read_its_memory,
        ask_for_its_strides,
        view_one_of_several_results,
        view_it_in_a_branch,
        split_and_view,
    ],
    ids=lambda body: body.__name__,
)
def test_program_with_changed_strides_computes_the_same(body: Callable[[Tensor], Any], decompose: bool) -> None:
    inputs = (torch.randn(2, 64, 64).bfloat16(), torch.randn(2, 64, 64).bfloat16())
    program = torch.export.export(Behind(body), inputs)
    program = program.run_decompositions({}) if decompose else program
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 1, "fuse_add": 1})
    results = []
    for each in (program, rewritten):
        torch.manual_seed(1)
        results.append(pytree.tree_leaves(each.module()(*inputs)))
    for wanted, got in zip(*results, strict=True):
        assert (got.double() - wanted.double()).norm() <= 2**-7 * wanted.double().norm()


@pytest.mark.parametrize("write", ["reshape", "contiguous"])
def test_attention_whose_result_is_mutated_keeps_its_aliases(write: str) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            heads = q.view(2, 5, 2, 32).transpose(1, 2)
            a = F.scaled_dot_product_attention(heads, heads, heads)
            if write == "reshape":
                a.transpose(1, 2).reshape(2, 5, 64).add_(1)
            else:
                a.contiguous().mul_(3)
            return a

    inputs = (torch.randn(2, 5, 64).bfloat16(),)
    program = torch.export.export(Attention(), inputs)
    # A second rewrite would fuse the transposition that is inserted after attention into the operator.
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"unmasked_attention": 1})
    assert_same_results(rewritten, program, inputs)
