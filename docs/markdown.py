"""Parts of Markdown pages: text of docstrings, and tables."""

import inspect
import re
from collections.abc import Iterable
from typing import Any


def plain_marks(text: str) -> str:
    """Docstring markup as Markdown: double backticks and roles become code."""
    return re.sub(r":\w+:`([^`]+)`|``([^`]+)``", lambda found: f"`{found[1] or found[2]}`", text)


def docstring(thing: Any) -> tuple[str, str]:
    """The first line of a docstring, and the rest."""
    first, _, rest = (inspect.getdoc(thing) or "").partition("\n")
    return first.strip(), plain_marks(rest.strip())


def cell(text: Any) -> str:
    """Text that fits in one cell of a table."""
    return plain_marks(" ".join(str(text).split())).replace("|", "\\|")


def described(cls: type) -> tuple[str, dict[str, str]]:
    """The prose of a class's docstring after its first line, and the entries of its ``Attributes:`` section."""
    prose, _, section = docstring(cls)[1].partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return prose.strip(), {name: " ".join(text.split()) for name, text in entries}


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell(item) for item in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
