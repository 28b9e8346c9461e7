"""Checks the language of docstrings, comments, messages and pages: ``python -m docs.language [PATH ...]``.

It finds words to avoid, sentences that begin with "Of" or with an abstract "What", and test names without a subject.
Code is ignored: text between backquotes, code blocks, and identifiers. ``[tool.language]`` in pyproject.toml lists the
paths that are checked by default.
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTEAD = {
    "told": "reported, or passed",
    "untold": "unknown, or not reported",
    "asked": "checked, evaluated or requested",
    "taken": "matched, used or chosen",
    "made": "built, created or written",
    "settle": "decide, or flush",
    "settled": "decided",
    "settles": "decides",
    "worth": "benefit",
    "hand in": "pass",
    "handed in": "passed",
    "handed back": "returned",
    "hands back": "returns",
    "look over": "check",
    "looked over": "checked",
    "make room": "rename",
    "one of which": "a sentence of its own",
    "there is none": "no ..., or None",
    "there are none": "no ..., or None",
    "nobody": "nothing, or no reader",
    "somebody": "a user, or a reader",
}
"""Each word to avoid, with words to use in its place."""
WORDS = re.compile(r"\b(" + "|".join(sorted(INSTEAD, key=len, reverse=True)) + r")\b", re.IGNORECASE)
STARTS = re.compile(r"(?:^|(?<=[.!?:] ))(Of [a-z]|What (?!if\b|does\b|do\b)[^.?!]*[.!]|Whether nobody)")
FEWEST_WORDS = 4
"""``test_rule_is_rejected`` is the shortest name that has a subject and an expectation."""
NO_SUBJECT = {"a", "an", "the", "what", "whatever", "that", "it", "of", "who", "which", "where", "no", "each", "every"}
CODE = re.compile(r"```.*?```|``[^`]*``|`[^`]*`|:\w+:`[^`]*`|<[^>\s]+>|\S*[/\\_]\S*", re.DOTALL)


def problems(text: str) -> Iterator[str]:
    """The faults of a piece of prose."""
    prose = re.sub(r"\s+", " ", CODE.sub("x", text)).strip()
    for found in WORDS.finditer(prose):
        yield f"'{found[0]}': write {INSTEAD[found[0].lower()]}"
    for found in STARTS.finditer(prose):
        yield f"a sentence begins '{found[0][:30]}': begin with its subject"


def pieces(path: Path) -> Iterator[tuple[int, str]]:
    """The prose of a file, paragraph by paragraph or literal by literal, with its line numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from _paragraphs(text, 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from _paragraphs(node.value, node.lineno)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield from ((node.lineno, problem) for problem in _name(node.name))
    comments: list[str] = []
    begin = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            begin = begin if comments else token.start[0]
            comments.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT) and comments:
            yield begin, " ".join(comments)
            comments = []


def _name(name: str) -> Iterator[str]:
    words = name.split("_")[1:]
    if len(words) < FEWEST_WORDS - 1 or words[0] in NO_SUBJECT:
        yield f"test name {name}: name the subject first, then what is expected"


def _paragraphs(text: str, line: int) -> Iterator[tuple[int, str]]:
    inside = False
    paragraph: list[str] = []
    begin = line
    for number, content in enumerate([*text.splitlines(), ""], line):
        fence = content.lstrip().startswith("```")
        inside ^= fence
        if inside or fence or not content.strip() or content.lstrip().startswith("|"):
            if paragraph:
                yield begin, " ".join(paragraph)
            paragraph = []
        else:
            begin = begin if paragraph else number
            paragraph.append(content.strip())


def check(paths: Iterable[Path]) -> int:
    """Print the faults in ``paths``, files or folders; returns their number."""
    count = 0
    for path in paths:
        files = [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.md")])
        for file in files:
            for line, text in pieces(file):
                found = [text] if text.startswith("test name ") else problems(text)
                for problem in found:
                    count += 1
                    print(f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{line}: {problem}")
    return count


def main(arguments: list[str]) -> int:
    """Check the paths given, or those of pyproject.toml; returns 1 if there are faults."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["language"]["paths"]
    found = check([Path(argument) for argument in arguments] or [ROOT / path for path in listed])
    if found:
        print(f"{found} found", file=sys.stderr)
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
