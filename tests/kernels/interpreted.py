"""Runs a file of tests in Triton's interpreter, in a separate process.

Triton selects the interpreter when a kernel is decorated, so that one process cannot use both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process uses the interpreter."""
DTYPES = pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float16, 1e-3), pytest.param(torch.bfloat16, 1.6e-2, marks=pytest.mark.slow)]
)
"""The dtypes of the activations with the largest error. fp16 has the narrower bound, and the kernels' source is the
same for both. The interpreter truncates fp32 to bf16, where a GPU rounds, which doubles the error."""
_ROOT = Path(__file__).parents[2]


def check_in_interpreter(file: str, passing: int, *, slow: bool = False) -> None:
    """Run the slow tests of ``file``, or the others, in the interpreter: none fails, and ``passing`` pass."""
    selected = ["-m", "slow" if slow else "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{passing} passed" in done.stdout
