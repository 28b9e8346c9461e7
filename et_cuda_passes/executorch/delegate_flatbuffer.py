"""A checked reader of flatbuffers, for files that may be cut, flipped or made up.

The layout is that of the FlatBuffers format (https://flatbuffers.dev/internals): a table begins with the signed
distance back to its vtable, which holds its own size, the table's size and each field's offset; strings, vectors and
tables are reached by unsigned distances forward. Field numbers are the order of declaration in the schema.
"""

import struct
from typing import NamedTuple

from et_cuda_passes.executorch.delegate_bytes import Reader


class Flatbuffer(Reader):
    """A flatbuffer's bytes, and how much of them may still be read.

    Distances may point anywhere, so that a small file can describe a large tree by having parts share bytes. What a
    serializer writes shares no more than vtables and strings: reading several times what the file holds is an error.
    """

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(data, where)
        self._left = 4 * len(data)

    def spend(self, amount: int, at: int, what: str) -> None:
        """Count ``amount`` bytes as read."""
        self._left -= amount
        if self._left < 0:
            self.fail(at, what, "more is read than the file holds, because its parts overlap")

    def root(self) -> "Table":
        """The table that the file opens with."""
        return Table(self, self.number(0, "I", "root"), "root")


class Union(NamedTuple):
    """A union's type, as its number in the schema, and its table; None where the type has none or it is absent."""

    kind: int
    table: "Table | None"


class Table:
    """One table. Fields that are absent have the schema's default: 0, no text, no elements."""

    def __init__(self, buffer: Flatbuffer, at: int, name: str) -> None:
        self._buffer, self._at, self.name = buffer, at, name
        buffer.spend(4, at, name)
        self._vtable = at - buffer.number(at, "i", name)
        self._vtable_size, size = buffer.numbers(self._vtable, "HH", f"the vtable of {name}")
        if self._vtable_size < 4 or self._vtable_size % 2 or size < 4:
            buffer.fail(self._vtable, f"the vtable of {name}", "its sizes are no sizes of a vtable and a table")
        buffer.numbers(self._vtable, f"{self._vtable_size}x", f"the vtable of {name}")
        buffer.numbers(at, f"{size}x", name)
        self._size = size

    def fail(self, problem: str, field: str = "") -> None:
        """Raise a :class:`DelegateError` that names this table, or a field of it."""
        self._buffer.fail(self._at, self._path(field) if field else self.name, problem)

    def integer(self, field: int, form: str, name: str, default: int = 0) -> int:
        """A number of ``struct`` form ``form``."""
        at = self._find(field, struct.calcsize(f"<{form}"), name)
        return default if at is None else self._buffer.number(at, form, self._path(name))

    def real(self, field: int, name: str) -> float:
        """A double."""
        at = self._find(field, 8, name)
        return 0.0 if at is None else float(self._buffer.numbers(at, "d", self._path(name))[0])

    def text(self, field: int, name: str) -> str:
        """A string."""
        at, size = self._vector(field, 1, name)
        return self._buffer.text(at, size, self._path(name))

    def blob(self, field: int, name: str) -> bytes:
        """A vector of bytes."""
        at, size = self._vector(field, 1, name)
        return self._buffer.data[at : at + size]

    def integers(self, field: int, form: str, name: str) -> tuple[int, ...]:
        """A vector of numbers of ``struct`` form ``form``."""
        at, count = self._vector(field, struct.calcsize(f"<{form}"), name)
        return self._buffer.numbers(at, f"{count}{form}", self._path(name))

    def table(self, field: int, name: str) -> "Table | None":
        """A table."""
        at = self._target(field, name)
        return None if at is None else Table(self._buffer, at, self._path(name))

    def tables(self, field: int, name: str) -> list["Table"]:
        """A vector of tables."""
        at, count = self._vector(field, 4, name)
        path = self._path(name)
        places = range(at, at + 4 * count, 4)
        return [
            Table(self._buffer, place + self._buffer.number(place, "I", path), f"{path}[{index}]")
            for index, place in enumerate(places)
        ]

    def union(self, field: int, name: str) -> Union:
        """A union: its type is field ``field``, its table the one after."""
        return Union(self.integer(field, "B", f"{name}'s type"), self.table(field + 1, name))

    def _path(self, name: str) -> str:
        return name if self.name == "root" else f"{self.name}.{name}"

    def _find(self, field: int, size: int, name: str) -> int | None:
        """Where a field's own bytes lie; None where it is absent."""
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
        at = self._find(field, 4, name)
        return None if at is None else at + self._buffer.number(at, "I", self._path(name))

    def _vector(self, field: int, item: int, name: str) -> tuple[int, int]:
        """The first element and the number of elements, all within the data."""
        at = self._target(field, name)
        if at is None:
            return 0, 0
        path = self._path(name)
        count = self._buffer.number(at, "I", path)
        if at + 4 + count * item > len(self._buffer.data):
            self._buffer.fail(at, path, f"{count} elements of {item} bytes go past the end of the data")
        self._buffer.spend(4 + count * item, at, path)
        return at + 4, count
