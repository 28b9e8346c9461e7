"""Weights that torchao exports without a dequantize: reported with the fix, and warned of where they stay wrapped."""

from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_misses

CONFIGS = {
    "fp8": (Float8WeightOnlyConfig(), "float8_e4m3fn"),
    "int8": (Int8WeightOnlyConfig(), "int8"),
}


def exported(config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, ExportedProgram, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype).eval()
    quantize_(model, config)
    x = torch.randn(3, 64, dtype=dtype)
    return model, torch.export.export(model, (x,)), x


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("scheme", CONFIGS)
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_a_weight_without_a_dequantize_is_missed_with_the_fix(scheme: str, target: str, decompose: bool) -> None:
    config, dtype = CONFIGS[scheme]
    _, program, _ = exported(config)
    program = program.run_decompositions({}) if decompose else program
    report = assert_misses(program, f"its weight is {dtype}, converted by the program itself", target)
    (outcome,) = report.outcomes
    assert outcome.fqn == "0.weight"
    assert "quantize with IntxWeightOnlyConfig" in str(outcome.reasons[0])


@pytest.mark.parametrize("scheme", CONFIGS)
def test_xnnpack_refuses_it_with_the_fix(scheme: str) -> None:
    _, program, _ = exported(CONFIGS[scheme][0], torch.float32)
    with pytest.raises(ValueError, match=r"0\.weight.*converted by the program itself.*IntxWeightOnlyConfig"):
        to_edge_transform_and_lower(program, partitioner=[ecp.XnnpackPartitioner()])


def test_the_stock_partitioner_computes_int8_weight_only_wrongly_and_says_nothing() -> None:
    """Why it is refused: should this fail, see whether it can be left as it is."""
    model, program, x = exported(Int8WeightOnlyConfig(), torch.float32)
    buffer = to_edge_transform_and_lower(program, partitioner=[Stock()]).to_executorch().buffer
    found = Runtime.get().load_program(buffer).load_method("forward").execute([x])[0]
    assert (found - model(x)).norm() / model(x).norm() > 1


def test_a_weight_that_stays_wrapped_is_warned_about() -> None:
    _, program, _ = exported(NVFP4WeightOnlyConfig())
    _, report = ecp.rewrite(program, "cuda")
    (warning,) = report.warnings
    assert "1 weights of type NVFP4Tensor (0.weight, ...) stand wrapped" in warning
    assert "IntxWeightOnlyConfig" in warning


class Table(nn.Module):
    """A mask and a table of bytes, which are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.uint8))
        self.register_buffer("table", torch.ones(9, 4, dtype=torch.int8))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return x * self.mask.to(x.dtype) + self.table[rows].to(x.dtype)


def test_a_mask_and_a_table_are_no_weights() -> None:
    program = torch.export.export(Table(), (torch.randn(4, 4), torch.tensor([0, 1, 2, 3])))
    for target in ecp.targets():
        _, report = ecp.rewrite(program, target)
        assert report.outcomes == []
