"""The JSON members of a .pt2: the graph, the tables of weights, and every text in them that torch evaluates or compiles.

Torch's own schema says which fields there are and of which type; a value of another type, or a field beside them, is
refused. Beyond that, a text is checked by what torch does with it. Names of values and inputs, and keys of keyword
arguments, become names in Python source. Expressions of sizes go through ``sympy.sympify``, which evaluates Python.
Guards are compiled by ``ExportedProgram.module``. Targets and types of inputs are looked up by name. Texts in operator
arguments reach C++ and Python source that Inductor writes. Texts in metadata reach comments of that source.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.union import _Union
from torch.utils import _pytree

from et_cuda_passes.executorch.archive_expression import check_expression, check_guard
from et_cuda_passes.executorch.archive_pickle import fits
from et_cuda_passes.executorch.archive_zip import Refused

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# An FQN: names of modules are whatever a ModuleDict takes as a key. "@" numbers the calls of a module.
_FQN = re.compile(r"[\w\-+/:@ ]+(\.[\w\-+/:@ ]+)*")
_SYMBOLIC = re.compile(r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift)")
_SYMBOLIC_TORCH = re.compile(r"torch\.sym_(not|int|float|ite|max|min)|torch\._sym_sqrt|torch\.sym_sqrt|math\.trunc")
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)
_HIGHER_ORDER = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|"
    r"wrap_with_autocast|auto_functionalized|auto_functionalized_v2|out_dtype|flex_attention|invoke_subgraph|"
    r"tag_activation_checkpoint|wrap_activation_checkpoint|hints_wrapper|strict_mode|with_effects)"
)
# Left in a graph around calls under torch.vmap.
_VMAP = re.compile(
    r"torch\._functorch\.predispatch\.(_add_batch_dim|_remove_batch_dim|_vmap_increment_nesting|_vmap_decrement_nesting)"
    r"|torch\._C\._functorch\.(_add_batch_dim|_remove_batch_dim|_vmap_increment_nesting|_vmap_decrement_nesting)"
    r"|torch\._functorch\.vmap\.lazy_load_decompositions"
)
_NAMESPACES = frozenset(
    ("aten", "prims", "export", "torchao", "quantized_decomposed", "et_cuda_passes", "dim_order_ops", "llama")
    + ("transformers", "torchvision")
)
# Operators of these namespaces that reach for something outside the program.
_OUTSIDE = frozenset(("aten.from_file", "aten.save", "aten._print", "aten.warn", "aten.get_pool_allocator"))
_MOST_DEPTH = 200


def check_program(data: bytes) -> None:
    """Refuse a ``models/model.json`` in which a text could become code.

    Raises:
        Refused: the message names the field and its value.
    """
    _Walk().check(schema.ExportedProgram, _json(data), "")


def check_payloads(data: bytes, records: Mapping[str, int], prefix: str) -> frozenset[str]:
    """Refuse a table of weights or constants whose tensors do not stand in ``records`` (bytes by member name).

    Returns:
        the members that are pickles.

    Raises:
        Refused: as above; also where an entry is no tensor.
    """
    table = _json(data)
    _Walk().check(schema.PayloadConfig, table, "")
    pickled, raw = set(), {}
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
    """Refuse the description of a fake tensor in which a text could become code."""
    _Walk().check(schema.TensorMeta, value, "")


def _check_tensor(fqn: str, meta: dict[str, Any], first: dict[str, Any], nbytes: int) -> None:
    """Refuse a tensor that its record does not hold. The record has the dtype of the first tensor in it."""
    size, stride = ([value.get("as_int") for value in meta[name]] for name in ("sizes", "strides"))
    dtype = _DTYPES.get(first["dtype"])
    if dtype is None:
        raise Refused(f"{fqn} has no dtype that torch knows")
    if not fits(size, stride, meta["storage_offset"].get("as_int"), nbytes // dtype.itemsize):
        raise Refused(f"{fqn} of {size} needs more data than the {nbytes:,} bytes of its record")


def _dtypes() -> dict[int, torch.dtype]:
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    return {int(number): dtype for number, dtype in _SERIALIZE_TO_TORCH_DTYPE.items()}


_DTYPES = _dtypes()


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise Refused("its JSON is nested too deeply") from None
    except ValueError as error:
        raise Refused(f"it is no JSON ({error})") from None


class _Walk:
    """Compares a value with a class of torch's schema, and checks the texts in it."""

    def __init__(self) -> None:
        self._fields: dict[type, dict[str, tuple[Any, bool]]] = {}

    def check(self, kind: Any, value: Any, place: str, depth: int = 0) -> None:
        if depth > _MOST_DEPTH:
            raise Refused(f"{place[:80]} is nested too deeply")
        if isinstance(kind, str):
            kind = getattr(schema, kind)
        elif isinstance(kind, typing.ForwardRef):
            kind = getattr(schema, kind.__forward_arg__)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Annotated:
            self.check(arguments[0], value, place, depth)
        elif origin in (typing.Union, types.UnionType):
            if value is not None:
                self.check(arguments[0], value, place, depth)
        elif origin is list:
            _expect(isinstance(value, list), place, "a list")
            for index, item in enumerate(value):
                self.check(arguments[0], item, f"{place}[{index}]", depth + 1)
        elif origin is dict:
            _expect(isinstance(value, dict), place, "an object")
            for key, item in value.items():
                _check_text(place, "key", key)
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
                raise Refused(f"{place or kind.__name__} has a field {name!r} that torch {torch.__version__} does not know")
            where = f"{place}.{name}" if place else name
            self.check(fields[name][0], item, where, depth + 1)
            if item is None:
                continue
            _check_texts(kind.__name__, name, item, where)


def _expect(holds: bool, place: str, what: str) -> None:
    if not holds:
        raise Refused(f"{place or 'it'} is not {what}")


def _check_texts(kind: str, name: str, value: Any, place: str) -> None:
    """Check each text in the field ``kind.name`` of torch's schema; a text without a rule must be a name."""
    for text in (value,) if isinstance(value, str) else value if isinstance(value, list) else ():
        if isinstance(text, str):
            _RULES.get((kind, name), _name)(text, place)
    if (kind, name) in _OBJECTS:
        _OBJECTS[kind, name](value, place)


def _name(text: str, place: str) -> None:
    if not _NAME.fullmatch(text):
        raise Refused(f"{place} is no name: {_short(text)}")


def _argument_name(text: str, place: str) -> None:
    if text:
        _name(text, place)


def _fqn(text: str, place: str) -> None:
    if text and not _FQN.fullmatch(text) or any(part.startswith("__") and part.endswith("__") for part in text.split(".")):
        raise Refused(f"{place} is no name of a module or tensor: {_short(text)}")


def _literal(text: str, place: str) -> None:
    """A text that stands in quotes of generated source must not end them."""
    if re.search(r'["\\\x00-\x1f\x7f]', text):
        raise Refused(f"{place} has quotes, backslashes or control characters: {_short(text)}")


def _input_literal(text: str, place: str) -> None:
    _literal(text, place)
    if "'" in text:
        raise Refused(f"{place} has quotes: {_short(text)}")


def _one_line(text: str, place: str) -> None:
    if not text.isprintable():
        raise Refused(f"{place} has control characters: {_short(text)}")


def _version(text: str, place: str) -> None:
    if not re.fullmatch(r"[\w.+<= \-]*", text):
        raise Refused(f"{place} is no version: {_short(text)}")


def _device(text: str, place: str) -> None:
    if not re.fullmatch(r"[a-z]+", text):
        raise Refused(f"{place} is no device: {_short(text)}")


def _target(text: str, place: str) -> None:
    """A function that torch writes into graphs. Others that torch would find by name are refused, also uncalled ones."""
    if _SYMBOLIC.fullmatch(text) or _SYMBOLIC_TORCH.fullmatch(text) or _HIGHER_ORDER.fullmatch(text) or _VMAP.fullmatch(text):
        return
    parts = _OPERATOR.fullmatch(text)
    if parts is None or parts[1] not in _NAMESPACES or f"{parts[1]}.{parts[2]}" in _OUTSIDE:
        raise Refused(f"{place} calls {_short(text)}, which is no operator of an exported program")


def _tree(text: str, place: str) -> None:
    """The structure of inputs or outputs: torch imports classes that it names."""
    value = _json(text.encode())
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
            raise Refused(
                f"{place} has inputs of the type {_short(kind)}, which is not registered with torch.utils._pytree in "
                "this process"
            )
        # A type with a function of its own for its context, such as a named tuple, may write no JSON.
        _context(_json(context.encode()) if isinstance(context, str) and _is_json(context) else context, place, 0)
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
    """What a type of inputs keeps beside its tensors: plain values, and classes of transformers' caches."""
    if depth > _MOST_DEPTH:
        raise Refused(f"{place} is nested too deeply")
    if isinstance(value, str):
        _input_literal(value, place)
    elif isinstance(value, list):
        for item in value:
            _context(item, place, depth + 1)
    elif isinstance(value, dict):
        if "__enum__" in value:
            raise Refused(f"{place} imports {_short(value.get('fqn'))}")
        if "_t" in value:
            _transformers_object(value, place)
        for key, item in value.items():
            _input_literal(key, place)
            _context(item, place, depth + 1)


def _transformers_object(value: dict[str, Any], place: str) -> None:
    """An object as transformers' exporters describe it: of a class that they import by its path, and may call."""
    kind, path, name = value["_t"], value.get("p"), value.get("n")
    if kind in ("obj", "type"):
        known = isinstance(path, str) and re.fullmatch(r"transformers\.cache_utils:\w+(Cache|Layer)", path, re.ASCII)
    elif kind in ("seq", "map"):
        known = path in ("builtins:tuple", "builtins:set", "builtins:frozenset", "collections:OrderedDict")
    elif kind in ("dtype", "layout"):
        known = isinstance(getattr(torch, name, None) if isinstance(name, str) else None, (torch.dtype, torch.layout))
    else:
        known = kind in ("tensor", "sym", "device", "size", "items")
    if not known:
        raise Refused(f"{place} has an input made from {_short(path or name or kind)}")


def _factory(context: Any, place: str) -> None:
    value = _json(context.encode()) if isinstance(context, str) else context
    made = f"{value.get('default_factory_module')}.{value.get('default_factory_name')}" if isinstance(value, dict) else ""
    if made not in {f"builtins.{name}" for name in ("list", "dict", "tuple", "set", "int", "float", "bool", "str")}:
        raise Refused(f"{place} has a defaultdict that calls {_short(made)}")


def _keywords(text: str, place: str) -> None:
    """The structure of a call's inputs, ``(args, kwargs)``: the keys of kwargs become names of arguments in source."""
    _tree(text, place)
    top = _json(text.encode())[1]
    kinds = [child["type"] for child in top["children_spec"]]
    if top["type"] != "builtins.tuple" or kinds != ["builtins.tuple", "builtins.dict"]:
        raise Refused(f"{place} is no structure of args and kwargs")
    names = _json(top["children_spec"][1]["context"].encode())
    if not isinstance(names, list):
        raise Refused(f"{place} has no names of kwargs")
    for name in names:
        _name(name if isinstance(name, str) else repr(name), place)


def _metadata(value: dict[str, str], place: str) -> None:
    """What a node keeps of its origin. Only the traceback may have lines."""
    for key, text in value.items():
        where = f"{place}.{key}"
        if key == "stack_trace":
            continue
        if key in ("nn_module_stack", "torch_fn"):
            _one_line(text, where)
        elif key == "source_fn_stack":
            # torch looks up what stands behind the comma.
            if not re.fullmatch(r"[\w.<>,; \-]*", text) or "__" in re.sub(r"[\w]+,", "", text):
                raise Refused(f"{where} is no list of functions: {_short(text)}")
        elif key in ("from_node", "custom"):
            _plain(_json(text.encode()), where)
        else:
            raise Refused(f"{where} is no metadata that torch {torch.__version__} writes")


def _plain(value: Any, place: str) -> None:
    if isinstance(value, str):
        _one_line(value, place)
    elif isinstance(value, dict):
        for key, item in value.items():
            _one_line(key, place)
            _plain(item, place)
    elif isinstance(value, list):
        for item in value:
            _plain(item, place)


def _check_text(place: str, what: str, key: object) -> None:
    if not isinstance(key, str) or not key.isprintable() or re.search(r"[\"'\\]", key):
        raise Refused(f"{place or 'it'} has a {what} with quotes or control characters: {_short(key)}")


def _short(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _keys_are_names(value: dict[str, Any], place: str) -> None:
    for key in value:
        _name(key, place)


def _keys_are_fqns(value: dict[str, Any], place: str) -> None:
    for key in value:
        _fqn(key, place)


# By class and field of the schema, or by field alone. A text that is not listed must be a name.
_RULES: dict[tuple[str, str], Callable[[str, str], None]] = {
    ("SymExpr", "expr_str"): check_expression,
    ("ExportedProgram", "guards_code"): check_guard,
    ("ExportedProgram", "torch_version"): _version,
    ("Node", "target"): _target,
    ("Argument", "as_operator"): _target,
    ("Argument", "as_string"): _literal,
    ("Argument", "as_strings"): _literal,
    ("ConstantValue", "as_string"): _input_literal,
    ("Device", "type"): _device,
    ("NamedArgument", "name"): _argument_name,
    ("InputToConstantInputSpec", "name"): _argument_name,
    ("InputToParameterSpec", "parameter_name"): _fqn,
    ("InputToBufferSpec", "buffer_name"): _fqn,
    ("InputToTensorConstantSpec", "tensor_constant_name"): _fqn,
    ("BufferMutationSpec", "buffer_name"): _fqn,
    ("ParameterMutationSpec", "parameter_name"): _fqn,
    ("GradientToParameterSpec", "parameter_name"): _fqn,
    ("ModuleCallEntry", "fqn"): _fqn,
    ("ModuleCallSignature", "in_spec"): _keywords,
    ("ModuleCallSignature", "out_spec"): _tree,
}


def _no_objects(value: Any, place: str) -> None:
    if value:
        raise Refused(f"{place} has an object of Python or TorchScript")


def _input_texts(value: list[Any], place: str) -> None:
    for index, item in enumerate(value):
        if "as_string" in item:
            _input_literal(item["as_string"], f"{place}[{index}].as_string")


_OBJECTS: dict[tuple[str, str], Callable[[Any, str], None]] = {
    ("Node", "metadata"): _metadata,
    ("GraphModule", "metadata"): _metadata,
    ("Graph", "tensor_values"): _keys_are_names,
    ("Graph", "sym_int_values"): _keys_are_names,
    ("Graph", "sym_bool_values"): _keys_are_names,
    ("Graph", "sym_float_values"): _keys_are_names,
    ("Graph", "custom_obj_values"): _no_objects,
    ("ExportedProgram", "range_constraints"): _keys_are_names,
    ("Argument", "as_string_to_argument"): _keys_are_names,
    ("Argument", "as_custom_obj"): _no_objects,
    ("InputSpec", "custom_obj"): _no_objects,
    ("Graph", "inputs"): _input_texts,
    ("PayloadConfig", "config"): _keys_are_fqns,
}
