"""The files of the demo's steps, and the display of their progress."""

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
"""A function that creates the file or folder at a path."""

PACKAGES = ("torch", "torchao", "executorch", "triton", "transformers")
ROOT = Path(__file__).parent.parent


class Screen:
    """Prints a line for each finished step, and under it a bar for the current one."""

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
        """Display a running step; the yielded function counts one of `total`. Without a total the bar has no end."""
        task = self._progress.add_task(title, total=total)
        begin = time.perf_counter()
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)
        self.done(title, f"{time.perf_counter() - begin:.1f} s")

    def done(self, title: str, how: str) -> None:
        """Print that a step is done; `how` is its time, or that its file was reused."""
        self._progress.advance(self._all)
        self.console.print(f"  {title:<64} {how:>10}", highlight=False, markup=False)


class Workspace:
    """A folder of finished files. An existing file was written by the same code with the same versions.

    A step writes to a temporary name and then renames, so that an interrupted step leaves no file that looks finished.
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
        """A workspace inside this one, for files that also depend on the code of et_cuda_passes."""
        return Workspace(self.folder / f"rewritten-{_key([], 'et_cuda_passes')}", self._screen)

    def make(self, name: str, title: str, build: Build) -> Path:
        """The path of the file or folder `name`, which `build` creates if it does not exist."""
        path = self.folder / name
        if path.exists():
            self._screen.done(title, "reused")
            return path
        # The suffix stays, since torch rejects a package without the suffix .pt2.
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
    """The versions and the CPU on which files depend; a compiled file runs only on a CPU with the same instructions."""
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    return [*versions, platform.python_version(), platform.machine(), torch.backends.cpu.get_cpu_capability()]


def _key(facts: list[str], package: str) -> str:
    digest = hashlib.sha256("\n".join(facts).encode())
    for file in sorted((ROOT / package).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
