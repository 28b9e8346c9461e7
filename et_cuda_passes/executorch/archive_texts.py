"""Rules for the texts in a .pt2 that torch evaluates, looks up, compiles, or writes into source.

Names of values and inputs, and keys of keyword arguments, become names in Python source. Expressions of sizes go
through ``sympy.sympify``, which evaluates Python. ``ExportedProgram.module`` compiles guards. Targets are looked up by
name. Texts in operator arguments reach C++ and Python source that Inductor writes, and texts in metadata its comments.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from et_cuda_passes.executorch.archive_expression import check_expression, check_guard
from et_cuda_passes.executorch.archive_tree import check_literal, check_tree, read_json
from et_cuda_passes.executorch.archive_zip import Refused, short

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# An FQN. A ModuleDict accepts many characters in its keys. "@" numbers the calls of a module.
_FQN = re.compile(r"[\w\-+/:@ ]+(\.[\w\-+/:@ ]+)*")
_SYMBOLIC = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift)"
)
_SYMBOLIC_TORCH = re.compile(r"torch\.sym_(not|int|float|ite|max|min)|torch\._sym_sqrt|torch\.sym_sqrt|math\.trunc")
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)
_HIGHER_ORDER = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|"
    r"wrap_with_autocast|auto_functionalized|auto_functionalized_v2|out_dtype|flex_attention|invoke_subgraph|"
    r"tag_activation_checkpoint|wrap_activation_checkpoint|hints_wrapper|strict_mode|with_effects)"
)
# torch.vmap leaves these functions in a graph.
_VMAP = re.compile(
    r"torch\._functorch\.predispatch\.(_add_batch_dim|_remove_batch_dim|_vmap_increment_nesting|_vmap_decrement_nesting)"
    r"|torch\._C\._functorch\.(_add_batch_dim|_remove_batch_dim|_vmap_increment_nesting|_vmap_decrement_nesting)"
    r"|torch\._functorch\.(predispatch|vmap)\.lazy_load_decompositions"
)
_NAMESPACES = frozenset((
    "aten", "prims", "export", "torchao", "quantized_decomposed", "et_cuda_passes", "dim_order_ops", "llama",
    "transformers",
))  # fmt: skip
# Operators of these namespaces that access something outside the program.
_OUTSIDE = frozenset(("aten.from_file", "aten.save", "aten._print", "aten.warn"))

# Raises for a text that is not allowed; the second argument is the place for the message.
Rule = Callable[[str, str], None]


def rule_of(kind: str, name: str) -> Rule | None:
    """The rule for the texts in field ``name`` of the schema's class ``kind``."""
    return _RULES.get((kind, name), _name)


def check_key(key: str, place: str) -> None:
    """Reject a key that could end a text or a line."""
    if not key.isprintable() or re.search(r"[\"'\\]", key):
        raise Refused(f"{place or 'it'} has a key with quotes or control characters: {short(key)}")


def _name(text: str, place: str) -> None:
    if not _NAME.fullmatch(text):
        raise Refused(f"{place} is no name: {short(text)}")


def _argument_name(text: str, place: str) -> None:
    if text:
        _name(text, place)


def _fqn(text: str, place: str) -> None:
    if (text and not _FQN.fullmatch(text)) or any(
        part.startswith("__") and part.endswith("__") for part in text.split(".")
    ):
        raise Refused(f"{place} is no name of a module or tensor: {short(text)}; rename it before the export")


def _option(text: str, place: str) -> None:
    """An option of a kernel, which a template writes into source without quotes."""
    if not re.fullmatch(r"[\w.\-]*", text, re.ASCII):
        raise Refused(f"{place} is no plain value: {short(text)}")


def _literal(text: str, place: str) -> None:
    """A text in double quotes of generated source must not end them."""
    if re.search(r'["\\\x00-\x1f\x7f]', text):
        raise Refused(f"{place} has quotes, backslashes or control characters: {short(text)}")


def _one_line(text: str, place: str) -> None:
    if not text.isprintable():
        raise Refused(f"{place} has control characters: {short(text)}")


def _version(text: str, place: str) -> None:
    if not re.fullmatch(r"[\w.+<= \-]*", text):
        raise Refused(f"{place} is no version: {short(text)}")


def _device(text: str, place: str) -> None:
    if not re.fullmatch(r"[a-z]+", text):
        raise Refused(f"{place} is no device: {short(text)}")


def _target(text: str, place: str) -> None:
    """A target must be a function that torch writes into graphs: torch looks up any name."""
    if (
        _SYMBOLIC.fullmatch(text)
        or _SYMBOLIC_TORCH.fullmatch(text)
        or _HIGHER_ORDER.fullmatch(text)
        or _VMAP.fullmatch(text)
    ):
        return
    parts = _OPERATOR.fullmatch(text)
    name = "" if parts is None else f"{parts[1]}.{parts[2]}"
    if parts is not None and parts[1] not in _NAMESPACES:
        raise Refused(f"{place} calls {short(text)}, an operator of a package that is not known to be safe")
    if parts is None or name in _OUTSIDE or name.startswith("prims.inductor_"):
        raise Refused(f"{place} calls {short(text)}, which is no operator of an exported program")


def _keywords(text: str, place: str) -> None:
    """The structure of a call's inputs, ``(args, kwargs)``: the keys of kwargs become names of arguments in source."""
    check_tree(text, place)
    top = read_json(text.encode())[1]
    kinds = [child["type"] for child in top["children_spec"]]
    if top["type"] != "builtins.tuple" or kinds != ["builtins.tuple", "builtins.dict"]:
        raise Refused(f"{place} is no structure of args and kwargs")
    names = read_json(top["children_spec"][1]["context"].encode())
    if not isinstance(names, list):
        raise Refused(f"{place} has no names of kwargs")
    for name in names:
        _name(name if isinstance(name, str) else repr(name), place)


def _metadata(value: dict[str, str], place: str) -> None:
    """Metadata of a node about its origin. Only the traceback may have line breaks."""
    for key, text in value.items():
        where = f"{place}.{key}"
        if key == "stack_trace":
            if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
                raise Refused(f"{where} has control characters")
        elif key in ("nn_module_stack", "torch_fn"):
            _one_line(text, where)
        elif key == "source_fn_stack":
            # torch looks up the name after the comma.
            if not re.fullmatch(r"[\w.<>,; \-]*", text) or "__" in re.sub(r"[\w]+,", "", text):
                raise Refused(f"{where} is no list of functions: {short(text)}")
        elif key in ("from_node", "custom"):
            _plain(read_json(text.encode()), where)
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


def _keys_are_names(value: dict[str, Any], place: str) -> None:
    for key in value:
        _name(key, place)


def _options(value: dict[str, Any], place: str) -> None:
    _keys_are_names(value, place)
    for key, argument in value.items():
        for text in argument.get("as_strings", [argument.get("as_string", "")]):
            _option(text, f"{place}.{key}")


def _keys_are_fqns(value: dict[str, Any], place: str) -> None:
    for key in value:
        _fqn(key, place)


# By class and field of the schema, or by field alone. A text that is not listed must be a name.
_RULES: dict[tuple[str, str], Rule] = {
    ("SymExpr", "expr_str"): check_expression,
    ("ExportedProgram", "guards_code"): check_guard,
    ("ExportedProgram", "torch_version"): _version,
    ("Node", "target"): _target,
    ("Argument", "as_operator"): _target,
    ("Argument", "as_string"): _literal,
    ("Argument", "as_strings"): _literal,
    ("ConstantValue", "as_string"): check_literal,
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
    ("ModuleCallSignature", "out_spec"): check_tree,
}


def _no_objects(value: Any, place: str) -> None:
    if value:
        raise Refused(f"{place} has an object of Python or TorchScript")


def _input_texts(value: list[Any], place: str) -> None:
    for index, item in enumerate(value):
        if "as_string" in item:
            check_literal(item["as_string"], f"{place}[{index}].as_string")


OBJECTS: dict[tuple[str, str], Callable[[Any, str], None]] = {
    ("Node", "metadata"): _metadata,
    ("GraphModule", "metadata"): _metadata,
    ("Graph", "tensor_values"): _keys_are_names,
    ("Graph", "sym_int_values"): _keys_are_names,
    ("Graph", "sym_bool_values"): _keys_are_names,
    ("Graph", "sym_float_values"): _keys_are_names,
    ("Graph", "custom_obj_values"): _no_objects,
    ("ExportedProgram", "range_constraints"): _keys_are_names,
    ("Argument", "as_string_to_argument"): _options,
    ("Argument", "as_custom_obj"): _no_objects,
    ("InputSpec", "custom_obj"): _no_objects,
    ("Graph", "inputs"): _input_texts,
    ("PayloadConfig", "config"): _keys_are_fqns,
}
