"""Versions: beyond the tested range a warning, below it an error with the reason; with the metadata of another version.

A folder with the metadata stands first on the path of a new process, so that the installed code says another version.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest

import et_cuda_passes as ecp
from et_cuda_passes._versions import RANGES, REASONS, require_version
from tests.saved import save

ROOT = Path(ecp.__file__).parent.parent


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    return tmp_path / "metadata"


def pretend(metadata: Path, distribution: str, version: str) -> None:
    """Write metadata by which ``distribution`` has another version."""
    info = metadata / f"{distribution}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def python(metadata: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(metadata), str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd=metadata.parent,
    )


@pytest.mark.parametrize(
    ("distribution", "version"), [("torch", "2.16.0"), pytest.param("torchao", "0.19.0+cu130", marks=pytest.mark.slow)]
)
def test_version_beyond_the_range_is_one_warning(distribution: str, version: str, metadata: Path) -> None:
    pretend(metadata, distribution, version)
    done = python(metadata, "-c", "import et_cuda_passes, et_cuda_passes.executorch; et_cuda_passes.targets()")
    lowest, beyond = RANGES[distribution]
    said = f"tested with {distribution}>={lowest},<{beyond}, found {version}"
    assert done.returncode == 0
    assert done.stderr.count(said) == 1
    assert "`et-cuda-passes doctor` checks" in done.stderr


def test_command_says_all_versions_beyond_the_range_in_one_line(metadata: Path) -> None:
    for distribution, version in (("torch", "2.16.0"), ("executorch", "1.6.0")):
        pretend(metadata, distribution, version)
    path, _ = save(metadata.parent, "4w")
    done = python(metadata, "-m", "et_cuda_passes", "explain", path, "--target", "cpu")
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert line.startswith("warning: ") and "torch>=2.11,<2.16" in line and "executorch>=1.5,<1.6" in line
    assert "rewritten     2 x linear_int4" in done.stdout
    assert python(metadata, "-m", "et_cuda_passes", "--help").stderr == ""


OLD = [
    ("torch", "2.10.0", "torchao 0.18 loads none of its compiled operators with an older torch"),
    ("torchao", "0.17.0", "ExecuTorch 1.5 requires torchao 0.18"),
    ("executorch", "1.4.1", "lack the hook transform_for_pre_decomposition"),
]


@pytest.mark.parametrize(("distribution", "version", "reason"), OLD)
def test_version_below_the_range_is_an_error_with_the_reason(
    distribution: str, version: str, reason: str, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(metadata, distribution, version)
    monkeypatch.syspath_prepend(metadata)
    with pytest.raises(ImportError) as raised:
        require_version(distribution)
    error = str(raised.value)
    assert error.startswith(f"et_cuda_passes needs {distribution}>={RANGES[distribution][0]}, found {version}")
    assert reason in error and f"pip install '{distribution}>=" in error


@pytest.mark.slow  # the command below imports it too, and one test reads the reason of each
@pytest.mark.parametrize(("distribution", "version"), [each[:2] for each in OLD])
def test_import_with_an_old_version_is_that_error(distribution: str, version: str, metadata: Path) -> None:
    pretend(metadata, distribution, version)
    done = python(metadata, "-c", "import et_cuda_passes.executorch")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: et_cuda_passes needs {distribution}>=")


def test_command_with_an_old_version_is_an_error_of_one_line(metadata: Path) -> None:
    pretend(metadata, "executorch", "1.4.1")
    done = python(metadata, "-m", "et_cuda_passes", "explain", "model.pt2", "--target", "cpu")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ImportError: et_cuda_passes needs executorch>=1.5, found 1.4.1")
    assert line.endswith("`et-cuda-passes doctor` checks the installation")
    help_text = python(metadata, "-m", "et_cuda_passes", "--help")
    assert (help_text.returncode, help_text.stderr) == (0, "")


def test_other_distribution_beyond_the_range_is_an_error(metadata: Path) -> None:
    assert "networkx" not in REASONS
    pretend(metadata, "networkx", "4.0")
    done = python(metadata, "-c", "import et_cuda_passes")
    assert done.returncode == 1
    assert "ImportError: et_cuda_passes is tested with networkx>=3.4,<3.7, found 4.0" in done.stderr


def test_installed_versions_are_accepted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    optional = {re.split(r"[\s\[<>=!~;]", text)[0] for text in requires("et-cuda-passes") or () if "extra ==" in text}
    for distribution in RANGES:
        if distribution in optional and not list(distributions(name=distribution)):
            continue
        require_version(distribution)
    assert [str(each.message) for each in recwarn] == []
