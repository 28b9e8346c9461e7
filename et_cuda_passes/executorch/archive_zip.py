"""The ZIP container of a .pt2: read by strict rules, and written again for torch without a copy of the data.

Two readers of one ZIP file can see different members: a ZIP file contains each name twice and each size three times. So
:func:`read_zip` accepts only the form that ``torch.export.save`` writes, and :func:`write_zip` writes new headers for
the members. Torch reads only these headers. Member data stay in the file until torch reads them: neither memory nor
disk holds them twice.
"""

import io
import os
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

# Limits of the directory that is parsed. A model with 100 B parameters has some thousand members.
_MOST_MEMBERS = 100_000
_LONGEST_DIRECTORY = 32 << 20

_LOCAL = struct.Struct("<4s5HIIIHH")
_ENTRY = struct.Struct("<4s6HIIIHHHHHII")
_END = struct.Struct("<4s4HIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_SIGNED = {
    "local": b"PK\x03\x04",
    "entry": b"PK\x01\x02",
    "end": b"PK\x05\x06",
    "end64": b"PK\x06\x06",
    "at": b"PK\x06\x07",
}
_ZIP64 = 0xFFFFFFFF
_ENCRYPTED, _LINK = 0x1, 0xA000


class NoArchive(ValueError):
    """The bytes are no ZIP file, or a truncated one."""


class Refused(ValueError):
    """The archive has another form than ``torch.export.save`` writes; the message names the member."""


def short(value: object) -> str:
    """``repr(value)``, truncated for a message."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


@dataclass(frozen=True)
class Span:
    """``size`` bytes at ``start`` of the open file."""

    start: int
    size: int


# The content of a member: a sequence of bytes in memory and spans of the file.
Content = tuple["bytes | Span", ...]


def size_of(content: Content) -> int:
    """The number of bytes of ``content``."""
    return sum(part.size if isinstance(part, Span) else len(part) for part in content)


def read_all(file: BinaryIO, content: Content, most: int, name: str) -> bytes:
    """``content`` in memory.

    Raises:
        Refused: the content is longer than ``most`` bytes.
    """
    if size_of(content) > most:
        raise Refused(f"member {name} has {size_of(content):,} bytes; at most {most:,} are read")
    return b"".join(_at(file, part.start, part.size) if isinstance(part, Span) else part for part in content)


def read_zip(file: BinaryIO, outer: Span) -> dict[str, Span]:
    """The members of the ZIP file that fills ``outer``, by name without their common folder.

    Raises:
        NoArchive: ``outer`` contains no ZIP file, or its end is missing.
        Refused: a member is compressed, encrypted, a link, or a folder; a name leaves the folder, or occurs twice; a
            size exceeds the file; two members share bytes; the two headers of a member disagree.
    """
    directory, count = _directory(file, outer)
    if count > _MOST_MEMBERS or directory.size > _LONGEST_DIRECTORY:
        raise Refused(
            f"the archive lists {count:,} members in {directory.size:,} bytes; at most {_MOST_MEMBERS:,} are read"
        )
    listed = _at(file, directory.start, directory.size)
    members: dict[str, Span] = {}
    at = 0
    for _ in range(count):
        at = _read_entry(file, outer, directory, listed, at, members)
    if at != len(listed):
        raise Refused(f"the archive's directory has {len(listed) - at} bytes after its {count} members")
    ends = sorted((span.start, span.start + span.size, name) for name, span in members.items())
    for (_, end, one), (start, _, other) in pairwise(ends):
        if start < end:
            raise Refused(f"members {one} and {other} share bytes")
    return _without_root(members)


def write_zip(members: Mapping[str, Content]) -> Content:
    """A ZIP file with ``members`` in the folder ``archive``, uncompressed, with 64-bit sizes."""
    parts: list[bytes | Span] = []
    entries: list[bytes] = []
    offset = 0
    for name, content in members.items():
        path, size = f"archive/{name}".encode(), size_of(content)
        # Torch does not check the checksum. For data in the file it is 0, since its computation would read the data.
        crc = zlib.crc32(b"".join(part for part in content if isinstance(part, bytes)))
        crc = 0 if any(isinstance(part, Span) for part in content) else crc
        extra = struct.pack("<HHQQ", 1, 16, size, size)
        head = (
            _LOCAL.pack(_SIGNED["local"], 45, 0x800, 0, 0, 0, crc, _ZIP64, _ZIP64, len(path), len(extra)) + path + extra
        )
        extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
        sizes = (crc, _ZIP64, _ZIP64, len(path), len(extra), 0, 0, 0, 0, _ZIP64)
        entries.append(_ENTRY.pack(_SIGNED["entry"], 45, 45, 0x800, 0, 0, 0, *sizes) + path + extra)
        parts += [head, *content]
        offset += len(head) + size
    listed = b"".join(entries)
    count, length = len(entries), len(listed)
    end64 = _END_64.pack(_SIGNED["end64"], _END_64.size - 12, 45, 45, 0, 0, count, count, length, offset)
    locator = _LOCATOR.pack(_SIGNED["at"], 0, offset + length, 1)
    end = _END.pack(_SIGNED["end"], 0, 0, 0xFFFF, 0xFFFF, _ZIP64, _ZIP64, 0)
    return (*parts, listed + end64 + locator + end)


class Contents(io.RawIOBase):
    """A readable file with ``content``; its spans are read from ``file`` on demand."""

    def __init__(self, file: BinaryIO, content: Iterable["bytes | Span"]) -> None:
        self._file = file
        self._parts = [part for part in content if size_of((part,))]
        self._starts, self._size = [], 0
        for part in self._parts:
            self._starts.append(self._size)
            self._size += size_of((part,))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "memoryview", /) -> int:  # type: ignore[override]
        """Fill ``buffer`` up to the end of the content: torch treats a short read as the end."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self._size:
            index = bisect_right(self._starts, self._position) - 1
            part, skip = self._parts[index], self._position - self._starts[index]
            wanted = min(len(view) - done, size_of((part,)) - skip)
            if isinstance(part, Span):
                self._file.seek(part.start + skip)
                got = _fill(self._file, view[done : done + wanted])
            else:
                view[done : done + wanted] = part[skip : skip + wanted]
                got = wanted
            if not got:
                break
            done += got
            self._position += got
        return done


def _fill(file: BinaryIO, view: memoryview) -> int:
    return int(file.readinto(view) or 0)  # type: ignore[attr-defined]


def _at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise NoArchive("the file became shorter while it was read")
    return data


def _directory(file: BinaryIO, outer: Span) -> tuple[Span, int]:
    """The span of the list of members, and the number of members."""
    if outer.size < _END.size:
        raise NoArchive("no end of a ZIP file")
    stop = outer.start + outer.size
    end = _END.unpack(_at(file, stop - _END.size, _END.size))
    if end[0] != _SIGNED["end"] or end[7]:
        raise NoArchive("no end of a ZIP file")
    last, count, size, start = stop - _END.size, end[4], end[5], end[6]
    before = last - _LOCATOR.size - _END_64.size
    if before >= outer.start and _at(file, last - _LOCATOR.size, 4) == _SIGNED["at"]:
        end64 = _END_64.unpack(_at(file, before, _END_64.size))
        if end64[0] != _SIGNED["end64"]:
            raise Refused("the archive's two ends disagree")
        last, count, size, start = before, end64[7], end64[8], end64[9]
    directory = Span(outer.start + start, size)
    if directory.start + directory.size != last:
        raise NoArchive("the list of members is not at the offset in the end of the ZIP file")
    if count * _ENTRY.size > size:
        raise Refused(f"the archive declares {count:,} members, and lists fewer")
    return directory, count


def _read_entry(file: BinaryIO, outer: Span, directory: Span, listed: bytes, at: int, members: dict[str, Span]) -> int:
    """Add one member of ``listed`` to ``members``; returns the offset of the next one."""
    if at + _ENTRY.size > len(listed):
        raise Refused("the archive lists fewer members than it declares")
    entry = _ENTRY.unpack_from(listed, at)
    flags, method, packed, size = entry[3], entry[4], entry[8], entry[9]
    long, extra_long, comment, outside, offset = entry[10], entry[11], entry[12], entry[15], entry[16]
    name_at = at + _ENTRY.size
    after = name_at + long + extra_long + comment
    if entry[0] != _SIGNED["entry"] or after > len(listed):
        raise Refused("the archive's list of members is damaged")
    raw = listed[name_at : name_at + long]
    name = _name(raw)
    packed, size, offset = _in_64_bits(listed[name_at + long : name_at + long + extra_long], packed, size, offset, name)
    if method or packed != size or flags & _ENCRYPTED:
        raise Refused(f"member {name} is compressed or encrypted; torch.export.save writes members as they are")
    if (outside >> 16) & 0xF000 == _LINK:
        raise Refused(f"member {name} is a symbolic link")
    if name in members:
        raise Refused(f"member {name} is in the archive twice")
    start = outer.start + offset
    if start + _LOCAL.size > directory.start:
        raise Refused(f"member {name} begins beyond the file")
    local = _LOCAL.unpack(_at(file, start, _LOCAL.size))
    start += _LOCAL.size + local[9] + local[10]
    if start + size > directory.start:
        raise Refused(f"member {name} declares {size:,} bytes, which the file does not contain")
    if local[0] != _SIGNED["local"] or local[3] or _at(file, start - local[9] - local[10], local[9]) != raw:
        raise Refused(f"member {name} has another header than in the archive's list")
    members[name] = Span(start, size)
    return int(after)


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise Refused(f"a member's name is not UTF-8: {raw!r}") from None
    # The folder has the name of the original file, which nothing reads.
    root, _, path = name.partition("/")
    parts = path.split("/")
    if not re.fullmatch(r"[\w.\-+@ /]+", path, re.ASCII) or {"", ".", ".."} & {root, *parts} or not root.isprintable():
        raise Refused(f"a member's name is no plain path inside a folder of the archive: {name!r}")
    return name


def _in_64_bits(extra: bytes, packed: int, size: int, offset: int, name: str) -> tuple[int, int, int]:
    """Sizes and offset, read from the ZIP64 field if they exceed 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            try:
                size = wide.pop(0) if size == _ZIP64 else size
                packed = wide.pop(0) if packed == _ZIP64 else packed
                offset = wide.pop(0) if offset == _ZIP64 else offset
            except IndexError:
                raise Refused(f"member {name} has a damaged header") from None
            break
        at += 4 + length
    return packed, size, offset


def _without_root(members: dict[str, Span]) -> dict[str, Span]:
    roots = {name.partition("/")[0] for name in members}
    if len(roots) > 1:
        raise Refused(f"the members are in {len(roots)} folders; torch.export.save writes one")
    inside = {name.partition("/")[2]: span for name, span in members.items()}
    seen: set[str] = set()
    for name in inside:  # torch ignores case when it looks up a member
        if name.lower() in seen:
            raise Refused(f"member {name} is in the archive twice")
        seen.add(name.lower())
    return inside
