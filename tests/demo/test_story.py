"""Every step of the demo on a tiny model; all tests here share two compilations."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from demo import workspace
from demo.story import STEPS, Settings, demo
from tests.demo.tiny import LINEARS, tiny_source

PROMPTS = ("Hello", "What is a tensor?")


def run(folder: Path, **changes: Any) -> str:
    """The output of the demo; answers are short, so that a run is short."""
    output = io.StringIO()
    settings = Settings(folder, tokens=6, prompts=PROMPTS)
    demo(settings, replace(tiny_source(), **changes), Console(file=output, width=160))
    return output.getvalue()


def no_model() -> Any:
    raise AssertionError("the model was loaded again")


def steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("  ") and (line.endswith((" s", "GPU", "reused")))]


def answers(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("  packed int4:", "  unquantized bf16:"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module", autouse=True)
def unchanging_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Only the same code reuses files; an edit while the tests run must not fail them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "ROOT", tmp_path_factory.mktemp("code"))
        yield


@pytest.fixture(scope="module")
def first(folder: Path, unchanging_code: None) -> str:
    return run(folder)


def only(folder: Path, name: str) -> Path:
    (path,) = folder.rglob(name)
    return path


def test_first_run_does_every_step(first: str) -> None:
    assert len(steps(first)) == STEPS
    assert "reused" not in first
    for target in ("cuda", "cpu"):
        assert f"{target}: {LINEARS} candidates: {LINEARS} rewritten, 0 kept, 0 missed" in first
    assert len(answers(first)) == 2 * len(PROMPTS)


def test_compiled_program_agrees_with_the_exported_one(first: str, folder: Path) -> None:
    errors = json.loads(only(folder, "errors.json").read_text())
    assert list(errors) == ["unquantized bf16", "packed int4"]
    # Two orders of rounding to bfloat16 differ slightly.
    assert all(0 < error < 0.02 for error in errors.values()), errors


def test_packing_makes_the_file_smaller(first: str, folder: Path) -> None:
    size = {name: only(folder, name).stat().st_size for name in ("int4.pt2", "cuda.pt2")}
    assert size["cuda.pt2"] < size["int4.pt2"]
    for path in (only(folder, name) for name in size):
        assert f"{path.stat().st_size / 1e6:.1f}" in first


def test_second_run_reuses_all_files(first: str, folder: Path) -> None:
    second = run(folder, model=no_model)
    assert [line.endswith("reused") for line in steps(second)].count(True) == STEPS - 2
    assert answers(second) == answers(first)


def test_interrupted_run_is_resumed(first: str, folder: Path) -> None:
    packed = only(folder, "cuda.pt2")
    wanted = torch.export.load(packed)
    partial = packed.with_name("partial-cuda.pt2")
    partial.write_bytes(packed.read_bytes()[:1000])
    packed.unlink()
    again = run(folder, model=no_model)
    created = [line for line in steps(again) if not line.endswith("reused")]
    assert [line.strip()[:7] for line in created] == ["rewrite", "lower t", "generat"]
    assert not partial.exists()
    found = torch.export.load(packed)
    assert found.graph_module.code == wanted.graph_module.code
    assert found.state_dict.keys() == wanted.state_dict.keys()
    assert all(torch.equal(found.state_dict[name], wanted.state_dict[name]) for name in wanted.state_dict)


def test_prompt_that_does_not_fit_is_rejected_before_any_work(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tokens=40, prompts=("Hello, world",))
    with pytest.raises(ValueError, match="do not fit into 48"):
        demo(settings, tiny_source(), Console(file=io.StringIO()))
    assert not list(tmp_path.iterdir())
