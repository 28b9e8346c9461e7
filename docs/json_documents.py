"""The page and the JSON Schema of the documents that commands print with ``--json``."""

import dataclasses
import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docs.markdown import described, docstring, table
from et_cuda_passes.cli.documents import DOCUMENTS, Decibels, Document, QuantizationData, ReportData
from et_cuda_passes.graph.report import LayerAccuracy, OutputAccuracy, Report
from et_cuda_passes.hf.report import QuantizationReport

_DATA = {ReportData: Report, QuantizationData: QuantizationReport}
"""The classes whose ``to_dict()`` a document contains."""
_COUNTS = "the number of candidates by status, and how often each rule acted"


def record_fields(cls: type) -> dict[str, tuple[Any, str]]:
    """The type and the meaning of each key of a JSON object."""
    hints, meanings = get_type_hints(cls), described(cls)[1]
    found = {field.name: (hints[field.name], meanings.get(field.name, "")) for field in dataclasses.fields(cls)}
    if cls is Report:  # to_dict() has the applied rules among the counts
        del found["applied"]
        found["counts"] = (dict[str, int], _COUNTS)
    if cls in (LayerAccuracy, OutputAccuracy):  # JSON has no infinite numbers
        found = {name: (Decibels if name.endswith("_db") else each, text) for name, (each, text) in found.items()}
    return found


def records_in(annotation: Any) -> Iterator[type]:
    """The classes of the JSON objects in a type, each after those that contain it."""
    cls = _DATA.get(annotation, annotation)
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        yield cls
        for inner, _ in record_fields(cls).values():
            yield from records_in(inner)
    for argument in get_args(annotation):
        yield from records_in(argument)


def json_schema(annotation: Any) -> dict[str, Any]:
    """The JSON Schema of a type; that of a class is a reference."""
    cls = _DATA.get(annotation, annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        return {"$ref": f"#/$defs/{cls.__name__}"}
    if annotation is Any:
        return {}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [json_schema(each) for each in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": json_schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": json_schema(arguments[1])}
    names = {str: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}
    return {"type": names[annotation]}


def record_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema of a class. Later versions of the package may add keys."""
    properties = {}
    if issubclass(cls, Document):
        properties["schema"] = {"const": cls.schema()}
    for name, (annotation, meaning) in record_fields(cls).items():
        properties[name] = json_schema(annotation) | ({"description": meaning} if meaning else {})
    about = docstring(cls)[0]
    return {"type": "object", "description": about, "properties": properties, "required": list(properties)}


def schemas_json() -> str:
    """The JSON Schema of the documents that commands print with ``--json``."""
    records = dict.fromkeys(cls for document in DOCUMENTS for cls in records_in(document))
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The JSON documents of et-cuda-passes",
        "oneOf": [{"$ref": f"#/$defs/{document.__name__}"} for document in DOCUMENTS],
        "$defs": {cls.__name__: record_schema(cls) for cls in records},
    }
    return json.dumps(schema, indent=2) + "\n"


def json_type(annotation: Any) -> str:
    """A type as a reader of JSON names it."""
    cls = _DATA.get(annotation, annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        return f"[{cls.__name__}](#{cls.__name__.lower()})"
    if annotation is Any:
        return "any"
    if origin is Literal:
        return " or ".join(f'"{each}"' for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(json_type(each) for each in arguments)
    if origin in (list, tuple):
        return f"array of {json_type(arguments[0])}"
    if origin is dict:
        return f"object of {json_type(arguments[1])}"
    names = {str: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}
    return names[annotation]


def json_page() -> str:
    """The documents of ``--json``, key by key."""
    parts = [
        "# JSON documents",
        "With `--json` a command prints one JSON document on stdout, and nothing else there. Progress, warnings and "
        "errors go to stderr. The exit code is the same as without `--json`.",
        "```sh\net-cuda-passes explain model.pt2 --target cpu --json | python -m json.tool\n```",
        "The key `schema` has the name of the document and its version, such as `et-cuda-passes.explain/1`. A later "
        "release may add keys to a document. It gets a new version if a key is renamed, removed or changes its "
        "meaning, so check `schema` and ignore keys that you do not know.",
        "The installed package contains a JSON Schema of all documents:",
        '```sh\npython -c "import importlib.resources as r; '
        "print(r.files('et_cuda_passes.cli') / 'schemas.json')\"\n```",
        "## Errors",
        "stdout is empty if the command has no result: bad usage (exit code 2), a file that cannot be read, or an "
        "error on the way (1). stderr then has one line that begins with `error: `, or with `Error: ` for an unknown "
        "option.",
        "A command that has a result prints it also when it exits with 1. `verify` prints the outputs that are wrong, "
        "`doctor` the checks that are wrong. `lower` and `export` print what they wrote, and the key `error` says "
        "what this machine lacks for the rest. stderr has the same error.",
        "Numbers are finite: an infinity or NaN is `null`.",
        "`report.json`, which `lower` and `export` write, has no key `schema`. That of `lower` is a [Report](#report).",
    ]
    records = dict.fromkeys(cls for document in DOCUMENTS for cls in records_in(document))
    for cls in sorted(records, key=lambda cls: (not issubclass(cls, Document), cls.__name__)):
        rows = [(f"`{name}`", json_type(each), meaning) for name, (each, meaning) in record_fields(cls).items()]
        if issubclass(cls, Document):
            rows.insert(0, ("`schema`", f'"{cls.schema()}"', "name and version"))
        parts += [f"## {cls.__name__}", docstring(cls)[0], table(["key", "type", "meaning"], rows)]
    return "\n\n".join(parts)
