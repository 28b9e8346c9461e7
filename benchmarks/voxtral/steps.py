"""Runs steps in separate processes, with their results in a folder; finished steps are not repeated."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: name of the step and of its result's file.
        command: the command; it writes the result with :meth:`Results.write` and exits with 0.
        settings: the settings on which the result depends; a result with other settings is ignored.
        needs: steps whose results it reads.
        parallel: whether it may run beside other parallel steps; else it runs alone.
    """

    name: str
    command: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple["Step", ...] = ()
    parallel: bool = False


class Results:
    """The results in a folder: ``<step>.json``, beside the step's ``<step>.log``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result; its file is complete or absent."""
        path = self._path(name)
        unfinished = path.with_suffix(".unfinished")
        content = {"settings": dict(settings), "finished": time.time(), **result}
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def read(self, name: str) -> dict[str, Any] | None:
        """A result; None if its file is missing or damaged."""
        try:
            content = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return content if isinstance(content, dict) else None

    def is_done(self, step: Step) -> bool:
        """Whether ``step`` has a result with these settings that is newer than its needs, which are done too."""
        result = self.read(step.name)
        if result is None or result.get("settings") != dict(step.settings) or not all(map(self.is_done, step.needs)):
            return False
        return all(self._finished(need.name) <= result["finished"] for need in step.needs)

    def log(self, name: str) -> Path:
        """The file for a step's output."""
        return self.folder / f"{name}.log"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _finished(self, name: str) -> float:
        result = self.read(name)
        return float(result["finished"]) if result else float("inf")


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    began: float


class Runner:
    """Runs steps in their order.

    Args:
        results: folder of results and logs.
        environment: returns the environment of a step's process, for the step and the number of parallel steps.
        jobs: parallel steps at a time.
        deadline_s: seconds after which no step is started; running steps are waited for.
        limit_s: seconds after which a step is ended.
        say: prints a line.
    """

    def __init__(
        self,
        results: Results,
        environment: Callable[[Step, int], Mapping[str, str]] = lambda step, jobs: os.environ,
        jobs: int = 1,
        deadline_s: float | None = None,
        limit_s: float = 480,
        say: Callable[[str], None] = print,
    ) -> None:
        self._results, self._environment, self._jobs, self._say = results, environment, jobs, say
        self._deadline_s = float("inf") if deadline_s is None else deadline_s
        self._limit_s = limit_s
        self._began = time.monotonic()
        self._running: list[_Running] = []
        self._failed: set[str] = set()

    def run(self, steps: Sequence[Step]) -> bool:
        """Do what is not done.

        Returns:
            Whether every step is done now.
        """
        pending = [step for step in steps if not self._results.is_done(step)]
        for step in steps:
            if step not in pending:
                self._say(f"{step.name}: done before")
        try:
            while pending or self._running:
                self._reap()
                pending = self._drop_hopeless(pending)
                if pending and time.monotonic() - self._began >= self._deadline_s:
                    self._say(f"past the deadline, not started: {', '.join(step.name for step in pending)}")
                    pending = []
                elif startable := next((step for step in pending if self._may_start(step)), None):
                    pending.remove(startable)
                    self._start(startable)
                elif self._running:
                    time.sleep(0.1)
                elif pending:
                    raise ValueError(f"{pending[0].name} needs steps that are not among those to do")
        finally:
            for running in self._running:
                self._end(running)
        return all(self._results.is_done(step) for step in steps)

    def _may_start(self, step: Step) -> bool:
        if not all(map(self._results.is_done, step.needs)):
            return False
        if not self._running:
            return True
        return step.parallel and len(self._running) < self._jobs and all(r.step.parallel for r in self._running)

    def _drop_hopeless(self, pending: list[Step]) -> list[Step]:
        """The steps without those that need a failed one."""
        kept = []
        for step in pending:
            if lost := [need.name for need in step.needs if need.name in self._failed]:
                self._failed.add(step.name)
                self._say(f"{step.name}: skipped, it needs {', '.join(lost)}")
            else:
                kept.append(step)
        return kept

    def _start(self, step: Step) -> None:
        self._say(f"{time.monotonic() - self._began:6.0f} s  {step.name} begins")
        with open(self._results.log(step.name), "wb") as log:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._environment(step, self._jobs if step.parallel else 1)),
                process_group=0,
            )
        self._running.append(_Running(step, process, time.monotonic()))

    def _reap(self) -> None:
        for running in list(self._running):
            took = time.monotonic() - running.began
            code = running.process.poll()
            if code is None and took > self._limit_s:
                self._end(running)
                self._fail(running.step, f"ended after {took:.0f} s, the limit")
            elif code is None:
                continue
            elif code == 0 and self._results.is_done(running.step):
                self._say(f"{time.monotonic() - self._began:6.0f} s  {running.step.name} is done, {took:.0f} s")
            else:
                self._fail(running.step, f"failed ({code}) after {took:.0f} s")
            self._running.remove(running)

    def _fail(self, step: Step, what: str) -> None:
        self._failed.add(step.name)
        log = self._results.log(step.name)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        self._say(f"{step.name}: {what}; {log} ends with\n" + "\n".join(f"    {line[:300]}" for line in lines))

    @staticmethod
    def _end(running: _Running) -> None:
        """End a step and its child processes, mostly compilers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
