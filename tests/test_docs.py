"""The documentation is true: generated pages match the code, links have targets, and examples run."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from docs import generate

EXAMPLES = [
    page for page in sorted((generate.ROOT / "docs").rglob("*.md")) if "```python" in page.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", list(generate.pages()), ids=lambda path: path.name)
def test_generated_page_matches_the_code(path: Path) -> None:
    assert path.exists(), "`make docs` writes it"
    assert path.read_text(encoding="utf-8") == generate.pages()[path], "`make docs` brings it up to date"


def test_links_of_all_pages_have_targets() -> None:
    assert list(generate.broken_links()) == []


def test_link_without_a_target_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(
        "# A heading, here\n[b](b.md) [up](../README.md#gone) [ok](#a-heading-here)\n"
    )
    (tmp_path / "README.md").write_text("# Here\n[a](docs/a.md#a-heading-here) [far](https://example.org/x)\n")
    assert list(generate.broken_links(tmp_path)) == ["docs/a.md: b.md", "docs/a.md: ../README.md#gone"]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_and_print_their_output(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python blocks form one program. The text block after a block is its output."""
    monkeypatch.chdir(generate.ROOT)
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    space: dict[str, object] = {"__name__": page.stem}
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] != "python":
            continue
        # Empty lines before a block give its source lines the line numbers of the page.
        above = "\n" * text.count("\n", 0, block.start(2))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(above + block[2], page.relative_to(generate.ROOT).as_posix(), "exec"), space)
        if printed.getvalue():
            assert following is not None and following[1] == "text", "what is printed stands in a text block after it"
            assert following[2] == printed.getvalue()
