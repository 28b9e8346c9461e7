"""The documentation is true: generated pages match the code, links have targets, and examples run."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F

from docs import generate
from et_cuda_passes.testing import assert_rewrites
from tests.cli.command import called

FIRST_EXPORT = generate.ROOT / "docs" / "tutorials" / "first-export.md"
"""It writes files and has commands of the shell, and so has a test of its own."""
EXAMPLES = [
    page
    for page in sorted((generate.ROOT / "docs").rglob("*.md"))
    if "```python" in page.read_text(encoding="utf-8") and page != FIRST_EXPORT
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", generate.PAGES, ids=lambda path: path.name)
def test_generated_page_matches_the_code(path: Path) -> None:
    assert path.exists(), "`make docs` writes it"
    assert path.read_text(encoding="utf-8") == generate.page(path), "`make docs` brings it up to date"


def test_links_of_all_pages_have_targets() -> None:
    assert list(generate.broken_links()) == []


def test_link_without_a_target_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(
        "# A heading, here\n[b](b.md) [up](../README.md#gone) [ok](#a-heading-here)\n"
    )
    (tmp_path / "README.md").write_text("# Here\n[a](docs/a.md#a-heading-here) [far](https://example.org/x)\n")
    assert list(generate.broken_links(tmp_path)) == ["docs/a.md: b.md", "docs/a.md: ../README.md#gone"]


def run_page(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page as one program; the text block after a block must be its output.

    Returns:
        The names that the program defines.
    """
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    space: dict[str, Any] = {"__name__": page.stem}
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
    return space


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_and_print_their_output(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(generate.ROOT)
    run_page(page)


def shown(expected: str, printed: str) -> bool:
    """Whether ``printed`` contains the text of a page; ``...`` stands for any text, and spaces do not matter."""
    pattern = ".*".join(r"\s+".join(map(re.escape, piece.split())) for piece in expected.split("..."))
    return re.search(pattern, " ".join(printed.split()), re.DOTALL) is not None


@pytest.mark.compiled
def test_commands_of_the_first_export_print_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the page is for a machine without a GPU
    blocks = [(found[1], found[2]) for found in BLOCK.finditer(FIRST_EXPORT.read_text(encoding="utf-8"))]
    (program,) = (text for kind, text in blocks if kind == "python")
    exec(compile(program, FIRST_EXPORT.name, "exec"), {"__name__": "first_export"})
    outputs = []
    for text in (text for kind, text in blocks if kind == "sh"):
        results = [called(*shlex.split(line)[1:]) for line in text.replace("\\\n", "").splitlines()]
        outputs.append(results)
    (export,), generated, (lower,) = outputs
    export_text, generated_text = (text for kind, text in blocks if kind == "text")
    assert export.code == 1 and "et-cuda-passes lower out --target cuda" in export.err
    assert shown(export_text, export.out), export.out
    assert [result.code for result in generated] == [0, 0]
    for result in generated:
        assert shown(generated_text, result.out), result.out
    assert lower.code == 1 and "needs a CUDA device" in lower.err, "the command for the machine with a GPU"


def test_rule_of_the_page_on_constants_distinguishes_two_scales_of_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(generate.ROOT)
    rule = run_page(generate.ROOT / "docs/how-to/write-a-rule-well.md")["ScaleAfter"]

    class TwoScales(torch.nn.Module):
        """Two linears with the same integers, and with scales that are numbers in the graph."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.randint(-127, 128, (8, 16), dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor
            one, two = (dequantize(self.q, scale, 0, -128, 127, torch.int8) for scale in (0.5, 0.03))
            return F.linear(x, one) - F.linear(x, two)

    program = torch.export.export(TwoScales(), (torch.randn(2, 16),))
    after, _ = assert_rewrites(program, "cpu", passes=[rule()], expect={"scale_after": 2}, rtol=1e-6)
    scales = [tensor for name, tensor in after.state_dict.items() if ".row_scale" in name]
    assert sorted(float(scale[0]) for scale in scales) == pytest.approx([0.03, 0.5])
