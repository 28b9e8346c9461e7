"""Reads programs that ``torch.export.save`` wrote, and writes packed programs for lowering on another machine.

A packed program contains a record: the target, the report of its rewrite with the outcome of every layer, and, for the
cpu layout, the instruction set that it was packed for.
"""

import json
import logging
import mmap
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch.export import ExportedProgram

from et_cuda_passes.executorch import archive
from et_cuda_passes.executorch.checked_output import checked_output
from et_cuda_passes.executorch.errors import ModelError as ModelError
from et_cuda_passes.graph.decibels import decibels_from_json
from et_cuda_passes.graph.drawing import Drawing, DrawnNode, DrawnSizes
from et_cuda_passes.graph.report import STATUSES, LayerAccuracy, Outcome, OutputAccuracy, Reason, Report
from et_cuda_passes.ops import quantized_embedding
from et_cuda_passes.packed_cache import without_counts
from et_cuda_passes.plugins import RULES, TARGETS
from et_cuda_passes.targets import Target, get_target, import_plugins
from et_cuda_passes.targets.compatibility import (
    is_host_specific,
    packed_layouts,
    targets_supporting,
    unsupported_layouts,
)

_RECORD = "et_cuda_passes.json"
_OLD_KEYS = {"untaken": "rejected"}
"""Keys of a report that earlier versions wrote, with their names of today."""
_NEW_KEYS: dict[str, Any] = {
    "notes": [],
    "drawings": [],
    "accuracy": [],
    "output_accuracy": [],
    "tilings": "",
    "packages": {},
}
"""Keys of a report that earlier versions did not write, with their values."""
_NO_MEMORY = "can't allocate memory"
"""torch's error."""
_AGAIN = "export the model again and save it with torch.export.save(program, path)"


@dataclass(frozen=True)
class Model:
    """A program from a file.

    Attributes:
        program: the program as it was saved.
        packed: number of its operators that read packed int4 weights already, by layout.
        report: the report of the rewrite that packed it; None if :func:`save_packed` did not write the file.
    """

    program: ExportedProgram
    packed: Counter[str]
    report: Report | None


def load(path: Path | str, trust: bool = False, mapped: bool = False) -> ExportedProgram:
    """Read a program that ``torch.export.save`` wrote, without running code from the file.

    ``torch.export.load`` unpickles and evaluates parts of a file. This function first rejects a file that contains more
    than data; docs/reference/trust.md lists what a file may contain.

    Args:
        path: a .pt2.
        trust: skip the check, and pass the file to ``torch.export.load``.
        mapped: leave the tensors in the file, which is mapped into memory: the system reads a page when it is used, and
            can drop it again. The file must not be changed while the program is used; replacing it is no problem.

    Raises:
        ModelError: the file is missing, truncated or no exported program, or contains something that could run code.
    """
    return _read(Path(path), trust, mapped)[0]


def load_model(path: Path, target: str | Target, trust: bool = False, mapped: bool = False) -> Model:
    """Read a program for ``target``, as :func:`load` does.

    Raises:
        ModelError: as :func:`load`; or the program is packed for another target or for another instruction set than
            this host's.
    """
    program, text = _read(path, trust, mapped)
    try:
        record = json.loads(text or "{}")
        report = read_report(record["report"]) if record else None
        texts = [record[name] for name in record if name != "report"]
        if type(record) is not dict or not all(type(text) is str and text.isprintable() for text in texts):
            raise TypeError("the record has values that are no text")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} was packed by another version of et_cuda_passes: pack the original program again"
        ) from error
    model = Model(program, packed_layouts(program), report)
    _check_target(path, model, record, get_target(target))
    return model


def _read(path: Path, trust: bool, mapped: bool = False) -> tuple[ExportedProgram, str]:
    """The program and the text of its record, empty if it has none."""
    before = file_state(path)
    try:
        found = _read_once(path, trust, mapped)
    except ModelError:
        check_unchanged(path, before)  # a file that is being written looks damaged
        raise
    # Parts of two files would fit together if only the weights differ.
    check_unchanged(path, before)
    return found


def file_state(path: Path) -> tuple[int, ...] | None:
    """Inode, size and times of a file, which change when it is replaced or written; None if there is no file.

    A copy can keep the time of the content, also where all files have the same; the time of the change is the system's.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_unchanged(path: Path, before: tuple[int, ...] | None, replaced: bool = False) -> None:
    """Check that a file is as it was, or with ``replaced`` that it is, or is another file now.

    Raises:
        ModelError: it was written.
    """
    now = file_state(path)
    if now != before and not (replaced and (now is None or before is None or now[0] != before[0])):
        raise ModelError(f"{path} changed while it was read: run the command again when nothing writes to it")


def _read_once(path: Path, trust: bool, mapped: bool) -> tuple[ExportedProgram, str]:
    _check_kind(path, trust)
    # torch.export.load reads only the extra files whose names are in this dict.
    extra = {_RECORD: ""}
    logged: list[BaseException] = []
    try:
        with _opened(path, trust, mapped) as (file, left_out), quiet_load() as logged:
            program = torch.export.load(file, extra_files=extra)
            _map(program, path, left_out)
    except ModelError:
        raise
    except Exception as error:  # a damaged file raises any exception from torch.export.load
        if any(isinstance(each, MemoryError) or _NO_MEMORY in str(each) for each in (error, *logged)):
            raise MemoryError(f"{path} cannot be read: there is not enough memory") from error
        text = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{path} is damaged, or no program that torch {torch.__version__} reads ({type(error).__name__}: {text}): "
            f"{_AGAIN}"
        ) from error
    return program, extra[_RECORD]


def save_packed(program: ExportedProgram, report: Report, path: Path) -> None:
    """Write a rewritten program to ``path`` (.pt2), with the record that :func:`load_model` reads."""
    record = {
        "target": report.target,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # The same program is the same file, whatever a cache had.
        "report": replace(report, notes=without_counts(report.notes)).to_dict(),
    }
    with checked_output(path) as file:
        torch.export.save(program, file, extra_files={_RECORD: json.dumps(record)})


def _check_kind(path: Path, trust: bool) -> None:
    """Raise if ``path`` is no archive of an exported program, for which torch.export.load has no clear error."""
    if not path.exists():
        raise ModelError(f"{path} does not exist; MODEL is a .pt2 that torch.export.save wrote")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise ModelError(f"{path} is {kind}; MODEL is a .pt2 that torch.export.save wrote")
    try:
        names = _trusted_names(path) if trust else archive.member_names(path)
    except (archive.NoArchive, zipfile.BadZipFile):
        raise ModelError(f"{path} is no .pt2 file, or is only a part of one: {_AGAIN}") from None
    except archive.Refused as error:
        raise _distrust(path, error) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if any(name.startswith("models/") for name in names):
        return
    if any(name.startswith("data/aotinductor/") for name in names):
        raise ModelError(
            f"{path} is an AOTInductor package, which is compiled already: give the program that it was compiled from, "
            "as torch.export.save wrote it"
        )
    raise ModelError(f"{path} holds no exported program, or is only a part of a file: {_AGAIN}")


@contextmanager
def _opened(path: Path, trust: bool, mapped: bool = False) -> Iterator[tuple[Any, dict[str, archive.Span]]]:
    """The argument for torch.export.load: the checked file, or with ``trust`` the path. And what it leaves out.

    Registers the operators that the program calls.
    """
    if trust:
        with zipfile.ZipFile(path) as file:
            _register_operators(path, b"".join(file.read(name) for name in file.namelist() if "/models/" in name))
        yield path, {}
        return
    with ExitStack() as stack:
        try:
            checked = stack.enter_context(archive.checked(path, mapped))
        except archive.NoArchive:
            raise ModelError(f"{path} is no .pt2 file, or is only a part of one: {_AGAIN}") from None
        except archive.Refused as error:
            raise _distrust(path, error) from None
        _register_operators(path, checked.program)
        yield checked.file, checked.left_out


def _map(program: ExportedProgram, path: Path, left_out: dict[str, archive.Span]) -> None:
    """Replace the tensors that were left out by views of the mapped file; tied ones are one tensor."""
    if not left_out:
        return
    with path.open("rb") as file:
        # Private pages: a program that mutates a buffer does not change the file.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    views: dict[tuple[int, torch.dtype, torch.Size], torch.Tensor] = {}
    for table in (program.state_dict, program.constants):
        for name, old in [(name, old) for name, old in table.items() if name in left_out]:
            if old.nbytes != left_out[name].size:
                raise ValueError(f"{name} has {left_out[name].size} bytes in the file, and needs {old.nbytes}")
            key = (left_out[name].start, old.dtype, old.shape)
            if key not in views:
                flat = torch.frombuffer(memory, dtype=old.dtype, count=old.numel(), offset=key[0])
                views[key] = flat.view(old.shape)
            view = views[key]
            table[name] = torch.nn.Parameter(view, old.requires_grad) if isinstance(old, torch.nn.Parameter) else view


def _trusted_names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as file:
        return [name.partition("/")[2] for name in file.namelist()]


def _distrust(path: Path, error: archive.Refused) -> ModelError:
    return ModelError(
        f"{path}: {error}. It was not read, because reading it could run code that its author put there: {_AGAIN}; or, "
        "if you trust the source of the file, pass --trust (trust=True in Python)"
    )


_CALL = re.compile(rb'"target": ?"torch\.ops\.(\w+)\.(\w+)')


def _register_operators(path: Path, program: bytes) -> None:
    """Register the operators that the program calls: torch cannot read the program without them.

    They are ExecuTorch's, or those of the packages of plugins.

    Raises:
        ModelError: an operator is not registered.
    """
    if b"quantized_decomposed.embedding_" in program:
        quantized_embedding.register()
    if not _unregistered(program):
        return
    try:
        import_plugins()
    except ValueError as error:
        failed = f" ({error})"
    else:
        failed = ""
    if missing := _unregistered(program):
        namespaces = ", ".join(dict.fromkeys(name.partition("::")[0] for name in missing))
        raise ModelError(
            f"{path} calls {', '.join(missing)}, which no imported package registers{failed}: import the package that "
            f"registers the operators of {namespaces} (et-cuda-passes --import PACKAGE ...; import it in Python), "
            f"or install it with an entry point in the group {TARGETS} or {RULES}"
        )


def _unregistered(program: bytes) -> list[str]:
    """The operators that the program calls and that are not registered, as ``namespace::name``."""
    called = {(namespace.decode(), name.decode()) for namespace, name in _CALL.findall(program)}
    return [f"{space}::{name}" for space, name in sorted(called) if not hasattr(getattr(torch.ops, space), name)]


def _check_target(path: Path, model: Model, record: dict[str, Any], target: Target) -> None:
    foreign = unsupported_layouts(model.program, target)
    made_for = record.get("target") or (next(iter(targets_supporting(model.program)), "") if foreign else "")
    if foreign or made_for not in ("", target.name):
        what = f"packed ({', '.join(foreign)})" if foreign else "rewritten"
        # A program with the rewrites of two targets runs on neither.
        origin, instead = (f" for target {made_for}", f", or --target {made_for}") if made_for else ("", "")
        raise ModelError(
            f"{path} is {what}{origin}, which target {target.name} does not run: pass the program as it was before"
            f"{instead}"
        )
    here = torch.backends.cpu.get_cpu_capability()
    if is_host_specific(model.packed) and record.get("cpu_capability", here) != here:
        raise ModelError(
            f"{path} is packed for {record['cpu_capability']}, and this host has {here}; the cpu layout depends on the "
            "instruction set: pack the original program on this host"
        )


def read_report(data: dict[str, Any]) -> Report:
    """The inverse of :meth:`Report.to_dict`; malformed data raise any of the errors that :func:`load_model` catches."""
    outcomes = [
        Outcome(**{**outcome, "reasons": [Reason(**reason) for reason in outcome["reasons"]]})
        for outcome in data["outcomes"]
    ]
    applied = {name: count for name, count in data["counts"].items() if name not in STATUSES}
    data = _NEW_KEYS | {_OLD_KEYS.get(name, name): value for name, value in data.items()}
    read: dict[str, Any] = {
        "outcomes": outcomes,
        "applied": applied,
        "drawings": [_drawing(drawing) for drawing in data["drawings"]],
        "accuracy": tuple(LayerAccuracy(**_decibels(layer)) for layer in data["accuracy"]),
        "output_accuracy": tuple(OutputAccuracy(**_decibels(output)) for output in data["output_accuracy"]),
    }
    report = Report(**read, **{field.name: data[field.name] for field in fields(Report) if field.name not in read})
    _check_types(report)
    return report


def _decibels(data: dict[str, Any]) -> dict[str, Any]:
    return {key: decibels_from_json(value) for key, value in data.items()}


def _drawing(data: dict[str, Any]) -> Drawing:
    sides = {side: [DrawnNode(**node) for node in data[side]] for side in ("before", "after")}
    drawing = Drawing(**{**data, **sides, "sizes": [DrawnSizes(**sizes) for sizes in data["sizes"]]})
    for nodes in sides.values():
        # Each input stands after its reader, so that there is no cycle.
        ends = [position < source < len(nodes) for position, node in enumerate(nodes) for source in node.inputs]
        if not nodes or not all(ends):
            raise ValueError("a drawing has no nodes, or an edge to none")
    return drawing


def _check_types(value: Any) -> None:
    """Raise TypeError if a value in a report has another type than its field, or a text has control characters.

    A terminal interprets control characters as commands.
    """
    hints = get_type_hints(type(value))
    for field in fields(value):
        held, kind = getattr(value, field.name), hints[field.name]
        parts = list(held.items()) if isinstance(held, dict) else held if isinstance(held, list) else [held]
        if get_origin(kind) in (list, dict) and type(held) is not get_origin(kind):
            raise TypeError(f"{field.name} is no {kind}")
        for part in _leaves(parts):
            if is_dataclass(part):
                _check_types(part)
            elif type(part) not in _leaf_types(kind):
                raise TypeError(f"{field.name} has a {type(part).__name__}")
            elif isinstance(part, str) and not part.replace("\n", "").replace("\t", "").isprintable():
                raise TypeError(f"{field.name} has control characters")
    if isinstance(value, Outcome) and value.status not in STATUSES:
        raise TypeError(f"{value.status} is no status")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _leaf_types(kind: Any) -> set[type]:
    """The types of the leaves of ``kind``: str for a ``dict[str, list[str]]``."""
    if kind is None or kind is type(None):
        return {type(None)}
    if get_origin(kind) is Literal:
        return {str}
    inner = get_args(kind)
    return set().union(*map(_leaf_types, inner)) if inner else {kind}


class _Log(logging.Filter):
    """Keeps the exceptions that are logged, and drops what is below an error."""

    def __init__(self) -> None:
        super().__init__()
        self.exceptions: list[BaseException] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            self.exceptions.append(record.exc_info[1])
        return record.levelno >= logging.ERROR


@contextmanager
def quiet_load() -> Iterator[list[BaseException]]:
    """Suppress the log that torch.export.load writes before it raises, unless logging is at level DEBUG.

    Its log message for inputs other than tensors and containers is malformed, and prints a traceback. The list has the
    exceptions that it logs, of which the one that it raises says nothing.
    """
    log, found = logging.getLogger("torch.export"), _Log()
    levels = {
        "torch.export": logging.WARNING,
        "torch.export.pt2_archive": logging.ERROR,
        "torch._export": logging.ERROR,
    }
    logs = [logging.getLogger(name) for name in levels]
    before = [each.level for each in logs]
    quiet = log.getEffectiveLevel() > logging.DEBUG
    if quiet:
        log.addFilter(found)
        for each, level in zip(logs, levels.values(), strict=True):
            each.setLevel(level)
    try:
        yield found.exceptions
    finally:
        log.removeFilter(found)
        for each, level in zip(logs, before, strict=True):
            each.setLevel(level)
