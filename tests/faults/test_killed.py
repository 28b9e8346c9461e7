"""Commands that are killed, or interrupted, at random moments. FAULTS is how many of each (``make faults``)."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from et_cuda_passes.unfinished import PREFIX
from tests.faults.files import Contents, assert_whole, contents, left_over
from tests.processes import Command, finished

COUNT = int(os.environ.get("FAULTS", "2"))
Arguments = Callable[[Path], tuple[object, ...]]


def lower(program: Path) -> Arguments:
    return lambda out: ("lower", program, "-t", "cuda", "--stop-after", "rewrite", "-o", out)


def export(checkpoint: Path) -> Arguments:
    options = ("--target", "cuda", "--qlinear", "4w", "--dtype", "bfloat16", "--gpu", "sm_80", "--overwrite")
    return lambda out: ("export", "--model", checkpoint, *options, "--output-dir", out)


@pytest.fixture(params=["lower", pytest.param("export", marks=pytest.mark.slow)])
def arguments(request: pytest.FixtureRequest, program: Path, checkpoint: Path) -> Arguments:
    return lower(program) if request.param == "lower" else export(checkpoint)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export for cuda ends with packed programs everywhere."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def whole(arguments: Arguments, no_gpu: None, tmp_path: Path) -> tuple[Contents, float]:
    """The files of a run that ends, and its seconds."""
    finished("--version", folder=tmp_path / "start")  # all processes are forked from one that starts now
    command = Command(arguments(tmp_path / "reference" / "out"), tmp_path / "reference")
    result = command.wait()
    assert result.code == 0 or "on a machine that has it, go on with" in result.error, result.err
    return contents(tmp_path / "reference" / "out"), time.monotonic() - command.began


def wait_for_a_moment(command: Command, out: Path, seconds: float, in_writing: bool) -> None:
    """Wait for a random moment of the whole run, or one shortly after the first temporary file."""
    if in_writing:
        command.until(lambda: any(out.glob(f"{PREFIX}*")))
        time.sleep(random.uniform(0, 0.1))
    else:
        time.sleep(random.uniform(0, seconds))


def assert_retry_succeeds(arguments: Arguments, folder: Path, whole: Contents) -> None:
    finished(*arguments(folder / "out"), folder=folder)
    assert contents(folder / "out") == whole
    assert left_over(folder / "out", folder / "temporary") == []


def test_killed_command_leaves_whole_files_and_a_retry_succeeds(
    arguments: Arguments, whole: tuple[Contents, float], tmp_path: Path
) -> None:
    expected, seconds = whole
    folder = tmp_path / "killed"
    for index in range(COUNT):
        command = Command(arguments(folder / "out"), folder)
        wait_for_a_moment(command, folder / "out", seconds, index % 2 == 0)
        command.kill()
        found = contents(folder / "out")
        assert_whole(found, expected)
        if "export.json" in found:
            assert found == expected, "a folder with a manifest is a whole export"
        if index % 10 == 9 or index == COUNT - 1:
            assert_retry_succeeds(arguments, folder, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_command_removes_its_temporary_files(
    arguments: Arguments, whole: tuple[Contents, float], number: signal.Signals, tmp_path: Path
) -> None:
    expected, seconds = whole
    folder = tmp_path / "interrupted"
    codes = set()
    for index in range(COUNT):
        command = Command(arguments(folder / "out"), folder)
        wait_for_a_moment(command, folder / "out", seconds, index % 2 == 0)
        command.send(number)
        codes.add(command.wait().code)
        assert "Traceback" not in command.err
        assert left_over(folder / "out", folder / "temporary") == []
        assert_whole(contents(folder / "out"), expected)
    # Before the command has a handler of its own, the signal ends the process.
    assert codes <= {128 + number, -number, 0, 1}
    assert_retry_succeeds(arguments, folder, expected)


def test_killed_writer_leaves_whole_entries_in_the_cache(program: Path, tmp_path: Path) -> None:
    def arguments(folder: Path) -> tuple[object, ...]:
        return (
            "lower",
            program,
            "-t",
            "cuda",
            "--stop-after",
            "rewrite",
            "--cache",
            folder / "cache",
            "-o",
            folder / "out",
        )

    assert finished(*arguments(tmp_path / "reference"), folder=tmp_path / "reference").code == 0
    expected = contents(tmp_path / "reference" / "cache")
    assert len(expected) == 4
    folder = tmp_path / "killed"
    for _ in range(COUNT):
        command = Command(arguments(folder), folder)
        command.until(lambda: any((folder / "cache").glob("*")) or any((folder / "cache").glob(f"{PREFIX}*")))
        time.sleep(random.uniform(0, 0.02))
        command.kill()
        assert_whole(contents(folder / "cache"), expected)
    assert finished(*arguments(folder), folder=folder).code == 0
    assert contents(folder / "cache") == expected and left_over(folder) == []
