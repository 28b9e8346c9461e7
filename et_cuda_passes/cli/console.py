"""Output of the commands beside their results: progress and errors on stderr, and the list of written files."""

import json
import logging
import os
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from et_cuda_passes._versions import untested_versions
from et_cuda_passes.cli.documents import Document
from et_cuda_passes.plugins import PluginError, PluginWarning
from et_cuda_passes.shortage import find_shortage

# --help does not import torch.
if TYPE_CHECKING:
    from et_cuda_passes.graph.report import Report


class UsageError(Exception):
    """An argument is invalid; exits with 2."""


class LoweringError(Exception):
    """The lowering failed; exits with 1."""


class RunError(LoweringError):
    """A program does not run, or its results are wrong; exits with 1."""


class Steps:
    """Progress on stderr: each step with the percentage of the work that is done, its time, and memory.

    A step prints a line when it ends. While it runs, a terminal shows it in a line that changes; elsewhere a line is
    printed every :attr:`interval` seconds. Without a count of steps there is no percentage.

    Args:
        count: the number of steps of the command, if it is known.
    """

    interval = 10.0

    def __init__(self, count: int = 0) -> None:
        self._count, self._done, self._part = count, 0, 0.0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (SpinnerColumn(), _Step(), TimeElapsedColumn(), _Memory(Column(no_wrap=True)))
        self._live = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._step: tuple[str, float] | None = None
        self._stopped = threading.Event()

    @property
    def current(self) -> str | None:
        """The step that runs."""
        return self._step[0] if self._step else None

    def expect(self, count: int) -> None:
        """Say that ``count`` more steps follow the present one."""
        self._count = self._done + (self._step is not None) + count

    def part(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` equal parts of the present step are done."""
        self._part = done / total if total else 0.0
        if self._step is not None:
            for task in self._live.task_ids:
                self._live.update(task, description=self._percent() + self._step[0])

    def __call__(self, step: str) -> None:
        """Begin ``step``, which ends the previous one."""
        self._end()
        self._step = (step, time.monotonic())
        _reset_peak_memory()
        self._live.add_task(self._percent() + step, total=None)

    def __enter__(self) -> "Steps":
        self._live.start()
        if not self._console.is_terminal:
            self._stopped = threading.Event()
            threading.Thread(target=self._print_current, args=(self._stopped,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if error is None:
            self._end()
        self._live.stop()

    def _percent(self) -> str:
        if not self._count:
            return ""
        # A command can have more steps than it said.
        return f"{int(100 * min(self._done + self._part, self._count) / self._count):3} %  "

    def _print_current(self, stopped: threading.Event) -> None:
        """Print the step that runs, now and then."""
        while not stopped.wait(self.interval):
            if self._step is not None:
                step, began = self._step
                passed = time.monotonic() - began
                if passed >= self.interval:
                    text = f"{self._percent()}{step}: {passed:.0f} s so far, memory {_memory('VmRSS')}"
                    self._console.print(text, markup=False)

    def _end(self) -> None:
        if self._step is not None:
            step, began = self._step
            for task in self._live.task_ids:
                self._live.remove_task(task)
            self._step, self._part = None, 0.0
            self._done += 1
            text = f"{self._percent()}{step}: {time.monotonic() - began:.1f} s, peak memory {_memory('VmHWM')}"
            self._console.print(text, markup=False)


class _Step(ProgressColumn):
    """The step that runs; in a narrow terminal its end is cut off, so that the line stays one line."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Memory(ProgressColumn):
    """The memory of the process."""

    def render(self, task: Task) -> Text:
        return Text(f"memory {_memory('VmRSS')}")


def _reset_peak_memory() -> None:
    """Forget the largest resident memory until now, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _memory(field: str) -> str:
    """The resident memory of this process now ("VmRSS"), or the largest since it was reset ("VmHWM").

    Without Linux's files: the largest of the whole run.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        count = 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = largest if sys.platform == "darwin" else 1024 * largest
    return f"{count / 1e9:.2f} GB"


def print_json(document: Document) -> None:
    """Print the JSON document of a command on stdout, where nothing else may be printed then."""
    typer.echo(document.to_json())


def check_writable(folder: Path, option: str = "--output-dir") -> None:
    """Check that the folder of an option exists or can be created, and that files can be written to it.

    Raises:
        UsageError: not so.
    """
    if folder.is_symlink() and not folder.exists():
        raise UsageError(f"{option} {folder} is a link to {os.readlink(folder)}, which does not exist")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"{option} {folder} cannot be created: {nearest} is a file; name a directory")
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        raise UsageError(f"{option} {folder} is on a file system that is read-only; name another directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder} cannot be written: no permission for {nearest}; name another directory")


def check_output_file(path: Path, option: str, model: Path) -> None:
    """Check, before a slow step begins, that :func:`write_files` can write the file of an option.

    Raises:
        UsageError: not so, or it would replace MODEL.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path} is a device or a pipe, which the file would replace; name a file")
    if path.resolve() == model.resolve():
        raise UsageError(f"{option} {path} is MODEL itself, which the file would replace; name another file")
    check_writable(path.parent, option)


def write_files(texts: Mapping[Path, str]) -> None:
    """Write each file whole or not at all. A link stays, and the file that it names is replaced."""
    from et_cuda_passes.executorch.lower import atomic_output

    for path, text in texts.items():
        real = path.resolve()
        try:
            with atomic_output(real.parent) as staging:
                (staging / real.name).write_text(text, encoding="utf-8")
        except OSError as error:  # it names the temporary file
            raise OSError(error.errno, error.strerror, str(path)) from error


def write_reports(
    reports: "Mapping[str, Report]", html: Path | None, model_explorer: Path | None, title: str
) -> list[Path]:
    """Write the files of ``--html`` and ``--model-explorer``, and return their paths."""
    from et_cuda_passes.graph.model_explorer import node_data
    from et_cuda_passes.graph.report_page import render

    data = {name: report.to_dict() for name, report in reports.items()}
    texts = {} if html is None else {html: render(data, title)}
    if model_explorer is not None:
        for each in data.values():
            path = model_explorer
            if len(data) > 1:
                path = path.with_name(f"{path.stem}.{each['target']}{path.suffix}")
            texts[path] = json.dumps(node_data(each), indent=1) + "\n"
    write_files(texts)
    return list(texts)


@contextmanager
def handle_errors(debug: bool) -> Iterator[None]:
    """Turn errors into one line and an exit code, and hide deprecation warnings of the libraries."""
    try:
        with quiet_import(debug), _quiet_environment(debug):
            import et_cuda_passes.api  # noqa: F401  (torch and torchao, for all that follows)
            from et_cuda_passes.executorch.errors import ModelError
    except ImportError as error:  # a version that does not fit: the message says which
        _fail(f"{one_line(error)}; `et-cuda-passes doctor` checks the installation", 1, debug)
    if untested := list(untested_versions()):
        typer.echo(f"warning: {'; '.join(untested)}", err=True)
    try:
        with _short_warnings_of_plugins(), _quiet_loggers(debug), _quiet_environment(debug), exits_on_sigterm():
            if not debug:
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except (UsageError, ModelError, PluginError) as error:
        _fail(str(error), 2, debug)
    except LoweringError as error:
        _fail(str(error), 1, debug)
    except (typer.Exit, typer.Abort, BrokenPipeError):  # a reader of stdout left: Typer ends quietly
        raise
    except OSError as error:
        _fail(_of_file(error), 1, debug)
    except Exception as error:
        _fail(shortage_of(error) or f"{one_line(error)} (unexpected; --debug shows the traceback)", 1, debug)


@contextmanager
def handle_errors_without_torch() -> Iterator[None]:
    """:func:`handle_errors` for a command that does not need torch, or only for plugins."""
    try:
        with _short_warnings_of_plugins():
            yield
    except (UsageError, PluginError) as error:
        _fail(str(error), 2, False)
    except BrokenPipeError:
        raise
    except LoweringError as error:
        _fail(str(error), 1, False)
    except OSError as error:
        _fail(_of_file(error), 1, False)


@contextmanager
def _short_warnings_of_plugins() -> Iterator[None]:
    """Print a warning about a plugin as one line, and every other warning as before."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, PluginWarning):
                typer.echo(f"warning: {message}", err=True)
            else:
                others(message, category, *place, **options)

        warnings.showwarning = show
        yield


@contextmanager
def quiet_import(debug: bool) -> Iterator[None]:
    """Hide what the libraries log and warn about while they are imported: optional parts that they do not find.

    torchao logs each of its libraries that it cannot load, such as those for another GPU. Its environment variable
    TORCHAO_FORCE_SKIP_LOADING_SO_FILES logs a line too, and leaves out the libraries that it could load.
    """
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _quiet_loggers(debug: bool) -> Iterator[None]:
    """Hide what modules of torchao and coremltools log as they are imported, when a command needs them."""
    loggers = [] if debug else [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "coremltools")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _quiet_environment(debug: bool) -> Iterator[None]:
    """Hide the progress bars of coremltools, and what ExecuTorch's Core ML backend logs about iOS versions.

    tqdm and the backend read these variables when they are imported.
    """
    quiet = {} if debug else {"TQDM_DISABLE": "1", "ET_COREML_LOG_LEVEL": "ERROR"}
    added = {name: value for name, value in quiet.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def start_runtime() -> None:
    """Start the threads of ExecuTorch's runtime, without the lines about the processor that it writes to stderr then.

    They come from C++ code, for which only the descriptor can be redirected. Errors of the runtime come later.
    """
    try:
        with quiet_import(False):
            from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count as start
    except ImportError:  # no runtime, or one without this function
        return
    sys.stderr.flush()
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        start()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)


@contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, by which temporary folders are removed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _of_file(error: OSError) -> str:
    if shortage := shortage_of(error):
        return shortage
    if error.filename:
        return f"{error.filename}: {error.strerror}"
    own = error.errno is not None and error.strerror != os.strerror(error.errno)
    return str(error.strerror) if own else one_line(error)  # a text of this package names its cause and its fix


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def one_line(error: BaseException) -> str:
    """The class of an error and the first line of its message; for a shortage the cause and the fix."""
    if shortage := shortage_of(error):
        return shortage
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def shortage_of(error: BaseException) -> str:
    """The disk or memory that an error, or its cause, is about, with the fix; empty if it is about another thing."""
    found = find_shortage(error)
    if found is None or found.text:
        return found.text if found else ""
    where = f" ({found.place})" if found.place else ""
    if found.kind == "full disk":
        return f"the disk is full{where}; free some space and run the command again"
    if found.kind == "file limit":
        return f"a file would be larger than the limit{where}; raise it with ulimit -f and run the command again"
    if found.kind == "read-only":
        return f"the file system is read-only{where}; name another folder"
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = "" if limit == resource.RLIM_INFINITY else f" (ulimit -v limits it to {limit / 1e9:.2f} GB)"
    return f"there is not enough memory{limited}; free some, or need less with --stream DIR"


def list_files(paths: Iterable[Path]) -> None:
    """Print the written files with their sizes on stdout."""
    sizes = {str(path): f"{path.stat().st_size:,}" for path in paths}
    table = Table("written", Column("bytes", justify="right"), box=None, pad_edge=False)
    for path, size in sizes.items():
        table.add_row(Text(path, overflow="fold"), size)
    console = Console(highlight=False)
    if not console.is_terminal:
        # Outside of a terminal a line is not wrapped, so that every path stays whole.
        console = Console(highlight=False, width=max(map(len, sizes)) + max(map(len, sizes.values())) + 10)
    console.print(table)
