"""A hook of MkDocs: ``folder/*`` in the navigation stands for the pages of the folder that are not listed by name.

So a new page appears in the site before anyone has chosen its place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> None:
    """The event of MkDocs."""
    config.nav = expand(config.nav, Path(config.docs_dir))


def expand(nav: Any, folder: Path) -> Any:
    """The navigation with the pages of ``folder`` in place of each ``name/*``."""
    named = set(entries(nav))

    def expanded(item: Any) -> list[Any]:
        if isinstance(item, dict):
            return [{title: expand_items(value) for title, value in item.items()}]
        if not item.endswith("/*"):
            return [item]
        pages = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{item}.md"))
        return [page for page in pages if page not in named]

    def expand_items(value: Any) -> Any:
        return [each for item in value for each in expanded(item)] if isinstance(value, list) else value

    return expand_items(nav)


def entries(nav: Any) -> Iterator[str]:
    """The paths in a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(item)
