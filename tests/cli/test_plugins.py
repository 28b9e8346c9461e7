"""Rules of installed packages on the command line: listed, used, switched off, and reported if they have a fault."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import et_cuda_passes as ecp
from tests.cli.command import Result
from tests.plugins import install
from tests.processes import finished


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt2, the package my-rules, and in "bad" the package bad-rules, which fails to import."""
    path = tmp_path_factory.mktemp("plugins")
    install(path, "my-rules")
    install(path / "bad", "bad-rules", "import nowhere_at_all")
    torch.export.save(torch.export.export(Gate(), (torch.randn(2, 8),)), path / "model.pt2")
    return path


def run(folder: Path, *arguments: object, bad: bool = False, **variables: str) -> Result:
    """Run the command line in a process of its own, without the switch of the tests."""
    environment = os.environ | {"PYTHONPATH": str(folder / "bad") if bad else ""} | variables
    if "ETCP_PLUGINS" not in variables:
        del environment["ETCP_PLUGINS"]
    return finished(*arguments, folder=folder / "work", cwd=folder, variables=environment)


def test_rules_lists_plugins_with_package_and_version(folder: Path) -> None:
    result = run(folder, "rules")
    assert result.code == 0 and result.err == "", result.err
    lines = result.out.splitlines()
    (cpu,) = (lines[at + 1] for at, line in enumerate(lines) if line.startswith("cpu: "))
    assert cpu.endswith("remove_linear_views, write_silu (my-rules 1.0)")
    at = lines.index("write_silu (my-rules 1.0)")
    assert lines[at + 1 : at + 3] == ["  x * sigmoid(x) -> silu(x)", "  requires a floating-point x; convert x"]
    assert lines[-2:] == ["plugins", "  my-rules 1.0: rules my_rules = my_rules:RULES"]


@pytest.mark.slow
def test_rules_as_json_has_the_package_of_a_plugin(folder: Path) -> None:
    about = json.loads(run(folder, "rules", "--json").out)["targets"]
    own = json.loads(run(folder, "rules", "--json", "--no-plugins").out)["targets"]
    *others, last = about["cpu"]["passes"]
    assert others == own["cpu"]["passes"] and about["cuda"] == own["cuda"]
    assert (last["name"], last["package"], last["options"]) == ("write_silu", "my-rules 1.0", {})


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--no-plugins",), ("--no-plugins", "--import", "json")])
@pytest.mark.parametrize("first", [True, False])
def test_options_about_plugins_stand_before_or_after_the_command(
    options: tuple[str, ...], first: bool, folder: Path
) -> None:
    command = ("explain", "model.pt2", "--target", "cpu")
    assert "1 x write_silu" in run(folder, *command).out
    result = run(folder, *options, *command) if first else run(folder, *command, *options)
    assert result.code == 0, result.err
    assert "write_silu" not in result.out


def test_plugin_that_cannot_be_imported_is_a_warning_and_the_command_goes_on(folder: Path) -> None:
    result = run(folder, "explain", "model.pt2", "--target", "cpu", bad=True)
    assert result.code == 0 and "1 x write_silu" in result.out
    (line,) = (line for line in result.err.splitlines() if "bad" in line)
    assert line.startswith("warning: plugin bad_rules (rules) of bad-rules 1.0: bad_rules:RULES cannot be imported")
    assert "ModuleNotFoundError: No module named 'nowhere_at_all'" in line
    result = run(folder, "rules", bad=True)
    assert result.code == 0 and result.err.count("warning: plugin bad_rules") == 1
    assert "  bad-rules 1.0: rules bad_rules = bad_rules:RULES" in result.out


@pytest.mark.parametrize(
    "command", [("explain", "model.pt2", "--target", "cpu"), pytest.param(("rules",), marks=pytest.mark.slow)]
)
def test_plugin_that_cannot_be_imported_is_an_error_if_strict(command: tuple[str, ...], folder: Path) -> None:
    result = run(folder, *command, "--strict-plugins", bad=True)
    assert result.code == 2 and result.out == ""
    assert "plugin bad_rules (rules) of bad-rules 1.0: bad_rules:RULES cannot be imported" in result.error


def test_both_options_about_plugins_are_bad_usage(folder: Path) -> None:
    result = run(folder, "rules", "--no-plugins", "--strict-plugins")
    assert result.code == 2
    assert "--no-plugins uses none" in " ".join(result.err.split())


def test_trace_has_a_line_for_each_rule(folder: Path) -> None:
    result = run(folder, "explain", "model.pt2", "--target", "cpu", ETCP_TRACE="1")
    traced = [line for line in result.err.splitlines() if line.startswith("cpu: ")]
    assert len(traced) == len(ecp.default_passes("cpu")) + 1
    assert traced[-1].startswith("cpu: write_silu: 1 tried, 1 matched, 1 applied, 0.")
    assert traced[0].startswith("cpu: unpack_linear: 0 tried, 0 matched, 0 applied")


OPERATOR = """
import torch


@torch.library.custom_op("my_rules::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return x.clone()


class Twice(torch.nn.Module):
    def forward(self, x):
        return torch.ops.my_rules.twice(x)


RULES = {}
"""


def test_program_with_an_operator_of_a_plugin_of_rules_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "my-operators", OPERATOR)
    monkeypatch.syspath_prepend(tmp_path)
    twice = importlib.import_module("my_operators").Twice()
    torch.export.save(torch.export.export(twice, (torch.ones(2),)), tmp_path / "twice.pt2")
    # In processes that do not import the operator themselves.
    explain = ("explain", "twice.pt2", "--target", "cpu", "--trust")
    assert run(tmp_path, *explain, ETCP_PLUGINS="1").code == 0
    result = run(tmp_path, *explain, ETCP_PLUGINS="0")
    assert result.code == 2
    assert "calls my_rules::twice, which no imported package registers" in result.err
