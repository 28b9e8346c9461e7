"""A driver for a GPU that this machine does not have, for tests of launches."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class AbsentHopper(DriverBase):
    """A driver for an H100 that this machine does not have: torch only reads the compile target from it."""

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
    """Launches are traced for an H100."""
    if torch.cuda.is_available():
        pytest.skip("compiles for a GPU that this machine does not have")
    triton.runtime.driver.set_active(AbsentHopper())
    # torch analyses a kernel with descriptors only if the GPU supports them.
    monkeypatch.setattr(torch.utils._triton, "has_triton_tensor_descriptor_host_tma", lambda: True)
    yield
    with suppress(RuntimeError):  # this machine has no driver
        triton.runtime.driver.reset_active()
