"""A bias that is no vector of out_features, on XNNPACK: taken behind the linear, whose delegate would misread it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.rules.bias_apart import BiasApart
from et_cuda_passes.testing import assert_rewrites

N, K, M = 32, 64, 5
SHAPES = [(1,), (M, N), (M, 1), (1, N)]
SCHEMES: dict[str, Any] = {
    "kept, 4 bits": Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),
    "kept, 8 bits": Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)),
    "folded": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
    "float": None,
}


class Wide(nn.Module):
    """``F.linear`` with a bias of any shape that broadcasts."""

    def __init__(self, shape: tuple[int, ...], scheme: str = "float") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(K, N, bias=False)
        self.bias = nn.Parameter(3 * torch.randn(shape))
        if SCHEMES[scheme] is not None:
            quantize_(self.inner, SCHEMES[scheme], filter_fn=lambda module, fqn: True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.bias)


def run(model: nn.Module, x: Tensor, partitioner: Any) -> Tensor:
    lowered = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[partitioner]).to_executorch()
    result: Tensor = Runtime.get().load_program(lowered.buffer).load_method("forward").execute([x])[0]
    return result


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_delegate_computes_what_the_model_does(shape: tuple[int, ...], scheme: str) -> None:
    model, x = Wide(shape, scheme).eval(), torch.randn(M, K)
    partitioner = ecp.XnnpackPartitioner(expect={"bias_apart": 1, "missed": 0})
    wanted = model(x)
    # The delegate rounds activations to 8 bits as the graph does, now and then one to the step beside it.
    assert (run(model, x, partitioner) - wanted).norm() < 2e-3 * wanted.norm()


def test_the_stock_partitioner_reads_past_such_a_bias_and_says_nothing() -> None:
    """Why the rule is there: should this fail, see whether it still has to be."""
    model, x = Wide((M, N)).eval(), torch.randn(M, K)
    wanted = model(x)
    assert not (run(model, x, Stock()) - wanted).norm() < 0.1 * wanted.norm()


def test_it_comes_first_in_a_list_that_lacks_it() -> None:
    model, x = Wide((M, N), "folded").eval(), torch.randn(M, K)
    partitioner = ecp.XnnpackPartitioner(passes=[ecp.FoldDequantize()])
    wanted = model(x)
    assert (run(model, x, partitioner) - wanted).norm() < 1e-5 * wanted.norm()
    assert partitioner.report.passes == ["bias_apart", "fold_dequantize"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_vector_is_left_where_it_is_and_nothing_is_said(scheme: str) -> None:
    model = Wide((N,), scheme).eval()
    _, report = ecp.rewrite(torch.export.export(model, (torch.randn(M, K),)), "xnnpack")
    assert report.applied.get("bias_apart", 0) == 0
    assert "bias_apart" not in str(report) + str(report.rejected)


def test_numbers_and_a_second_rewrite() -> None:
    program = torch.export.export(Wide((M, 1)).eval(), (torch.randn(M, K),))
    assert_rewrites(program, "xnnpack", [BiasApart()], expect={"bias_apart": 1}, rtol=1e-6)
