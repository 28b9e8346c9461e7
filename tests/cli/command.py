"""Calls the command line from tests."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from et_cuda_passes.cli import app


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line with the error; no other error and no traceback may occur."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Run = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments], prog_name="et-cuda-passes")
        return Result(int(stop.value.code or 0), *capsys.readouterr())

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def called(*arguments: object) -> Result:
    """Run the command line in this process, in fixtures that several tests share."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments], prog_name="et-cuda-passes")
    return Result(int(stop.value.code or 0), out.getvalue(), err.getvalue())
