"""One job of ``matrix``: what its key is, whether its files are there already, and its command in a process.

Nothing here imports torch, so that a machine can wait for a job with little memory.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from et_cuda_passes.cli.documents import JobResult
from et_cuda_passes.cli.jobs import Job
from et_cuda_passes.plugins import RULES, TARGETS, installed
from et_cuda_passes.unfinished import replaced_file

RECORD = "job.json"
"""The file in the folder of a job that says what the job wrote."""
_PACKAGES = ("torch", "torchao", "executorch", "triton", "transformers", "gguf", "safetensors")
_BESIDE = (".json", ".txt", ".model", ".jinja")
"""The suffixes of the files beside a .safetensors or .gguf file that belong to the model: its config and tokenizer."""
_RECENT = 2.0
"""Seconds within which a second change of a file can leave its time as it is."""
_PATIENCE = 30.0
"""Seconds for a command to remove its temporary files after SIGTERM."""


class CommandKilled(Exception):
    """A signal ended the command, as when the machine has no memory left; another try can succeed."""


class Stopped(Exception):
    """The jobs are to end before they are done."""


# Keys ----------------------------------------------------------------------------------------------------------------


class Digests:
    """SHA-256 of files, remembered in a file: one whose size, times and inode are as before is not read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError, AttributeError):  # a file of another form is replaced
            found = json.loads(path.read_text(encoding="utf-8"))
            self._known = {name: value for name, value in found.items() if isinstance(value, list)}

    def of(self, path: Path) -> str:
        """The digest of a file, or of the names and the contents of all files in a folder."""
        if not path.is_dir():
            return self._of_file(path)
        files = sorted(each for each in path.rglob("*") if each.is_file())
        names = [(each.relative_to(path).as_posix(), self._of_file(each)) for each in files]
        return hashlib.sha256(repr(names).encode()).hexdigest()

    def _of_file(self, path: Path) -> str:
        with path.open("rb") as file:
            form = _identity(os.fstat(file.fileno()))
            with self._lock:
                known = self._known.get(str(path))
            if known and known[:-1] == form and isinstance(known[-1], str):
                return known[-1]
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - max(form[1:3]) / 1e9 > _RECENT:
            with self._lock:
                self._known[str(path)] = [*form, found]
        return found

    def save(self) -> None:
        """Remember the digests for the next run."""
        with self._lock:
            _write(self._path, self._known)


def key_of(job: Job, digests: Digests) -> str:
    """The key of a job: equal for the same command, contents of its files, and versions of the packages.

    A name of the Hub counts as a name.

    Raises:
        OSError: a file of the job is missing or cannot be read.
    """
    contents = {str(path): [digests.of(each) for each in _files_of(path)] for path in job.inputs}
    command = [contents.get(argument, argument) for argument in job.identity]
    plugins = [each.origin for group in (RULES, TARGETS) for each in installed(group)]
    text = json.dumps([command, _source(), plugins, {name: _version(name) for name in _PACKAGES}])
    return hashlib.sha256(text.encode()).hexdigest()


def _files_of(path: Path) -> list[Path]:
    """The file or folder, and the files beside it that the command reads too."""
    if path.suffix not in (".safetensors", ".gguf"):
        return [path]
    return [path, *sorted(each for each in path.parent.iterdir() if each.suffix in _BESIDE and each.is_file())]


def _source() -> str:
    """The hash of this package, which can change without a new version."""
    root = Path(__file__).parent.parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in (".py", ".json", ".txt"))
    found = hashlib.sha256()
    for path in files:
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _state(paths: Iterable[Path]) -> list[tuple[str, list[int]]]:
    """Sizes, times and inodes of all files; one of them changes when a file is written or replaced."""
    files = [each for path in paths for one in _files_of(path) for each in (one.rglob("*") if one.is_dir() else [one])]
    return [(str(each), _identity(each.stat())) for each in sorted(files) if each.is_file()]


def _identity(found: os.stat_result) -> list[int]:
    """Size, times and inode of a file.

    A copy can have the size and the time of the file that it replaces, and never the time of that change.
    """
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _form(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


# Records -------------------------------------------------------------------------------------------------------------


def finished(job: Job, key: str) -> JobResult | None:
    """The result of a job that is done: its record has this key, and every file is the one that it wrote."""
    record = _read_record(job)
    if record.get("key") != key:
        return None
    try:
        result = JobResult(**record["result"], status="up to date")
        if not all(_is_same(job.folder / name, entry) for name, entry in record["files"].items()):
            return None
    except (AttributeError, KeyError, TypeError, ValueError, OSError):
        return None
    return result


def recorded(job: Job) -> JobResult | None:
    """The result in the record of a job, whose inputs can be others by now; None without one."""
    record = _read_record(job)
    try:
        return JobResult(**record["result"], status="written") if record.get("key") else None
    except (KeyError, TypeError):
        return None


def _is_same(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is as it was recorded. It is read only if its time is another one, as after a copy."""
    found = file.stat()
    if _form(found) == (entry["size"], entry["mtime_ns"]):
        return True
    return bool(found.st_size == entry["size"] and _sha256(file) == entry["sha256"])


def _read_record(job: Job) -> dict[str, Any]:
    try:
        record = json.loads((job.folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    """The entry of a file in the record. The file is on the disk then."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size, moment = _form(os.fstat(file.fileno()))
        return {"size": size, "mtime_ns": moment, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode())


# A run ---------------------------------------------------------------------------------------------------------------


def run_job(job: Job, digests: Path, stop: threading.Event | None = None) -> JobResult:
    """Run the command of a job unless it is done, and record what it wrote. An error of the command is a result.

    Two runs of one job exclude each other, also on two machines of one file system that has locks. The second waits,
    and finds the files of the first. The lock is on the log, which is open in each process of the command: it lasts as
    long as one of them.

    Args:
        job: the job.
        digests: the file of :class:`Digests`.
        stop: ends the command when it is set.

    Raises:
        CommandKilled: a signal that is not from here ended the command.
        Stopped: ``stop`` is set.
    """
    began = time.monotonic()
    try:
        with _locked(job.log, stop) as log:
            remembered = Digests(digests)
            before = _state(job.inputs)
            key = key_of(job, remembered)
            if known := finished(job, key):
                return known
            former = _read_record(job).get("files", {})
            if former:
                # Not done from here on; the names stay, so that the next success removes what it does not write.
                _write(job.folder / RECORD, {"key": None, "files": former})
            log.truncate(0)
            code, document = _call(job, log, stop)
            seconds = round(time.monotonic() - began, 1)
            if code < 0:
                raise CommandKilled(_killed(code))
            if code or document is None or document.get("error"):
                return failure(job, _error(job, code), seconds)
            if _state(job.inputs) != before:
                return failure(job, "a file of the model changed while the job read it: run matrix again", seconds)
            return _record(job, key, document, former, seconds)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return failure(job, text, round(time.monotonic() - began, 1))


def failure(job: Job, error: str, seconds: float = 0.0) -> JobResult:
    """The result of a job that failed."""
    return JobResult(job.name, list(job.shell_command), str(job.folder), str(job.log), "failed", seconds, error=error)


def _killed(code: int) -> str:
    name = signal.Signals(-code).name
    hint = "; the system does that to the largest process when memory is short" if name == "SIGKILL" else ""
    return f"the command was killed by {name}{hint}"


@contextmanager
def _locked(path: Path, stop: threading.Event | None) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(stop)
            except OSError:
                break  # the file system has no locks
        yield log


def _wait(stop: threading.Event | None, seconds: float = 0.1) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


def _call(job: Job, log: IO[bytes], stop: threading.Event | None) -> tuple[int, dict[str, Any] | None]:
    """The exit code of the command, and its JSON document."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "et_cuda_passes", *job.command, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            # Ctrl-C in a terminal reaches this process alone, which ends the command once.
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                _wait(stop)
        finally:
            _end(process)
        out.seek(0)
        try:
            return process.returncode, dict(json.loads(out.read()))
        except ValueError:
            return process.returncode, None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command that still runs, and what it started."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _error(job: Job, code: int) -> str:
    """The last error in the log of a command."""
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = next((line for line in reversed(lines) if line.strip()), "the log is empty")
    return errors[-1] if errors else f"the command ended with exit code {code}: {last}"


def _record(job: Job, key: str, document: dict[str, Any], former: Mapping[str, Any], seconds: float) -> JobResult:
    """Write the record of a job that succeeded, and return its result."""
    written = [Path(each["path"]) for each in document["files"]]
    names = sorted({each.name for each in written if each.parent == job.folder} - {RECORD})
    for name in sorted(set(former) - set(names)):
        if Path(name).name == name:
            (job.folder / name).unlink(missing_ok=True)
    files = {name: _entry(job.folder / name) for name in names}
    counts: dict[str, int] = {}
    for report in _reports(document):
        for status, count in report["counts"].items():
            counts[status] = counts.get(status, 0) + count
    result = JobResult(
        job.name,
        list(job.shell_command),
        str(job.folder),
        str(job.log),
        "written",
        seconds,
        sum(entry["size"] for entry in files.values()),
        counts.get("rewritten", 0),
        counts.get("kept", 0),
        counts.get("missed", 0),
    )
    data = {name: value for name, value in vars(result).items() if name != "status"}
    _write(job.folder / RECORD, {"key": key, "files": files, "result": data})
    return result


def _reports(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The reports in the document of ``export`` or ``lower``."""
    if "reports" in document:
        return [report for parts in document["reports"].values() for report in parts.values()]
    return [document["report"]] if document["report"] else []
