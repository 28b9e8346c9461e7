"""Programs that mutate inputs of a match: the rewritten program reads them at the same place as before."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_rewrites
from tests.quantized import Quantized


class Written(nn.Module):
    """A linear whose bias is mutated between the linear and the operator after it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.q = Quantized(32, 64)
        self.form = form

    def forward(self, x: Tensor, bias: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        bias = bias * 1
        if self.form == "a view":
            y = torch.addmm(bias, x.view(6, 64), self.q.weight().t())
            bias.add_(5)
            return y.view(2, 3, 32), bias
        y = F.linear(x, self.q.weight(), bias)
        bias.add_(5)
        return (torch.relu(y) if self.form == "an activation" else y + r), bias


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
@pytest.mark.parametrize("form", ["a view", "an activation", "a sum"])
def test_bias_that_is_mutated_after_its_linear_keeps_its_value(form: str, target: str) -> None:
    inputs = (torch.randn(2, 3, 64).bfloat16(), torch.randn(32).bfloat16(), torch.randn(2, 3, 32).bfloat16())
    program = torch.export.export(Written(form), inputs)
    assert_rewrites(program, target, expect={"linear_int4": 1, "missed": 0})


class Cache(nn.Module):
    """Attention over a cache that the program mutates afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.randn(1, 2, 7, 32).bfloat16())
        self.register_buffer("v", torch.randn(1, 2, 7, 32).bfloat16())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, self.k, self.v)
        self.k.copy_(k)
        self.v.copy_(v)
        return y.transpose(1, 2)


def test_cache_that_is_mutated_after_attention_keeps_its_value() -> None:
    inputs = tuple(torch.randn(1, 2, rows, 32).bfloat16() for rows in (5, 7, 7))
    program, _ = assert_rewrites(torch.export.export(Cache(), inputs), "cuda", expect={"unmasked_attention": 1})
    assert program is not None


class Dropped(nn.Module):
    """In eval mode, dropout returns its input, so a mutation of its result mutates x."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.a, self.b = Quantized(64, 64), Quantized(64, 64)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        q = F.linear(x, self.a.weight())
        h = self.operation(x)
        h += 1
        return q @ F.linear(x, self.b.weight()).T


@pytest.mark.parametrize(
    "operation",
    [
        nn.Dropout(0.1),
        nn.AlphaDropout(0.1),
        lambda x: torch.einsum("ab->ba", x),
        lambda x: x.type_as(x),
        lambda x: x.sum_to_size(x.shape),
        torch.atleast_2d,
    ],
    ids=["dropout", "alpha dropout", "einsum", "type_as", "sum_to_size", "atleast_2d"],
)
def test_mutation_through_a_possible_alias_reaches_its_input(operation: Any) -> None:
    program = torch.export.export(Dropped(operation).eval(), (torch.randn(6, 64).bfloat16(),))
    assert_rewrites(program, "cuda", expect={"linear_int4": 2, "missed": 0})


class Growing(nn.Module):
    """A scale that is a parameter, and that the program doubles in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.q = Quantized(32, 64)
        self.scale = nn.Parameter(self.q.scale.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.torchao.dequantize_affine(
            self.q.data, (1, 32), self.scale, self.q.zero_point, torch.int8, -8, 7, output_dtype=torch.bfloat16
        )
        y = F.linear(x, weight)
        self.scale.mul_(2)
        return y


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_parameter_that_the_program_updates_is_not_packed(target: str, decompose: bool) -> None:
    program = torch.export.export(Growing(), (torch.randn(4, 64).bfloat16(),))
    program = program.run_decompositions({}) if decompose else program
    _, report = ecp.rewrite(program, target)
    assert report.counts()["missed"] == 1
