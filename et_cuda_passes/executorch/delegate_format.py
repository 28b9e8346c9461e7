"""The files of a delegated program as data: a .pte's methods, and the named data in a .pte or .ptd.

Only what running delegates needs is read. Sources: ExecuTorch 1.5's schema (program.fbs, flat_tensor.fbs, whose order
of declaration numbers the fields) and headers (``_ExtendedHeader`` in exir/_serialize/_program.py, ``FlatTensorHeader``
in extension/flat_tensor/serialize/serialize.py).
"""

from dataclasses import dataclass
from pathlib import Path

from et_cuda_passes.executorch.delegate_bytes import DelegateError, File, Reader, Span
from et_cuda_passes.executorch.delegate_flatbuffer import Flatbuffer, Table
from et_cuda_passes.executorch.delegate_plan import Plan, read_plan

# A flatbuffer's distances are 31 bits.
_LONGEST = (1 << 31) - 1


@dataclass(frozen=True)
class DataFile:
    """A .ptd: named data."""

    named: dict[str, Span]


@dataclass(frozen=True)
class ProgramFile:
    """A .pte: methods by name, and named data."""

    plans: dict[str, Plan]
    named: dict[str, Span]


def read_pte(path: Path) -> ProgramFile:
    """Read a .pte, all but the segments.

    Raises:
        DelegateError: it is no .pte, or one that was cut or damaged.
    """
    file = File(path)
    head = _head(file, b"ET12", "a .pte program of this version")
    size, base, limit = file.size, 0, 0
    if head.data[8:12] == b"eh00":
        length = head.number(12, "I", "the header's length")
        size, base = head.numbers(16, "QQ", "the header")
        limit = file.size - base if base else 0
        if length < 24:
            head.fail(12, "the header's length", f"it is {length}, less than the header itself")
        if length > 24:
            limit = min(limit, head.number(32, "Q", "the header's size of all segments"))
        if base and not size <= base <= file.size:
            head.fail(24, "the header's start of segments", f"it is {base}, in a file of {file.size} bytes")
    root = _flatbuffer(file, size)
    segments = _segments(root, 4, file, base, limit)
    plans: dict[str, Plan] = {}
    inline = root.tables(3, "backend_delegate_data")

    def data_of(reference: Table) -> bytes | Span:
        index = reference.integer(1, "I", "index")
        in_segment = reference.integer(0, "b", "location")
        if in_segment not in (0, 1):
            reference.fail(f"location {in_segment} is neither in the program nor in a segment")
        if index >= len(segments if in_segment else inline):
            reference.fail(f"index {index}, of {len(segments if in_segment else inline)}")
        return segments[index] if in_segment else inline[index].blob(0, "data")

    for table in root.tables(1, "execution_plan"):
        plan = read_plan(table, data_of)
        if plan.name in plans:
            table.fail(f"a second method is called {plan.name!r}")
        plans[plan.name] = plan
    return ProgramFile(plans, _named(root, 7, segments))


def read_ptd(path: Path) -> DataFile:
    """Read a .ptd, all but the segments.

    Raises:
        DelegateError: it is no .ptd, or one that was cut or damaged.
    """
    file = File(path)
    head = _head(file, b"FT01", "a .ptd data file of this version")
    if head.data[8:12] != b"FH01":
        head.fail(8, "the header", "it does not begin with FH01")
    if (length := head.number(12, "I", "the header's length")) < 40:
        head.fail(12, "the header's length", f"it is {length}, less than the header itself")
    offset, size, base, limit = head.numbers(16, "QQQQ", "the header")
    if not offset + size <= base <= file.size:
        head.fail(32, "the header's start of segments", f"it is {base}, in a file of {file.size} bytes")
    root = _flatbuffer(file, offset + size)
    return DataFile(_named(root, 2, _segments(root, 1, file, base, min(limit, file.size - base))))


def _head(file: File, magic: bytes, what: str) -> Reader:
    head = Reader(file.read(0, min(64, file.size), "the header"), str(file.path))
    if head.data[4:8] != magic:
        raise DelegateError(f"{file.path} is not {what}: bytes 4 to 8 are {head.data[4:8]!r}, not {magic!r}")
    return head


def _flatbuffer(file: File, size: int) -> Table:
    if size > _LONGEST:
        raise DelegateError(f"{file.path}: the header says that the program is {size} bytes long, which none can be")
    root = Flatbuffer(file.span(0, size, "the program").read(), str(file.path)).root()
    if version := root.integer(0, "I", "version"):
        root.fail(f"version {version} is newer than version 0, which this reader knows")
    return root


def _segments(root: Table, field: int, file: File, base: int, limit: int) -> list[Span]:
    spans = []
    for table in root.tables(field, "segments"):
        offset, size = table.integer(0, "Q", "offset"), table.integer(1, "Q", "size")
        if offset + size > limit:
            table.fail(f"{size} bytes from {offset} on, and all segments together have {limit} bytes")
        spans.append(file.span(base + offset, size, table.name))
    return spans


def _named(root: Table, field: int, segments: list[Span]) -> dict[str, Span]:
    named: dict[str, Span] = {}
    for table in root.tables(field, "named_data"):
        key, index = table.text(0, "key"), table.integer(1, "I", "segment_index")
        if index >= len(segments):
            table.fail(f"{key!r} is in segment {index}, of {len(segments)}")
        if key in named:
            table.fail(f"{key!r} is there twice")
        named[key] = segments[index]
    return named
