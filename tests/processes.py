"""Commands and functions in processes of their own, which are forked from one that has imported everything.

So a command takes as long as its work, and fifty of them can be killed in a minute or two. A process has its own
arguments, variables, working directory, output and signals, and runs the ``main`` of the console script. It is no test
of imports: those that happen in a new interpreter, and what they print, need ``subprocess``.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TextIO

from tests.cli.command import Result

ROOT = Path(__file__).parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])
PATIENCE = 120.0


def process(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process that calls ``function``, which it imports from its module."""
    with chdir(ROOT):  # where the server finds what it is to import
        forkserver.ensure_running()
    started = _CONTEXT.Process(target=function, args=arguments)
    started.start()
    return started


def outcome(function: Callable[..., None], *arguments: Any, folder: Path) -> tuple[int, str]:
    """The exit code and the output of a process that calls ``function``; an exception is 1."""
    said = folder / "said.txt"
    started = process(_with_output_in, said.absolute(), function, *arguments)
    started.join(PATIENCE)
    if started.exitcode is None:
        started.kill()
        raise AssertionError(f"it runs for more than {PATIENCE:.0f} s: {said.read_text()}")
    return started.exitcode, said.read_text()


def _with_output_in(said: Path, function: Callable[..., None], *arguments: Any) -> None:
    _redirect(said, sys.stdout, sys.stderr)
    function(*arguments)


def _redirect(path: Path, *streams: TextIO) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in streams:
        os.dup2(file, stream.fileno())
    os.close(file)


def run_pytest(variables: Mapping[str, str], *arguments: str) -> None:
    """Run tests in this process; ``variables`` are added to its environment."""
    import pytest

    os.environ.update(variables)
    raise SystemExit(pytest.main([*arguments]))


class Command:
    """A command that runs.

    Args:
        arguments: of ``et-cuda-passes``.
        folder: gets its output, and its temporary files in a folder "temporary".
        memory: the limit of its address space, in bytes beyond what it has at its start.
        cwd: its working directory; by default that of this process.
        variables: its environment; by default that of this process.
    """

    def __init__(
        self,
        arguments: tuple[object, ...],
        folder: Path,
        memory: int | None = None,
        *,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        texts = [str(each) for each in arguments]
        environment = {**(os.environ if variables is None else variables), "TMPDIR": str(self.temporary)}
        where = (cwd or Path.cwd()).absolute()
        self._process = process(_run, texts, self._out.absolute(), self._err.absolute(), where, environment, memory)
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


def _run(
    arguments: list[str], out: Path, err: Path, cwd: Path, environment: dict[str, str], memory: int | None
) -> None:
    os.setpgid(0, 0)
    # A test run in the background of a shell ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _redirect(out, sys.stdout)
    _redirect(err, sys.stderr)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    os.chdir(cwd)
    # The path of a new interpreter that runs the package by -m.
    roots = (sys.prefix, sys.base_prefix)
    installed = [path for path in sys.path if any(map(Path(path).is_relative_to, roots))]
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(cwd), *given, *installed, str(ROOT)]
    sys.argv = ["et-cuda-passes", *arguments]
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from tests.preload import main

    try:
        main()
    except KeyboardInterrupt:  # it came before the command handles signals, or after
        raise SystemExit(130) from None


def finished(
    *arguments: object,
    folder: Path,
    memory: int | None = None,
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Result:
    """The result of a command."""
    return Command(arguments, folder, memory, cwd=cwd, variables=variables).wait()
