"""Errors that say that a disk or the memory is short, however deep a library has wrapped them."""

import errno
import os
import re
from dataclasses import dataclass
from typing import Literal

from et_cuda_passes.unfinished import PREFIX, PREFIX_IN_TEMP

_NO_MEMORY = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|std::bad_alloc|can't start new thread|failed to map"
)
"""Messages of torch, of C++ and of the system."""

Kind = Literal["full disk", "file limit", "read-only", "memory"]
_KINDS: dict[int, Kind] = {
    errno.ENOSPC: "full disk",
    errno.EDQUOT: "full disk",
    errno.EFBIG: "file limit",
    errno.EROFS: "read-only",
    errno.ENOMEM: "memory",
}


@dataclass(frozen=True)
class Shortage:
    """A disk that cannot be written any more, or memory that is missing.

    Attributes:
        kind: of the shortage.
        place: the file or folder; empty if the error does not say it.
        text: of an error that names its cause and its fix itself; else empty.
    """

    kind: Kind
    place: str
    text: str


def find_shortage(error: BaseException) -> Shortage | None:
    """The shortage that an error, or one of its causes, is about; None if it is about another thing."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        if (kind := _kind(each)) is not None:
            # The names of temporary files mean nothing to a user.
            place = re.split(f"/(?:{re.escape(PREFIX)}|{PREFIX_IN_TEMP})", str(getattr(each, "filename", None) or ""))
            # The cache and the files of a streamed rewrite say which they are.
            own = isinstance(each, OSError) and each.errno is not None and each.strerror != os.strerror(each.errno)
            return Shortage(kind, place[0], str(each.strerror or "") if own and isinstance(each, OSError) else "")
        each = each.__cause__ or each.__context__
    return None


def _kind(error: BaseException) -> Kind | None:
    if isinstance(error, OSError) and error.errno in _KINDS:
        return _KINDS[error.errno]
    if "No space left on device" in str(error):
        return "full disk"
    return "memory" if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) else None
