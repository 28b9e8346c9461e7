"""Checks the JSON members of a .pt2, the graph and the tables of weights, against torch's own schema.

The schema lists the fields and their types. A value of another type, or an additional field, is rejected.
:mod:`et_cuda_passes.executorch.archive_texts` checks the texts.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE
from torch._export.serde.union import _Union

from et_cuda_passes.executorch.archive_standins import fits
from et_cuda_passes.executorch.archive_texts import OBJECTS, Rule, check_key, rule_of
from et_cuda_passes.executorch.archive_tree import read_json
from et_cuda_passes.executorch.archive_zip import Refused

_MOST_DEPTH = 200


def check_program(data: bytes) -> bytes:
    """Reject a ``models/model.json`` in which a text could become code.

    Returns:
        ``data``. If a traceback contains ``)"``, a space is inserted between the two characters, since Inductor can
        write tracebacks into raw strings of C++, which ``)"`` ends.

    Raises:
        Refused: the message names the field and its value.
    """
    program = read_json(data)
    _Walk().check(schema.ExportedProgram, program, "")
    changed = [_split_raw_string_end(node["metadata"]) for node in _nodes(program["graph_module"]["graph"])]
    return json.dumps(program).encode() if any(changed) else data


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """The nodes of a graph and of its subgraphs."""
    if isinstance(value, dict):
        yield from value.get("nodes", ())
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(item)


def _split_raw_string_end(metadata: dict[str, str]) -> bool:
    trace = metadata.get("stack_trace", "")
    if ')"' in trace:
        metadata["stack_trace"] = trace.replace(')"', ') "')
    return ')"' in trace


def check_payloads(data: bytes, records: Mapping[str, int], prefix: str) -> frozenset[str]:
    """Reject a table of weights or constants whose tensors are not in ``records`` (bytes by member name).

    Returns:
        The members that are pickles.

    Raises:
        Refused: as above, or an entry is no tensor.
    """
    table = read_json(data)
    _Walk().check(schema.PayloadConfig, table, "")
    pickled: set[str] = set()
    raw: dict[str, tuple[str, dict[str, Any]]] = {}
    for fqn, payload in table.get("config", {}).items():
        record, meta = payload["path_name"], payload["tensor_meta"]
        if not re.fullmatch(re.escape(prefix) + r"\d+", record):
            raise Refused(f"{fqn} is in {record}, which is no tensor (an object of Python or TorchScript?)")
        if record not in records:
            raise Refused(f"{fqn} is in {record}, which the archive does not hold")
        if payload["use_pickle"]:
            pickled.add(record)
            continue
        if meta is None:
            raise Refused(f"{fqn} has no shape")
        raw.setdefault(record, (fqn, meta))
        _check_tensor(fqn, meta, raw[record][1], records[record])
    return frozenset(pickled)


def check_tensor_meta(value: object) -> None:
    """Reject the description of a fake tensor in which a text could become code."""
    _Walk().check(schema.TensorMeta, value, "")


def _check_tensor(fqn: str, meta: dict[str, Any], first: dict[str, Any], nbytes: int) -> None:
    """Reject a tensor that exceeds its record. A record has the dtype of its first tensor."""
    size, stride = ([value.get("as_int") for value in meta[name]] for name in ("sizes", "strides"))
    dtype = _DTYPES.get(first["dtype"])
    if dtype is None:
        raise Refused(f"{fqn} has no dtype that torch knows")
    if not fits(size, stride, meta["storage_offset"].get("as_int"), nbytes // dtype.itemsize):
        raise Refused(f"{fqn} of {size} needs more data than the {nbytes:,} bytes of its record")


_DTYPES = {int(number): dtype for number, dtype in _SERIALIZE_TO_TORCH_DTYPE.items()}


class _Walk:
    """Compares a value with a class of torch's schema, and checks the texts in it."""

    def __init__(self) -> None:
        self._fields: dict[type, dict[str, tuple[Any, bool]]] = {}

    def check(self, kind: Any, value: Any, place: str, depth: int = 0, rule: Rule | None = None) -> None:
        """Reject ``value`` unless it is a ``kind`` of the schema and ``rule`` accepts its texts."""
        if depth > _MOST_DEPTH:
            raise Refused(f"{place[:80]} is nested too deeply")
        if isinstance(kind, str):
            kind = getattr(schema, kind)
        elif isinstance(kind, typing.ForwardRef):
            kind = getattr(schema, kind.__forward_arg__)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Annotated:
            self.check(arguments[0], value, place, depth, rule)
        elif origin in (typing.Union, types.UnionType):
            if value is not None:
                self.check(arguments[0], value, place, depth, rule)
        elif origin is list:
            _expect(isinstance(value, list), place, "a list")
            for index, item in enumerate(value):
                self.check(arguments[0], item, f"{place}[{index}]", depth + 1, rule)
        elif origin is dict:
            _expect(isinstance(value, dict), place, "an object")
            for key, item in value.items():
                check_key(key, place)
                self.check(arguments[1], item, f"{place}.{key}", depth + 1)
        elif dataclasses.is_dataclass(kind):
            self._check_fields(typing.cast(type, kind), value, place, depth)
        elif issubclass(kind, IntEnum):
            _expect(type(value) is int and value in kind._value2member_map_, place, f"a {kind.__name__}")
        elif kind is float:
            _expect(type(value) in (int, float) or value in ("Infinity", "-Infinity", "NaN"), place, "a number")
        else:
            _expect(type(value) is kind, place, f"a {kind.__name__}")
            if kind is int:
                _expect(abs(value) < 2**64, place, "an integer of 64 bits")
            elif kind is str and rule is not None:
                rule(value, place)

    def _check_fields(self, kind: type, value: Any, place: str, depth: int) -> None:
        _expect(isinstance(value, dict), place, "an object")
        if kind not in self._fields:
            hints = typing.get_type_hints(kind, globalns=vars(schema))
            self._fields[kind] = {
                field.name: (hints[field.name], field.default is field.default_factory is dataclasses.MISSING)
                for field in dataclasses.fields(kind)
            }
        fields = self._fields[kind]
        if issubclass(kind, _Union):
            _expect(len(value) == 1, place, "one alternative")
        elif missing := [name for name, (_, needed) in fields.items() if needed and name not in value]:
            raise Refused(f"{place or kind.__name__} lacks {missing[0]}")
        for name, item in value.items():
            if name not in fields:
                raise Refused(
                    f"{place or kind.__name__} has a field {name!r} that torch {torch.__version__} does not know"
                )
            where = f"{place}.{name}" if place else name
            self.check(fields[name][0], item, where, depth + 1, rule_of(kind.__name__, name))
            if item is not None and (check := OBJECTS.get((kind.__name__, name))):
                check(item, where)


def _expect(holds: bool, place: str, what: str) -> None:
    if not holds:
        raise Refused(f"{place or 'it'} is not {what}")
