"""Packed constants by their content, in a folder or at a URL that several runs and machines share.

A key is the hash of everything that determines a constant: the bytes of its sources, the form, and the version of the
packers. An entry is one file, a line of JSON and then the bytes. It is verified whenever it is read: one that is
damaged is computed again and replaced.

In a folder, a writer writes a temporary file, flushes it to the disk, and renames it. So a reader never sees a part of
an entry, also if a writer is killed, and several may write the same entry. The next run removes what a killed writer
left: a temporary file that no process has locked.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from et_cuda_passes.graph.constants import Planned
from et_cuda_passes.threads import for_chunks, ranges
from et_cuda_passes.unfinished import remove_unfinished, replaced_file

PACKER_VERSION = 1
"""Raise it when the bytes of any packed constant change. A test compares them with those of this version."""

_BLOCK = 4 << 20
_LONGEST_HEADER = 4096
_ENTRY = ".packed"
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""The packages of some protocols of fsspec."""


class PackedCache:
    """Packed constants on a disk or an object store, for ``rewrite(..., cache=)`` and the partitioners.

    Args:
        place: a folder, which is created, or a URL of fsspec, such as ``s3://bucket/folder`` or ``gs://bucket/folder``.
            A protocol may need a package of its own (s3fs, gcsfs).
        limit: bytes of all entries of a folder. Beyond it, the least recently used ones are removed, but none that this
            object used. An object store has rules of its own for that.

    Raises:
        ValueError: a limit for a URL that is no folder, or a limit below 1; no place, a URL without ``//``, or one with
            a protocol that no filesystem has.
        ImportError: the protocol needs a package that is not installed.
        OSError: the folder cannot be written, or the store cannot be read.
    """

    def __init__(self, place: str | Path, limit: float | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"the limit of the cache must be at least 1 byte, got {limit}")
        self.place = str(place)
        self.damaged = 0
        """The number of entries that failed the check."""
        self._store = _open(self.place, limit)

    def load(self, plan: Planned, out: torch.Tensor) -> bool:
        """Read the constant of ``plan`` into ``out``. False if there is no such entry, or a damaged one."""
        content = self._store.read(content_key(plan))
        if content is None:
            return False
        data, end = memoryview(content), bytes(content[:_LONGEST_HEADER]).find(b"\n") + 1
        try:
            header = json.loads(bytes(data[:end]))
            fits = header["form"] == _form(out) and len(data) - end == out.nbytes
        except (ValueError, KeyError, TypeError):
            fits = False
        if fits:
            if out.nbytes:
                out.view(-1).view(torch.uint8).copy_(torch.frombuffer(content, dtype=torch.uint8, offset=end))
            # The bytes that are used are those that are checked.
            fits = header.get("sha256") == digest(out)
        self.damaged += not fits
        return fits

    def save(self, plan: Planned, tensor: torch.Tensor) -> None:
        """Write the constant of ``plan``."""
        header = json.dumps({"form": _form(tensor), "sha256": digest(tensor)}) + "\n"
        self._store.write(content_key(plan), header.encode(), _bytes(tensor))


_COUNTS = "packed {} constants, {} from the cache "


def counts_note(packed: int, loaded: int, damaged: int, place: str) -> str:
    """The note of a report about a cache: how many constants were computed, and how many were read."""
    replaced = f"; {damaged} damaged entr{'y was' if damaged == 1 else 'ies were'} replaced" if damaged else ""
    return _COUNTS.format(packed, loaded) + place + replaced


def without_counts(notes: Iterable[str]) -> list[str]:
    """Notes without :func:`counts_note`, which is about a run and not about the program."""
    pattern = re.compile(_COUNTS.format(r"\d+", r"\d+"))
    return [note for note in notes if not pattern.match(note)]


def content_key(plan: Planned) -> str:
    """The name of a constant: equal for equal bytes of the sources, form and version of the packers."""
    sources = [(_form(source), digest(source)) for source in plan.sources]
    text = repr((PACKER_VERSION, plan.form, plan.shape, str(plan.dtype), sources))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(tensor: torch.Tensor) -> str:
    """A hash of the values of a tensor in logical order, computed in several threads: that of the hashes of blocks."""
    data = _bytes(tensor)
    pieces = ranges(max(1, len(data)), _BLOCK)
    found: dict[int, bytes] = {}

    def work(piece: tuple[int, int]) -> None:
        found[piece[0]] = hashlib.sha256(data[slice(*piece)]).digest()

    for_chunks(pieces, lambda: work, torch.device("cpu"))
    return hashlib.sha256(b"".join(found[start] for start, _ in pieces)).hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    array: Any = flat.numpy()  # a buffer, which older type stubs of numpy do not say
    return memoryview(array)


def _form(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype)]


# Stores --------------------------------------------------------------------------------------------------------------


class _Store(ABC):
    @abstractmethod
    def read(self, key: str) -> bytearray | None:
        """The content of an entry, or None."""

    @abstractmethod
    def write(self, key: str, header: bytes, data: memoryview) -> None:
        """Write an entry."""


def _open(place: str, limit: float | None) -> _Store:
    if not place:
        raise ValueError("the cache has an empty name: give a folder, or a URL with a protocol of fsspec")
    protocol, colon, rest = place.partition(":")
    if not colon or not (rest.startswith("//") or _is_protocol(protocol)):
        return _Folder(Path(place), limit)
    if not rest.startswith("//") and protocol != "file":
        raise ValueError(
            f"the cache {place} lacks two slashes: write {protocol}://{rest}, or ./{place} if it is a folder"
        )
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # torch depends on it

    try:
        system, path = url_to_fs(place)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        raise ImportError(f"the cache {place}: {error}{f'; pip install {package}' if package else ''}") from error
    except ValueError as error:
        raise ValueError(f"the cache {place}: {error}; give a folder, or a URL with a protocol of fsspec") from error
    except Exception as error:  # some filesystems connect now, and each has its own errors
        raise _unusable(place, "opened", error) from error
    if "file" in system.protocol:
        return _Folder(Path(path), limit)
    if limit is not None:
        raise ValueError(
            f"the cache {place} has a limit, which only a folder can have: leave it out, and give the bucket a rule "
            "that removes old objects"
        )
    return _Remote(system, path, place)


def _is_protocol(name: str) -> bool:
    if not name.isalnum():  # a path, such as ./a:b
        return False
    from fsspec import available_protocols  # type: ignore[import-untyped]

    return name in available_protocols()


class _Remote(_Store):
    """Files of an fsspec filesystem. An object store writes a file whole or not at all."""

    def __init__(self, system: Any, path: str, place: str) -> None:
        self._system, self._path, self._url = system, path.rstrip("/"), place
        # Credentials or a host that are missing are found before the work for the first entry.
        self.read("none")

    def _place(self, key: str) -> str:
        return f"{self._path}/{key}{_ENTRY}"

    def read(self, key: str) -> bytearray | None:
        try:
            return bytearray(self._system.cat_file(self._place(key)))
        except FileNotFoundError:
            return None
        except Exception as error:  # each filesystem has its own
            raise _unusable(self._url, "read", error) from error

    def write(self, key: str, header: bytes, data: memoryview) -> None:
        try:
            self._system.makedirs(self._path, exist_ok=True)
            self._system.pipe_file(self._place(key), header + bytes(data))
        except Exception as error:  # each filesystem has its own
            raise _unusable(self._url, "written", error) from error


def _unusable(url: str, done: str, error: Exception) -> OSError:
    text = str(error).strip().partition("\n")[0]
    return OSError(
        f"the cache {url} cannot be {done} ({type(error).__name__}{f': {text}' if text else ''}): check its name, the "
        "network and the credentials that its filesystem reads, or leave it out"
    )


class _Folder(_Store):
    """Files of a folder."""

    def __init__(self, folder: Path, limit: float | None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = "is a file" if folder.is_file() else f"cannot be created: {error.strerror}"
            raise OSError(error.errno, f"the cache {folder} {text}; name another folder, or leave it out") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"the cache {folder} cannot be written: name another folder, or leave it out")
        self._folder, self._limit = folder, limit
        self._used: set[str] = set()
        self._size: int | None = None
        remove_unfinished(folder)

    def read(self, key: str) -> bytearray | None:
        path = self._folder / f"{key}{_ENTRY}"
        try:
            with path.open("rb") as file:
                content = bytearray(os.fstat(file.fileno()).st_size)
                if file.readinto(content) != len(content):
                    return bytearray()  # a damaged entry
            with suppress(PermissionError):  # an entry of another user, who alone can set its time
                os.utime(path)  # the time of the last use
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OSError(
                error.errno,
                f"the entry {path} of the cache cannot be read: {error.strerror}; let its users read the files of each "
                "other, or remove it",
            ) from error
        self._used.add(path.name)
        return content

    def write(self, key: str, header: bytes, data: memoryview) -> None:
        path = self._folder / f"{key}{_ENTRY}"
        try:
            with replaced_file(path) as file:
                file.write(header)
                file.write(data)
        except OSError as error:
            text = f"the cache {self._folder} cannot be written: {error.strerror}; free some space, or leave it out"
            raise OSError(error.errno, text) from error
        self._used.add(path.name)
        self._evict(len(header) + len(data))

    def _evict(self, added: int) -> None:
        """Remove the least recently used entries beyond the limit."""
        if self._limit is None:
            return
        self._size = None if self._size is None else self._size + added
        if self._size is not None and self._size <= self._limit:
            return
        entries = []
        for path in self._folder.glob(f"*{_ENTRY}"):
            with suppress(FileNotFoundError):  # another run removed it
                entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        self._size = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if self._size <= self._limit:
                return
            if path.name not in self._used:
                with suppress(PermissionError):  # an entry of another user, in a folder in which each removes his own
                    path.unlink(missing_ok=True)
                    self._size -= size
