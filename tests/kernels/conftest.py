"""Fixtures of the kernels' tests."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
import triton

from tests.kernels.launched import AbsentHopper


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
