"""``--json``: each command prints one document that its schema describes, on stdout alone, whatever the exit code."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

import et_cuda_passes as ecp
from docs import json_documents
from et_cuda_passes.cli import app, documents
from et_cuda_passes.cli.compare import compare
from et_cuda_passes.cli.documents import DOCUMENTS
from tests.cli.command import Result, Run
from tests.delegate.delegated import K, counting, single_call, write
from tests.hf import checkpoints
from tests.processes import finished
from tests.saved import save

ROOT = Path(ecp.__file__).parent.parent
SCHEMAS: dict[str, Any] = json.loads((ROOT / "et_cuda_passes" / "cli" / "schemas.json").read_text())


def closed(schema: Any) -> Any:
    """A schema that also refuses keys that it does not describe."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return inner | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else inner


VALIDATOR = jsonschema.Draft202012Validator(closed(SCHEMAS))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def document(text: str, command: str) -> dict[str, Any]:
    """The only document in ``text``, which is valid and belongs to ``command``."""
    found = json.loads(text, parse_constant=refuse)
    VALIDATOR.validate(found)
    assert found["schema"] == f"et-cuda-passes.{command}/1"
    return dict(found)


OURS = re.compile(r"( *\d+ %  )?[^\[\]]+: \d+(\.\d s, peak memory| s so far, memory) \d+\.\d\d GB|(error|warning): .*")


def assert_only_ours(result: Result) -> None:
    """Check that each line on stderr is a step, an error or a warning of the command line."""
    assert [line for line in result.err.splitlines() if not OURS.fullmatch(line)] == []


# The schemas ---------------------------------------------------------------------------------------------------------


def test_schemas_are_valid_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS)


def test_command_that_reports_has_a_document() -> None:
    import typer

    group: Any = typer.main.get_command(app)
    with_json = {
        name for name, command in group.commands.items() if any("--json" in each.opts for each in command.params)
    }
    assert with_json == {each.name for each in DOCUMENTS}
    assert with_json == set(group.commands), "a command that reports has --json"


def test_keys_of_all_documents_have_a_meaning() -> None:
    records = {cls for each in DOCUMENTS for cls in json_documents.records_in(each)}
    assert len(records) > len(DOCUMENTS)
    assert [
        f"{cls.__name__}.{name}"
        for cls in records
        for name, (_, meaning) in json_documents.record_fields(cls).items()
        if not meaning
    ] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("packed"),
        lambda found: found.update(schema="et-cuda-passes.explain/2"),
        lambda found: found.update(extra=1),
        lambda found: found["reports"]["cpu"].update(bytes_before="many"),
        lambda found: found["reports"]["cpu"]["outcomes"][0].update(status="lost"),
    ],
)
def test_other_documents_are_refused(change: Any, tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    found = document(command("explain", path, "-t", "cpu", "--json").out, "explain")
    change(found)
    assert not VALIDATOR.is_valid(found)


def test_infinity_and_nan_become_null() -> None:
    nothing = compare(0, torch.ones(2), torch.ones(3), None, False)
    assert math.isinf(nothing.relative)
    entry = nothing.entry("cpu")
    assert (entry.relative, entry.largest, entry.holds) == (None, None, False)
    found = documents.Verify("model.pt2", False, "wrong", [entry])
    assert document(found.to_json(), "verify")["outputs"][0]["relative"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        dataclasses.replace(found, outputs=[dataclasses.replace(entry, relative=math.nan)]).to_json()


# Programs ------------------------------------------------------------------------------------------------------------


def test_explain_prints_a_document_and_its_steps(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "4w")
    result = finished("explain", path, "-t", "cpu", "--json", folder=tmp_path)  # where also C++ code prints
    assert result.code == 0
    assert_only_ours(result)
    found = document(result.out, "explain")
    assert found["reports"]["cpu"]["counts"]["rewritten"] == 2 and found["packed"] == {}
    read = subprocess.run([sys.executable, "-m", "json.tool"], input=result.out, capture_output=True, text=True)
    assert read.returncode == 0 and json.loads(read.stdout) == found


def test_explain_of_a_packed_program_counts_its_layouts(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    packing = command("lower", path, "-t", "cpu", "--stop-after", "rewrite", "-o", tmp_path, "--json")
    lowered = document(packing.out, "lower")
    assert [Path(each["path"]).name for each in lowered["files"]] == [
        "report.json",
        "report.html",
        "model.cpu.packed.pt2",
    ]
    assert lowered["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    explained = command("explain", tmp_path / "model.cpu.packed.pt2", "-t", "cpu", "--json")
    assert document(explained.out, "explain")["packed"] == {"cpu": 2}


def test_explain_of_several_targets_prints_one_document(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    found = document(command("explain", path, "-t", "cpu,cuda", "--json").out, "explain")
    assert list(found["reports"]) == ["cpu", "cuda"]


def test_accuracy_prints_a_document(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    result = command("accuracy", path, "-t", "cpu", "--random-seed", 0, "--json")
    found = document(result.out, "accuracy")
    assert len(found["layers"]) == 2 and found["suggestion"] is None
    assert not any(layer["beyond_rounding"] for layer in found["layers"])


def test_rules_prints_a_document(tmp_path: Path) -> None:
    result = finished("rules", "--json", folder=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert list(document(result.out, "rules")["targets"]) == list(ecp.targets())


def test_match_prints_a_document(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    found = document(command("match", "linear_int4", path, "-t", "cpu", "--nearest", "1", "--json").out, "match")
    (place,) = found["places"]
    assert found["tried"] >= found["matched"] >= 1
    assert (place["matches"], place["stopped"], place["failed"]) == (True, None, [])
    assert place["tree"][0].startswith("✓ aten.linear ") and place["node"] in place["nodes"]
    found = document(command("match", "linear_int8", path, "-t", "cpu", "--json").out, "match")
    assert all(not place["matches"] and (place["stopped"] or place["failed"]) for place in found["places"])


def test_new_rule_prints_a_document(tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = document(command("new-rule", "write_silu", "--json").out, "new-rule")
    assert [file["path"] for file in found["files"]] == ["write_silu.py", "test_write_silu.py"]
    assert all(Path(file["path"]).stat().st_size == file["bytes"] for file in found["files"])


@pytest.mark.slow
def test_lower_and_verify_for_xnnpack_print_documents_alone(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "4w")
    result = finished("lower", path, "-t", "xnnpack", "-o", tmp_path / "out", "--json", folder=tmp_path)
    assert result.code == 0, result.err
    assert_only_ours(result)
    lowered = document(result.out, "lower")
    assert (lowered["target"], lowered["error"], lowered["cpu_capability"]) == ("xnnpack", None, None)
    assert lowered["report"] == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {each["path"]: each["bytes"] for each in lowered["files"]} == {
        str(each): each.stat().st_size for each in (tmp_path / "out").iterdir()
    }
    percents = [int(line.split("%")[0]) for line in result.err.splitlines() if "so far" not in line]
    assert percents == [20, 40, 60, 80, 100]

    result = finished("verify", path, "-t", "xnnpack", "--json", folder=tmp_path)
    assert result.code == 0, result.err
    assert_only_ours(result)
    verified = document(result.out, "verify")
    assert verified["holds"] is True and "agrees with the original" in verified["verdict"]
    assert verified["outputs"][0]["relative"] < 1e-6 and verified["outputs"][0]["holds"] is True


def test_wrong_output_is_in_the_document_and_exits_with_1(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "8da4w")
    result = command("verify", path, "-t", "xnnpack", "--tolerance", "1e-9", "--json")
    assert result.code == 1
    found = document(result.out, "verify")
    assert found["holds"] is False and found["outputs"][0]["holds"] is False
    assert found["verdict"] in result.error


def test_lower_that_lacks_something_prints_what_it_wrote(tmp_path: Path, command: Run, no_gpu: None) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    result = command("lower", path, "-t", "cuda", "-o", tmp_path / "out", "--json")
    assert result.code == 1
    found = document(result.out, "lower")
    assert result.error == f"error: {found['error']}" and "needs a CUDA device" in found["error"]
    names = [Path(each["path"]).name for each in found["files"]]
    assert names == ["report.json", "report.html", "model.cuda.packed.pt2"]


def test_unmet_expectation_prints_the_report(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    result = command("lower", path, "-t", "cpu", "-o", tmp_path / "out", "--expect", "kept=1", "--json")
    assert result.code == 1
    found = document(result.out, "lower")
    assert found["report"]["counts"]["kept"] == 0 and "kept: expected 1, got 0" in found["error"]


@pytest.mark.slow
def test_run_prints_outputs_and_times(tmp_path: Path, command: Run) -> None:
    model = write(tmp_path, {"forward": single_call(counting())})
    save_file({"x": torch.full((3, K), torch.nan)}, tmp_path / "x.safetensors")
    given = ("--inputs", tmp_path / "x.safetensors", "--trust", "--device", "cpu", "--json")
    found = document(command("run", model, *given).out, "run")
    assert (found["ran"], found["target"], found["times"]) == ("forward", None, None)
    first = found["outputs"][0]
    assert (first["dtype"], first["shape"], first["mean"], first["not_finite"]) == ("torch.float32", [3, 16], None, 48)
    timed = document(command("run", model, "--trust", "--device", "cpu", "--benchmark", "--json").out, "run")["times"]
    assert 0 < timed["fastest"] <= timed["median"] <= timed["percentile_90"] and timed["runs"] >= 20


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "missing.pt2", "-t", "cpu"],
        ["lower", "missing.pt2", "-t", "cpu"],
        ["lower", "missing.pt2", "-t", "tpu"],
        ["verify", "missing.pt2", "-t", "cpu"],
        ["run", "missing.pte"],
        ["generate", "missing", "--prompt", "Hello"],
        ["export", "--model", "missing", "--target", "tpu", "--output-dir", "out"],
        ["rules", "--nothing"],
        ["doctor", "--nothing"],
    ],
)
def test_bad_usage_exits_with_2_and_prints_no_document(
    arguments: list[str], tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(*arguments, "--json")
    assert (result.code, result.out) == (2, "")
    assert "error: " in result.err.lower()


# Exports -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    checkpoints.causal(folder / "causal")
    return folder


@pytest.fixture(scope="module")
def exported(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A decoder for two targets; a machine without a GPU finishes one of them."""
    folder = tmp_path_factory.mktemp("exports") / "causal"
    return folder, finished(
        "export", "--model", models / "causal", "--target", "xnnpack,cuda", "--qlinear", "8da4w", "--max-length", "32",
        "--dtype", "float32", "--cast-to-bf16", "--output-dir", folder, "--json", folder=folder.parent,
        variables=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.mark.slow
def test_export_prints_a_document(exported: tuple[Path, Result]) -> None:
    folder, result = exported
    assert result.code == 1, result.err
    assert_only_ours(result)
    found = document(result.out, "export")
    report = json.loads((folder / "report.json").read_text())
    assert found["folder"] == str(folder) and found["reports"] == report["targets"]
    assert found["quantization"] == report["quantization"] and found["gguf_blocks"] == {}
    assert {Path(each["path"]).name for each in found["files"]} == {each.name for each in folder.iterdir()}
    assert list(found["unfinished"]) == ["cuda"] and result.error == f"error: {found['error']}"


@pytest.mark.slow
def test_verify_of_an_export_prints_every_comparison(exported: tuple[Path, Result], models: Path, command: Run) -> None:
    folder, _ = exported
    result = command("verify", folder, "-t", "xnnpack", "--model", models / "causal", "--json")
    assert result.code == 0, result.err
    found = document(result.out, "verify")
    assert found["holds"] is True and {each["component"] for each in found["outputs"]} == {"prefill", "decode"}
    assert all(each["target"] == "xnnpack" and each["case"] for each in found["outputs"])
    percents = [int(line.split("%")[0]) for line in result.err.splitlines() if " %  " in line]
    assert percents[-1] == 100
    alone = document(command("verify", folder, "-t", "xnnpack", "--json").out, "verify")
    assert alone["holds"] is None and alone["outputs"] == [] and "compared with nothing" in alone["verdict"]


@pytest.mark.slow
def test_run_of_a_component_prints_a_document(exported: tuple[Path, Result], command: Run) -> None:
    folder, _ = exported
    result = command("run", folder, "--component", "prefill", "-t", "xnnpack", "--json")
    assert result.code == 0, result.err
    found = document(result.out, "run")
    assert (found["ran"], found["target"]) == ("prefill", "xnnpack") and found["outputs"][0]["mean"] is not None


@pytest.mark.slow
def test_generate_prints_the_text_only_in_the_document(
    exported: tuple[Path, Result], models: Path, tmp_path: Path
) -> None:
    folder, _ = exported
    asked = ("--prompt", "lazy brown", "--max-new-tokens", "6", "--target", "xnnpack")
    result = finished("generate", folder, *asked, "--compare", models / "causal", "--json", folder=tmp_path)
    assert result.code == 0, result.err
    assert_only_ours(result)
    found = document(result.out, "generate")
    assert found["tokens"] == 6 and found["first_token_seconds"] > 0
    plain = finished("generate", folder, *asked, folder=tmp_path)
    assert plain.out.splitlines()[0].strip() == found["text"].strip() != ""
    assert_only_ours(plain)
    assert found["compared"]["model"] == str(models / "causal")


@pytest.mark.slow
def test_finishing_an_export_with_nothing_to_do_prints_a_document(exported: tuple[Path, Result], command: Run) -> None:
    folder, _ = exported
    found = document(command("lower", folder, "-t", "xnnpack", "--json").out, "lower")
    assert (found["files"], found["report"], found["error"]) == ([], None, None)
