"""Bytes of files that are not believed: every read is checked against the end, and says where it failed."""

import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

CHUNK = 16 << 20
"""The most bytes of a segment that are in host memory at once."""


class DelegateError(ValueError):
    """A delegated program cannot be read or run; the message says what, where, and what to do where that is known."""


class File:
    """A file read piece by piece, so that a long one is never in memory whole and a shortened one is an error.

    It is not mapped into memory: there, a file that another process cuts ends this one with a bus error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            self.size = os.lseek(self._handle, 0, os.SEEK_END)
            os.read(self._handle, 0)
        except OSError as error:
            raise DelegateError(f"{path} cannot be read: {error.strerror}") from error

    def span(self, offset: int, size: int, what: str) -> "Span":
        """A part of the file, checked to lie within it."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise DelegateError(
                f"{self.path}: {what} is said to be the {size} bytes at byte {offset}, and the file ends at {self.size}"
            )
        return Span(self, offset, size, what)

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Exactly ``size`` bytes."""
        parts: list[bytes] = []
        left = size
        try:
            os.lseek(self._handle, offset, os.SEEK_SET)
            while left and (part := os.read(self._handle, left)):
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise DelegateError(f"{self.path}: {what} at byte {offset} cannot be read: {error.strerror}") from error
        if left:
            raise DelegateError(
                f"{self.path}: {what} at byte {offset} ends after {size - left} of {size} bytes; it was cut since"
            )
        return b"".join(parts)


class Span:
    """A named part of a file."""

    def __init__(self, file: File, offset: int, size: int, what: str) -> None:
        self.file, self.offset, self.size, self.what = file, offset, size, what

    def read(self) -> bytes:
        """The whole part."""
        return self.file.read(self.offset, self.size, self.what)

    def chunks(self) -> Iterator[bytes]:
        """The part in pieces of at most :data:`CHUNK` bytes."""
        for start in range(0, self.size, CHUNK):
            yield self.file.read(self.offset + start, min(CHUNK, self.size - start), self.what)


class Reader:
    """Numbers and strings out of bytes in memory.

    Args:
        data: what is read.
        where: what the data is, for messages.
        start: the position of ``data`` in its file, for messages.
    """

    def __init__(self, data: bytes, where: str, start: int = 0) -> None:
        self.data, self.where, self.start = data, where, start

    def fail(self, at: int, what: str, problem: str) -> NoReturn:
        """Raise a :class:`DelegateError` that names the place."""
        raise DelegateError(f"{self.where}: {what} at byte {self.start + at}: {problem}")

    def numbers(self, at: int, form: str, what: str) -> tuple[int, ...]:
        """``struct.unpack`` of a little-endian ``form`` at ``at``."""
        size = struct.calcsize(f"<{form}")
        if at < 0 or at + size > len(self.data):
            self.fail(at, what, f"{size} bytes are wanted, and the data ends at byte {self.start + len(self.data)}")
        return struct.unpack_from(f"<{form}", self.data, at)

    def number(self, at: int, form: str, what: str) -> int:
        """One number."""
        return self.numbers(at, form, what)[0]

    def text(self, at: int, size: int, what: str) -> str:
        """``size`` bytes of UTF-8."""
        if at < 0 or at + size > len(self.data):
            self.fail(at, what, f"{size} bytes are wanted, and the data ends at byte {self.start + len(self.data)}")
        try:
            return self.data[at : at + size].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(at, what, "it is no UTF-8 text")
