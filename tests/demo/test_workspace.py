"""A step's file exists if and only if the step is complete."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from demo import workspace
from demo.workspace import Screen, Workspace, size_of


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def files(tmp_path: Path, output: io.StringIO) -> Workspace:
    return Workspace(tmp_path / "files", Screen(Console(file=output, width=100), 1))


def never(path: Path) -> None:
    raise AssertionError(f"{path} is there already")


def test_file_is_written_once(files: Workspace, output: io.StringIO) -> None:
    path = files.make("a.pt2", "make a", lambda path: path.write_text("whole") and None)
    assert path.read_text() == "whole"
    assert files.make("a.pt2", "make a", never) == path
    assert "reused" not in output.getvalue().splitlines()[0]
    assert "reused" in output.getvalue().splitlines()[1]


def test_interrupted_step_is_repeated(files: Workspace, output: io.StringIO) -> None:
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.make("a.pt2", "make a", interrupted)
    assert not (files.folder / "a.pt2").exists()
    assert output.getvalue() == ""
    files.make("a.pt2", "make a", lambda path: path.write_text("whole") and None)
    assert [path.name for path in files.folder.iterdir()] == ["a.pt2"]


def test_interrupted_folder_is_rebuilt_from_nothing(files: Workspace) -> None:
    def folder(*names: str) -> workspace.Build:
        def build(path: Path) -> None:
            path.mkdir()
            for name in names:
                (path / name).write_text(name)
            if "bad" in names:
                raise OSError("disk full")

        return build

    with pytest.raises(OSError, match="disk full"):
        files.make("cuda", "lower", folder("bad"))
    created = files.make("cuda", "lower", folder("model.pte", "data"))
    assert sorted(path.name for path in created.iterdir()) == ["data", "model.pte"]
    assert size_of(created) == len("model.pte") + len("data")


def test_fresh_run_reuses_no_files(tmp_path: Path, files: Workspace) -> None:
    screen = Screen(Console(file=io.StringIO()), 1)
    (tmp_path / "mine").write_text("not the demo's")
    old = Workspace.for_model(tmp_path, "tiny", screen, fresh=False)
    old.make("a", "make a", Path.touch)
    assert Workspace.for_model(tmp_path, "tiny", screen, fresh=False).make("a", "make a", never)
    with pytest.raises(AssertionError, match="there already"):
        Workspace.for_model(tmp_path, "tiny", screen, fresh=True).make("a", "make a", never)
    assert (tmp_path / "mine").exists()


def test_other_versions_and_other_code_have_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folders() -> tuple[Path, Path]:
        files = Workspace.for_model(tmp_path, "tiny", Screen(Console(file=io.StringIO()), 1), fresh=False)
        return files.folder, files.after_rewriting().folder

    before = folders()
    assert folders() == before
    monkeypatch.setattr(workspace, "version", lambda package: "99.0")
    assert folders()[0] != before[0]
    monkeypatch.undo()

    for package in ("demo", "et_cuda_passes"):
        (tmp_path / "code" / package).mkdir(parents=True)
    monkeypatch.setattr(workspace, "ROOT", tmp_path / "code")
    before = folders()
    (tmp_path / "code" / "et_cuda_passes" / "rule.py").write_text("new")
    after = folders()
    assert after[0] == before[0]
    assert after[1] != before[1]
