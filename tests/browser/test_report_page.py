"""The report page in a browser: filter, sorting, folding, widths, print, and that it needs no network."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from et_cuda_passes.graph.report import Report
from et_cuda_passes.graph.report_page import render
from tests.reports import LAYERS, report_on

COLUMNS = ["Layer", "Outcome", "Operator", "Scheme", "Kernel", "Layout", "Shape", "Bytes"]
COLUMNS += ["SNR quantized", "SNR rewritten", "Source"]
Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page of reports from a file; in the end checks that there was no request and no error."""
    contexts: list[Any] = []
    problems: list[str] = []
    requests: list[str] = []

    def open_page(*reports: Report, width: int = 1440, **options: Any) -> Any:
        path = tmp_path / "report.html"
        path.write_text(render({report.target: report.to_dict() for report in reports}, "model.pt2"), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert all(url.startswith("file:") and url.endswith("report.html") for url in requests), requests
    assert len(requests) == len(contexts)


def shown(page: Any, selector: str = "table tbody tr") -> list[str]:
    """The first cells of the rows that one can see."""
    rows: list[str] = page.eval_on_selector_all(
        selector, "rows => rows.filter(r => r.checkVisibility()).map(r => r.cells[0].innerText.split('\\n')[0])"
    )
    return rows


def test_groups_are_folded_and_open_one_by_one(opened: Open) -> None:
    page = opened(report_on(30))
    assert shown(page) == [f"model.layers.{{0..29}}.{name}.weight" for name, _ in LAYERS]
    page.locator("summary", has_text="q_proj").click()
    assert shown(page)[1:31] == [f"model.layers.{block}.self_attn.q_proj.weight" for block in range(30)]
    assert len(shown(page)) == 35
    page.get_by_role("button", name="Unfold all").click()
    assert len(shown(page)) == 155
    page.get_by_role("button", name="Unfold all").click()
    assert len(shown(page)) == 5


def test_filter_shows_the_layers_with_all_its_words(opened: Open) -> None:
    page = opened(report_on(30, missed_every=50))
    filter_box, count = page.get_by_label("Filter"), page.locator("output")
    assert count.inner_text() == "150 rows"
    filter_box.fill("UP_PROJ")
    assert shown(page) == ["model.layers.{0..29}.mlp.up_proj.weight"]
    assert count.inner_text() == "30 of 150 rows"
    # A filter that only some layers of a group meet opens the group.
    filter_box.fill("layers.7. mlp")
    assert [name for name in shown(page) if "{" not in name] == [
        f"model.layers.7.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    assert count.inner_text() == "3 of 150 rows"
    filter_box.fill("missed")
    assert count.inner_text() == "3 of 150 rows"
    filter_box.fill("nothing like it")
    assert shown(page) == []
    filter_box.fill("")
    assert len(shown(page)) == 6
    assert count.inner_text() == "150 rows"


def test_filter_applies_to_all_targets(opened: Open) -> None:
    page = opened(report_on(3), report_on(3, target="cpu"))
    page.get_by_label("Filter").fill("k_proj")
    assert shown(page) == ["model.layers.{0..2}.self_attn.k_proj.weight"] * 2
    assert page.locator("output").inner_text() == "6 of 30 rows"


@pytest.mark.parametrize("column", COLUMNS)
def test_columns_are_sorted_by_keyboard(column: str, opened: Open) -> None:
    page = opened(report_on(5, missed_every=3, measured=True))
    # At first the worst ratios are on top; two clicks give the order of the graph.
    worst_first = page.get_by_role("columnheader", name="SNR quantized")
    assert worst_first.get_attribute("aria-sort") == "ascending"
    worst_first.get_by_role("button").click(click_count=2)
    header, original = page.get_by_role("columnheader", name=column, exact=True), shown(page)
    button = header.get_by_role("button")
    place = COLUMNS.index(column)

    def values() -> list[str]:
        cells: list[str] = page.eval_on_selector_all(
            "tbody",
            "(bodies, place) => bodies.map(b => b.rows[0].cells[place]).map(c => c.dataset.v ?? c.textContent.trim())",
            place,
        )
        return cells

    def key(value: str) -> tuple[Any, ...]:
        number = re.fullmatch(r"-?\d+(\.\d+)?", value)
        digits = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", value.lower())]
        return (float(value),) if number else tuple(digits)

    before = values()
    assert header.get_attribute("aria-sort") == "none"
    button.focus()
    for press, direction, reverse in (("Enter", "ascending", False), ("Space", "descending", True)):
        page.keyboard.press(press)
        assert header.get_attribute("aria-sort") == direction
        known = [value for value in values() if value]
        assert known == sorted(known, key=key, reverse=reverse)
        # Unknown values come last in both directions.
        assert values() == known + [""] * (len(before) - len(known))
        assert sorted(values()) == sorted(before)
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "none"
    assert shown(page) == original


def test_layers_within_a_group_are_sorted_too(opened: Open) -> None:
    page = opened(report_on(12, measured=True))
    page.locator("summary", has_text="q_proj").click()
    cells = page.locator("tbody", has_text="q_proj").locator("tr.member .db1").all_inner_texts()
    assert len(cells) == 12
    assert cells == sorted(cells)
    page.get_by_role("columnheader", name="Layer").get_by_role("button").click()
    names = [name for name in shown(page) if "q_proj" in name and "{" not in name]
    # Numbers in names count as numbers.
    assert names == [f"model.layers.{block}.self_attn.q_proj.weight" for block in range(12)]


def test_page_is_used_by_keyboard_alone(opened: Open) -> None:
    page = opened(report_on(4))
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText || document.activeElement.tagName"))
    assert {"cuda", "INPUT", "Unfold all", "Layer", "Source", "The passes, in their order"} <= set(reached)
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert len(shown(page)) == 9


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 1100, 390])
def test_page_is_not_wider_than_the_window(width: int, scheme: str, opened: Open) -> None:
    long = report_on(12, missed_every=4, measured=True)
    long.outcomes[0] = replace(long.outcomes[0], fqn="a" * 300, source="b" * 200 + ".py:1: " + "c" * 300)
    long.warnings.append("d" * 400)
    page = opened(long, report_on(2, target="cpu"), width=width, color_scheme=scheme)
    page.get_by_role("button", name="Unfold all").click()
    page.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.body.scrollWidth") <= width


def test_text_has_the_contrast_that_wcag_asks_for(opened: Open) -> None:
    for scheme in ("light", "dark"):
        page = opened(report_on(2, missed_every=3), color_scheme=scheme)
        colors = page.evaluate(
            "(names => { const p = document.createElement('p'); document.body.append(p); return names.map(n => {"
            " p.style.color = `var(--${n})`; return getComputedStyle(p).color.match(/\\d+/g).map(Number) }) })"
            "(['ground', 'raised', 'text', 'muted', 'rewritten', 'kept', 'missed', 'warning'])"
        )
        for background in colors[:2]:
            for color in colors[2:]:
                assert contrast(color, background) >= 4.5, (scheme, color, background)


def contrast(first: list[int], second: list[int]) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(color: list[int]) -> float:
        parts = [value / 255 for value in color]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_print_shows_what_is_folded(opened: Open) -> None:
    page = opened(report_on(6))
    texts = ["tilings on sm_90 for 192 x 576", "linear_int8 wanted 8 bits", "A = 576, B = 1536"]
    visible = """text => [...document.querySelectorAll("dd, li")].some(
        each => each.innerText.includes(text) && each.checkVisibility({contentVisibilityAuto: true}))"""
    assert len(shown(page)) == 5
    assert not any(page.evaluate(visible, text) for text in texts)
    page.emulate_media(media="print")
    assert len(shown(page)) == 35
    assert all(page.evaluate(visible, text) for text in texts)
    assert not page.get_by_label("Filter").is_visible()
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("width", [718, 1047])
def test_print_fits_on_paper(width: int, opened: Open) -> None:
    """A4, upright and across, in CSS pixels without the margins."""
    page = opened(report_on(6, missed_every=4, measured=True), width=width)
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = page.eval_on_selector_all(
        "tbody tr", "rows => rows.map(row => [row.getBoundingClientRect().height, row.cells[0].offsetWidth])"
    )
    assert len(boxes) > 30
    assert all(height < 120 and first > 200 for height, first in boxes)
    cells = page.eval_on_selector_all("tbody td", "all => Math.max(...all.map(c => c.getBoundingClientRect().right))")
    assert cells <= width


def test_names_of_a_model_stay_text(opened: Open) -> None:
    evil = "<script>alert(1)</script>"
    given = report_on(2)
    given.outcomes[0] = replace(
        given.outcomes[0], fqn=f'{evil}"><img src=x onerror=alert(2)>', source=f"{evil}: {evil}"
    )
    given.notes.append(f"</style>{evil}")
    page = opened(replace(given, target=evil))
    assert shown(page)[0] == f'{evil}"><img src=x onerror=alert(2)>'
    assert page.locator("img").count() == 0
    assert page.locator("h2 a").inner_text() == evil


def test_page_works_without_scripts(opened: Open) -> None:
    page = opened(report_on(3), java_script_enabled=False)
    row = page.locator("tr.member").first
    assert not row.is_visible()
    page.locator("summary").first.click()
    assert row.is_visible()


def test_2000_layers_are_filtered_and_sorted_within_a_second(opened: Open) -> None:
    page = opened(report_on(400, missed_every=7, measured=True))
    timed = """async act => {
        const start = performance.now();
        eval(act);
        await new Promise(requestAnimationFrame);
        return performance.now() - start;
    }"""
    for act in (
        "document.querySelector('thead th:nth-child(8) button').click()",
        "(f => { f.value = 'layers.3 up'; f.dispatchEvent(new Event('input')) })(document.getElementById('filter'))",
        "(f => { f.value = ''; f.dispatchEvent(new Event('input')) })(document.getElementById('filter'))",
        "document.getElementById('unfold').click()",
    ):
        assert page.evaluate(f"({timed})({act!r})") < 1000
    assert len(shown(page)) == 2000 + 10
