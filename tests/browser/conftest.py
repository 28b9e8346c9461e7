"""A headless Chromium: Playwright's own, or one of the system.

Without one the tests of this folder are skipped; with ``REQUIRE_BROWSER=1``, which `make browser` sets, they fail.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright import sync_api
    except ImportError:
        _without("playwright")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).is_file() else next(filter(None, map(shutil.which, _NAMES)), None)
        if path is None:
            _without("Chromium")
        # Chromium refuses to run as root with a sandbox.
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=path, args=options)
        yield launched
        launched.close()


def _without(what: str) -> NoReturn:
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(f"there is no {what}: install a Chromium, such as Debian's package")
    pytest.skip(f"there is no {what}: `make browser` installs it where it can")
