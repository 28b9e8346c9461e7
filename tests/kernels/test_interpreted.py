"""The kernels in Triton's interpreter, in a separate process: see ``interpreted.py``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.interpreted import INTERPRETED

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in Path(__file__).parent.glob("test_*_interpreted.py"))


@pytest.mark.compiled
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("selected", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_pass_in_the_interpreter(selected: str) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", selected, *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # None is skipped, and no file lacks tests.
    assert re.search(r"^=+ \d+ passed(, \d+ deselected)?(, \d+ warnings?)? in ", done.stdout, re.MULTILINE), done.stdout
    assert {line.partition("::")[0] for line in done.stdout.splitlines() if " PASSED" in line} == {*FILES}
