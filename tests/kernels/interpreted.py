"""Runs a file of tests in Triton's interpreter, in a separate process.

Triton selects the interpreter when a kernel is decorated, so that one process cannot use both.
"""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process uses the interpreter."""
_ROOT = Path(__file__).parents[2]


def check_in_interpreter(file: str, passing: int) -> None:
    """Run the tests of ``file`` in the interpreter: none fails, and ``passing`` pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{passing} passed" in done.stdout
