"""A file that torch writes an archive to, and the error of a write that fails."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def checked_output(path: Path) -> Iterator[IO[bytes]]:
    """A file for torch's writer of archives.

    The writer is in C++ and ends the process if a write fails, as on a full disk. It cannot do that here: the file
    keeps the first error and swallows what follows, and the error is raised when the block ends.

    Raises:
        OSError: a write failed.
    """
    # Without a buffer, which would try again to write when it is closed.
    with path.open("wb", buffering=0) as file:
        output = _Output(file)
        try:
            yield output  # type: ignore[misc]  # it has all that the writer calls
        except Exception as error:
            if output.error is not None:
                raise output.error from error
            raise
        if output.error is not None:
            raise output.error


class _Output(io.RawIOBase):
    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        try:
            while rest and self.error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, self._file.name)
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
