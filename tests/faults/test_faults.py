"""A full disk, little memory, a read-only disk, two runs at once, and models that change while they are read."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from et_cuda_passes.testing import Quantized, export, floats
from et_cuda_passes.unfinished import PREFIX, TemporaryFolder, remove_unfinished, replaced_file
from tests.faults.conftest import Disk
from tests.faults.files import Contents, assert_whole, contents, left_over
from tests.hf import checkpoints
from tests.processes import Command, finished
from tests.saved import save

PACKED = ("-t", "cuda", "--stop-after", "rewrite")
LONG = "FAULTS" in os.environ


def lowered(program: Path, folder: Path, *options: object) -> Contents:
    """The files of a run without a fault."""
    result = finished("lower", program, *PACKED, *options, "-o", folder / "out", folder=folder)
    assert result.code == 0, result.err
    return contents(folder / "out")


# A full disk ---------------------------------------------------------------------------------------------------------


def test_full_disk_is_an_error_at_any_file(program: Path, tmp_path: Path, disk: Disk) -> None:
    expected = lowered(program, tmp_path / "whole")
    out, total = disk.path / "out", sum(map(len, expected.values()))
    sizes = range(4096, total, 4096) if LONG else [total - 8192]
    for size in sizes:
        disk.resize(size)
        result = finished("lower", program, *PACKED, "-o", out, folder=tmp_path / "full")
        assert result.code == 1
        assert result.error.startswith("error: the disk is full")
        assert result.error.endswith("free some space and run the command again")
        assert_whole(contents(out), expected)
        assert left_over(out, tmp_path / "full" / "temporary") == []
        shutil.rmtree(out, ignore_errors=True)
    disk.resize(64 << 20)
    assert finished("lower", program, *PACKED, "-o", out, folder=tmp_path / "full").code == 0
    assert contents(out) == expected


@pytest.mark.parametrize("target", ["xnnpack", "cpu"])
@pytest.mark.slow
def test_full_disk_while_lowering_names_the_cause(program: Path, target: str, tmp_path: Path, disk: Disk) -> None:
    disk.resize(48 << 10)
    out = disk.path / "out"
    model = save(tmp_path, "4w")[0]
    result = finished("lower", model, "-t", target, "-o", out, folder=tmp_path / "full")
    assert result.code == 1
    assert result.error.startswith(f"error: {model} could not be lowered for {target}: the disk is full")
    assert set(contents(out)) == {"report.json", "report.html"} and left_over(out) == []


def test_full_cache_names_the_cache(program: Path, tmp_path: Path, disk: Disk) -> None:
    large = tmp_path / "large.pt2"
    torch.export.save(export(nn.Sequential(Quantized(512, 512)), floats(2, 512)), large)
    disk.resize(16 << 10)
    options = ("--gpu", "sm_80", "--cache", disk.path / "cache")
    result = finished("lower", large, *PACKED, *options, "-o", tmp_path / "out", folder=tmp_path / "work")
    assert result.code == 1 and f"the cache {disk.path / 'cache'} cannot be written" in result.error, result.err
    assert left_over(disk.path) == []
    disk.resize(1 << 20)
    assert finished("lower", large, *PACKED, *options, "-o", tmp_path / "out", folder=tmp_path / "work").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["output", "temporary"])
def test_full_disk_of_an_export_leaves_nothing(
    checkpoint: Path, place: str, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = disk.path if place == "temporary" else tmp_path / "work"
    out = disk.path / "out" if place == "output" else tmp_path / "out"
    arguments = ("export", "--model", checkpoint, "--target", "cuda", "--dtype", "bfloat16", "--output-dir", out)
    for size in range(8192, 256 << 10, 16384) if LONG else [16384, 96 << 10]:
        disk.resize(size)
        result = finished(*arguments, folder=folder)
        assert result.code == 1 and "the disk is full" in result.error, result.err
        assert contents(out) == {} and left_over(out, folder / "temporary") == []
    disk.resize(64 << 20)
    assert "on a machine that has it, go on with" in finished(*arguments, folder=folder).error
    assert (out / "export.json").is_file()


# Read-only -----------------------------------------------------------------------------------------------------------


def test_read_only_disk_is_an_error_before_any_work(program: Path, tmp_path: Path, disk: Disk) -> None:
    disk.make_read_only()
    result = finished("lower", program, *PACKED, "-o", disk.path / "out", folder=tmp_path)
    assert (result.code, result.out) == (2, "")
    place = f"--output-dir {disk.path / 'out'}"
    assert result.error == f"error: {place} is on a file system that is read-only; name another directory"
    assert "loading" not in result.err


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MB of weights in 8 bits."""
    path = tmp_path_factory.mktemp("large") / "large.pt2"
    model = nn.Sequential(*(Quantized(4096, 4096, seed=seed) for seed in range(4)))
    torch.export.save(export(model, floats(2, 4096)), path)
    return path


@pytest.mark.parametrize(
    "megabytes", [80, *(pytest.param(size, marks=pytest.mark.slow) for size in (16, 112, 144, 200))]
)
def test_memory_limit_is_an_error_with_the_cause(large: Path, megabytes: int, tmp_path: Path) -> None:
    arguments = ("lower", large, *PACKED, "--gpu", "sm_80", "-o", tmp_path / "out")
    result = finished(*arguments, folder=tmp_path / "work", memory=megabytes << 20)
    assert result.code == 1
    assert "there is not enough memory (ulimit -v limits it to" in result.error, result.err
    assert left_over(tmp_path / "out", tmp_path / "work" / "temporary") == []
    assert finished(*arguments, folder=tmp_path / "work").code == 0


# Two runs ------------------------------------------------------------------------------------------------------------


def test_folder_of_two_runs_has_the_files_of_one(tmp_path: Path) -> None:
    programs = []
    for name, scheme in (("a", "4w"), ("b", "8da4w")):
        (tmp_path / name).mkdir()
        programs.append(save(tmp_path / name, scheme, torch.bfloat16)[0])
    expected = [lowered(each, tmp_path / f"whole-{each.parent.name}") for each in programs]
    assert expected[0].keys() == expected[1].keys() and expected[0] != expected[1]
    out = tmp_path / "out"
    for _ in range(10 if LONG else 1):
        commands = [
            Command(("lower", each, *PACKED, "-o", out), tmp_path / each.parent.name / "work") for each in programs
        ]
        assert [command.wait().code for command in commands] == [0, 0]
        assert contents(out) in expected
        assert left_over(out) == []


# A model that changes ------------------------------------------------------------------------------------------------


@contextmanager
def repeated(change: object) -> Iterator[None]:
    """Call ``change`` again and again in a thread."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            change()  # type: ignore[operator]

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("way", ["replaced", pytest.param("written", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_program_that_changes_is_lowered_whole_or_not_at_all(way: str, stream: bool, tmp_path: Path) -> None:
    models = []
    for seed in range(2):
        path = tmp_path / f"{seed}.pt2"
        torch.export.save(export(nn.Sequential(Quantized(64, 64, seed=seed)), floats(2, 64)), path)
        models.append(path.read_bytes())
    model = tmp_path / "model.pt2"
    options = ("--gpu", "sm_80", *(("--stream", tmp_path) if stream else ()))
    expected = []
    for content in models:
        model.write_bytes(content)
        expected.append(lowered(model, tmp_path / f"whole-{len(expected)}", *options))
    turn = [0]

    def change() -> None:
        turn[0] ^= 1
        if way == "replaced":
            with replaced_file(model) as file:
                file.write(models[turn[0]])
        else:
            with model.open("r+b") as file:
                for start in range(0, len(models[turn[0]]), 1000):
                    file.write(models[turn[0]][start : start + 1000])
        time.sleep(random_pause())

    refused = 0
    with repeated(change):
        for index in range(20 if LONG else 2):
            out = tmp_path / f"out-{index}"
            result = finished("lower", model, *PACKED, *options, "-o", out, folder=tmp_path / "work")
            if result.code == 0:
                assert contents(out) in expected
            else:
                refused += 1
                assert "changed while it was read: run the command again" in result.error
                assert contents(out) == {}
            assert left_over(out) == []
    if way == "replaced" and not refused:
        assert expected[0] != expected[1]
    assert lowered(model, tmp_path / "retry", *options) in expected


def random_pause() -> float:
    return float(torch.rand(()) * 0.05)


@pytest.mark.slow
def test_checkpoint_that_changes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = checkpoints.masked(tmp_path / "model")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    out = tmp_path / "out"
    arguments = ("export", "--model", model, "--target", "cuda", "--dtype", "bfloat16", "--output-dir", out)
    command = Command(arguments, tmp_path / "work")
    command.until(lambda: "exporting" in command.err or "splitting" in command.err)
    with replaced_file(weights) as file:
        file.write(content)
    result = command.wait()
    assert result.code == 2
    assert result.error == (
        f"error: {weights} changed while it was read: run the command again when nothing writes to it"
    )
    assert contents(out) == {}
    assert "go on with" in finished(*arguments, folder=tmp_path / "work").error


# Temporary files -----------------------------------------------------------------------------------------------------


def test_temporary_files_of_a_living_process_stay(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / "half").write_text("half")
    (tmp_path / f"{PREFIX}file").write_text("half")
    (tmp_path / "mine").write_text("whole")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "mine")
    with TemporaryFolder(tmp_path) as folder, replaced_file(tmp_path / "new") as file:
        remove_unfinished(tmp_path)
        assert folder.is_dir()
        file.write(b"new")
        assert len(left_over(tmp_path)) == 3, "the two of this process, and a link, which is not one"
    assert (tmp_path / "new").read_bytes() == b"new" and (tmp_path / "mine").read_text() == "whole"
    (tmp_path / f"{PREFIX}link").unlink()
    assert left_over(tmp_path) == []


def test_replaced_file_keeps_its_content_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")

    def fail() -> None:
        with replaced_file(tmp_path / "file") as file:
            file.write(b"half")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def interrupted(work: Callable[[], None], step: int) -> bool:
    """Whether ``KeyboardInterrupt``, as by Ctrl-C, ended ``work`` at a step: a line of ours, or a call in a library."""
    left = [step]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        file = Path(frame.f_code.co_filename).name
        ours = event == "line" and file == "unfinished.py"
        if ours or (event == "call" and file in ("weakref.py", "shutil.py", "contextlib.py")):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_interrupt_at_any_step_leaves_no_temporary_file(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "file"

    def work() -> None:
        if kind == "folder":
            with TemporaryFolder(tmp_path) as folder:
                (folder / "part").write_text("half")
        else:
            with replaced_file(target) as file:
                file.write(b"whole")

    step = 0
    while interrupted(work, step):
        assert left_over(tmp_path) == [], f"step {step}"
        assert not target.exists() or target.read_bytes() == b"whole"
        target.unlink(missing_ok=True)
        step += 1
    assert step > 20
    assert left_over(tmp_path) == []
