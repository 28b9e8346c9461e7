"""A stand-in for a GPU, for tests of what would be compiled for one."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Absent(DriverBase):
    """Stands for the GPU that is not here: torch only asks it what to compile for."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        return None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("asks what would be compiled for a GPU that is not here")
    triton.runtime.driver.set_active(Absent())
    # torch reads a descriptor's kernel only where a GPU is that has them.
    monkeypatch.setattr(torch.utils._triton, "has_triton_tensor_descriptor_host_tma", lambda: True)
    yield
    with suppress(RuntimeError):  # there is no driver to go back to
        triton.runtime.driver.reset_active()
