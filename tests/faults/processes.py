"""The command line in processes that can be killed. They are forked from one that has imported everything.

So a command takes as long as its work, and fifty of them can be killed in a minute or two.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.cli.command import Result

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.preload"])
PATIENCE = 120.0


class Command:
    """A command that runs.

    Args:
        arguments: of ``et-cuda-passes``.
        folder: gets its output, and its temporary files in a folder "temporary".
        memory: the limit of its address space, in bytes beyond what it has at its start.
    """

    def __init__(self, arguments: tuple[object, ...], folder: Path, memory: int | None = None) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        texts = [str(each) for each in arguments]
        self._process = _CONTEXT.Process(target=_run, args=(texts, self._out, self._err, self.temporary, memory))
        self._process.start()
        self.began = time.monotonic()

    def wait(self) -> Result:
        """Wait until it ends. The code is negative if a signal killed it."""
        self._process.join(PATIENCE)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"it runs for more than {PATIENCE:.0f} s: {self._err.read_text()}")
        return Result(code, self._out.read_text(), self._err.read_text())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or the command ends."""
        while not condition() and self._process.is_alive():
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the command has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it with all that it started."""
        if self._process.is_alive():
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(self.pid, signal.SIGKILL)
            self.send(signal.SIGKILL)
        self._process.join()

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""


def _run(arguments: list[str], out: Path, err: Path, temporary: Path, memory: int | None) -> None:
    os.setpgid(0, 0)
    # A test run in the background of a shell ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from tests.faults.preload import app

    try:
        app(arguments, prog_name="et-cuda-passes")
    except KeyboardInterrupt:  # it came before the command handles signals, or after
        raise SystemExit(130) from None


def finished(*arguments: object, folder: Path, memory: int | None = None) -> Result:
    """The result of a command."""
    return Command(arguments, folder, memory).wait()
