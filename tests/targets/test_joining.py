"""Rules and targets of installed packages: where they join, and the warning for each fault."""

import dataclasses
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes import plugins
from et_cuda_passes.plugins import PluginError, PluginWarning
from et_cuda_passes.targets import joining, own_targets
from tests.plugins import RULE, install

AFTER = RULE.replace("requirements = (", 'after = ("linear_int8",)\n    before = ("conv_int4",)\n    requirements = (')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, with plugins switched on. Their modules are forgotten after the test."""
    monkeypatch.setenv("ETCP_PLUGINS", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_reported", {})
    # The packages of two tests have the same names and other contents.
    joining._joining.cache_clear()
    before = set(sys.modules)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def exported() -> ExportedProgram:
    return torch.export.export(Gate(), (torch.randn(2, 8),))


def names(target: str = "cpu") -> list[str]:
    return [rule.name for rule in ecp.default_passes(target)]


def warned(target: str = "cpu") -> list[str]:
    """The warnings of one request of the default passes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ecp.default_passes(target)
    assert all(issubclass(each.category, PluginWarning) for each in found)
    return [str(each.message) for each in found]


RESTORING = ["unpack_linear", "restore_float8", "restore_int4_nested", "restore_int8", "compile_float_dequantize"]
OWN = ["linear_int4", "linear_int8", "conv_int4", "conv_int8", "bmm_int4", "indexed_bmm_int4", "grouped_mm_int4",
       "einsum_int4", "embedding_int4", "embedding_int8", "fold_floats", "remove_linear_views"]  # fmt: skip


def test_rule_of_a_plugin_joins_the_list_of_its_target(folder: Path) -> None:
    install(folder, "my-rules")
    assert names() == [*RESTORING, *OWN, "write_silu"]
    assert "write_silu" not in names("cuda")
    program, report = ecp.rewrite(exported(), "cpu", expect={"write_silu": 1})
    assert torch.ops.aten.silu.default in {node.target for node in program.graph.nodes}
    assert report.packages == {"write_silu": "my-rules 1.0"}
    assert "package   my-rules 1.0: write_silu" in str(report)
    assert report.to_dict()["packages"] == report.packages


def test_rule_of_a_plugin_stands_where_before_and_after_put_it(folder: Path) -> None:
    install(folder, "my-rules", AFTER)
    assert names() == [*RESTORING, *OWN[:2], "write_silu", *OWN[2:]]


def test_explicit_pass_list_gets_no_plugin(folder: Path) -> None:
    install(folder, "my-rules")
    _, report = ecp.rewrite(exported(), "cpu", passes=[ecp.LinearInt4()])
    assert (report.passes, report.packages, report.applied) == (["linear_int4"], {}, {})


def test_plugins_are_switched_off_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, "my-rules")
    monkeypatch.setenv("ETCP_PLUGINS", "0")
    assert names() == [*RESTORING, *OWN]
    monkeypatch.setenv("ETCP_PLUGINS", "no")
    with pytest.raises(PluginError, match="ETCP_PLUGINS=no: write 0 to use no plugins"):
        ecp.default_passes("cpu")


@pytest.mark.parametrize("first", ["b-rules", "a-rules"])
def test_order_of_plugins_is_by_name_of_the_rule(first: str, folder: Path) -> None:
    """Whichever package is installed first, and whatever its name is."""
    packages = {"a-rules": "WriteZ", "b-rules": "WriteA"}
    for package in (first, *(packages.keys() - {first})):
        install(folder, package, RULE.replace("WriteSilu", packages[package]))
    assert names() == [*RESTORING, *OWN, "write_a", "write_z"]


def test_partitioner_runs_the_rules_of_plugins(folder: Path) -> None:
    install(folder, "my-rules", RULE.replace('"cpu"', '"xnnpack"'))
    partitioner = ecp.XnnpackPartitioner(expect={"write_silu": 1})
    partitioner.transform_for_pre_decomposition(exported())
    assert partitioner.report.packages == {"write_silu": "my-rules 1.0"}


FIX = " is not used (ETCP_PLUGINS=0 or --no-plugins uses no plugins at all)"
FAULTS: dict[str, tuple[str, list[str]]] = {
    "import": ("import nowhere_at_all", ["my_rules:RULES cannot be imported (ModuleNotFoundError", "install it again"]),
    "error": (
        "1 / 0",
        ["cannot be imported (ZeroDivisionError: division by zero); correct the package", "The plugin is"],
    ),
    "end of the program": ("raise SystemExit(7)", ["cannot be imported (RuntimeError: the import ends the program"]),
    "no such object": (RULE.replace("RULES =", "OTHERS ="), ["AttributeError", "correct the package"]),
    "no mapping": (RULE + "RULES = WriteSilu()", ["my_rules:RULES is WriteSilu(); an entry point in the group"]),
    "no list": (RULE + 'RULES = {"cpu": WriteSilu()}', ["the value of 'cpu' is WriteSilu(), not a list of rules"]),
    "class": (RULE + 'RULES = {"cpu": [WriteSilu]}', ["it contains the class WriteSilu; write WriteSilu()"]),
    "no rule": (RULE + 'RULES = {"cpu": [len]}', ["it contains <built-in function len>, which is not a Rule"]),
    "target": (
        RULE.replace('"cpu":', '"cqu":'),
        ["there is no target 'cqu'; the nearest names are cpu", "Its entry 'cqu' is not used"],
    ),
    "name of a built-in rule": (
        RULE.replace("WriteSilu", "LinearInt4"),
        ["the name of its rule linear_int4 is that of a rule of this package", "rename the class"],
    ),
    "unknown before": (
        RULE.replace("requirements = (", 'before = ("linear_int5",)\n    requirements = ('),
        ["rule write_silu cannot join the list of cpu", "names 'linear_int5' in before or after", "linear_int4"],
    ),
    "cycle": (
        RULE.replace("requirements = (", 'before = ("linear_int4",)\n    after = ("conv_int4",)\n    requirements = ('),
        ["rule write_silu cannot join the list of cpu: before and after of the passes form a cycle"],
    ),
    "no pattern": (RULE.replace("def pattern", "def patern"), ["rule write_silu has no pattern method"]),
    "pattern that fails": (
        RULE.replace("aten.sigmoid", "aten.sigmund"),
        ["rule write_silu: its pattern failed: AttributeError"],
    ),
    "options without a dataclass": (
        RULE.replace("@dataclasses.dataclass(frozen=True)", "@dataclasses.dataclass"),
        ["write_silu has options, or state, and WriteSilu is no frozen dataclass"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_plugin_with_a_fault_is_one_warning_and_is_not_used(fault: str, folder: Path) -> None:
    source, texts = FAULTS[fault]
    install(folder, "my-rules", source)
    (text,) = warned()
    assert text.startswith("plugin my_rules (rules) of my-rules 1.0: ") and text.endswith(FIX)
    assert all(part in text for part in texts), text
    assert warned() == []  # not a second time
    assert names() == [*RESTORING, *OWN]
    _, report = ecp.rewrite(exported(), "cpu")
    assert report.packages == {} and report.warnings == []


@pytest.mark.parametrize("fault", FAULTS)
def test_plugin_with_a_fault_is_an_error_if_strict(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, "my-rules", FAULTS[fault][0])
    monkeypatch.setenv("ETCP_PLUGINS", "strict")
    for _ in range(2):
        with pytest.raises(PluginError, match=r"plugin my_rules \(rules\) of my-rules 1\.0: "):
            ecp.rewrite(exported(), "cpu")


def test_one_name_in_two_plugins_is_a_warning_that_names_both(folder: Path) -> None:
    install(folder, "a-rules")
    install(folder, "b-rules")
    (text,) = warned()
    assert text.startswith("plugin b_rules (rules) of b-rules 1.0: the name of its rule write_silu is that of a rule")
    assert "a-rules 1.0 (plugin a_rules)" in text
    assert names() == [*RESTORING, *OWN, "write_silu"]
    assert ecp.rewrite(exported(), "cpu")[1].packages == {"write_silu": "a-rules 1.0"}


def test_rules_of_two_plugins_that_form_a_cycle_lose_the_later_one(folder: Path) -> None:
    for package, name, after in (("a-rules", "WriteA", "write_z"), ("b-rules", "WriteZ", "write_a")):
        source = RULE.replace("WriteSilu", name)
        install(folder, package, source.replace("requirements = (", f'after = ("{after}",)\n    requirements = ('))
    (text,) = warned()
    assert "b-rules 1.0: rule write_z cannot join the list of cpu: before and after of the passes form a cycle" in text
    assert names() == [*RESTORING, *OWN, "write_a"]


def test_other_rules_of_a_plugin_with_a_fault_join(folder: Path) -> None:
    install(folder, "my-rules", RULE + 'RULES = {"cpu": [WriteSilu(), len], "nowhere": [WriteSilu()]}')
    assert len(warned()) == 2
    assert names() == [*RESTORING, *OWN, "write_silu"]


TARGET = RULE + 'npu = ecp.Target("my_npu", "an accelerator", kernels={}, passes=lambda: [WriteSilu()])'


def test_target_of_a_plugin_is_found_with_the_origin_of_its_rules(folder: Path) -> None:
    install(folder, "my-npu", TARGET, entry="npu", group="targets")
    assert ecp.targets() == (*own_targets(), "my_npu")
    _, report = ecp.rewrite(exported(), "my_npu", expect={"write_silu": 1})
    assert report.packages == {"write_silu": "my-npu 1.0"}


def test_target_of_a_plugin_under_a_name_of_this_package_is_a_warning(folder: Path) -> None:
    install(folder, "cpu", TARGET, entry="npu", group="targets")
    with pytest.warns(PluginWarning, match="plugin cpu \\(target\\) of cpu 1.0: this package has the target cpu"):
        assert ecp.targets() == own_targets()
    assert ecp.get_target("cpu").summary == "AOTInductor on the CPU"


def test_rule_of_a_plugin_joins_the_target_of_another_one(folder: Path) -> None:
    install(folder, "my-npu", TARGET, entry="npu", group="targets")
    install(folder, "more-rules", RULE.replace("WriteSilu", "WriteMore").replace('"cpu"', '"my_npu"'))
    assert names("my_npu") == ["write_silu", "write_more"]


def test_another_target_under_a_name_of_this_package_is_refused() -> None:
    own = ecp.Target("cuda", "mine", kernels={}, passes=lambda: [ecp.LinearInt4()])
    with pytest.raises(ValueError, match="this Target has the name of the target 'cuda' of the package"):
        ecp.rewrite(exported(), own)
    with pytest.raises(ValueError, match="lowered_as='cpu'"):
        ecp.get_target(dataclasses.replace(ecp.get_target("cpu"), passes=list))


def test_target_of_this_package_for_another_gpu_is_accepted() -> None:
    target: Any = dataclasses.replace(ecp.get_target("cuda"), gpu=None)
    assert ecp.get_target(target) is target


@pytest.mark.parametrize("name", ["my_npu:", ":npu", "my npu:x"])
def test_place_of_a_target_without_both_parts_is_an_error_with_the_form(name: str) -> None:
    with pytest.raises(ValueError, match="is not of the form MODULE:NAME: write the module, a colon, and the name"):
        ecp.get_target(name)


def test_name_of_an_entry_point_is_that_of_its_target(folder: Path) -> None:
    source = "import et_cuda_passes as ecp\nnpu = ecp.Target('other', 'd', kernels={}, passes=list)"
    install(folder, "my-npu", source, "npu", "targets")
    with pytest.raises(ValueError, match="target 'my_npu': my_npu:npu has the name 'other'.* the same name"):
        ecp.get_target("my_npu")


def test_import_of_a_plugin_prints_nothing_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(folder, "my-rules", "print('loading')\n" + RULE)
    assert names()[-1] == "write_silu"
    assert capsys.readouterr() == ("", "loading\n")


def test_package_of_a_rule_is_named_before_its_plugin_is_loaded(folder: Path) -> None:
    install(folder, "my-rules")
    rule = importlib.import_module("my_rules").WriteSilu()
    _, report = ecp.rewrite(exported(), "cpu", passes=[rule])
    assert report.packages == {"write_silu": "my-rules 1.0"}
