"""Programs that name a GPU: one with fewer multiprocessors lowers and is right, another architecture is refused."""

from pathlib import Path

import pytest
import torch
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.delegate import load
from et_cuda_passes.executorch.lower import lower as lower_files
from et_cuda_passes.executorch.lower import missing_requirement
from et_cuda_passes.kernels.device import compile_problem, present_gpu
from et_cuda_passes.kernels.gpus import GPUS
from tests.gpu.lowered import lower, quantized, relative

pytestmark = pytest.mark.gpu


def smaller() -> str:
    """The present architecture, with half of the multiprocessors."""
    gpu = present_gpu()
    assert gpu is not None
    return f"{gpu.name}:{gpu.processors // 2}"


@pytest.mark.parametrize("rows", [1, 333, None])
def test_program_for_fewer_multiprocessors_agrees_with_eager(rows: int | None, tmp_path: Path) -> None:
    model, x = quantized(512, 1536), torch.randn(rows or 16, 512).bfloat16()
    dynamic = None if rows else ({0: Dim("length", min=1, max=2048)},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    pte, partitioner = lower(program, tmp_path, gpu=smaller(), expect={"linear_int4": 2, "missed": 0})
    assert f"for {smaller()}; once lowered" in str(partitioner.report)
    run = load(pte)
    for count in (rows,) if rows else (1, 16, 17, 160, 333, 1100, 2048):
        x = torch.randn(count, 512).bfloat16()
        assert relative(run(x.cuda())[0], model(x)) < 8e-3, count


def test_packed_program_that_names_this_gpu_lowers(tmp_path: Path) -> None:
    model, x = quantized(256, 512), torch.randn(4, 256).bfloat16()
    packed, _ = ecp.rewrite(torch.export.export(model, (x,)), "cuda", gpu=smaller())
    assert missing_requirement("cuda", smaller()) is None
    files = lower_files(packed, "cuda", tmp_path, "model")
    assert relative(load(next(file for file in files if file.suffix == ".pte"))(x.cuda())[0], model(x)) < 8e-3


def test_operators_in_eager_agree_for_every_named_gpu() -> None:
    model, x = quantized(512, 1536), torch.randn(333, 512).bfloat16()
    exported = torch.export.export(model, (x,))
    for name in (*GPUS, smaller()):
        module = ecp.rewrite(exported, "cuda", gpu=name)[0].module().to("cuda")
        assert relative(module(x.cuda()), model(x)) < 8e-3, name


def test_another_architecture_is_refused_before_the_lowering(tmp_path: Path) -> None:
    other = next(name for name in GPUS if compile_problem(name))
    model, x = quantized(256, 512), torch.randn(4, 256).bfloat16()
    exported = torch.export.export(model, (x,))
    with pytest.raises(ValueError, match=f"names {other}, this machine has sm_.*: lower on a machine with {other}"):
        ecp.CudaPartitioner(gpu=other)
    packed, _ = ecp.rewrite(exported, "cuda", gpu=other)
    with pytest.raises(ValueError, match=f"names {other}, this machine has sm_"):
        lower_files(packed, "cuda", tmp_path / "out", "model")
    assert not (tmp_path / "out").exists()
    # AOTInductor alone meets the same error when it traces the operators.
    module = packed.module().to("cuda")
    with pytest.raises(Exception, match=f"names {other}, this machine has sm_"):
        torch._inductor.aot_compile(module, (x.cuda(),))
