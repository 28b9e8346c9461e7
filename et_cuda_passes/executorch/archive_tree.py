"""Checks the structure of a program's inputs and outputs in pytree's form: torch imports the classes in it."""

import json
import re
from typing import Any

import torch
from torch.utils import _pytree

from et_cuda_passes.executorch.archive_zip import Refused, short

_MOST_DEPTH = 200


def read_json(data: bytes) -> Any:
    """``data`` as JSON; rejects other data."""
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise Refused("its JSON is nested too deeply") from None
    except ValueError as error:
        raise Refused(f"it is no JSON ({error})") from None


_MODULE = re.compile(r"\w+(\.\w+)*")


def check_literal(text: str, place: str) -> None:
    """A text in quotes of either kind, or in a raw string of C++, must not end them."""
    if re.search(r"[\"'\\()\x00-\x1f\x7f]", text):
        raise Refused(f"{place} has quotes, parentheses, backslashes or control characters: {short(text)}")


def check_tree(text: str, place: str) -> None:
    """Reject a structure of inputs or outputs in which torch would import other classes than registered ones."""
    value = read_json(text.encode())
    if not isinstance(value, list) or len(value) != 2 or value[0] != 1:
        raise Refused(f"{place} is no structure of inputs that torch {torch.__version__} reads")
    _node(value[1], place, 0)


def _node(node: Any, place: str, depth: int) -> None:
    if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"} or depth > _MOST_DEPTH:
        raise Refused(f"{place} is no structure of inputs")
    kind, context = node["type"], node["context"]
    if not isinstance(node["children_spec"], list):
        raise Refused(f"{place} is no structure of inputs")
    if kind is not None:
        if not isinstance(kind, str) or kind not in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE or "." not in kind:
            # A name with a colon is one that an exporter of transformers registers, not the import of a module.
            module = kind.rpartition(".")[0] if isinstance(kind, str) and ":" not in kind else ""
            hint = f"; import first what registers it (--import {module})" if _MODULE.fullmatch(module) else ""
            raise Refused(
                f"{place} has values of the type {short(kind)}, which is not registered with torch.utils._pytree in "
                f"this process{hint}"
            )
        # A type with its own function for the context, such as a named tuple, may write other text than JSON.
        _context(read_json(context.encode()) if isinstance(context, str) and _is_json(context) else context, place, 0)
        if kind == "collections.defaultdict":
            _factory(context, place)
    elif context is not None or node["children_spec"]:
        raise Refused(f"{place} is no structure of inputs")
    for child in node["children_spec"]:
        _node(child, place, depth + 1)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _context(value: Any, place: str, depth: int) -> None:
    """The context of a type of inputs: plain values, and classes of transformers' caches."""
    if depth > _MOST_DEPTH:
        raise Refused(f"{place} is nested too deeply")
    if isinstance(value, str):
        check_literal(value, place)
    elif isinstance(value, list):
        for item in value:
            _context(item, place, depth + 1)
    elif isinstance(value, dict):
        if "__enum__" in value:
            raise Refused(f"{place} imports {short(value.get('fqn'))}")
        if "_t" in value:
            _transformers_object(value, place)
        for key, item in value.items():
            check_literal(key, place)
            _context(item, place, depth + 1)


def _transformers_object(value: dict[str, Any], place: str) -> None:
    """An object in the form of transformers' exporters, which import its class by path and may call it."""
    kind, path, name = value["_t"], value.get("p"), value.get("n")
    if kind in ("obj", "type"):
        known = bool(re.fullmatch(r"transformers\.cache_utils:\w+(Cache|Layer)", str(path), re.ASCII))
    elif kind in ("seq", "map"):
        known = path in ("builtins:tuple", "builtins:set", "builtins:frozenset", "collections:OrderedDict")
    elif kind in ("dtype", "layout"):
        known = isinstance(getattr(torch, name, None) if isinstance(name, str) else None, (torch.dtype, torch.layout))
    else:
        known = kind in ("tensor", "sym", "device", "size", "items")
    if not known:
        raise Refused(f"{place} has an input built from {short(path or name or kind)}")


def _factory(context: Any, place: str) -> None:
    value = read_json(context.encode()) if isinstance(context, str) else context
    called = (
        f"{value.get('default_factory_module')}.{value.get('default_factory_name')}" if isinstance(value, dict) else ""
    )
    if called not in {f"builtins.{name}" for name in ("list", "dict", "tuple", "set", "int", "float", "bool", "str")}:
        raise Refused(f"{place} has a defaultdict that calls {short(called)}")
