"""The reference of the Python interface: signatures and docstrings of the public names, as one Markdown page."""

import dataclasses
import enum
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

import et_cuda_passes as ecp
from docs.markdown import docstring, table
from et_cuda_passes import delegate, hf, testing
from et_cuda_passes.quant.weight import QuantizedWeight, WeightValues

GROUPS = {
    "Rewrite": (ecp, ["rewrite", "load", "Report", "Outcome", "Reason", "ExpectationError", "ModelError"]),
    "Lower with ExecuTorch": (
        ecp,
        ["CudaPartitioner", "MetalPartitioner", "XnnpackPartitioner", "RewritingPartitioner"],
    ),
    "Quantize": (ecp, ["quantize_model_", "QuantizationOptions", "QuantizationReport"]),
    "Export models of transformers": (hf, list(hf.__all__)),
    "Run a .pte for CUDA": (delegate, list(delegate.__all__)),
    "Write a rule": (
        ecp,
        [
            "Rule",
            "GroupRule",
            "Keep",
            "requirement",
            "Requirement",
            "Failure",
            "Notes",
            "op",
            "any_of",
            "dequantized",
            "Capture",
            "Match",
            "weight_of",
            "weight_values",
            "Builder",
            "Unmet",
            "RuleError",
        ],
    ),
    "Describe a target": (ecp, ["targets", "get_target", "default_passes", "Target", "Kernel"]),
}
"""The names of each section, and the module that exports them."""
SHORT = {
    "DEQUANTIZE": "The operator `torchao.dequantize_affine`, for patterns.",
    "Pattern": "The type of a pattern: a result of `op` or `any_of`, a `Capture`, a number or a text.",
    "layouts": "The packed layouts, [described one by one](../explanation/layouts.md).",
    "ops": "The registered [operators](operators.md).",
}
"""Names without a docstring of their own."""
TITLES = {"Args": "Arguments"}
WIDTH = 100
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n", re.MULTILINE)
ENTRY = re.compile(r"^    ([\w*., ]+): (.*(?:\n {8}.*|\n(?=\n {8}))*)", re.MULTILINE)


def api_page() -> str:
    """The page. A public name that no section has stands in the last one."""
    placed = {name for module, names in GROUPS.values() if module is ecp for name in names}
    others = [name for name in ecp.__all__ if name not in placed]
    rules = {name: getattr(ecp, name)().name for name in others if _is_rule(getattr(ecp, name))}
    parts = [
        "# Python API",
        "The public names of `et_cuda_passes`, usually imported as `ecp`, and of its parts `et_cuda_passes.hf` and "
        "`et_cuda_passes.delegate`. Everything else may change between versions.",
    ]
    for title, (module, names) in GROUPS.items():
        parts.append(f"## {title}")
        if module is not ecp:
            parts.append(f"Import from `{module.__name__}`.")
        for name in names:
            parts += _entry(name, getattr(module, name))
        if title == "Write a rule":
            for cls in (QuantizedWeight, WeightValues):
                parts += _entry(cls.__name__, cls)
    parts += ["## Rules of the package", "[Rules](rules.md) describes the options and requirements of each."]
    parts.append("\n".join(f"- [`{name}`](rules.md#{rule})" for name, rule in rules.items()))
    parts.append("## Other names")
    for name in others:
        if name in SHORT:
            parts += [f"### {name}", SHORT[name]]
        elif name not in rules:
            parts += _entry(name, getattr(ecp, name))
    return "\n\n".join(parts)


def testing_page() -> str:
    """The functions for tests of rules."""
    first, rest = docstring(testing)
    parts = ["# Testing", "`et_cuda_passes.testing`. " + first + " " + rest]
    for name in testing.__all__:
        parts += _entry(name, getattr(testing, name), level=2)
        if name == "Sketch":
            public = {each: value for each, value in vars(testing.Sketch).items() if not each.startswith("_")}
            rows = [(f"`{each}`", docstring(value)[0]) for each, value in public.items()]
            parts.append(table(["method", "meaning"], rows))
    return "\n\n".join(parts)


def _is_rule(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, ecp.Rule)


def _entry(name: str, value: Any, level: int = 3) -> Iterator[str]:
    """Heading, signature and docstring of a class or a function, and the members of a class."""
    heading = "#" * level
    yield f"{heading} {name}"
    if not callable(value):
        yield f"`{value!r}`"
        return
    yield f"```py\n{_signature(name, value)}\n```"
    yield from _docstring(value)
    if not inspect.isclass(value):
        return
    for member, held in vars(value).items():
        if member.startswith("_"):
            continue
        function = held.__func__ if isinstance(held, (staticmethod, classmethod)) else held
        text = inspect.getdoc(held) or ""
        if not text or text.startswith("ExecuTorch's hook"):  # ExecuTorch calls it, not the user
            continue
        if isinstance(held, (property, functools.cached_property)):
            yield f"{heading}# {name}.{member}"
            yield from _sections(text)
        elif inspect.isfunction(function):
            yield f"{heading}# {name}.{member}"
            yield f"```py\n{_signature(f'{name}.{member}', function)}\n```"
            yield from _sections(text)


def _signature(name: str, value: Any) -> str:
    """The signature, on one line or with one argument a line."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # an exception with the constructor of its base
        return name
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    texts: list[str] = []
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and "*" not in texts and not any(text.startswith("*") for text in texts):
            texts.append("*")
        texts.append(_parameter(each))
    returned = signature.return_annotation
    is_value = returned not in (signature.empty, None, "None") or not inspect.isclass(value)
    result = f" -> {_annotation(returned)}" if is_value and returned is not signature.empty else ""
    line = f"{name}({', '.join(texts)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + f"){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        text = "*" + text
    elif parameter.kind is parameter.VAR_KEYWORD:
        text = "**" + text
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {_default(parameter.default)}"
    return text


def _annotation(annotation: Any) -> str:
    """An annotation without the modules of its names, except for ``torch.Tensor`` and its like."""
    text: str = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = text.replace("'", "") if "Literal" not in text else text
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", lambda found: found[0] if found[0] == "torch." else "", text)
    return text.replace("~_T", "T")


def _default(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if inspect.isroutine(value):
        return str(value.__name__)
    text = repr(value)
    return "..." if text.startswith("<") else text


def _docstring(value: Any) -> Iterator[str]:
    text = inspect.getdoc(value)
    # dataclasses writes the signature of a class without docstring as its docstring.
    if text and not (dataclasses.is_dataclass(value) and text.startswith(f"{getattr(value, '__name__', '')}(")):
        yield from _sections(text)


def _sections(text: str) -> Iterator[str]:
    """A docstring as Markdown: prose, and its sections as lists."""
    pieces = SECTION.split(text)
    if pieces[0].strip():
        yield _prose(pieces[0])
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        entries, rest = _entries(body)
        if entries:
            yield f"**{TITLES.get(title, title)}**"
            yield "\n".join(f"- {entry}" for entry in entries)
        else:
            yield f"**{TITLES.get(title, title)}**"
            yield _prose(inspect.cleandoc("\n" + body))
            continue
        if rest:
            yield _prose(inspect.cleandoc(rest))


def _entries(body: str) -> tuple[list[str], str]:
    """The entries ``name: text`` of a section as Markdown, and the text after the section."""
    lines = body.splitlines()
    end = next((index for index, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    section = "\n".join(lines[:end])
    found = [
        f"`{each[1].strip()}`: {_prose(' '.join(each[2].split()))}"
        for each in ENTRY.finditer(section)
        if not each[1].strip().count(" ") or ", " in each[1]
    ]
    return found, "\n".join(lines[1:] if not found else lines[end:])


def _prose(text: str) -> str:
    """Docstring markup as Markdown: roles and double backquotes become code."""

    def code(found: re.Match[str]) -> str:
        inside = found[1] or found[2]
        inside = inside.rpartition(".")[2] if inside.startswith("~") else inside.removeprefix(".")
        return f"`{inside}`"

    text = re.sub(r":\w+:`([^`]+)`|``([^`]+)``", code, text.strip())
    # `::` begins a literal block, which is indented.
    return re.sub(r"::(?=\n\n    )", ":", text)
