"""Weights in the forms of ExecuTorch's CUDA backend: nested scales, and its products with int4 and int8 weights.

Its package changes what ``IntxWeightOnlyConfig(torch.int8)`` exports, for the whole process. So these tests run in a
process of their own.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.ops import DEQUANTIZE_INT4_NESTED
from tests.processes import outcome, run_pytest

APART = "ETCP_TEST_CUDA_FORMS"
HERE = os.environ.get(APART) == "1"
GROUP = 32
TARGETS = {"cuda": "linear_int4", "cpu": "linear_int4", "metal": "linear_int4", "xnnpack": "fold_dequantize"}

if HERE:
    import executorch.backends.cuda.quantize_op_dispatch  # noqa: F401  (registers the products)
    from executorch.backends.cuda.coalesced_int4_tensor import CudaCoalescedInt4Tensor
    from executorch.extension.llm.export.int4 import ExportableInt4Tensor

apart = pytest.mark.skipif(not HERE, reason="runs in a process of its own")


@pytest.mark.skipif(HERE, reason="this is that process")
def test_forms_of_the_cuda_backend_pass_in_their_own_process(tmp_path: Path) -> None:
    code, said = outcome(run_pytest, {APART: "1"}, "-q", "-p", "no:cacheprovider", __file__, folder=tmp_path)
    assert code == 0, said[-4000:]
    assert "27 passed" in said


def exported(model: nn.Module, *shape: int) -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return torch.export.export(model, (x,)), x


def off(program: ExportedProgram, x: Tensor, dense: Tensor, bias: Tensor) -> float:
    """The relative error against a product with the weight."""
    found = program.module()(x).detach()
    wanted = F.linear(x.double(), dense.double(), bias.detach().double())
    return float((found.double() - wanted).norm() / wanted.norm())


def nested(n: int = 48, k: int = 512) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n)).bfloat16().eval()
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP), mapping_type=MappingType.ASYMMETRIC))
    packed = ExportableInt4Tensor.from_intx_unpacked_to_int8_tensor(model[0].weight)
    weight = CudaCoalescedInt4Tensor.from_exportable_int4_tensor(packed)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


@apart
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(("rows", "rule"), [(2, "unpack_linear"), (6, "restore_int4_nested")])
@pytest.mark.parametrize("target", TARGETS)
def test_nested_scales_are_packed_for_the_target(target: str, rows: int, rule: str, decomposed: bool) -> None:
    """With up to four rows the program has a product of its own, else arithmetic."""
    model = nested()
    dense = model[0].weight.dequantize(torch.float32)
    program, x = exported(model, rows, 512)
    program = program.run_decompositions({}) if decomposed else program
    rewritten, report = ecp.rewrite(program, target, expect={rule: 1, TARGETS[target]: 1, "missed": 0})
    assert report.outcomes[0].detail.startswith("int4 group 32 packed for int4_plain_mm -> ")
    assert off(rewritten, x, dense, model[0].bias) < 6e-3
    assert not [name for name in rewritten.state_dict if "parametrizations" in name]


@apart
def test_decode_and_prefill_share_the_packed_constant() -> None:
    model, pool = nested(), ConstantCache()
    packed = []
    for rows in (1, 16):
        program, _ = ecp.rewrite(exported(model, rows, 512)[0], "cuda", pool=pool)
        packed.append(program.state_dict["0.weight.packed"])
    assert packed[0].data_ptr() == packed[1].data_ptr()


@apart
def test_nested_scales_of_a_dynamic_length_are_packed() -> None:
    model = nested()
    x = torch.randn(9, 512).bfloat16()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", min=5, max=512)},))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 1, "missed": 0})
    dense = model[0].weight.dequantize(torch.float32)
    assert off(rewritten, torch.randn(33, 512).bfloat16(), dense, model[0].bias) < 6e-3


@apart
def test_dequantize_computes_the_weight() -> None:
    weight = nested()[0].weight
    parts = (weight.qdata, weight.scale, weight.scale_step, weight.zero_point, weight.zero_point_step)
    assert torch.equal(DEQUANTIZE_INT4_NESTED(*parts, GROUP, torch.float32), weight.dequantize(torch.float32))


@apart
@pytest.mark.parametrize("granularity", [PerGroup(64), PerAxis(0)], ids=["group", "axis"])
@pytest.mark.parametrize(("rows", "rule"), [(2, "unpack_linear"), (6, "restore_int8")])
@pytest.mark.parametrize("target", ["cuda", "xnnpack"])
def test_int8_weight_is_packed_for_the_target(target: str, rows: int, rule: str, granularity: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 48)).bfloat16().eval()
    quantize_(model, IntxWeightOnlyConfig(torch.int8, granularity, mapping_type=MappingType.ASYMMETRIC))
    dense = model[0].weight.dequantize()
    program, x = exported(model, rows, 512)
    other = {"cuda": "linear_int8", "xnnpack": "fold_dequantize"}[target]
    rewritten, _ = ecp.rewrite(program, target, expect={rule: 1, other: 1, "missed": 0})
    assert off(rewritten, x, dense, model[0].bias) < 6e-3
