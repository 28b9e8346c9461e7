"""``matrix`` that is killed or interrupted, alone or with its commands, and two at a time."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.files import Contents, assert_whole, contents, left_over
from tests.processes import Command, finished

COUNT = int(os.environ.get("FAULTS", "1"))
NAMES = ("mlp-cuda-sm_80", "mlp-cuda-sm_90")
SAVED = {"job.json", "results.json", "inputs.json"}


def write_jobs(folder: Path, program: Path, gpus: str) -> Path:
    folder.mkdir()
    path = folder / "jobs.toml"
    path.write_text(
        f'output = "out"\n[model.mlp]\npath = "{program}"\n[target.cuda]\nstop-after = "rewrite"\ngpu = {gpus}\n'
    )
    return path


def outputs(folder: Path) -> Contents:
    """The files that the commands of jobs write, without logs and records."""
    found = contents(folder / "out")
    return {name: data for name, data in found.items() if Path(name).name not in SAVED and not name.endswith(".log")}


def descendants(pid: int) -> list[int]:
    children = [int(each) for task in Path(f"/proc/{pid}/task").glob("*/children") for each in task.read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with its commands"])
def test_killed_matrix_is_finished_by_the_next(alone: bool, program: Path, tmp_path: Path) -> None:
    gpus = '["sm_80", "sm_90"]'
    jobs = write_jobs(tmp_path / "whole", program, gpus)
    command = Command(("matrix", jobs, "--jobs", 2), tmp_path / "work")
    assert command.wait().code == 0, command.err
    seconds, expected = time.monotonic() - command.began, outputs(tmp_path / "whole")
    assert len(expected) == 6
    folder = tmp_path / "killed"
    jobs = write_jobs(folder, program, gpus)
    for index in range(COUNT):
        command = Command(("matrix", jobs, "--jobs", 2), tmp_path / "work")
        time.sleep(random.uniform(0, seconds))
        others = [] if alone else descendants(command.pid)
        command.kill()
        for other in others:
            try:
                os.kill(other, signal.SIGKILL)
            except ProcessLookupError:
                continue
        found = outputs(folder)
        # A command that lives on may be writing.
        if not alone:
            assert_whole(found, expected)
        for name in NAMES:
            record = folder / "out" / name / "job.json"
            if record.exists() and json.loads(record.read_text())["key"]:
                own = {file: data for file, data in expected.items() if file.startswith(f"{name}/")}
                assert own.items() <= outputs(folder).items(), "a job with a record is done"
        if index % 5 == 4 or index == COUNT - 1:
            result = finished("matrix", jobs, "--jobs", 2, "--json", folder=tmp_path / "work")
            assert result.code == 0, result.err
            assert outputs(folder) == expected
            assert left_over(folder, tmp_path / "work" / "temporary") == []
            again = finished("matrix", jobs, "--json", folder=tmp_path / "work")
            assert {job["status"] for job in json.loads(again.out)["jobs"]} == {"up to date"}


def test_interrupted_matrix_ends_its_commands_and_says_what_was_not_run(program: Path, tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs", program, '["sm_80", "sm_90"]')
    out = tmp_path / "jobs" / "out"
    command = Command(("matrix", jobs), tmp_path / "work")
    log = out / f"{NAMES[0]}.log"
    command.until(lambda: log.exists() and bool(descendants(command.pid)))
    (started,) = descendants(command.pid)
    command.send(signal.SIGINT)
    assert command.wait().code == 130
    assert not Path(f"/proc/{started}").exists()
    assert left_over(out, tmp_path / "work" / "temporary") == []
    statuses = [job["status"] for job in json.loads((out / "results.json").read_text())["jobs"]]
    assert statuses == ["not run", "not run"]
    assert not any((out / name / "job.json").exists() for name in NAMES)


@pytest.mark.slow
def test_two_runs_of_one_file_do_each_job_once(program: Path, tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs", program, '"sm_80"')
    commands = [Command(("matrix", jobs, "--json"), tmp_path / str(index)) for index in range(2)]
    results = [command.wait() for command in commands]
    assert [result.code for result in results] == [0, 0]
    statuses = sorted(json.loads(result.out)["jobs"][0]["status"] for result in results)
    assert statuses == ["up to date", "written"]
