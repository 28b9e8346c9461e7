"""The smallest path with what is installed: hooks, operators, and for each target a rewrite that is lowered and run.

``et-cuda-passes doctor`` makes the same checks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch._inductor import config as inductor

import et_cuda_passes as ecp
from et_cuda_passes.cli import diagnosing, smallest
from et_cuda_passes.executorch import run as running
from et_cuda_passes.executorch.lower import missing_requirement, no_lowering
from et_cuda_passes.executorch.run import EXECUTABLE, runtime_problem
from et_cuda_passes.hf.artifact import ExportError
from et_cuda_passes.hf.runner import _Loaded
from tests.processes import finished

ROOT = Path(ecp.__file__).parent.parent
SCHEMAS = json.loads((ROOT / "et_cuda_passes" / "cli" / "schemas.json").read_text())


@pytest.mark.slow  # the test of doctor has all targets
@pytest.mark.parametrize("target", ecp.targets())
def test_smallest_path_of_a_target_agrees_with_eager(target: str) -> None:
    walked = smallest.walk(target)
    assert walked.rewritten.holds, str(walked.rewritten)
    assert walked.missing == (missing_requirement(target) or no_lowering(ecp.get_target(target)) or None)
    assert (walked.bytes > 0) == (walked.missing is None)
    runs = target in EXECUTABLE and not (target in ("xnnpack", "openvino") and runtime_problem())
    if walked.missing is None and runs:
        assert walked.lowered is not None
        assert walked.lowered.holds, str(walked.lowered)


@pytest.mark.parametrize("name", ["hooks", "operators"])
def test_nothing_is_wrong_with_hooks_and_operators(name: str) -> None:
    found = list(diagnosing._GROUPS[name](False))
    assert found
    assert [each for each in found if each[0] == "wrong"] == []


DOCTOR = ("doctor", "--quick", "--json")


def document(text: str) -> dict[str, Any]:
    """The output of ``doctor``, checked against its schema."""
    found: dict[str, Any] = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMAS).validate(found)
    return found


def by_subject(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {check["subject"]: check for check in found["checks"]}


def test_doctor_finds_nothing_wrong_with_the_installation(tmp_path: Path) -> None:
    code, out, err = finished(*DOCTOR, folder=tmp_path)
    found = document(out)
    wrong = [check for check in found["checks"] if check["status"] == "wrong"]
    assert (code, found["ok"], wrong) == (0, True, [])
    assert {check["group"] for check in found["checks"]} == {"versions", "hooks", "operators", "machine", "targets"}
    checks = by_subject(found)
    assert all(checks[target]["found"].startswith("rewritten") for target in ecp.targets())
    assert checks["torch"]["found"] == torch.__version__
    assert found["seconds"] < 60
    # ExecuTorch's runtime writes to stderr as it starts. A slow machine prints a step several times.
    steps = dict.fromkeys(line.partition("checking ")[2].partition(":")[0] for line in err.splitlines())
    assert list(steps) == ["versions", "hooks", "operators", "machine", "targets"]


def test_doctor_says_what_to_do_about_a_broken_installation(tmp_path: Path) -> None:
    info = tmp_path / "executorch-1.4.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: executorch\nVersion: 1.4.0\n")
    searched = os.pathsep.join(filter(None, [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH")]))
    broken = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "a folder")}
    done = subprocess.run(
        [sys.executable, "-m", "et_cuda_passes", *DOCTOR],
        capture_output=True,
        text=True,
        env=os.environ | broken | {"PYTHONPATH": searched},
    )
    found = document(done.stdout)
    assert (done.returncode, found["ok"]) == (1, False)
    checks = by_subject(found)
    old = checks["executorch"]
    assert old["status"] == "wrong" and "1.4.0 is not >=1.5,<1.6" in old["found"]
    assert "transform_for_pre_decomposition" in old["found"] and old["fix"] == "pip install 'executorch>=1.5,<1.6'"
    # The code is that of the installed version, and refuses the version in the metadata.
    assert checks["CudaPartitioner"]["status"] == "wrong"
    assert all(check["fix"] for check in found["checks"] if check["status"] == "wrong")


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-compiler", "no-such-compiler is not found"), ("false", "InvalidCxxCompiler: No working C++ compiler")],
)
def test_compiler_that_does_not_work_is_wrong(compiler: str, said: str) -> None:
    with inductor.patch({"cpp.cxx": (None, compiler)}):
        status, _, found, fix = diagnosing._compiler()
    assert (status, "apt install g++" in fix) == ("wrong", True) and said in found


@pytest.mark.parametrize(
    ("folder", "said"), [("a folder", "has spaces in its path"), ("file/below", "cannot be written")]
)
def test_cache_folder_that_does_not_work_is_wrong(
    folder: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / folder))
    ((status, _, found, fix),) = diagnosing._cache()
    assert status == "wrong" and said in found and "TORCHINDUCTOR_CACHE_DIR" in fix


def test_path_with_wrong_numbers_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a backend that computes with the raw integers."""
    monkeypatch.setattr(diagnosing, "TARGETS", ("cuda", "xnnpack"))
    execute = smallest.execute
    monkeypatch.setattr(smallest, "execute", lambda *given: [2 * each for each in execute(*given)])
    found = {target: (status, text) for status, target, text, _ in diagnosing._targets(True)}
    assert (
        found["xnnpack"][0] == "wrong" and "lowered (torch.float32 [2, 64]): relative error 1.0" in found["xnnpack"][1]
    )
    assert found["cuda"][0] == "ok"


def test_path_that_fails_is_wrong_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*given: object) -> None:
        raise RuntimeError("missing fallback kernels\nand more")

    monkeypatch.setattr(smallest, "lower", lower)
    found = {target: (status, text) for status, target, text, _ in diagnosing._targets(True)}
    assert found["xnnpack"] == ("wrong", "RuntimeError: missing fallback kernels")


def test_doctor_notes_a_torch_whose_tensors_the_runtime_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_RUNTIME_TORCH", "99.0")
    (note,) = (each for each in diagnosing._machine(True) if each[1] == "ExecuTorch's runtime for Python")
    assert note[0] == "note" and note[2].startswith("it reads tensors of torch 99.0 and later, and this is torch ")
    walked = smallest.walk("xnnpack")
    assert walked.bytes and walked.lowered is None
    with pytest.raises(RuntimeError, match=r"runtime for Python cannot be used: it reads tensors of torch 99\.0"):
        running.execute("xnnpack", [], (), {})
    # `generate` loads an exported folder with these.
    with pytest.raises(ExportError, match=r"runtime for Python cannot be used: it reads tensors of torch 99\.0"):
        _Loaded("xnnpack", Path("model.pte")).method("forward")
