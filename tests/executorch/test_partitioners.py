"""The partitioners: they replace the stock ones, run a pass list in ExecuTorch's hook, and keep a report."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executorch.backends.apple.metal.metal_partitioner import MetalPartitioner as StockMetal
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as StockCuda
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as StockXnnpack
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.targets.gpu import gpu_named_in
from et_cuda_passes.testing import Quantized
from tests.helpers import NO_DEVICE, names

AOTI = [(ecp.CudaPartitioner, StockCuda, "cuda"), (ecp.MetalPartitioner, StockMetal, "metal")]
ALL = [*AOTI, (ecp.XnnpackPartitioner, StockXnnpack, "xnnpack")]


def program(seed: int = 0, rows: int = 2) -> ExportedProgram:
    return torch.export.export(Quantized(16, 64, seed=seed), (torch.randn(rows, 64).bfloat16(),))


def specs(partitioner: Any) -> dict[str, bytes]:
    return {spec.key: spec.value for spec in partitioner.delegation_spec.compile_specs}


@pytest.mark.parametrize(("ours", "stock", "target"), ALL)
def test_partitioner_is_an_instance_of_the_stock_class(ours: Any, stock: type, target: str) -> None:
    partitioner = ours()
    assert isinstance(partitioner, stock)
    assert partitioner.delegation_spec.backend_id == (stock() if target == "xnnpack" else stock([])).delegation_spec[0]


@pytest.mark.parametrize(("ours", "stock", "target"), AOTI)
def test_compile_specs_pass_through_and_the_method_name_is_supplied(ours: Any, stock: type, target: str) -> None:
    given = [CompileSpec("low_memory_mode", b"ON")]
    assert specs(ours(given)).items() >= {"low_memory_mode": b"ON", "method_name": b"forward"}.items()
    assert len(given) == 1
    assert specs(ours([CompileSpec("method_name", b"decode")]))["method_name"] == b"decode"


@pytest.mark.parametrize(("ours", "stock", "target"), ALL)
def test_hook_rewrites_a_copy_and_keeps_the_report(ours: Any, stock: type, target: str) -> None:
    partitioner, before = ours(), program()
    text, held = str(before.graph), {name: value.clone() for name, value in before.state_dict.items()}
    after = partitioner.transform_for_pre_decomposition(before)
    wanted, _ = ecp.rewrite(before, target)
    assert names(after) == names(wanted)
    assert partitioner.report.counts()["rewritten"] == 1
    assert partitioner.report.target == target
    assert str(before.graph) == text
    assert all(torch.equal(before.state_dict[name], value) for name, value in held.items())


def test_hook_of_a_partitioner_with_a_gpu_names_it() -> None:
    partitioner = ecp.CudaPartitioner(gpu="sm_89:76")
    after = partitioner.transform_for_pre_decomposition(program())
    assert gpu_named_in(after) == "sm_89:76"
    assert "tilings predicted, not measured, for sm_89:76" in str(partitioner.report)
    with pytest.raises(ValueError, match="'h100' names no known GPU"):
        ecp.CudaPartitioner(gpu="h100")


def test_partitioner_refuses_a_gpu_that_this_machine_cannot_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=8, minor=0, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    with pytest.raises(ValueError, match="names sm_90, this machine has sm_80: lower on a machine with sm_90$"):
        ecp.CudaPartitioner(gpu="sm_90")
    with pytest.raises(ValueError, match="set the environment variable ET_CUDA_TARGET_SMEM_BYTES=101376"):
        ecp.CudaPartitioner(gpu="sm_89")
    monkeypatch.setenv("ET_CUDA_TARGET_SMEM_BYTES", "101376")
    ecp.CudaPartitioner(gpu="sm_89")


@pytest.mark.parametrize(("ours", "stock", "target"), ALL)
def test_empty_pass_list_is_the_stock_partitioner(ours: Any, stock: type, target: str) -> None:
    partitioner, before = ours(passes=[]), program()
    if target == "xnnpack":
        with pytest.raises(ValueError, match="XNNPACK cannot compute"):
            partitioner.transform_for_pre_decomposition(before)
        return
    assert names(partitioner.transform_for_pre_decomposition(before)) == names(before)
    assert partitioner.report.counts() == {"rewritten": 0, "kept": 0, "missed": 1}


@pytest.mark.parametrize(("ours", "stock", "target"), ALL)
def test_invalid_pass_list_is_rejected_by_the_constructor(ours: Any, stock: type, target: str) -> None:
    with pytest.raises(TypeError, match="accepted are rules"):
        ours(passes=[42])
    with pytest.raises(TypeError, match=r"pass an instance, LinearInt4\(\)"):
        ours(passes=[ecp.LinearInt4])
    with pytest.raises(ValueError, match="two passes are named 'linear_int4'"):
        ours(passes=[ecp.LinearInt4(), ecp.LinearInt4(cast_to_bf16=True)])


@pytest.mark.parametrize(("ours", "stock", "target"), ALL)
def test_invalid_expectation_is_rejected_by_the_constructor(ours: Any, stock: type, target: str) -> None:
    with pytest.raises(TypeError, match="expect must map names to counts"):
        ours(expect=["missed"])
    with pytest.raises(ValueError, match="expect contains 'linear_int3'"):
        ours(expect={"linear_int3": 1})


def test_report_before_a_lowering_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="give this partitioner to to_edge_transform_and_lower first"):
        _ = ecp.CudaPartitioner().report


def test_unmet_expectation_stops_the_lowering() -> None:
    partitioner = ecp.CudaPartitioner(expect={"linear_int4": 2})
    with pytest.raises(ecp.ExpectationError, match="linear_int4: expected 2, got 1"):
        to_edge_transform_and_lower(program(), partitioner=[partitioner])
    assert partitioner.report.counts()["linear_int4"] == 1


def test_several_methods_share_one_report_and_one_packed_weight() -> None:
    partitioner = ecp.CudaPartitioner()
    model = Quantized(16, 64)
    methods = [torch.export.export(model, (torch.randn(rows, 64).bfloat16(),)) for rows in (2, 8)]
    first, second = map(partitioner.transform_for_pre_decomposition, methods)
    assert len(partitioner.reports) == 2
    assert partitioner.report.counts()["linear_int4"] == 2
    assert first.state_dict["data.packed"].data_ptr() == second.state_dict["data.packed"].data_ptr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the lowering goes on; tests/gpu follows it")
def test_operator_passes_the_edge_verifier_up_to_the_missing_device() -> None:
    """The verifier rejects ``aten._weight_int4pack_mm`` itself, with a SpecViolationError."""
    partitioner = ecp.CudaPartitioner()
    with pytest.raises(Exception, match=NO_DEVICE) as error:
        to_edge_transform_and_lower(program(), partitioner=[partitioner])
    assert "SpecViolation" not in type(error.value).__name__
    assert partitioner.report.counts()["linear_int4"] == 1


def test_another_delegate_may_come_first() -> None:
    """XNNPACK comes first: it folds the weight and claims the linear, so the second finds nothing."""
    first, second = ecp.XnnpackPartitioner(), ecp.CudaPartitioner()
    model = Quantized(16, 64, dtype=torch.float32)
    exported = torch.export.export(model, (torch.randn(2, 64),))
    edge = to_edge_transform_and_lower(exported, partitioner=[first, second])
    assert first.report.counts()["fold_dequantize"] == 1
    assert second.report.outcomes == []
    assert "XnnpackBackend" in str([m.backend_id for m in edge.exported_program().graph_module.children()])


def test_partitioner_of_another_target_rewrites_for_it() -> None:
    """The mixin before a stock partitioner; here XNNPACK's, as that of a backend of one's own."""
    folded = ecp.Target("folded", "float weights", kernels={}, passes=lambda: [ecp.FoldDequantize()])

    class Folded(ecp.RewritingPartitioner, StockXnnpack):  # type: ignore[misc]
        rewrite_target = folded

    partitioner = Folded(per_op_mode=True, expect={"fold_dequantize": 1})
    assert partitioner.per_op_mode
    before = torch.export.export(Quantized(16, 64, dtype=torch.float32), (torch.randn(2, 64),))
    lowered = to_edge_transform_and_lower(before, partitioner=[partitioner])
    assert partitioner.report.target == "folded"
    calls = [node.name for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    assert any(name.startswith("executorch_call_delegate") for name in calls)
    with pytest.raises(ecp.ExpectationError, match="fold_dequantize: expected 2, got 1"):
        Folded(expect={"fold_dequantize": 2}).transform_for_pre_decomposition(before)


def test_partitioner_of_a_variant_of_cuda_has_its_passes() -> None:
    class Mine(ecp.CudaPartitioner):
        rewrite_target = dataclasses.replace(ecp.get_target("cuda"), name="mine", passes=lambda: [ecp.LinearInt4()])

    partitioner = Mine()
    partitioner.transform_for_pre_decomposition(program())
    assert (partitioner.report.target, partitioner.report.passes) == ("mine", ["linear_int4", "replace_split"])
