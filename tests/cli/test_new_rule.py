"""``new-rule``: the files that it writes work at once, in a fresh environment too, and nothing is overwritten."""

import os
import re
import shlex
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import et_cuda_passes as ecp
from tests.cli.command import Run, names

ROOT = Path(ecp.__file__).parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_new_rule_and_its_test_pass_at_once(here: Path, command: Run) -> None:
    result = command("new-rule", "write_silu", "--target", "cuda")
    assert result.out.splitlines() == [
        "wrote write_silu.py",
        "wrote test_write_silu.py",
        "test it with: python -m pytest test_write_silu.py",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=here,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("WriteSilu", "NAME 'WriteSilu' is not in snake case: write lower-case words and underscores, as write_silu"),
        ("write-silu", "as write_silu"),
        ("2silu", "is not in snake case"),
        ("", "is not in snake case"),
        ("lambda", "NAME lambda is a keyword of Python: give the rule another name, such as lambda_rule"),
        ("missed", "NAME missed is a status in reports"),
        ("torch", "NAME torch is the name of another module"),
        ("linear_int4", "NAME linear_int4 is the name of a rule of et_cuda_passes: give the rule another name"),
        ("../silu", "is not in snake case"),
    ],
)
def test_new_rule_with_a_bad_name_is_an_error(name: str, error: str, here: Path, command: Run) -> None:
    result = command("new-rule", name)
    assert result.code == 2 and error in result.error
    assert names(here) == []


@pytest.mark.parametrize("existing", ["write_silu.py", "test_write_silu.py"])
def test_new_rule_overwrites_no_file(existing: str, here: Path, command: Run) -> None:
    (here / existing).write_text("mine")
    result = command("new-rule", "write_silu")
    assert result.code == 2 and f"{existing} exists, and is not overwritten" in result.error
    assert names(here) == [existing] and (here / existing).read_text() == "mine"


@pytest.mark.parametrize(
    ("package", "error"),
    [
        (
            "full",
            "--package full: the folder has files, and is not changed: name a new one. To add a rule to a",
        ),
        ("file", "--package file is a file: name a new folder"),
        (
            "write_silu",
            "the package would have the name 'write_silu'; name the folder as a package, for example",
        ),
        ("torch", "the package would have the name 'torch'"),
        ("1-rules", "the package would have the name '1_rules'"),
        ("---", "the package would have the name ''"),
    ],
)
def test_new_rule_in_a_bad_package_is_an_error(package: str, error: str, here: Path, command: Run) -> None:
    (here / "full").mkdir()
    (here / "full" / "pyproject.toml").write_text("mine")
    (here / "file").write_text("mine")
    result = command("new-rule", "write_silu", "--package", package)
    assert result.code == 2 and error in result.error
    assert names(here) == ["file", "full"] and names(here / "full") == ["pyproject.toml"]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (
            "cqu",
            "--target cqu: there is no such target; known are cuda, metal, xnnpack, cpu, vulkan",
        ),
        ("my_npu:npu", "a rule joins the list of a target by its name"),
    ],
)
def test_new_rule_for_an_unknown_target_is_an_error(target: str, error: str, here: Path, command: Run) -> None:
    result = command("new-rule", "write_silu", "--target", target)
    assert result.code == 2 and error in result.error
    assert names(here) == []


def test_templates_are_part_of_the_distribution() -> None:
    assert '"cli/templates/*.txt"' in (ROOT / "pyproject.toml").read_text()


def test_tutorial_shows_the_rule_that_the_command_writes(here: Path, command: Run) -> None:
    page = (ROOT / "docs" / "tutorials" / "your-own-rule.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    command("new-rule", "write_silu")
    assert (here / "write_silu.py").read_text(encoding="utf-8") == shown


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment that has the packages of this one, and this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    lines = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", *site.getsitepackages()]
    (packages / "this_checkout.pth").write_text("\n".join(lines) + "\n")
    script = folder / "bin" / "et-cuda-passes"
    script.write_text(f"#!{folder / 'bin' / 'python'}\nfrom et_cuda_passes.cli import main\nmain()\n")
    script.chmod(0o755)
    return folder


@pytest.mark.slow
def test_commands_of_the_tutorial_bring_a_rule_into_the_report(environment: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorials" / "your-own-rule.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    assert len(commands) == 5
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key not in ("ETCP_PLUGINS", "PYTHONPATH")}
    # Without a network: the build needs setuptools, which this environment has.
    env |= {"PATH": path, "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1"}
    outputs = []
    for command in commands:
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    shown = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)[-1]
    assert shown in outputs[-1] + "\n"
    assert "1 x write_silu" in outputs[-1] and "my-rules 0.1.0: write_silu" in outputs[-1]
    listed = subprocess.run(["et-cuda-passes", "rules"], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert "write_silu (my-rules 0.1.0)" in listed
