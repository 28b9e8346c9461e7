"""Temporary files and folders that a killed process leaves behind, and that the next run removes.

Each is locked as long as its process lives, and the system releases the lock however the process ends. So an unlocked
one is left over. Nothing else has a name with the prefix.
"""

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PREFIX = ".unfinished-"
"""The names in folders that belong to a user or to a cache."""
PREFIX_IN_TEMP = "et_cuda_passes-"
"""The names in the system's folder of temporary files."""


class TemporaryFolder:
    """A folder that is removed when its block ends, when nothing refers to it, or by the next run.

    Args:
        parent: the folder around it; by default the system's folder of temporary files.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        around, prefix = (Path(tempfile.gettempdir()), PREFIX_IN_TEMP) if parent is None else (parent, PREFIX)
        remove_unfinished(around, prefix)
        name = _new_name(around, prefix)
        # The handler of a signal can raise an exception after each step.
        try:
            descriptor = _locked(name, _create_folder)
            # The lock is on the folder around it, so that a user of the path can lock that.
            self.path = Path(name, "files")
            self._remove = weakref.finalize(self, _remove, name, descriptor)
            self.path.mkdir()
        except BaseException:
            shutil.rmtree(name, ignore_errors=True)
            raise

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder now."""
        try:
            self._remove()
        finally:
            # A signal can have ended the removal.
            shutil.rmtree(self.path.parent, ignore_errors=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """A file for the new content of ``path``. It becomes ``path`` when the block ends, and is on the disk then.

    A reader, also after a loss of power, sees the former content or all of the new one.
    """
    part = _new_name(path.parent, PREFIX)
    try:
        with os.fdopen(_locked(part, _create_file), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise
    flush_names(path.parent)


def flush_names(folder: Path) -> None:
    """Write a folder itself to the disk: it holds the names of its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders cannot be flushed
            raise
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path, prefix: str = PREFIX) -> None:
    """Remove what killed processes left in a folder. Those of another user stay."""
    for path in folder.glob(f"{prefix}*"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def _new_name(folder: Path, prefix: str) -> str:
    """A name for a new file or folder. It is known before that exists, so that an error at any moment can remove it."""
    return os.path.join(folder, f"{prefix}{secrets.token_hex(8)}")


def _locked(name: str, create: Callable[[str], int]) -> int:
    """Create a file or folder and lock it; again if another run removed it before it was locked."""
    while True:
        descriptor = create(name)
        # A file system without locks has no other process to wait for, as far as this one can know.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):
            return descriptor
        os.close(descriptor)


def _create_file(name: str) -> int:
    """A new file with the permissions of any other; tempfile's are for the user alone."""
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _create_folder(name: str) -> int:
    while True:
        os.mkdir(name, 0o700)
        with suppress(FileNotFoundError):  # another run removed it
            return os.open(name, os.O_RDONLY)


def _remove(folder: str, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
