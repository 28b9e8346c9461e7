"""Progress: a line with percentage, time and memory for each step, and lines in between where there is no terminal."""

import io
import os
import pty
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.cli.console import Steps
from et_cuda_passes.executorch.lower import lower, lowering_steps
from tests.saved import save

END = re.compile(r"(?:( *\d+) %  )?(.+): (\d+\.\d) s, peak memory (\d+\.\d\d) GB")


def ended(text: str) -> list[tuple[int | None, str, float, float]]:
    """Percentage, name, seconds and gigabytes of each step that ended."""
    found = [END.fullmatch(line) for line in text.splitlines()]
    return [(m[1] and int(m[1]), m[2], float(m[3]), float(m[4])) for m in found if m]  # type: ignore[misc]


def test_step_has_percentage_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps(3) as step:
        step("one")
        time.sleep(0.2)
        step("two")
        kept = torch.ones(25_000_000)
        step("three")
    (one, two, three) = ended(capsys.readouterr().err)
    assert [each[:2] for each in (one, two, three)] == [(33, "one"), (66, "two"), (100, "three")]
    assert one[2] >= 0.2
    # Its peak belongs to a step: the tensor of 100 MB is allocated in the second.
    assert two[3] - one[3] > 0.08 and kept.numel()


def test_without_a_count_there_is_no_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as step:
        step("one")
        step("two")
        step.expect(1)
        step("three")
    assert [each[:2] for each in ended(capsys.readouterr().err)] == [(None, "one"), (66, "two"), (100, "three")]


def test_more_steps_than_expected_stay_at_100_percent(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps(1) as step:
        step("one")
        step("two")
    assert [each[0] for each in ended(capsys.readouterr().err)] == [100, 100]


def test_step_with_an_error_prints_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Steps(1) as step:
            step("one")
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        fail()
    assert capsys.readouterr().err == ""


def test_long_step_prints_lines_with_the_part_that_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Steps, "interval", 0.1)
    with Steps(2) as step:
        step("short")
        step("long")
        step.part(1, 2)
        time.sleep(0.35)
    lines = [line for line in capsys.readouterr().err.splitlines() if "so far" in line]
    assert 1 <= len(lines) <= 3
    assert all(re.fullmatch(r" 75 %  long: 0 s so far, memory \d+\.\d\d GB", line) for line in lines)


def test_rewrite_reports_every_weight(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "4w")
    seen: list[tuple[int, int]] = []
    ecp.rewrite(torch.export.load(path), "cpu", progress=lambda *part: seen.append(part))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("methods", [("forward",), ("prefill", "decode")])
def test_lowering_reports_each_method(methods: tuple[str, ...], tmp_path: Path) -> None:
    path, _ = save(tmp_path, "4w")
    program, _ = ecp.rewrite(torch.export.load(path), "xnnpack")
    steps: list[str] = []
    lower(dict.fromkeys(methods, program), "xnnpack", tmp_path, "model", steps.append)
    assert steps == [*(f"decomposing {name}" for name in methods), "lowering", "serializing"]
    assert len(steps) == lowering_steps("xnnpack", len(methods))


def shown_in_terminal(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The output in a terminal while half of a step runs, and then the other half."""
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = io.BytesIO()

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(master, 4096):
                shown.write(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        with Steps(2) as step:
            step(name)
            time.sleep(0.5)
            step.part(1, 2)
            time.sleep(0.5)
    reader.join()
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue().decode())


def test_terminal_shows_the_step_and_its_memory_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_in_terminal("loading", 100, monkeypatch)
    assert re.search(r"  0 %  loading \d:\d\d:\d\d memory \d+\.\d\d GB", text)
    assert " 25 %  loading" in text
    assert ended(text.replace("\r", "\n"))[-1][:2] == (50, "loading")


def test_narrow_terminal_cuts_off_the_name_of_the_step_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_in_terminal("cpu: compiling prefill with AOTInductor", 60, monkeypatch)
    lines = [line for line in re.split(r"[\r\n]+", text) if "memory" in line and "peak" not in line]
    assert lines and all(re.search(r"%  cpu: compiling.*… \d:\d\d:\d\d memory \d+\.\d\d GB", line) for line in lines)
    assert max(map(len, lines)) <= 60
