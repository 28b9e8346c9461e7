"""``matrix --ray`` on a local Ray of two CPUs: placement by resources, and another try after a killed command."""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import et_cuda_passes as ecp
from tests.cli.command import Run
from tests.saved import save

try:
    import ray
except ImportError:
    ray = None

ROOT = Path(ecp.__file__).parent.parent
needs_ray = pytest.mark.skipif(ray is None, reason="ray is not installed: pip install 'et-cuda-passes[ray]'")


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    save(tmp_path, "4w", torch.bfloat16)
    (tmp_path / "jobs.toml").write_text(
        'output = "out"\ncache = "packed"\n[model.mlp]\npath = "model.pt2"\n'
        '[target.cuda]\nstop-after = "rewrite"\ngpu = ["sm_80", "sm_90"]\n'
    )
    return tmp_path


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of one machine with two CPUs. Its token is also that of the processes that the test starts."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DISABLE_MEMORY_MONITOR": "1"}
    script = (
        "import ray, sys\n"
        "context = ray.init(address='local', num_cpus=2, num_gpus=0, logging_level='ERROR', log_to_driver=False)\n"
        "print(context.address_info['address'], flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.communicate()


def start(farm: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "et_cuda_passes", "matrix", str(farm / "jobs.toml"), "--json", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def run(farm: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    process = start(farm, *options)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    jobs: list[dict[str, Any]] = json.loads(out)["jobs"]
    return jobs


def commands_of(farm: Path) -> list[int]:
    """The processes of the commands that Ray's workers started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(farm) in text and "\0lower\0" in text:
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Any) -> Any:
    end = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@needs_ray
def test_jobs_run_on_a_cluster_once(farm: Path, address: str) -> None:
    assert [job["status"] for job in run(farm, "--ray", address)] == ["written", "written"]
    assert all((farm / "out" / f"mlp-cuda-{gpu}" / "job.json").is_file() for gpu in ("sm_80", "sm_90"))
    assert [job["status"] for job in run(farm, "--ray", address)] == ["up to date", "up to date"]


@needs_ray
@pytest.mark.slow
def test_killed_command_is_started_again(farm: Path, address: str) -> None:
    process = start(farm, "--ray", address, "--only", "*sm_80")
    (first,) = wait_for(lambda: commands_of(farm))
    os.kill(first, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out)["jobs"][0]["status"] == "written"


@needs_ray
@pytest.mark.slow
def test_command_that_is_always_killed_fails_after_its_retries(farm: Path, address: str) -> None:
    path = farm / "jobs.toml"
    path.write_text("retries = 1\n" + path.read_text())
    process = start(farm, "--ray", address, "--only", "*sm_80")
    killed: list[int] = []

    def kill() -> None:
        while process.poll() is None:
            for each in commands_of(farm):
                os.kill(each, signal.SIGKILL)
                killed.append(each)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    out, err = process.communicate(timeout=240)
    thread.join()
    assert process.returncode == 1 and len(set(killed)) == 2, err
    (job,) = json.loads(out)["jobs"]
    assert job["status"] == "failed"
    assert "the command was killed by SIGKILL" in job["error"] and "Ray tried 2 times" in job["error"]


@needs_ray
@pytest.mark.slow
def test_job_waits_for_the_accelerator_that_it_needs(farm: Path, address: str) -> None:
    path = farm / "jobs.toml"
    path.write_text(path.read_text() + '\nneeds = {gpus = 1}\n[accelerators]\nsm_90 = "H100"\n')
    process = start(farm, "--ray", address)
    assert process.stderr is not None
    lines = [process.stderr.readline().strip() for _ in range(2)]
    assert lines == [
        "warning: mlp-cuda-sm_80 waits for a machine with GPU: 1",
        "warning: mlp-cuda-sm_90 waits for a machine with GPU: 1, accelerator_type:H100: 0.001",
    ]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert commands_of(farm) == []
    assert [job["status"] for job in json.loads((farm / "out" / "results.json").read_text())["jobs"]] == ["not run"] * 2


@needs_ray
@pytest.mark.slow
def test_interrupt_ends_the_commands_of_the_cluster(farm: Path, address: str) -> None:
    process = start(farm, "--ray", address)
    wait_for(lambda: commands_of(farm))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    wait_for(lambda: not commands_of(farm))
    assert not list((farm / "out").rglob(".unfinished-*"))


@needs_ray
def test_address_without_a_cluster_is_an_error(farm: Path) -> None:
    process = start(farm, "--ray", "127.0.0.1:1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "error: --ray 127.0.0.1:1: no connection (" in err


@pytest.mark.skipif(ray is not None, reason="ray is installed")
def test_ray_that_is_not_installed_names_the_extra(farm: Path, command: Run) -> None:
    result = command("matrix", farm / "jobs.toml", "--ray")
    assert (result.code, result.error) == (2, "error: --ray needs ray: pip install 'et-cuda-passes[ray]'")
