"""Checks a .pt2 before torch reads it, so that nothing in the file decides which code runs.

``torch.export.load`` unpickles, evaluates expressions and looks up functions and classes by names in the file. Here
every member is checked first. torch then reads an archive that contains the checked bytes under new headers. JSON and
pickles are read once, into memory; tensor data stay in the file.
"""

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from et_cuda_passes.executorch.archive_pickle import check_pickle
from et_cuda_passes.executorch.archive_program import check_payloads, check_program, check_tensor_meta
from et_cuda_passes.executorch.archive_zip import (
    Content,
    Contents,
    NoArchive,
    Refused,
    Span,
    read_all,
    read_zip,
    write_zip,
)

__all__ = ["NoArchive", "Refused", "Span", "checked", "member_names"]

_PROGRAM = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
# Raw tensors, or one pickle of all of them, as torch before 2.10 wrote it.
_FOLDERS = {
    "data/weights/": ("weight_", "model_weights_config.json"),
    "data/constants/": ("tensor_", "model_constants_config.json"),
}
_OTHERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.format_version|\.storage_alignment|\.data/(version|serialization_id)"
)
_INNER = re.compile(
    r"byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data\.pkl|data/\d+"
)
_LONGEST_JSON = 1 << 30
_LONGEST_PICKLE = 16 << 20
_LONGEST_TEXT = 1 << 10
_ALIGNMENT = 8
"""Bytes of the widest real number."""


class Checked(NamedTuple):
    """A file for ``torch.export.load``, the program's JSON in it, and the tensors that the file leaves out.

    ``torch.export.load`` creates zeros for those, which take no memory until they are read.
    """

    file: io.RawIOBase
    program: bytes
    left_out: dict[str, Span]


def member_names(path: Path) -> list[str]:
    """The names of the members, without their common folder.

    Raises:
        NoArchive: the file is no ZIP file, or is truncated.
        Refused: the ZIP file is not of the form that ``torch.export.save`` writes.
    """
    with path.open("rb") as file:
        return list(read_zip(file, _whole(file)))


@contextmanager
def checked(path: Path, leave_out: bool = False) -> Iterator[Checked]:
    """The checked content of ``path``, from which ``torch.export.load`` runs no code.

    With ``leave_out`` it lacks the bytes of the tensors, where each is the whole of its record.

    Raises:
        NoArchive: the file is no ZIP file, or is truncated.
        Refused: the file contains something that ``torch.export.save`` does not write or that could run code; the
            message names the member.
    """
    with path.open("rb") as file:
        members = read_zip(file, _whole(file))
        content = {name: _checked(file, name, span) for name, span in members.items()}
        for needed in (_PROGRAM, _INPUTS):
            if needed not in members:
                raise Refused(f"it has no member {needed}")
        for folder, (prefix, table) in _FOLDERS.items():
            _check_folder(file, members, content, folder, prefix, table)
        program = b"".join(part for part in content[_PROGRAM] if isinstance(part, bytes))
        left_out = _leave_out(content) if leave_out else {}
        yield Checked(Contents(file, write_zip(content)), program, left_out)


def _leave_out(content: dict[str, Content]) -> dict[str, Span]:
    """Empty the records of tensors, and return where in the file each tensor is, by its FQN."""
    found: dict[str, Span] = {}
    for folder, (_, table) in _FOLDERS.items():
        if folder + table not in content:
            continue
        text = b"".join(part for part in content[folder + table] if isinstance(part, bytes))
        records: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for fqn, entry in json.loads(text)["config"].items():
            records.setdefault(entry["path_name"], []).append((fqn, entry))
        for record, entries in records.items():
            spans = content.get(folder + record, ())
            forms = {(entry["tensor_meta"] or {}).get("dtype") for _, entry in entries}
            sizes = {str((entry["tensor_meta"] or {}).get("sizes")) for _, entry in entries}
            whole = len(forms) == len(sizes) == 1 and all(_is_whole(entry) for _, entry in entries)
            if whole and len(spans) == 1 and isinstance(spans[0], Span) and spans[0].start % _ALIGNMENT == 0:
                found.update((fqn, spans[0]) for fqn, _ in entries)
                content[folder + record] = ()
    return found


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether a tensor on the CPU is contiguous and begins where its record does."""
    meta = entry["tensor_meta"]
    if entry["use_pickle"] or meta is None or meta["device"]["type"] != "cpu":
        return False
    sizes, strides = ([each["as_int"] for each in meta[name]] for name in ("sizes", "strides"))
    return meta["storage_offset"]["as_int"] == 0 and strides == list(_contiguous_strides(sizes)) and 0 not in sizes


def _contiguous_strides(sizes: Sequence[int]) -> Iterator[int]:
    """The strides of a contiguous tensor."""
    for axis in range(len(sizes)):
        yield math.prod(sizes[axis + 1 :])


def _whole(file: BinaryIO) -> Span:
    return Span(0, file.seek(0, io.SEEK_END))


def _checked(file: BinaryIO, name: str, span: Span) -> Content:
    """The checked content of member ``name``. Tensors in a folder are checked with the folder's table."""
    with _naming(name):
        if name == _PROGRAM:
            return (check_program(read_all(file, (span,), _LONGEST_JSON, name)),)
        if name == _INPUTS or name in ("data/weights/model.pt", "data/constants/model.pt"):
            return _pickled(file, span, tensor=False) if span.size else ()
        for folder, (prefix, table) in _FOLDERS.items():
            if re.fullmatch(re.escape(folder + prefix) + r"\d+", name):
                return (span,)
            if name == folder + table:
                return (read_all(file, (span,), _LONGEST_JSON, name),)
        if name.startswith("extra/"):
            return (span,)
        if _OTHERS.fullmatch(name):
            return (read_all(file, (span,), _LONGEST_TEXT, name),)
        if name.startswith("data/constants/"):
            raise Refused("it is an object of Python or TorchScript, and reading it runs code")
        raise Refused("torch.export.save writes no such member")


def _check_folder(
    file: BinaryIO, members: dict[str, Span], content: dict[str, Content], folder: str, prefix: str, table: str
) -> None:
    """Check a table of tensors and its tensors, and replace pickles in ``content`` by the checked ones."""
    if folder + table not in members:
        if folder + "model.pt" not in members:
            raise Refused(f"it has no member {folder + table}")
        return
    records = {name.removeprefix(folder): span.size for name, span in members.items() if name.startswith(folder)}
    with _naming(folder + table):
        pickled = check_payloads(
            b"".join(part for part in content[folder + table] if isinstance(part, bytes)), records, prefix
        )
    for record in sorted(pickled):
        with _naming(folder + record):
            content[folder + record] = _pickled(file, members[folder + record], tensor=True)


def _pickled(file: BinaryIO, span: Span, *, tensor: bool) -> Content:
    """The checked content of a file that ``torch.save`` wrote, with new headers."""
    try:
        members = read_zip(file, span)
    except NoArchive:
        raise Refused("it is no file of torch.save, or one in a form from before torch 1.6") from None
    for name in members:
        if not _INNER.fullmatch(name):
            raise Refused(f"torch.save writes no member {name} into it")
    if "data.pkl" not in members:
        raise Refused("it contains no pickle")
    storages = {name.removeprefix("data/"): span.size for name, span in members.items() if name.startswith("data/")}
    data = read_all(file, (members["data.pkl"],), _LONGEST_PICKLE, "data.pkl")
    check_pickle(data, storages, check_tensor_meta, tensor=tensor)
    content: dict[str, Content] = {}
    for name, inner in members.items():
        is_tensor = name.startswith("data/")
        content[name] = (inner,) if is_tensor else (read_all(file, (inner,), _LONGEST_PICKLE, name),)
    content["data.pkl"] = (data,)
    return write_zip(content)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Add the name of the member to the message of a refusal."""
    try:
        yield
    except Refused as error:
        raise Refused(f"member {name}: {error}") from None
