"""Rules of the project that no tool checks: the list of `make help`, the imports, the length of modules."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes import Rule
from et_cuda_passes._versions import RANGES, REASONS
from tests.helpers import chain

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "et_cuda_passes"
MODULES = sorted(PACKAGE.rglob("*.py"))


RULE_MODULES = [
    import_module(f"et_cuda_passes.rules.{path.stem}") for path in sorted((PACKAGE / "rules").glob("[a-z]*.py"))
]
RULES = [
    value
    for module in RULE_MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__
]
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
LONGEST = 600


def run(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def kept_files() -> list[Path]:
    """The files that are committed or would be."""
    try:
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()]


def test_make_help_lists_the_targets() -> None:
    listed = [line.split()[0] for line in run("make", "--no-print-directory", "help").splitlines()]
    assert listed == [
        "setup", "demo", "test", "compiled", "browser", "real", "zoo", "nightly", "faults", "limits", "replay",
        "lint", "types", "layers", "golden", "docs", "site", "clean",
    ]  # fmt: skip


def test_make_targets_are_all_in_the_help() -> None:
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    listed = [line.split()[0] for line in run("make", "--no-print-directory", "help").splitlines()]
    assert declared[1].split() == ["help", *listed]


REWRITE = """
import sys, torch, torchao.quantization
program = torch.export.load(sys.argv[1])
before = set(sys.modules)
import et_cuda_passes
report = et_cuda_passes.rewrite(program, "cuda", gpu="sm_90")[1]
assert report.counts()["rewritten"] == 2
print(*set(sys.modules) - before)
"""


def test_import_and_rewrite_load_no_library_beyond_those_of_loading_the_program(tmp_path: Path) -> None:
    # torchao and torch.export import Dynamo and Inductor, most of the memory of a rewrite without its weights.
    torch.export.save(chain(2), tmp_path / "program.pt2")
    loaded = {name.partition(".")[0] for name in run(sys.executable, "-c", REWRITE, tmp_path / "program.pt2").split()}
    assert "et_cuda_passes" in loaded
    assert loaded <= {"et_cuda_passes", "triton", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", ecp.__all__)
def test_public_names_all_exist(name: str) -> None:
    assert getattr(ecp, name) is not None


def test_unknown_public_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'et_cuda_passes' has no attribute 'Anything'"):
        ecp.Anything()


def test_renamed_name_is_refused_with_its_new_name() -> None:
    with pytest.raises(AttributeError, match=r"et_cuda_passes\.MatchContext is now et_cuda_passes\.Match"):
        ecp.MatchContext()


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_module_has_at_most_the_allowed_lines(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{where(path)} has {lines} lines; split it by idea"


@pytest.mark.parametrize("module", RULE_MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_module_of_rules_says_what_it_does(module: ModuleType) -> None:
    assert (module.__doc__ or "").strip(), f"{module.__name__} has no docstring"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_opens_with_its_rewrite(rule: type[Rule]) -> None:
    before, arrow, after = (rule.__doc__ or "").strip().partition("\n")[0].partition(" -> ")
    assert before.strip() and arrow and after.strip(), f"{rule.__name__} does not open with `before -> after`"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_has_no_base_class_between(rule: type[Rule]) -> None:
    assert rule.__bases__ in [(Rule,), (ecp.GroupRule,), (ecp.Keep,)]
    assert "requirements" in vars(rule) or not rule.requirements


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_of_the_package_stands_where_its_list_has_it(rule: type[Rule]) -> None:
    """``before`` and ``after`` are for rules of other packages."""
    assert (rule.before, rule.after) == ((), ())


def test_rules_of_every_default_list_are_checked() -> None:
    listed = {type(entry) for target in ecp.targets() for entry in ecp.default_passes(target)}
    assert listed <= {*RULES}
    assert ecp.LinearInt4 in listed


@pytest.mark.parametrize("room", ROOMS)
def test_room_has_its_tests(room: str) -> None:
    assert list((ROOT / "tests" / room).glob("test_*.py")), f"tests/{room} has no tests of et_cuda_passes/{room}"


def test_files_contain_no_path_of_one_machine() -> None:
    # Home directories and mount points of one machine do not exist in a clone.
    place = re.compile(r"(?<![\w./<>{}$-])/(?:root|work|home|Users)/\w")
    found = []
    for path in kept_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
            if place.search(line):
                found.append(f"{where(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_distribution_contains_the_packages_of_its_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "et-cuda-passes"
    assert project["scripts"] == {"et-cuda-passes": "et_cuda_passes.cli:main"}
    assert (PACKAGE / "py.typed").exists()


def test_ranges_of_the_metadata_are_checked_at_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    entries = [*project["dependencies"], *extras["openvino"], *extras["coreml"]]
    declared = {re.split(r"[<>=]", entry)[0]: entry.partition(";")[0] for entry in entries}
    for name, (lowest, beyond) in RANGES.items():
        bound = "" if name in REASONS else f",<{beyond}"
        assert declared[name] == f"{name}>={lowest}{bound}"
