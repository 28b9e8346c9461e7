"""The report page as HTML: what it says, that it is one file, and that texts of a model stay texts."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.graph.report import LayerAccuracy, Outcome, OutputAccuracy, Reason, Report
from et_cuda_passes.graph.report_page import render, size_text
from et_cuda_passes.testing import Quantized
from tests.reports import report_on

EVIL = "<script>alert(1)</script>"
_VOID = {"meta", "input", "wbr", "path", "rect"}


class Page(HTMLParser):
    """The elements and texts of a page, and that every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[str]:
        return [" ".join(text.split()) for text in self.texts.get(tag, [])]

    @property
    def text(self) -> str:
        return self.all("body")[0]


def page_of(*reports: Report) -> Page:
    return Page(render({report.target: report.to_dict() for report in reports}, "model.pt2"))


def test_page_of_a_rewrite_has_counts_bytes_and_a_row_for_each_outcome() -> None:
    model, x = Quantized(128, 64), torch.zeros(1, 64, dtype=torch.bfloat16)
    report = ecp.rewrite(torch.export.export(model, (x,)), "cuda")[1]
    page = Page(report.to_html("model.pt2"))
    assert page.all("title") == ["model.pt2"]
    assert "1 rewritten0 kept0 missed" in page.text
    assert f"{size_text(report.bytes_before)} → {size_text(report.bytes_after)} of constants" in page.text
    (row,) = page.all("tbody")
    outcome = report.outcomes[0]
    before, after = size_text(outcome.bytes_before), size_text(outcome.bytes_after)
    for part in ("rewritten", "linear_int4", "aten.linear", "int4 group 32", "triton", "mma_tiled", "128 x 64"):
        assert part in row
    assert f"{before} → {after}" in row
    assert "modules.py:" in row


def test_layers_of_all_blocks_are_one_group() -> None:
    page = page_of(report_on(30))
    groups = [text for text in page.all("summary") if "layers" in text]
    assert groups[0] == "model.layers.{0..29}.self_attn.q_proj.weight 30 layers"
    assert len(groups) == 5
    assert len([text for text in page.all("th") if re.match(r"model\.layers\.\d+\.", text)]) == 150


def test_layer_with_another_outcome_is_in_another_group() -> None:
    given = report_on(4)
    given.outcomes[0] = replace(given.outcomes[0], status="missed", rule=None, kernel="", layout="")
    page = page_of(given)
    assert "model.layers.{1..3}.self_attn.q_proj.weight 3 layers" in page.all("summary")
    assert "model.layers.0.self_attn.q_proj.weight" in page.all("th")


def test_misses_are_grouped_by_reason_and_the_rule_with_fewest_changes_is_first() -> None:
    page = page_of(report_on(4, missed_every=4))
    (article,) = page.all("article")
    assert article.startswith("5 x aten.linear")
    first, second = (way for way in page.all("div") if way.startswith(("Quantize", "Or quantize")))
    assert first == "Quantize with PerGroup(16) linear_int8 wanted a group size, found group size 8; triton has 16"
    assert second.startswith(
        "Or quantize with weight_dtype=torch.int4, and quantize with PerGroup(32) linear_int4 wanted"
    )


def test_miss_without_a_rule_says_what_was_found() -> None:
    reason = Reason(None, "none", "", "no pass for target cuda rewrites aten.mul", "add a rule for it")
    outcome = Outcome("mul", "aten.mul", "w", None, "missed", [reason])
    (article,) = page_of(Report("cuda", outcomes=[outcome])).all("article")
    assert article == "1 x aten.mul 0 B w Add a rule for it no pass for target cuda rewrites aten.mul"


def test_accuracy_has_columns_and_charts_only_where_it_was_measured() -> None:
    without, measured = page_of(report_on(3)), page_of(report_on(3, measured=True))
    assert not any("SNR" in name or "Signal" in name for name in without.all("button") + without.all("figcaption"))
    assert measured.all("button")[-3:] == ["SNR quantized", "SNR rewritten", "Source"]
    assert [text.partition(" in the")[0] for text in measured.all("figcaption")[:3]] == [
        "Bytes of each layer",
        "Signal to noise of each layer, quantized against float",
        "Signal to noise of each layer, rewritten against as exported",
    ]
    # A group has the least ratio of its layers: these have 20, 25 and 23 dB.
    assert "≥ 20.0 dB≥ 45.0 dB" in measured.all("tr")[1].replace(" ≥", "≥")


def test_chart_of_bytes_has_heights_by_square_root_if_one_layer_is_much_larger() -> None:
    given = report_on(4)
    assert "square root" not in page_of(given).text
    given.outcomes[0] = replace(given.outcomes[0], bytes_before=100_000_000, bytes_after=100_000_000)
    page = page_of(given)
    assert "grey is as exported; heights by square root" in page.text
    paths = {each["class"]: each["d"] or "" for tag, each in page.elements if tag == "path"}
    heights = [int(height) for height in re.findall(r"v(\d+)", paths["rewritten"])]
    wanted = [100 * math.sqrt(outcome.bytes_after / 100_000_000) for outcome in given.outcomes]
    assert heights == [round(height) for height in wanted]
    assert len(set(heights)) > 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (math.inf, "exact"), (-math.inf, "no signal"), (math.nan, "not finite"), (-3.0, "-3.0 dB")],
)
def test_page_has_the_words_of_the_terminal_for_ratios(value: float | None, text: str) -> None:
    given = report_on(1)
    layers = [LayerAccuracy(each.fqn, each.node, value, 40.0) for each in given.outcomes]
    rows = page_of(replace(given, accuracy=tuple(layers))).all("tr")
    assert f"{text} 40.0 dB" in rows[1]


@pytest.mark.parametrize("values", [(24.0, math.nan), (math.nan, 24.0)])
def test_group_with_a_ratio_that_is_not_finite_says_so(values: tuple[float, float]) -> None:
    given = report_on(2)
    layers = [
        LayerAccuracy(each.fqn, each.node, value, math.inf)
        for each, value in zip(given.outcomes[::5], values, strict=True)
    ]
    group = page_of(replace(given, accuracy=tuple(layers))).all("tr")[1]
    assert "not finite exact" in group and "≥" not in group


def test_layers_beyond_rounding_and_outputs_are_on_top() -> None:
    given = report_on(1)
    layers = [LayerAccuracy(each.fqn, each.node, None, 50.0, 42.1) for each in given.outcomes]
    page = page_of(replace(given, accuracy=tuple(layers), output_accuracy=(OutputAccuracy("logits", 21.5, math.inf),)))
    assert "Beyond rounding" not in page.text
    assert "logits: 21.5 dB quantized against float, exact rewritten against as exported" in page.all("header")[0]
    layers[1] = replace(layers[1], rewritten_db=12.0)
    layers[2] = replace(layers[2], rewritten_db=math.nan)
    page = page_of(replace(given, accuracy=tuple(layers)))
    assert "Beyond rounding The rewrite changes 2 layers" in page.all("header")[0]
    assert [("beyond rounding, limit 42.1 dB" in row) for row in page.all("tr")[1:]] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_notes_on_layers_are_on_top() -> None:
    given = report_on(1)
    for number, text in ((0, "folded to float32"), (1, "folded to float32"), (2, "a scale of 3 is rounded")):
        given.outcomes[number].reasons.append(Reason("fold_dequantize", "note", "", text))
    header = page_of(given).all("header")[0]
    assert "2 x linear_int4: folded to float32" in header and "1 x linear_int4: a scale of 3 is rounded" in header


def test_sizes_that_an_older_report_lacks_stay_empty() -> None:
    given = report_on(1)
    given.outcomes[0] = replace(given.outcomes[0], bytes_before=0, bytes_after=0)
    rows = page_of(given).all("tr")
    assert [" kB → " in row for row in rows[1:3]] == [False, True]
    assert "0 B" not in rows[1]


def test_two_rules_with_one_fix_state_it_once() -> None:
    reasons = [Reason(rule, "values", "finite scales", "1 NaN", "quantize the weight again") for rule in ("a", "b")]
    missed = replace(report_on(1).outcomes[0], rule=None, status="missed", reasons=reasons)
    text = page_of(Report("cuda", outcomes=[missed])).text
    assert text.count("uantize the weight again") == 1
    assert "a wanted finite scales" in text and "b wanted finite scales" in text


def test_operator_with_two_weights_has_the_worst_of_their_ratios() -> None:
    given = report_on(1)
    node = given.outcomes[0].node
    layers = (LayerAccuracy("a", node, 30.0, None), LayerAccuracy("b", node, 12.0, 50.0))
    rows = page_of(replace(given, accuracy=layers)).all("tr")
    assert "12.0 dB 50.0 dB" in rows[1]


def test_texts_of_a_model_are_escaped() -> None:
    reason = Reason(EVIL, "metadata", EVIL, EVIL, EVIL)
    outcomes = [
        Outcome(EVIL, EVIL, EVIL, EVIL, "rewritten", [], EVIL, EVIL, EVIL, EVIL, [1], EVIL, EVIL, 1, 1),
        Outcome(EVIL, EVIL, f"{EVIL}.0", None, "missed", [reason], f"{EVIL}: {EVIL}"),
        Outcome(EVIL, EVIL, f"{EVIL}.1", None, "missed", [reason], f"{EVIL}: {EVIL}"),
    ]
    drawing = report_on(1).drawings[0]
    nodes = [replace(node, label=EVIL, value=EVIL) for node in drawing.before]
    evil = Report(
        EVIL,
        passes=[EVIL],
        outcomes=outcomes,
        conflicts=[EVIL],
        warnings=[EVIL],
        applied={EVIL: 1},
        rejected={EVIL: [EVIL]},
        notes=[EVIL],
        drawings=[replace(drawing, rule=EVIL, before=nodes)],
    )
    text = render({EVIL: evil.to_dict(), "x": replace(evil, notes=[], tilings=EVIL).to_dict()}, EVIL)
    assert EVIL not in text
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 1  # the page's own
    assert EVIL in page.all("h1")[0] and EVIL in page.all("tbody")[0]


def test_page_loads_nothing() -> None:
    text = render({"cuda": report_on(3, missed_every=4, measured=True).to_dict()}, "model.pt2")
    assert not re.search(r"https?:|url\(|@import|<link|<img|<iframe|\bsrc=", text)
    policies = [each["content"] for tag, each in Page(text).elements if each.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_page_of_several_reports_has_a_section_for_each() -> None:
    page = page_of(report_on(2), report_on(2, missed_every=3, target="cpu"))
    links = [each["href"] for tag, each in page.elements if tag == "a"]
    sections = [each["id"] for tag, each in page.elements if tag == "section"]
    assert links == [f"#{name}" for name in sections] == ["#s1", "#s2"]
    assert page.all("h2") == ["cuda", "cpu"] * 2
    names = [each["id"] for _, each in page.elements if each.get("id")]
    assert len(set(names)) == len(names)


def test_page_without_candidates_says_so() -> None:
    page = page_of(Report("cuda", warnings=["look here"]))
    assert "no operator reads a quantized weight" in page.text
    assert "Warning look here" in page.text
    assert "table" not in page.texts


def test_source_of_the_tilings_is_on_top_unless_a_note_says_it() -> None:
    given = report_on(1)
    assert "tilings: no GPU is named" in page_of(given).all("header")[0]
    noted = replace(given, notes=["tilings calibrated on NVIDIA H200"])
    assert "calibrated" in page_of(noted).all("header")[0]
    assert "no GPU is named" not in page_of(noted).text


def test_drawing_has_every_operator_with_its_shape_and_an_edge_for_every_input() -> None:
    page = page_of(report_on(1))
    given = report_on(1).drawings[0]
    labels = [text for text in page.all("text") if text]
    assert labels == [text for node in given.before + given.after for text in (node.label, node.value)]
    edges = [each for tag, each in page.elements if tag == "path" and each["class"] == "edge"]
    assert len(edges) == sum(len(node.inputs) for node in given.before + given.after)
    assert "2 times: A = 576, B = 1536" in page.all("li")


def test_page_of_equal_reports_has_equal_bytes() -> None:
    pages = {render({"cuda": report_on(5, missed_every=3, measured=True).to_dict()}) for _ in range(2)}
    assert len(pages) == 1


def test_page_of_2000_layers_has_less_than_1_kb_for_each() -> None:
    given = report_on(400, missed_every=7, measured=True)
    assert len(given.outcomes) == 2000
    assert len(given.to_html()) < 2_000_000


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_999, "1000 kB"),
        (1_500_000, "1.5 MB"),
        (2_345_000_000, "2.35 GB"),
    ],
)
def test_size_is_written_in_a_readable_unit(count: int, text: str) -> None:
    assert size_text(count) == text
