"""The files that the demo's steps leave, and the screen that shows a step at work."""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Build = Callable[[Path], object]
"""Makes what belongs at a path: a file, or a folder."""

PACKAGES = ("torch", "torchao", "executorch", "triton", "transformers")
ROOT = Path(__file__).parent.parent


class Screen:
    """One line for each step that is done, under it a bar for the one at work."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("steps", total=steps)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """A step at work; what it yields counts one of `total`. Without a total the bar only shows that it goes on."""
        task = self._progress.add_task(title, total=total)
        begin = time.perf_counter()
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)
        self.done(title, f"{time.perf_counter() - begin:.1f} s")

    def done(self, title: str, how: str) -> None:
        """A step is done: `how` is the time it took, or that there was nothing to do."""
        self._progress.advance(self._all)
        self.console.print(f"  {title:<64} {how:>10}", highlight=False, markup=False)


class Workspace:
    """A folder of finished files. One that is there was made by the same code from the same versions.

    A step writes beside its file's name and renames, so that an interrupted one leaves nothing that looks finished.
    """

    def __init__(self, folder: Path, screen: Screen) -> None:
        self.folder = folder
        self._screen = screen

    @classmethod
    def for_model(cls, folder: Path, model: str, screen: Screen, fresh: bool) -> Workspace:
        """The workspace in `folder` for this model, this code and these versions; emptied first if `fresh`."""
        workspace = cls(folder / f"{model}-{_key(_environment(), 'demo')}", screen)
        if fresh:
            shutil.rmtree(workspace.folder, ignore_errors=True)
        return workspace

    def after_rewriting(self) -> Workspace:
        """A workspace inside for what also depends on the code of et_cuda_passes."""
        return Workspace(self.folder / f"rewritten-{_key([], 'et_cuda_passes')}", self._screen)

    def make(self, name: str, title: str, build: Build) -> Path:
        """The path of the file or folder `name`, after `build` has made it if it was not there."""
        path = self.folder / name
        if path.exists():
            self._screen.done(title, "reused")
            return path
        # The suffix stays: torch refuses a package that is not called .pt2.
        partial = path.with_name(f"partial-{name}")
        if partial.is_dir():
            shutil.rmtree(partial)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._screen.step(title):
            build(partial)
            partial.replace(path)
        return path


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _environment() -> list[str]:
    """What decides the files besides the code; a compiled one runs only on a CPU with the same instructions."""
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    return [*versions, platform.python_version(), platform.machine(), torch.backends.cpu.get_cpu_capability()]


def _key(facts: list[str], package: str) -> str:
    digest = hashlib.sha256("\n".join(facts).encode())
    for file in sorted((ROOT / package).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
