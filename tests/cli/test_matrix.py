"""``matrix``: what a jobs file may contain, the commands of its jobs, and which jobs run again."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.cli import work
from et_cuda_passes.cli.app import common_options  # noqa: F401  (the package of the commands is imported before its parts)
from et_cuda_passes.cli.jobs import Job, Needs, read_jobs
from et_cuda_passes.cli.work import Digests, failure, finished, key_of
from tests.cli.command import Run
from tests.cli.test_json import document
from tests.saved import save

ROOT = Path(ecp.__file__).parent.parent


def jobs_of(path: Path) -> dict[str, Job]:
    from et_cuda_passes.cli import lower
    from et_cuda_passes.cli.exporting import export

    return {job.name: job for job in read_jobs(path, export, lower).jobs}


def write(folder: Path, text: str) -> Path:
    path = folder / "jobs.toml"
    path.write_text(text)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the files that the jobs files below name; nothing reads them."""
    for name in ("block.pt2", "recipe.toml"):
        (tmp_path / name).write_text(name)
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text("{}")
    return tmp_path


WHOLE = """
output = "build"
cache = "packed"
cache-limit = 5
retries = 1

[options]
debug = true
group-size-fallback = "error"

[model.decoder]
path = "decoder"
max_length = 128

[model.block]
path = "block.pt2"

[scheme.int4]
qlinear = "4w"
recipe = "recipe.toml"

[scheme.int8]
qlinear = "8w"
max-length = 64

[target.cuda]
gpu = ["sm_80", "sm_90"]
compile-spec = ["low_memory_mode=ON", "max_autotune=OFF"]
needs = {cpus = 4, memory = 2.5}

[target."cpu,xnnpack"]
cast-to-bf16 = true

[accelerators]
sm_90 = "H100"

[[exclude]]
model = "block"
target = "cpu,xnnpack"

[[exclude]]
scheme = "int8"
gpu = ["sm_80", "sm_90"]
"""


# The file ------------------------------------------------------------------------------------------------------------


def test_jobs_are_all_combinations_that_are_not_excluded(models: Path) -> None:
    jobs = jobs_of(write(models, WHOLE))
    assert list(jobs) == [
        "decoder-int4-cuda-sm_80",
        "decoder-int4-cuda-sm_90",
        "decoder-int4-cpu_xnnpack",
        "decoder-int8-cpu_xnnpack",
        "block-cuda-sm_80",
        "block-cuda-sm_90",
    ]
    job = jobs["decoder-int4-cuda-sm_90"]
    assert shlex.join(job.shell_command) == (
        f"et-cuda-passes export --model {models}/decoder --target cuda --gpu sm_90 --compile-spec low_memory_mode=ON "
        f"--compile-spec max_autotune=OFF --debug --group-size-fallback error --max-length 128 --qlinear 4w "
        f"--recipe {models}/recipe.toml --cache {models}/packed --cache-limit 5 "
        f"--output-dir {models}/build/{job.name} --overwrite"
    )
    assert job.inputs == (models / "decoder", models / "recipe.toml")
    assert (job.needs, job.retries) == (Needs(4, 1, 2_500_000_000, "H100"), 1)
    assert jobs["decoder-int4-cuda-sm_80"].needs.accelerator is None
    assert jobs["decoder-int8-cpu_xnnpack"].needs == Needs(1, 0)
    assert "--cast-to-bf16" in jobs["decoder-int8-cpu_xnnpack"].command
    # The options of the model decide before those of the scheme; lower has no such options.
    assert jobs["decoder-int8-cpu_xnnpack"].command[5:7] != ("--max-length", "64")
    assert "128" in jobs["decoder-int8-cpu_xnnpack"].command
    assert jobs["block-cuda-sm_80"].command[:6] == (
        "lower", str(models / "block.pt2"), "--target", "cuda", "--gpu", "sm_80",
    )  # fmt: skip
    assert "--max-length" not in jobs["block-cuda-sm_80"].command


def test_accelerator_of_a_gpu_holds_for_any_number_of_its_processors(models: Path) -> None:
    text = f'{BASE.replace("cpu", "cuda")}gpu = ["sm_90", "sm_90:114"]\n[accelerators]\nsm_90 = "H100"\n'
    assert [job.needs.accelerator for job in jobs_of(write(models, text)).values()] == ["H100", "H100"]


def test_job_that_stops_after_the_rewrite_needs_no_gpu(models: Path) -> None:
    text = 'output = "o"\n[model.m]\npath = "block.pt2"\n[target.cuda]\nstop-after = "rewrite"\n'
    assert jobs_of(write(models, text))["m-cuda"].needs.gpus == 0


BASE = 'output = "o"\n[model.m]\npath = "block.pt2"\n[target.cpu]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output = ", "is no TOML file: Invalid value"),
        ("outptu = 'o'", "unknown key 'outptu'; the nearest is output"),
        ("[model.m]\npath = 'block.pt2'\n[target.cpu]", "output is missing: name the folder of all results"),
        ("output = 'o'\n[target.cpu]", "there is no model: add a table [model.NAME]"),
        ("output = 'o'\n[model.m]\npath = 'block.pt2'", "there is no target: add a table [target.NAME]"),
        ("output = 'o'\nmodel = 'block.pt2'", "model must be a table"),
        ("output = 'o'\nmodel.m = 'block.pt2'", "model.m must be a table: write [model.NAME]"),
        ("output = 'o'\n[model.m]\n[target.cpu]", "[model.m] has no path: name a .pt2"),
        ("output = 'o'\n[model.m]\npath = 'gone.pt2'\n[target.cpu]", "[model.m]: there is no file or folder"),
        ("output = 'o'\n[model.m]\npath = './gone/x/y'\n[target.cpu]", "[model.m]: there is no file or folder"),
        (f"{BASE}expcet = 'missed=0'", "has expcet, which is no option of export and lower; the nearest is expect"),
        (f"{BASE}[scheme.a]\nqlinaer = '4w'", "has qlinaer, which is no option of export; the nearest is qlinear"),
        (f"{BASE}[scheme.a]\nqlinear = '4w'", "and each path is a .pt2: remove it"),
        (f"{BASE}output-dir = 'x'", "output-dir, which the jobs file sets itself: each job has a folder of its own"),
        (f"{BASE}[options]\nmodel = 'x'", "[options] has model, which the jobs file sets itself"),
        (f"{BASE}trust = 'yes'", "[target.cpu] trust must be true or false; got 'yes'"),
        (f"{BASE}max-length = 'long'", "[target.cpu] max-length must be a whole number; got 'long'"),
        (f"{BASE}max-length = true", "[target.cpu] max-length must be a whole number; got True"),
        (f"{BASE}max-length = 2", "[target.cpu] max-length must be at least 8; got 2"),
        (f"{BASE}expect = [1]", "[target.cpu] expect must be a text or several; got [1]"),
        (f"{BASE}dtype = 4", "[target.cpu] dtype must be a text; got 4"),
        (f"{BASE}gpu = []", "[target.cpu] gpu must be one name or several"),
        (f"{BASE}needs = {{cpu = 1}}", "[target.cpu] needs has unknown key 'cpu'; the nearest is cpus"),
        (f"{BASE}needs = {{cpus = -1}}", "needs.cpus must be a number, and not negative; got -1"),
        (f"{BASE}[[exclude]]\ntaget = 'cpu'", "[[exclude]] has unknown key 'taget'; the nearest is target"),
        (f"{BASE}[[exclude]]\ntarget = 'cup'", "[[exclude]] names the target 'cup'; the nearest is cpu"),
        (f"{BASE}[[exclude]]\ntarget = 'cpu'", "[[exclude]] leaves no job"),
        (f"{BASE}[exclude]\ntarget = 'cpu'", "as [[exclude]], in double brackets"),
        (f"retries = -1\n{BASE}", "retries must be a whole number, and not negative; got -1"),
        (f"cache-limit = 5\n{BASE}", "cache-limit limits the folder of cache: give that too"),
        (f"cache = 5\n{BASE}", "cache must be the path of a folder; got 5"),
        (f"{BASE}[model.'m ']\npath = 'block.pt2'\n[model.m_]\npath = 'block.pt2'", "two jobs have the name m_-cpu"),
        (f"{BASE}[target.cup]", "[target.cup]: there is no target 'cup'; the nearest is cpu"),
        (f"{BASE}stop-after = 'export'", "[target.cpu] stop-after must be rewrite; got 'export'"),
        (f"{BASE}gpu = 'sm_77'", "[target.cpu] 'sm_77' names no known GPU: use one of sm_80"),
        (f"{BASE}[accelerators]\nsm_99 = 'H100'", "[accelerators] 'sm_99' names no known GPU"),
        (f"{BASE}needs = {{memory = nan}}", "needs.memory must be a number, and not negative; got nan"),
        (f"{BASE}needs = {{gpus = 1.5}}", "needs.gpus must be a whole number or less than 1; got 1.5"),
        (f"{BASE}[[exclude]]", "[[exclude]] is empty and would leave out every job"),
        (f"{BASE}[[exclude]]\ngpu = 'sm_80'", "[[exclude]] names the gpu 'sm_80'; known are none"),
        (f"{BASE}dtype = 'float32'", "[target.cpu] has dtype, an option of export, and the file has only .pt2 files"),
        (f"cache = 'c'\ncache-limit = 0\n{BASE}", "cache-limit must be at least 0.001 GB; got 0"),
    ],
)  # fmt: skip
def test_wrong_jobs_file_is_refused_with_the_fix(models: Path, command: Run, text: str, message: str) -> None:
    path = write(models, text)
    result = command("matrix", path, "--print")
    assert (result.code, result.out) == (2, "")
    assert result.error.startswith(f"error: {path}: ") or " is no TOML file" in result.error
    assert message in result.error


def test_wrong_options_are_refused(models: Path, command: Run) -> None:
    path = write(models, BASE)
    assert "cannot be read: No such file" in command("matrix", models / "gone.toml").error
    assert "--only x*: no job has this name" in command("matrix", path, "--only", "x*").error
    assert "--ray and --jobs exclude each other" in command("matrix", path, "--jobs", 2, "--ray").error
    assert "--ray and --print exclude each other" in command("matrix", path, "--ray", "--print").error


def test_printed_commands_are_those_of_a_shell_and_import_no_torch(models: Path) -> None:
    path = write(models, WHOLE)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "et_cuda_passes", "matrix", path, "--print", "--only", "*sm_90"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    lines = done.stdout.splitlines()
    assert [tuple(shlex.split(line)) for line in lines] == [
        job.shell_command for name, job in jobs_of(path).items() if name.endswith("sm_90")
    ]


# Keys and records ----------------------------------------------------------------------------------------------------


def test_key_depends_on_command_and_contents_and_not_on_places(models: Path, tmp_path: Path) -> None:
    def key(text: str, folder: Path = models, name: str = "m-cpu") -> str:
        return key_of(jobs_of(write(folder, text))[name], Digests(tmp_path / "none.json"))

    first = key(BASE)
    assert key(BASE) == first
    assert key(BASE.replace('"o"', '"other"')) == first
    assert key(f"cache = 'packed'\n{BASE}") == first
    assert key(f"{BASE}stream = 'scratch'") == first
    assert key(BASE.replace("model.m", "model.n"), name="n-cpu") == first
    assert key(f"{BASE}trust = true") != first
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(models / "block.pt2", moved)
    assert key(BASE, moved) == first
    (moved / "block.pt2").write_text("block.pt3")
    assert key(BASE, moved) != first
    decoder = BASE.replace("block.pt2", "decoder")
    before = key(decoder)
    (models / "decoder" / "model.safetensors").write_text("x")
    assert key(decoder) != before


def test_digest_of_an_unchanged_file_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_RECENT", -1)
    model, known = tmp_path / "model", tmp_path / "inputs.json"
    model.write_text("one")
    first = Digests(known)
    first.of(model)
    first.save()
    remembered = json.loads(known.read_text())
    remembered[str(model)][-1] = "as remembered"
    known.write_text(json.dumps(remembered))
    assert Digests(known).of(model) == "as remembered"


@pytest.mark.parametrize("way", ["written", "moved"])
def test_file_that_is_replaced_with_the_same_size_and_time_is_read_again(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_RECENT", -1)
    model, known, other = tmp_path / "model", tmp_path / "inputs.json", tmp_path / "other"
    model.write_text("one")
    other.write_text("two")
    for path in (model, other):
        os.utime(path, (1, 1))
    digests = Digests(known)
    first = digests.of(model)
    digests.save()
    if way == "moved":
        other.replace(model)
    else:
        model.write_text("two")
        os.utime(model, (1, 1))
    assert Digests(known).of(model) == hashlib.sha256(b"two").hexdigest() != first


@pytest.mark.parametrize("text", ["[", "[]", "1", '{"MODEL": [1]}', '{"MODEL": [3, 1, 1, 1, 1, 1]}', '{"MODEL": []}'])
def test_damaged_memory_of_digests_is_none(text: str, tmp_path: Path) -> None:
    model, known = tmp_path / "model", tmp_path / "inputs.json"
    model.write_text("one")
    known.write_text(text.replace("MODEL", str(model)))
    assert Digests(known).of(model) == hashlib.sha256(b"one").hexdigest()


def test_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    """A second change within the resolution of the clock would not show."""
    model, known = tmp_path / "model", tmp_path / "inputs.json"
    model.write_text("one")
    digests = Digests(known)
    digests.of(model)
    digests.save()
    assert json.loads(known.read_text()) == {}


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the jobs of a file were run: one that succeeds, and one that fails."""
    folder = tmp_path_factory.mktemp("farm")
    save(folder, "4w", torch.bfloat16)
    write(
        folder,
        'output = "out"\ncache = "packed"\n[model.mlp]\npath = "model.pt2"\n'
        '[target.cuda]\nstop-after = "rewrite"\ngpu = "sm_80"\n[target.cpu]\nexpect = "missed=many"\n',
    )
    run_matrix(folder, code=1)
    return folder


def run_matrix(folder: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "et_cuda_passes", "matrix", str(folder / "jobs.toml"), "--json", *options],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    found = document(done.stdout, "matrix")
    jobs: list[dict[str, Any]] = found["jobs"]
    results = json.loads((folder / "out" / "results.json").read_text())["jobs"]
    assert all(each in results for each in jobs)
    # A run of some jobs leaves the results of the others.
    assert [each["job"] for each in results] == list(jobs_of(folder / "jobs.toml"))
    assert "not run" not in {each["status"] for each in results}
    return jobs


def test_results_have_sizes_counts_and_errors(farm: Path) -> None:
    first, failed = json.loads((farm / "out" / "results.json").read_text())["jobs"]
    assert [first["job"], first["status"], first["rewritten"], first["missed"]] == ["mlp-cuda-sm_80", "written", 2, 0]
    files = [path for path in Path(first["folder"]).iterdir() if path.name != "job.json"]
    assert first["bytes"] == sum(path.stat().st_size for path in files) > 0
    assert failed["status"] == "failed" and failed["error"].startswith("--expect missed=many: write NAME=COUNT")
    assert "error: " in Path(failed["log"]).read_text() and failed["log"] == str(farm / "out" / "mlp-cpu.log")


@pytest.mark.slow
def test_jobs_share_a_cache(farm: Path, tmp_path: Path) -> None:
    folder = copied(farm, tmp_path)
    path = folder / "jobs.toml"
    path.write_text(path.read_text().replace('"sm_80"', '["sm_80", "sm_90"]'))
    first, second = run_matrix(folder)
    assert (first["status"], second["status"]) == ("up to date", "written")
    notes = json.loads((Path(second["folder"]) / "report.json").read_text())["notes"]
    assert f"packed 0 constants, 4 from the cache {folder / 'packed'}" in notes


def test_done_jobs_are_not_done_again_and_failed_ones_are(farm: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (farm / "out").glob("*sm_*/*")}
    (result,) = run_matrix(farm, "--only", "*sm_80")
    assert result["status"] == "up to date"
    (result,) = run_matrix(farm, "--only", "*cpu", code=1)
    assert result["status"] == "failed"
    assert {path: path.stat().st_mtime_ns for path in (farm / "out").glob("*sm_*/*")} == before


def copied(farm: Path, folder: Path) -> Path:
    """A copy of a farm, with other times of all files."""
    shutil.copytree(farm, folder / "farm", copy_function=shutil.copyfile)
    path = folder / "farm" / "jobs.toml"
    path.write_text(path.read_text().split("[target.cpu]")[0])
    return folder / "farm"


def is_done(farm: Path) -> bool:
    (job,) = jobs_of(farm / "jobs.toml").values()
    return finished(job, key_of(job, Digests(farm / "none.json"))) is not None


def test_copy_of_a_finished_farm_is_done(farm: Path, tmp_path: Path) -> None:
    assert is_done(copied(farm, tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "report.json").unlink(),
        lambda folder: (folder / "model.cuda.packed.pt2").write_bytes(b""),
        lambda folder: flip(folder / "model.cuda.packed.pt2"),
        lambda folder: (folder / "job.json").unlink(),
        lambda folder: (folder / "job.json").write_text((folder / "job.json").read_text()[:100]),
        lambda folder: (folder / "job.json").write_text("[]"),
        lambda folder: (folder / "job.json").write_text('{"key": null}'),
        lambda folder: (folder.parent.parent / "model.pt2").write_bytes(b"another"),
    ],
    ids=["missing", "truncated", "flipped", "no record", "half a record", "other record", "no key", "other model"],
)
def test_job_whose_files_or_model_changed_is_not_done(farm: Path, tmp_path: Path, damage: Any) -> None:
    folder = copied(farm, tmp_path)
    damage(folder / "out" / "mlp-cuda-sm_80")
    assert not is_done(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_job_with_other_options_replaces_only_its_own_files(farm: Path, tmp_path: Path) -> None:
    folder = copied(farm, tmp_path)
    out = folder / "out" / "mlp-cuda-sm_80"
    (out / "mine.txt").write_text("mine")
    (folder / "model.pt2").rename(folder / "other.pt2")
    path = folder / "jobs.toml"
    path.write_text(
        path.read_text().replace("model.pt2", "other.pt2").replace("[target.cuda]", "[target.cuda]\ntrust = true")
    )
    (result,) = run_matrix(folder)
    assert result["status"] == "written"
    assert sorted(each.name for each in out.iterdir()) == [
        "job.json", "mine.txt", "other.cuda.packed.pt2", "report.html", "report.json",
    ]  # fmt: skip


def test_model_that_vanishes_is_a_failed_job(farm: Path, tmp_path: Path) -> None:
    (job,) = jobs_of(copied(farm, tmp_path) / "jobs.toml").values()
    job.inputs[0].unlink()
    with pytest.raises(FileNotFoundError):
        key_of(job, Digests(tmp_path / "none.json"))
    assert failure(job, "gone").status == "failed"


def test_file_of_the_page_is_as_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "build-many.md").read_text()
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    (tmp_path / "block.pt2").touch()
    jobs = jobs_of(write(tmp_path, page.split("```toml\n")[1].split("```")[0]))
    assert list(jobs) == [
        "smollm-int4-cuda-sm_80", "smollm-int4-cuda-sm_90", "smollm-int4-cpu", "smollm-int8-cpu",
        "block-cuda-sm_80", "block-cuda-sm_90", "block-cpu",
    ]  # fmt: skip
    assert jobs["block-cuda-sm_90"].needs == Needs(8, 1, 64_000_000_000, "H100")
