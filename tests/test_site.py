"""The site: it builds without a warning, loads nothing from another host, and shows every page as it is meant."""

import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from docs.generate import ROOT
from docs.navigation import entries, expand
from et_cuda_passes.rewrite import rewrite

LOADING = {"src", "srcset", "poster", "data"}
LOADING_LINKS = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "manifest", "modulepreload"}


class Page(HTMLParser):
    """The addresses that a page loads by itself, and the text of its paragraphs.

    Attributes:
        loaded: the addresses.
        paragraphs: text outside of code.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loaded += [value for name, value in values.items() if name in LOADING]
        if tag == "link" and set(values.get("rel", "").split()) & LOADING_LINKS:
            self.loaded.append(values["href"])
        if tag in ("p", "code"):
            self._open.append(tag)
            if tag == "p":
                self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "p" in self._open and "code" not in self._open:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def pages(site: Path) -> dict[str, Page]:
    found = {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def test_site_has_a_page_for_every_markdown_file_and_no_script(site: Path) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {name.removesuffix(".html") for name in pages(site)} == written | {"404"}
    assert list(site.rglob("*.py")) == []


def test_pages_and_styles_load_nothing_from_another_host(site: Path) -> None:
    elsewhere = re.compile(r"^(https?:)?//")
    for name, page in pages(site).items():
        assert page.loaded, name
        assert [address for address in page.loaded if elsewhere.match(address)] == [], name
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")) == [], style
    # The script of the theme asks other hosts for a repository's numbers and for Mermaid, if a page has one of them.
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in text and 'data-md-component="source"' not in text, path


def test_search_works_without_a_server(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = ") and "Missing out variants" in index
    assert "assets/iframe-worker.js" in pages(site)["index.html"].loaded


def test_paragraphs_of_all_pages_have_no_marks_of_a_list_or_a_table(site: Path) -> None:
    """Code hosts and MkDocs read Markdown differently: a list needs an empty line before it, for example."""
    marks = re.compile(r"(^|\n)\s*(- |1\. |\|)|```|\*\*|\]\(")
    for name, page in pages(site).items():
        assert [text for text in page.paragraphs if marks.search(text)] == [], name


def test_picture_has_the_stages_of_the_rewrite() -> None:
    stages = re.findall(r"^ +# (\d)\. (\w+)", inspect.getsource(rewrite), re.MULTILINE)
    assert len(stages) == 6
    # The comments name two of the stages by a verb.
    names = {"find": "candidates", "apply": "passes"}
    expected = [(number, names.get(word.lower(), word.lower())) for number, word in stages]
    picture = (ROOT / "docs" / "explanation" / "data-flow.svg").read_text(encoding="utf-8")
    assert re.findall(r">(\d)\. (\w+)<", picture) == expected
    page = (ROOT / "docs" / "explanation" / "data-flow.md").read_text(encoding="utf-8")
    assert [(number, word.lower()) for number, word in re.findall(r"^(\d)\. \*\*(\w+)", page, re.MULTILINE)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[here](#no-such-heading)", "no-such-heading"),
        ("[outside](../../README.md)", "README.md"),
    ],
)
def test_broken_link_stops_the_build(tmp_path: Path, text: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{text}\n", encoding="utf-8")
    config = load_config(
        str(ROOT / "mkdocs.yml"),
        docs_dir=str(tmp_path / "docs"),
        site_dir=str(tmp_path / "site"),
        nav=["index.md"],
        hooks=[],
        extra_css=[],
    )
    with pytest.raises(Abort, match="strict mode"):
        build(config)
    assert message in caplog.text


def test_star_in_the_navigation_stands_for_the_pages_that_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/two.md", "a/one.md", "a/three.md", "a/script.py"):
        (tmp_path / name).touch()
    nav = [{"A": ["a/three.md", "a/*"]}, {"B": [{"Inner": ["a/two.md", "b/*"]}]}, {"Home": "index.md"}]
    expanded = expand(nav, tmp_path)
    assert expanded == [{"A": ["a/three.md", "a/one.md"]}, {"B": [{"Inner": ["a/two.md"]}]}, {"Home": "index.md"}]
    assert list(entries(expanded)) == ["a/three.md", "a/one.md", "a/two.md", "index.md"]
