"""Files of delegated programs: read as ExecuTorch reads them, and refused if they are damaged."""

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import flatbuffers
import pytest
from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.delegate import DelegateError, Program
from et_cuda_passes.delegate.files import Flatbuffer, read_ptd
from tests.delegate.delegated import PART, read_program, small, with_operators, write, write_with_operators


def test_data_matches_the_deserializer_of_executorch(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()}).with_suffix(".ptd")
    theirs = FlatTensorSerializer().deserialize(path.read_bytes())
    ours = read_ptd(path)
    assert len(ours) == 2
    assert {key: b"".join(span.chunks()) for key, span in ours.items()} == {
        key: theirs.buffers[entry.buffer_index] for key, entry in theirs.named_data.items()
    }


def outcome(path: Path) -> str:
    """Whether the files are read or refused. Any other exception fails the test."""
    try:
        read_program(path)
    except DelegateError:
        return "refused"
    return "read"


@pytest.fixture(scope="module", params=[small, with_operators])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("whole")
    path = write(folder, {"forward": small()}) if request.param is small else write_with_operators(folder)
    assert outcome(path) == "read"
    return path, {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".pte", ".ptd")}


Whole = tuple[Path, dict[str, bytes]]


def with_damage(whole: Whole, suffix: str, versions: Iterator[bytes]) -> list[str]:
    """The outcome for each version of one of the two files, which is restored afterwards."""
    path, contents = whole
    outcomes = []
    try:
        for version in versions:
            path.with_suffix(suffix).write_bytes(version)
            outcomes.append(outcome(path))
    finally:
        path.with_suffix(suffix).write_bytes(contents[suffix])
    return outcomes


@pytest.mark.parametrize("suffix", [".pte", ".ptd"])
def test_file_shortened_anywhere_is_refused(suffix: str, whole: Whole) -> None:
    content = whole[1][suffix]
    outcomes = with_damage(whole, suffix, (content[:size] for size in range(len(content))))
    assert set(outcomes) == {"refused"}


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".pte", ".ptd"])
def test_file_with_any_flipped_bit_is_read_or_refused(suffix: str, bits: int, whole: Whole) -> None:
    content = whole[1][suffix]
    # One bit of each byte, another one in each run, or all.
    places = ((at, bit) for at in range(len(content)) for bit in random.sample(range(8), bits))
    versions = (content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :] for at, bit in places)
    # A flip in padding, in an unused name or in weights changes no structure.
    assert set(with_damage(whole, suffix, versions)) == {"refused", "read"}


@pytest.mark.parametrize("suffix", [".pte", ".ptd"])
def test_file_with_extreme_numbers_anywhere_is_read_or_refused(suffix: str, whole: Whole) -> None:
    content = whole[1][suffix]
    extremes = [struct.pack("<I", number) for number in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)]
    versions = (content[:at] + word + content[at + 4 :] for at in range(0, len(content) - 3, 4) for word in extremes)
    assert "refused" in with_damage(whole, suffix, versions)


@given(patches=st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6))
def test_file_with_several_patches_is_read_or_refused(whole: Whole, patches: list[tuple[int, bytes]]) -> None:
    for suffix, content in whole[1].items():
        patched = bytearray(content)
        for at, patch in patches:
            at %= len(content)
            patched[at : at + len(patch)] = patch
        with_damage(whole, suffix, iter([bytes(patched)]))


def test_flatbuffer_with_overlapping_parts_is_refused() -> None:
    # A root table with 10,000 references to one table of 10,000 numbers: 80 KB that describe 400 MB of numbers.
    many = 10_000
    vtable = struct.pack("<HHH", 6, 8, 4)
    root = struct.pack("<iI", 6, 4)
    head = struct.pack("<I", 10) + vtable + root
    inner = len(head) + 4 + 4 * many + len(vtable)
    start = len(head) + 4
    references = b"".join(struct.pack("<I", inner - (start + 4 * index)) for index in range(many))
    numbers = struct.pack("<iI", 6, 4) + struct.pack(f"<I{many}I", many, *range(many))
    buffer = Flatbuffer(head + struct.pack("<I", many) + references + vtable + numbers, "made.pte")
    tables = buffer.root().tables(0, "parts")
    assert len(tables) == many
    assert tables[0].integers(0, "I", "numbers") == tuple(range(many))
    with pytest.raises(DelegateError, match="its parts overlap"):
        [table.integers(0, "I", "numbers") for table in tables]


@pytest.mark.parametrize("count", [150, 10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_repeated_references_are_refused_in_bounded_time_and_memory(count: int, tmp_path: Path) -> None:
    # The methods, chains and instructions are references to one table each: `count` to the power of 3 instructions.
    builder = flatbuffers.Builder()
    builder.StartObject(0)
    jump = builder.EndObject()
    builder.StartObject(2)
    builder.PrependUint8Slot(0, 4, 0)
    builder.PrependUOffsetTRelativeSlot(1, jump, 0)
    table = builder.EndObject()
    for fields, field in ((4, 2), (9, 5), (8, 1)):
        builder.StartVector(4, count, 4)
        for _ in range(count):
            builder.PrependUOffsetTRelative(table)
        vector = builder.EndVector()
        builder.StartObject(fields)
        builder.PrependUOffsetTRelativeSlot(field, vector, 0)
        table = builder.EndObject()
    builder.Finish(table, b"ET12")
    path = tmp_path / "model.pte"
    path.write_bytes(builder.Output())
    start = time.process_time()
    with pytest.raises(DelegateError, match="its parts overlap"):
        Program(path)
    assert time.process_time() - start < 3
    tracemalloc.start()
    with pytest.raises(DelegateError, match="its parts overlap"):
        Program(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20


def test_large_flatbuffer_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    size = 1 << 31
    path.write_bytes(struct.pack("<I4s4sIQQ", 32, b"ET12", b"eh00", 24, size, size))
    os.truncate(path, size)
    with pytest.raises(DelegateError, match=f"without its segments the file has {size} bytes, more than the"):
        Program(path)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()})
    for name, content in (
        ("empty", b""),
        ("text", b"no program at all"),
        ("data", path.with_suffix(".ptd").read_bytes()),
    ):
        other = tmp_path / f"{name}.pte"
        other.write_bytes(content)
        with pytest.raises(DelegateError, match=rf"{name}.pte is not a .pte program of this version: bytes 4 to 8 are"):
            Program(other)
    with pytest.raises(DelegateError, match="is not a .ptd data file"):
        Program(path, path)
    for missing in (tmp_path / "missing.pte", tmp_path):
        with pytest.raises(DelegateError, match="cannot be read"):
            Program(missing)
    with pytest.raises(DelegateError, match="cannot be read"):
        Program(path, tmp_path / "missing.ptd")


def test_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()})
    first, _ = read_ptd(path.with_suffix(".ptd"))
    payload = DataPayload([b"1", b"2"], {first: DataEntry(0, 1, None), PART.key: DataEntry(1, 1, None)})
    data = tmp_path / "both.ptd"
    data.write_bytes(bytes(FlatTensorSerializer().serialize(payload)))
    with pytest.raises(DelegateError, match=f"both have data '{PART.key}'"):
        Program(path, data)
    twin = DataPayload([b"1", b"2"], {"aa": DataEntry(0, 1, None), "ab": DataEntry(1, 1, None)})
    data.write_bytes(bytes(FlatTensorSerializer().serialize(twin)).replace(b"ab", b"aa"))
    with pytest.raises(DelegateError, match="'aa' occurs twice"):
        Program(path, data)
