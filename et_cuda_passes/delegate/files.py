"""Read a .pte and a .ptd that may be damaged or forged.

A file that is not valid ends in a :class:`DelegateError` that names the place. The time and the memory that it takes
are bounded, whatever lengths and offsets it contains.

Sources: the FlatBuffers format (https://flatbuffers.dev/internals); ExecuTorch 1.5's schemas program.fbs,
flat_tensor.fbs and scalar_type.fbs, whose order of declaration numbers the fields; and the headers ``_ExtendedHeader``
in exir/_serialize/_program.py and ``FlatTensorHeader`` in extension/flat_tensor/serialize/serialize.py. Only the fields
that are needed to run a delegate are read.

ExecuTorch 1.5.1's own deserializers were tried instead and do not bound their work. ``_flatbuffer_to_program`` builds
every reference that a vector repeats: a .pte of 1.9 KB, whose methods, chains and instructions are 150 references each
to one table, takes 31 seconds and 690 MB. It also accepts a string that extends past the end of the file, and shortens
it. ``FlatTensorSerializer`` runs the program ``flatc`` on a .ptd, through temporary files and JSON: a valid one of 272
bytes takes 18 ms, and one of 50 KB that repeats a reference takes 2.4 seconds and 290 MB.
"""

import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

CHUNK = 16 << 20
"""The largest number of bytes of a segment that is in host memory at once."""

DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    25: torch.float8_e5m2fnuz,
    26: torch.float8_e4m3fnuz,
    27: torch.uint16,
    28: torch.uint32,
    29: torch.uint64,
}
"""Torch dtypes by ExecuTorch's ScalarType, which numbers them as torch does."""

# The libraries and weights are in segments. The flatbuffer before them only describes methods and lists names.
_MAX_FLATBUFFER = 64 << 20
# The objects that are read from one flatbuffer may use this many bytes of memory, by the estimates below.
_MAX_MEMORY = 128 << 20
_NUMBER_COST = 40
# A table uses about 250 bytes of memory, but 1024 are counted, so that reading a file takes less than a second. A file
# with more than about 130,000 tables is refused; a .ptd has two tables for each weight.
_TABLE_COST = 1024
# The smallest table of a valid file has 8 bytes, the reference to it included: 133 times less than is counted.
_MAX_EXPANSION = 256


class DelegateError(ValueError):
    """A delegated program cannot be read or run. The message names the place, the cause and, if known, the fix."""


class File:
    """A file that is read in parts, so that a large file is never in memory as a whole.

    The file is not mapped into memory: if another process shortened a mapped file, this process would end with a bus
    error. A read from a shortened file raises a :class:`DelegateError`.
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

    def span(self, offset: int, size: int, name: str) -> "Span":
        """A part of the file, checked to lie within it; ``name`` is for messages."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise DelegateError(
                f"{self.path}: {name} has {size} bytes from byte {offset}, but the file ends at byte {self.size}"
            )
        return Span(self, offset, size, name)

    def read(self, offset: int, size: int, name: str) -> bytes:
        """Exactly ``size`` bytes from byte ``offset``."""
        parts: list[bytes] = []
        missing = size
        try:
            os.lseek(self._handle, offset, os.SEEK_SET)
            while missing and (part := os.read(self._handle, missing)):
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise DelegateError(f"{self.path}: {name} at byte {offset} cannot be read: {error.strerror}") from error
        if missing:
            raise DelegateError(
                f"{self.path}: {name} at byte {offset} ends after {size - missing} of {size} bytes: the file was "
                "shortened after it was opened"
            )
        return b"".join(parts)


@dataclass(frozen=True, eq=False)
class Span:
    """A part of a file: ``size`` bytes from byte ``offset``; ``name`` is for messages."""

    file: File
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """All bytes of the part."""
        return self.file.read(self.offset, self.size, self.name)

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the part, at most :data:`CHUNK` at a time."""
        for start in range(0, self.size, CHUNK):
            yield self.file.read(self.offset + start, min(CHUNK, self.size - start), self.name)


class Reader:
    """Reads numbers and strings from bytes in memory.

    Args:
        data: the bytes.
        where: the name of the data, for messages.
        start: the position of ``data`` in its file, for messages.
    """

    def __init__(self, data: bytes, where: str, start: int = 0) -> None:
        self.data, self.where, self.start = data, where, start

    def fail(self, at: int, name: str, problem: str) -> NoReturn:
        """Raise a :class:`DelegateError` for the part ``name`` at byte ``at`` of the data."""
        raise DelegateError(f"{self.where}: {name} at byte {self.start + at}: {problem}")

    def numbers(self, at: int, form: str, name: str) -> tuple[int, ...]:
        """``struct.unpack`` of the little-endian format ``form`` at byte ``at``."""
        self.check_bounds(at, struct.calcsize(f"<{form}"), name)
        return struct.unpack_from(f"<{form}", self.data, at)

    def number(self, at: int, form: str, name: str) -> int:
        """One number."""
        return self.numbers(at, form, name)[0]

    def text(self, at: int, size: int, name: str) -> str:
        """A string of ``size`` bytes in UTF-8."""
        self.check_bounds(at, size, name)
        try:
            return self.data[at : at + size].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(at, name, "it is not valid UTF-8")

    def check_bounds(self, at: int, size: int, name: str) -> None:
        """Check that ``size`` bytes at byte ``at`` are within the data."""
        if at < 0 or at + size > len(self.data):
            end = self.start + len(self.data)
            self.fail(at, name, f"{size} bytes are needed, but the data ends at byte {end}")


class Flatbuffer(Reader):
    """The bytes of a flatbuffer, and how much memory may still be used for objects that are read from it.

    Offsets may point anywhere, so tables can share bytes and a small file can describe a large tree. A serializer does
    not write such files: there, only vtables and strings are shared. So the objects that are read may not take much
    more memory than the flatbuffer itself.
    """

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(data, where)
        self._budget = min(_MAX_MEMORY, _MAX_EXPANSION * len(data))

    def spend(self, cost: int, at: int, name: str) -> None:
        """Count ``cost`` bytes of memory for the part ``name`` at byte ``at``."""
        self._budget -= cost
        if self._budget < 0:
            self.fail(at, name, "the file describes far more data than a file of its size can have: its parts overlap")

    def root(self) -> "Table":
        """The root table."""
        return Table(self, self.number(0, "I", "root"), "root")


class Union(NamedTuple):
    """A union: the number of its type in the schema, and its table, which is None for type 0 and for a missing one."""

    kind: int
    table: "Table | None"


class Table:
    """One table. A missing field has the default value of the schema: 0, an empty string or an empty vector.

    The offset to the vtable is signed and counts backwards. The vtable has its own size, the size of the table, and
    the offset of each field, which is 0 for a missing field. Strings, vectors and tables are reached by unsigned
    offsets that count forwards.
    """

    __slots__ = ("_at", "_buffer", "_size", "_vtable", "_vtable_size", "name")

    def __init__(self, buffer: Flatbuffer, at: int, name: str) -> None:
        self._buffer, self._at, self.name = buffer, at, name
        buffer.spend(_TABLE_COST, at, name)
        self._vtable = at - buffer.number(at, "i", name)
        self._vtable_size, self._size = buffer.numbers(self._vtable, "HH", name)
        if self._vtable_size < 4 or self._vtable_size % 2 or self._size < 4:
            problem = f"a vtable of {self._vtable_size} bytes for a table of {self._size} bytes is not possible"
            buffer.fail(self._vtable, name, problem)
        buffer.check_bounds(self._vtable, self._vtable_size, name)
        buffer.check_bounds(at, self._size, name)

    def fail(self, problem: str, field: str = "") -> NoReturn:
        """Raise a :class:`DelegateError` that names this table, or one field of it."""
        self._buffer.fail(self._at, self._path(field) if field else self.name, problem)

    def integer(self, field: int, form: str, name: str) -> int:
        """A number in the ``struct`` format ``form``."""
        at = self._find(field, struct.calcsize(f"<{form}"), name)
        return 0 if at is None else self._buffer.number(at, form, self._path(name))

    def real(self, field: int, name: str) -> float:
        """A double."""
        at = self._find(field, 8, name)
        return 0.0 if at is None else float(self._buffer.number(at, "d", self._path(name)))

    def text(self, field: int, name: str) -> str:
        """A string."""
        at, size = self._vector(field, 1, 1, name)
        return self._buffer.text(at, size, self._path(name))

    def blob(self, field: int, name: str) -> bytes:
        """A vector of bytes."""
        at, size = self._vector(field, 1, 1, name)
        return self._buffer.data[at : at + size]

    def integers(self, field: int, form: str, name: str) -> tuple[int, ...]:
        """A vector of numbers in the ``struct`` format ``form``."""
        at, count = self._vector(field, struct.calcsize(f"<{form}"), _NUMBER_COST, name)
        return self._buffer.numbers(at, f"{count}{form}", self._path(name))

    def table(self, field: int, name: str) -> "Table | None":
        """A table."""
        at = self._target(field, name)
        return None if at is None else Table(self._buffer, at, self._path(name))

    def tables(self, field: int, name: str) -> list["Table"]:
        """A vector of tables."""
        at, count = self._vector(field, 4, _NUMBER_COST, name)
        path = self._path(name)
        offsets = self._buffer.numbers(at, f"{count}I", path)
        return [
            Table(self._buffer, at + 4 * index + offset, f"{path}[{index}]") for index, offset in enumerate(offsets)
        ]

    def union(self, field: int, name: str) -> Union:
        """A union: its type is field ``field`` and its table the field after it."""
        return Union(self.integer(field, "B", f"{name}'s type"), self.table(field + 1, name))

    def _path(self, name: str) -> str:
        return name if self.name == "root" else f"{self.name}.{name}"

    def _find(self, field: int, size: int, name: str) -> int | None:
        """The position of a field's own bytes; None for a missing field."""
        entry = 4 + 2 * field
        if entry >= self._vtable_size:
            return None
        offset = self._buffer.number(self._vtable + entry, "H", f"the vtable of {self.name}")
        if offset == 0:
            return None
        if offset + size > self._size:
            self._buffer.fail(self._at + offset, self._path(name), f"it lies outside its table of {self._size} bytes")
        return self._at + offset

    def _target(self, field: int, name: str) -> int | None:
        """The position that the offset in a field points to; None for a missing field."""
        at = self._find(field, 4, name)
        return None if at is None else at + self._buffer.number(at, "I", self._path(name))

    def _vector(self, field: int, item: int, cost: int, name: str) -> tuple[int, int]:
        """The position of the first element and the number of elements, checked to lie within the data.

        An element has ``item`` bytes in the data, and takes ``cost`` bytes of memory after it was read.
        """
        at = self._target(field, name)
        if at is None:
            return 0, 0
        path = self._path(name)
        count = self._buffer.number(at, "I", path)
        if at + 4 + count * item > len(self._buffer.data):
            self._buffer.fail(at, path, f"{count} elements of {item} bytes extend past the end of the data")
        self._buffer.spend(count * cost, at, path)
        return at + 4, count


@dataclass(frozen=True)
class ProgramFile:
    """A .pte. :func:`et_cuda_passes.delegate.plan.read_plans` decodes its methods.

    Attributes:
        plans: a table ``ExecutionPlan`` for each method.
        named_data: the data in the file by key.
        segments: the parts of the file behind the flatbuffer.
        inline_data: a table ``BackendDelegateInlineData`` for each payload inside the flatbuffer.
        constants: the segment of the constants, and where each of them begins in it.
        states: the same for each segment of initial states.
    """

    plans: tuple[Table, ...]
    named_data: dict[str, Span]
    segments: tuple[Span, ...]
    inline_data: tuple[Table, ...]
    constants: tuple[Span, tuple[int, ...]] | None
    states: tuple[tuple[Span, tuple[int, ...]] | None, ...]

    def stored(self, table: Table, part: int | None, index: int, size: int) -> Span:
        """The data of a tensor.

        Args:
            table: the tensor, for messages.
            part: the number of the segment of initial states; None for a constant.
            index: the index of the tensor in its segment.
            size: its bytes.

        Raises:
            DelegateError: the file has no such data.
        """
        parts = (self.constants,) if part is None else self.states[part : part + 1]
        found = parts[0] if parts else None
        if found is None:
            table.fail("the file has no segment with its data, which executorch 1.5 writes", "data_buffer_idx")
        segment, offsets = found
        if index >= len(offsets):
            table.fail(f"index {index} is out of range for {len(offsets)} tensors", "data_buffer_idx")
        if offsets[index] + size > segment.size:
            table.fail(
                f"it has {size} bytes from byte {offsets[index]} of a segment of {segment.size} bytes",
                "data_buffer_idx",
            )
        return Span(segment.file, segment.offset + offsets[index], size, f"the data of {table.name}")

    def payload(self, reference: Table) -> bytes | Span:
        """The payload that a table ``BackendDelegateDataReference`` refers to.

        Raises:
            DelegateError: the file has no such payload.
        """
        index, location = reference.integer(1, "I", "index"), reference.integer(0, "b", "location")
        if location not in (0, 1):
            reference.fail(f"location {location} is neither 0, the program, nor 1, a segment")
        if index >= (count := len(self.segments if location else self.inline_data)):
            reference.fail(f"index {index} is out of range for {count} payloads")
        return self.segments[index] if location else self.inline_data[index].blob(0, "data")


def read_pte(path: Path) -> ProgramFile:
    """Read a .pte except for its segments.

    Raises:
        DelegateError: the file is not a .pte, or it was shortened or damaged.
    """
    file = File(path)
    header = _read_header(file, b"ET12", "a .pte program of this version")
    size, base, limit = file.size, 0, 0
    if header.data[8:12] == b"eh00":
        length = header.number(12, "I", "the header's length")
        size, base = header.numbers(16, "QQ", "the header")
        limit = file.size - base if base else 0
        if length < 24:
            header.fail(12, "the header's length", f"{length} is less than the 24 bytes of a header")
        if length > 24:
            limit = min(limit, header.number(32, "Q", "the header's size of all segments"))
        if base and not size <= base <= file.size:
            header.fail(24, "the header's start of segments", f"it is {base}, in a file of {file.size} bytes")
    root = _read_root(file, size)
    segments = _read_segments(root, 4, file, base, limit)
    return ProgramFile(
        tuple(root.tables(1, "execution_plan")),
        _read_named_data(root, 7, segments),
        tuple(segments),
        tuple(root.tables(3, "backend_delegate_data")),
        None if (constants := root.table(5, "constant_segment")) is None else _read_offsets(constants, segments),
        tuple(_read_offsets(table, segments) for table in root.tables(6, "mutable_data_segments")),
    )


def read_ptd(path: Path) -> dict[str, Span]:
    """The data in a .ptd by key. The data itself is not read yet.

    Raises:
        DelegateError: the file is not a .ptd, or it was shortened or damaged.
    """
    file = File(path)
    header = _read_header(file, b"FT01", "a .ptd data file of this version")
    if header.data[8:12] != b"FH01":
        header.fail(8, "the header", "it does not begin with FH01")
    if (length := header.number(12, "I", "the header's length")) < 40:
        header.fail(12, "the header's length", f"{length} is less than the 40 bytes of a header")
    offset, size, base, limit = header.numbers(16, "QQQQ", "the header")
    if not offset + size <= base <= file.size:
        header.fail(32, "the header's start of segments", f"it is {base}, in a file of {file.size} bytes")
    root = _read_root(file, offset + size)
    return _read_named_data(root, 2, _read_segments(root, 1, file, base, min(limit, file.size - base)))


def _read_header(file: File, magic: bytes, kind: str) -> Reader:
    header = Reader(file.read(0, min(64, file.size), "the header"), str(file.path))
    if header.data[4:8] != magic:
        raise DelegateError(f"{file.path} is not {kind}: bytes 4 to 8 are {header.data[4:8]!r}, not {magic!r}")
    return header


def _read_root(file: File, size: int) -> Table:
    span = file.span(0, size, "the flatbuffer")
    if size > _MAX_FLATBUFFER:
        raise DelegateError(
            f"{file.path}: without its segments the file has {size} bytes, more than the {_MAX_FLATBUFFER} that are "
            "read. A program lowered for CUDA has its data in segments"
        )
    root = Flatbuffer(span.read(), str(file.path)).root()
    if version := root.integer(0, "I", "version"):
        root.fail(f"version {version} is newer than version 0, the only supported one")
    return root


def _read_segments(root: Table, field: int, file: File, base: int, limit: int) -> list[Span]:
    """The segments, whose offsets count from byte ``base`` and which end ``limit`` bytes later."""
    spans = []
    for table in root.tables(field, "segments"):
        offset, size = table.integer(0, "Q", "offset"), table.integer(1, "Q", "size")
        if offset + size > limit:
            table.fail(f"it has {size} bytes from byte {offset}, but all segments together have {limit} bytes")
        spans.append(file.span(base + offset, size, table.name))
    return spans


def _read_offsets(table: Table, segments: list[Span]) -> tuple[Span, tuple[int, ...]] | None:
    """A segment with tensors, and where each of them begins; None if there are no tensors."""
    offsets = table.integers(1, "Q", "offsets")
    if not offsets:
        return None
    index = table.integer(0, "I", "segment_index")
    if index >= len(segments):
        table.fail(f"segment {index} is out of range for {len(segments)} segments")
    return segments[index], offsets


def _read_named_data(root: Table, field: int, segments: list[Span]) -> dict[str, Span]:
    named_data: dict[str, Span] = {}
    for table in root.tables(field, "named_data"):
        key, index = table.text(0, "key"), table.integer(1, "I", "segment_index")
        if index >= len(segments):
            table.fail(f"{key!r} is in segment {index}, but there are only {len(segments)} segments")
        if key in named_data:
            table.fail(f"{key!r} occurs twice")
        named_data[key] = segments[index]
    return named_data
