"""The GPU that a program is compiled for, on machines with several GPUs and with none."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from et_cuda_passes.kernels.attention_launch import blocks
from et_cuda_passes.kernels.device import (
    SHARED_MEMORY_LIMIT,
    compile_problem,
    gpu_for,
    gpu_of,
    gpu_requirement,
    named_gpu,
    needed_limit,
    present_gpu,
)
from et_cuda_passes.kernels.gpus import GPUS, HOPPER, gpu_arch

CUDA = torch.device("cuda")


def has_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], processors: int = 132) -> None:
    """Let torch report this GPU; nothing here runs on it."""
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.fixture
def traced() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, 32)


def test_present_gpu_has_its_own_number_of_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch, (9, 0), 114)
    assert str(present_gpu()) == str(gpu_of(CUDA)) == "sm_90:114"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_machine_without_a_gpu_compiles_for_hopper_or_the_named_one(traced: torch.Tensor) -> None:
    assert present_gpu() is None and gpu_of(CUDA) == HOPPER
    assert gpu_for(traced, "") == HOPPER
    assert gpu_for(traced, "sm_89:76") == gpu_arch("sm_89:76")
    assert compile_problem("sm_89") is None


def test_named_gpu_of_the_same_architecture_is_compiled_for(
    monkeypatch: pytest.MonkeyPatch, traced: torch.Tensor
) -> None:
    has_gpu(monkeypatch, (9, 0))
    assert gpu_for(traced, "sm_90:66").processors == 66
    assert gpu_for(traced, "").processors == 132
    assert compile_problem("sm_90:66") is None and gpu_requirement("sm_90:66") is None


def test_named_gpu_that_runs_code_of_this_one_is_compiled_for(
    monkeypatch: pytest.MonkeyPatch, traced: torch.Tensor
) -> None:
    has_gpu(monkeypatch, (8, 0), 108)
    assert gpu_for(traced, "sm_89") == GPUS["sm_89"]


@pytest.mark.parametrize("capability", [(9, 0), (8, 9), (12, 0)])
def test_named_gpu_of_another_architecture_is_refused_when_compiling(
    monkeypatch: pytest.MonkeyPatch, traced: torch.Tensor, capability: tuple[int, int]
) -> None:
    has_gpu(monkeypatch, capability)
    present = "sm_{}{}".format(*capability)
    wanted = f"^the program names sm_86, this machine has {present}: lower on a machine with sm_86 or sm_80$"
    with pytest.raises(ValueError, match=wanted):
        gpu_for(traced, "sm_86")
    assert gpu_requirement("sm_86") == f"a GPU that is sm_86 or sm_80 (this machine has {present})"


def test_eager_launch_for_another_architecture_has_the_tilings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch, (9, 0))
    assert gpu_for(torch.empty(1, 32), "sm_89") == HOPPER


def test_limit_of_shared_memory_holds_for_named_and_present_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_MEMORY_LIMIT, "101376")
    assert named_gpu("sm_90").program_memory == 101376
    has_gpu(monkeypatch, (8, 0), 108)
    assert gpu_of(CUDA).program_memory == 101376
    monkeypatch.setenv(SHARED_MEMORY_LIMIT, "1000000")
    assert named_gpu("sm_90") == HOPPER
    assert str(named_gpu("sm_90:66")) == "sm_90:66"


@pytest.mark.parametrize("text", ["", "0", "-1", "99k"])
def test_limit_of_shared_memory_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(SHARED_MEMORY_LIMIT, text)
    with pytest.raises(ValueError, match=f"{SHARED_MEMORY_LIMIT}={text}: it is a number of bytes"):
        named_gpu("sm_90")


def test_lowering_for_less_shared_memory_needs_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available() or needed_limit("sm_86") is None
    has_gpu(monkeypatch, (8, 0), 108)
    assert needed_limit("sm_80") is None
    assert needed_limit("sm_86") == GPUS["sm_86"].program_memory
    monkeypatch.setenv(SHARED_MEMORY_LIMIT, "65536")
    assert needed_limit("sm_86") is None


def test_attention_follows_the_limit_of_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_MEMORY_LIMIT, str(GPUS["sm_86"].program_memory))
    for head_dim in (64, 128, 256):
        assert blocks(named_gpu("sm_90"), head_dim, 1000) == blocks(GPUS["sm_86"], head_dim, 1000)
    monkeypatch.setenv(SHARED_MEMORY_LIMIT, "65536")
    with pytest.raises(ValueError, match=r"attention needs up to 101376 bytes .* allows 65536: raise it"):
        blocks(named_gpu("sm_90"), 64, 1000)
