"""The start of the command line: no torch for help, versions and rules, and only its own lines on stderr."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import et_cuda_passes as ecp
from et_cuda_passes.cli.options import EMBEDDING_SCHEMES, EXECUTABLE, SCHEMES, STATUSES, TARGETS
from et_cuda_passes.executorch import run
from et_cuda_passes.graph import report
from et_cuda_passes.hf import support
from tests.saved import save

ROOT = Path(ecp.__file__).parent.parent


def python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def imported(lines: str) -> set[str]:
    """The modules in the output of ``-X importtime``."""
    return {line.rpartition("|")[2].strip() for line in lines.splitlines() if line.startswith("import time:")}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script that pip writes for the entry point."""
    path = tmp_path / "et-cuda-passes"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom et_cuda_passes.cli import main\nmain()\n")
    return path


COMMANDS = [
    "lower", "explain", "rules", "accuracy", "match", "matrix", "new-rule", "export", "generate", "run", "verify",
    "doctor",
]  # fmt: skip
QUICK = ["--help", "--version", "rules", "rules --json", *(f"{name} --help" for name in COMMANDS)]


@pytest.mark.parametrize(
    ("start", "arguments"),
    [*(("script", each) for each in QUICK), *(("module", each) for each in ("--help", "rules", "lower --help"))],
)
def test_help_versions_and_rules_import_no_torch(start: str, arguments: str, script: Path) -> None:
    program = ["-m", "et_cuda_passes"] if start == "module" else [script]
    done = python("-X", "importtime", *program, *arguments.split())
    assert done.returncode == 0
    modules = imported(done.stderr)
    assert {"typer", "et_cuda_passes.cli"} <= modules
    assert modules.isdisjoint({"torch", "torchao", "executorch", "transformers"})
    assert [line for line in done.stderr.splitlines() if not line.startswith("import time:")] == []


@pytest.mark.parametrize(
    ("command", "target", "steps"),
    [
        ("explain", "cpu", [" 50 %  loading", "100 %  rewriting for cpu"]),
        # coremltools draws progress bars, and logs what it does not find.
        pytest.param(
            "lower",
            "coreml",
            [
                " 20 %  loading",
                " 40 %  rewriting for coreml",
                " 60 %  decomposing forward",
                " 80 %  lowering",
                "100 %  serializing",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_new_interpreter_writes_only_the_document_and_its_steps(
    command: str, target: str, steps: list[str], tmp_path: Path
) -> None:
    path, _ = save(tmp_path, "4w")
    output = ["--output-dir", tmp_path] if command == "lower" else []
    done = python("-m", "et_cuda_passes", command, path, "--target", target, *output, "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    (report,) = [found["report"]] if command == "lower" else found["reports"].values()
    assert report["counts"]["rewritten"] + report["counts"]["kept"] == 2
    lines = [line.partition(":")[0] for line in done.stderr.splitlines() if "so far" not in line]
    assert [line.replace(f" {path}", "") for line in lines] == steps


def test_help_lists_every_command() -> None:
    listed = python("-m", "et_cuda_passes", "--help").stdout
    assert all(f"\n  {name} " in listed for name in COMMANDS)


def test_help_names_the_targets() -> None:
    assert ecp.targets() == TARGETS
    assert run.EXECUTABLE == EXECUTABLE


def test_completion_knows_the_schemes_and_statuses() -> None:
    # The entry with a comma is a scheme with a fallback.
    assert {*SCHEMES} == {*support.SCHEMES, "8da4w,8da8w"}
    assert EMBEDDING_SCHEMES == support.FOR_EMBEDDINGS
    assert STATUSES == report.STATUSES


@pytest.mark.parametrize("start", [pytest.param("import", marks=pytest.mark.slow), "package"])
def test_import_in_any_other_program_registers_the_operators(start: str, tmp_path: Path) -> None:
    """Also in a package that runs by -m and imports et_cuda_passes before its module is found."""
    check = "import torch\nprint(torch.ops.et_cuda_passes.int4_linear_cpu.default)\n"
    if start == "import":
        done = python("-c", f"import et_cuda_passes\n{check}")
    else:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "__init__.py").write_text(
            f"import sys\nsys.path.append({str(ROOT)!r})\nimport et_cuda_passes\n"
        )
        (tmp_path / "mine" / "__main__.py").write_text(check)
        done = python("-m", "mine", cwd=tmp_path)
    assert done.stdout == "et_cuda_passes.int4_linear_cpu.default\n", done.stderr
