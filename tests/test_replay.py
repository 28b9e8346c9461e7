"""Process replay: two recordings agree, and each kind of change is found and named."""

import copy
import gzip
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram
from torch.fx import Node

import et_cuda_passes as ecp
from et_cuda_passes import Report
from tests import replay
from tests.golden_models import exported
from tests.replay import Allowed, Record

FAMILIES = "golden,generated"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden models and two random ones, recorded by a process with hash seed 1."""
    folder = tmp_path_factory.mktemp("replay") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "1")
        command = ["--record", str(folder), "--families", FAMILIES, "--generated", "2", "--workers", "1"]
        assert replay.main(command) == 0
    return folder


def change(folder: Path, family: str, edit: Callable[[list[Record]], list[Record]]) -> None:
    """Rewrite one family of a recording."""
    records = edit(list(replay.read(folder, family)))
    with gzip.open(folder / f"{family}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.mark.slow
def test_replay_agrees_in_another_process_and_finds_what_changed(
    recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    shutil.copytree(recording, before)

    def edit(records: list[Record]) -> list[Record]:
        by_name = {record["name"]: record for record in records}
        four, eight = by_name["4w"]["programs"], by_name["8w"]["programs"]
        four["cuda"]["constant"][1] += "0"
        four["metal"]["graph"].pop(3)
        four["cpu"]["signature"].reverse()
        eight["cuda"]["report"]["bytes_after"] += 1
        eight["metal"] = {"error": {"type": "builtins.ValueError", "text": "no"}}
        # The recording has a model that the code does not have, and lacks one that the code has.
        by_name["8da4w"]["name"] = "gone"
        return records

    change(before, "golden", edit)
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    command = ["--record", str(now), "--against", str(before), "--families", FAMILIES, "--workers", "1"]
    assert replay.main(command) == 1

    # Both processes wrote the same bytes.
    for file in sorted(recording.iterdir()):
        assert file.read_bytes() == (now / file.name).read_bytes(), file.name
    text = capsys.readouterr().out
    count = sum(len(record["programs"]) for family in FAMILIES.split(",") for record in replay.read(now, family))
    assert f"{count} programs, 13 differences" in text
    headings = [line.split() for line in text.splitlines() if "distinct" in line]
    counts = {words[0].strip(":"): int(words[1].strip(",")) for words in headings}
    assert counts == {"missing": 4, "new": 4, "error": 1, "graph": 1, "signature": 1, "constant": 1, "report": 1}
    assert "golden/4w for metal\n    + %p_up_bias = placeholder" in text


Change = Callable[[ExportedProgram, Report], None]


def linear(program: ExportedProgram) -> Node:
    return next(node for node in program.graph.nodes if "int4_linear" in str(node.target))


def one_byte(program: ExportedProgram, report: Report) -> None:
    program.state_dict["up.weight.packed"].detach().view(torch.uint8)[0, 0] ^= 1


def one_name(program: ExportedProgram, report: Report) -> None:
    program.state_dict["up.weight.other"] = program.state_dict.pop("up.weight.packed")


def one_copy(program: ExportedProgram, report: Report) -> None:
    program.constants["again"] = program.state_dict["up.bias"]


def one_argument(program: ExportedProgram, report: Report) -> None:
    node = linear(program)
    node.args = (*node.args[:-1], "relu")


def one_shape(program: ExportedProgram, report: Report) -> None:
    node = linear(program)
    node.meta["val"] = node.meta["val"].transpose(0, 1)


def one_source(program: ExportedProgram, report: Report) -> None:
    linear(program).meta["from_node"][0].pass_name = "another"


def one_module(program: ExportedProgram, report: Report) -> None:
    linear(program).meta["nn_module_stack"] = {}


def one_limit(program: ExportedProgram, report: Report) -> None:
    program.range_constraints.clear()


def one_pass(program: ExportedProgram, report: Report) -> None:
    report.passes.reverse()


def one_warning(program: ExportedProgram, report: Report) -> None:
    report.warnings.append("the weather is bad")


@cache
def original() -> ExportedProgram:
    """The program to rewrite; a rewrite does not change it."""
    return exported("4w")


def as_recorded(change: Change | None = None) -> Record:
    program, report = ecp.rewrite(original(), "cuda")
    if change is not None:
        change(program, report)
    described = replay.described(program) | replay.reported(report)
    restored: Record = json.loads(json.dumps(described))
    return restored


@pytest.fixture(scope="module")
def unchanged() -> Record:
    return as_recorded()


def kinds(old: Record, new: Record, allowed: Allowed | None = None) -> list[str]:
    return [difference.kind for difference in replay.compare_programs("4w", old, new, allowed or Allowed())]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (one_byte, "constant"),
        (one_name, "constant"),
        (one_copy, "constant"),
        (one_argument, "graph"),
        (one_shape, "graph"),
        (one_source, "provenance"),
        (one_module, "provenance"),
        (one_limit, "signature"),
        (one_pass, "passes"),
        (one_warning, "report"),
    ],
)
def test_replay_names_the_kind_of_a_change(change: Change, kind: str, unchanged: Record) -> None:
    changed = as_recorded(change)
    assert kinds(unchanged, changed) == [kind]
    # An allowed difference in a report hides no difference elsewhere.
    assert kind in kinds(unchanged, changed, Allowed({"silu": "relu"}, ignore_texts=True))


def test_replay_finds_nothing_between_two_rewrites(unchanged: Record) -> None:
    assert kinds(unchanged, as_recorded()) == []


def test_replay_compares_control_flow() -> None:
    def program(factor: int) -> ExportedProgram:
        class Subgraphs(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return torch.cond(x.sum() > 0, lambda y: y * factor, lambda y: y - 1, (x,))

        return torch.export.export(Subgraphs(), (torch.ones(3),))

    old, new = replay.described(program(2)), replay.described(program(3))
    found = replay.compare_programs("branches", old, new, Allowed())
    assert [each.kind for each in found if each.kind != "provenance"] == ["graph"]
    graph = next(each for each in found if each.kind == "graph")
    assert "(%x, 2)" in graph.text and "(%x, 3)" in graph.text


def test_renames_apply_to_rules_and_reports_alone(unchanged: Record) -> None:
    old, new = unchanged, copy.deepcopy(unchanged)
    new["report"] = json.loads(json.dumps(new["report"]).replace("fuse_activation", "fuse_function"))
    new["provenance"] = json.loads(json.dumps(new["provenance"]).replace('"fuse_activation"', '"fuse_function"'))
    new["passes"] = ["fuse_function" if name == "fuse_activation" else name for name in new["passes"]]
    assert kinds(old, new) == ["provenance", "passes", "report"]
    assert kinds(old, new, Allowed({"fuse_activation": "fuse_function"})) == []
    new["constant"] = [line.replace("up.bias", "up.other") for line in new["constant"]]
    assert kinds(old, new, Allowed({"fuse_activation": "fuse_function", "up.bias": "up.other"})) == ["constant"]


def test_renames_make_one_rule_of_two() -> None:
    allowed = Allowed({"conv_int4": "conv", "conv_int8": "conv"})
    counts = {"conv_int4": 1, "linear": 1, "conv_int8": 2}
    old = {"passes": ["conv_int4", "linear", "conv_int8"], "report": {"counts": counts}}
    assert allowed.renamed(old) == {"passes": ["conv", "linear"], "report": {"counts": {"conv": 3, "linear": 1}}}


def test_changed_lines_are_those_that_differ_alone() -> None:
    old = [str(number) for number in range(1000)]
    new = [*old[:5], "new", *old[5:50], *old[51:]]
    assert replay.changed_lines(old, new) == "+ new\n- 50\n... there may be more"
    assert replay.changed_lines(old[:60], new[:60]) == "+ new\n- 50"


def test_ignored_texts_leave_statuses_and_counts_of_sentences(unchanged: Record) -> None:
    old = unchanged
    ignore = Allowed({"detail": "summary"}, ignore_texts=True)
    worded, kept, warned = (copy.deepcopy(old) for _ in range(3))
    worded["report"]["outcomes"][0]["summary"] = worded["report"]["outcomes"][0].pop("detail") + ", in other words"
    assert kinds(old, worded) == ["report"] and kinds(old, worded, ignore) == []
    kept["report"]["outcomes"][0]["status"] = "kept"
    assert kinds(old, kept, ignore) == ["report"]
    warned["report"]["warnings"] = ["one more"]
    assert kinds(old, warned, ignore) == ["report"]


def test_model_that_exports_differently_is_reported_as_such(recording: Path) -> None:
    old = next(replay.read(recording, "golden"))
    new = old | {"input": "another", "programs": {}}
    assert [each.kind for each in replay.compare_models("golden", old, new, Allowed())] == ["input"]


def test_plans_are_drawn_apart_from_the_package(recording: Path) -> None:
    # The imported modules influence the draws of hypothesis.
    with pytest.raises(RuntimeError, match="before the package is imported"):
        replay.draw(1)
    plan = next(replay.read(recording, "generated"))["plan"]
    assert replay.plain(replay.plan_of(plan)) == plan
    with pytest.raises(replay.ReplayError, match=r"cannot read a plan of the recording .*unheard.*give a field"):
        replay.plan_of(plan | {"unheard": 1})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give RECORD=DIR to make a recording, or AGAINST=DIR"),
        (["--record", "{folder}"], "is not empty: name a new folder"),
        (["--against", "{folder}"], "holds no complete recording: make one with `make replay RECORD="),
        (["--record", "{folder}/new", "--families", "reel"], "unknown families reel; there are real, golden"),
        (["--against", "{folder}/old"], "has format 0, this command 1: record it again"),
        (["--against", "{folder}", "--renames", "{folder}/names"], "'linear' is not `old -> new`"),
    ],
)
def test_wrong_command_is_rejected_with_the_fix(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "meta.json").write_text('{"format": 0}')
    (tmp_path / "names").write_text("a -> b  # a comment\nlinear\n")
    assert replay.main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    assert expected in capsys.readouterr().err
