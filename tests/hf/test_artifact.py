"""The folder of an export: whole or nothing, loaded by transformers' own class, and clear errors for what is wrong."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer
from transformers.exporters import ExportedModel as TransformersExportedModel

from et_cuda_passes.hf import EtConfig, EtExporter, ExportedModel, artifact
from et_cuda_passes.hf.artifact import ExportError
from tests.hf import checkpoints
from tests.hf.models import bert, tokens


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return tokens(rows=2)


@pytest.fixture(scope="module")
def exported(inputs: dict[str, torch.Tensor]) -> Any:
    return EtExporter().export(bert(), dict(inputs), EtConfig(target="xnnpack,cpu", qlinear="8da4w"))


@pytest.fixture(scope="module")
def original(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "bert"
    exported.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bert"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("cls", [TransformersExportedModel, ExportedModel])
@pytest.mark.parametrize("target", [None, "xnnpack", "cpu"])
def test_saved_export_gives_the_same_numbers(
    cls: Any, target: str | None, folder: Path, exported: Any, inputs: dict[str, torch.Tensor]
) -> None:
    exported.to(target=target)
    expected = exported(**inputs)
    again = cls.from_pretrained(folder, **({} if target is None else {"target": target}))
    assert again.runners["model"].target == (target or "xnnpack")
    assert again.config.model_type == "bert"
    torch.testing.assert_close(again(**inputs).last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)


def test_saved_folder_has_programs_manifest_config_and_report(folder: Path) -> None:
    assert names(folder) == [
        "config.json",
        "export.json",
        "model.cpu.pt2",
        "model.etcp.json",
        "model.xnnpack.pte",
        "report.html",
        "report.json",
    ]
    report = json.loads((folder / "report.json").read_text())
    assert list(report["targets"]) == ["xnnpack", "cpu"]
    assert report["targets"]["xnnpack"]["model"]["counts"]["kept"] == 7
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="\w+" aria-labelledby="\w+">\s*<h2[^>]*>(.*)</h2>', page) == ["xnnpack", "cpu"]
    manifest = json.loads((folder / "export.json").read_text())
    packages = manifest["components"]["model"]["metadata"]["packages"]
    assert {"transformers", "torch", "torchao", "executorch", "et_cuda_passes"} <= set(packages)
    assert report["command"]


@pytest.mark.parametrize("cls", [TransformersExportedModel, ExportedModel])
def test_loaded_export_can_be_saved_again(
    cls: Any, folder: Path, tmp_path: Path, inputs: dict[str, torch.Tensor]
) -> None:
    again = cls.from_pretrained(folder)
    again.save_pretrained(tmp_path / "second")
    assert set(names(folder)) - set(names(tmp_path / "second")) <= {"report.html", "report.json"}
    twice = ExportedModel.from_pretrained(tmp_path / "second", target="cpu")
    assert twice.report == getattr(again, "report", {})
    assert torch.isfinite(twice(**inputs).last_hidden_state).all()


def test_loaded_export_with_a_damaged_report_is_not_saved(folder: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    del report["targets"]["cpu"]["model"]["outcomes"]
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(ExportError, match="the report of the export is damaged: export the model again"):
        ExportedModel.from_pretrained(folder).save_pretrained(tmp_path / "second")
    assert list((tmp_path / "second").iterdir()) == []


def test_tokenizer_is_saved_beside_the_programs(exported: Any, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    exported.save_pretrained(tmp_path / "out", processor=tokenizer)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(names(tmp_path / "out"))


def test_another_export_is_not_overwritten(exported: Any, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="has an export already: choose another folder, or overwrite it"):
        exported.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_export_that_another_process_has_written_meanwhile_is_not_overwritten(
    exported: Any, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = artifact.shutil.copyfile

    def copy(*args: Any) -> None:
        shutil.copytree(original, tmp_path / "out", dirs_exist_ok=True, copy_function=real)
        real(*args)

    monkeypatch.setattr(artifact.shutil, "copyfile", copy)
    with pytest.raises(FileExistsError, match="has an export already"):
        exported.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == names(original)


def test_foreign_file_is_not_overwritten(exported: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="has config.json already"):
        exported.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_overwriting_replaces_the_files_of_the_former_export_alone(
    folder: Path, inputs: dict[str, torch.Tensor]
) -> None:
    (folder / "notes.txt").write_text("mine")
    other = EtExporter().export(bert(), dict(inputs), EtConfig(target="xnnpack"))
    other.save_pretrained(folder, overwrite=True)
    assert names(folder) == [
        "config.json", "export.json", "model.etcp.json", "model.xnnpack.pte", "notes.txt", "report.html",
        "report.json",
    ]  # fmt: skip
    torch.testing.assert_close(
        ExportedModel.from_pretrained(folder)(**inputs).last_hidden_state,
        other(**inputs).last_hidden_state,
        rtol=0,
        atol=0,
    )


def test_overwriting_leaves_nothing_of_the_former_tokenizer(exported: Any, tmp_path: Path) -> None:
    tokenizer = checkpoints.tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}"}
    for _ in range(2):
        exported.save_pretrained(tmp_path, overwrite=True, processor=tokenizer)
        assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    exported.save_pretrained(tmp_path, overwrite=True, processor=checkpoints.tokenizer())
    assert not list(tmp_path.rglob("*.jinja"))
    (tmp_path / "mine.json").write_text("{}")
    exported.save_pretrained(tmp_path, overwrite=True)
    assert not (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "mine.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_leaves_the_folder_as_it_was(
    exported: Any, folder: Path, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = folder if overwrite else tmp_path / "new"
    before = {path.name: path.read_bytes() for path in goal.iterdir()} if overwrite else {}

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # The second file that is copied does not fit.
    real, calls = shutil.copyfile, iter([False, True])
    monkeypatch.setattr(artifact.shutil, "copyfile", lambda *args: full() if next(calls) else real(*args))
    with pytest.raises(OSError, match="No space left"):
        exported.save_pretrained(goal, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in goal.iterdir()} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


OUTSIDE = {"cpu": {"files": {"../x.pt2": 1}, "missing": None}}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.cpu.pt2").unlink(), "model.cpu.pt2 is missing; model.etcp.json needs it"),
        (lambda folder: truncate(folder / "model.xnnpack.pte"), "bytes, and model.etcp.json says"),
        (lambda folder: truncate(folder / "model.etcp.json"), "is damaged, or not a component of an export"),
        (lambda folder: change(folder / "model.etcp.json", schema=3), "written by a newer version"),
        (lambda folder: change(folder / "model.etcp.json", inputs=[{"name": "x", "dtype": "nn"}]), "is damaged"),
        (lambda folder: change(folder / "model.etcp.json", targets=OUTSIDE), "which is not beside it"),
    ],
)
def test_damaged_folder_is_an_error_with_the_file(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ExportError, match=message):
        ExportedModel.from_pretrained(folder)


@pytest.mark.parametrize(("target", "file"), [("xnnpack", "model.xnnpack.pte"), ("cpu", "model.cpu.pt2")])
def test_changed_byte_of_a_program_is_an_error(
    target: str, file: str, folder: Path, inputs: dict[str, torch.Tensor]
) -> None:
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ExportError, match=f"{file} is not the file that the export wrote"):
        ExportedModel.from_pretrained(folder, target=target)
    # A copy is damaged too, and the files of the other target are not.
    other = {"xnnpack": "cpu", "cpu": "xnnpack"}[target]
    again = ExportedModel.from_pretrained(folder, target=other)
    assert torch.isfinite(again(**inputs).last_hidden_state).all()
    again.save_pretrained(folder.parent / "copy")
    with pytest.raises(ExportError, match=f"{file} is not the file that the export wrote"):
        ExportedModel.from_pretrained(folder.parent / "copy", target=target)


def test_export_without_checksums_is_loaded(folder: Path, exported: Any, inputs: dict[str, torch.Tensor]) -> None:
    data = json.loads((folder / "model.etcp.json").read_text())
    targets = {
        target: build | {"files": {name: each["size"] for name, each in build["files"].items()}}
        for target, build in data["targets"].items()
    }
    del data["interface"]
    (folder / "model.etcp.json").write_text(json.dumps(data | {"schema": 1, "targets": targets}))
    expected = exported.to(target="cpu")(**inputs).last_hidden_state
    again = ExportedModel.from_pretrained(folder, target="cpu")
    torch.testing.assert_close(again(**inputs).last_hidden_state, expected, rtol=0, atol=0)
    again.save_pretrained(folder.parent / "copy")
    assert "sha256" in (folder.parent / "copy" / "model.etcp.json").read_text()


def test_manifest_of_another_export_is_an_error(folder: Path) -> None:
    manifest = json.loads((folder / "export.json").read_text())
    metadata = manifest["components"]["model"]["metadata"]
    metadata["in_spec"] = metadata["in_spec"].replace("attention_mask", "token_type_ids")
    (folder / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"export.json and model.etcp.json are of different exports"):
        ExportedModel.from_pretrained(folder)


def test_unavailable_target_is_an_error_with_those_of_the_export(folder: Path) -> None:
    with pytest.raises(ExportError, match="not exported for cuda, only for xnnpack, cpu"):
        ExportedModel.from_pretrained(folder, target="cuda")
    with pytest.raises(ExportError, match="nothing to run on cuda"):
        ExportedModel.from_pretrained(folder, device="cuda")
    with pytest.raises(TypeError, match="runner takes"):
        ExportedModel.from_pretrained(folder, no_such_option=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": torch.zeros(2, 7, dtype=torch.int32)}, "takes input_ids as int64; got int32"),
        ({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, r"input_ids with the shape \[2, 7\]; got \[2, 8\]"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, r"got \[2\]"),
        ({"attention_mask": None}, "traced with a tensor for attention_mask; got None"),
        ({"input_ids": 3}, "traced with a tensor for input_ids; got 3"),
    ],
)
@pytest.mark.parametrize("target", ["xnnpack", "cpu"])
def test_call_that_the_export_does_not_cover_is_an_error(
    exported: Any, inputs: dict[str, torch.Tensor], target: str, wrong: dict[str, Any], message: str
) -> None:
    exported.to(target=target)
    with pytest.raises(ExportError, match=message):
        exported(**(inputs | wrong))


def test_missing_and_unknown_arguments_are_errors(exported: Any, inputs: dict[str, torch.Tensor]) -> None:
    runner = exported.runners["model"]
    with pytest.raises(ExportError, match="model needs attention_mask; it takes input_ids, attention_mask"):
        runner(input_ids=inputs["input_ids"])
    with pytest.raises(ExportError, match="was not traced with position_ids"):
        runner(**inputs, position_ids=inputs["input_ids"])
    assert runner(**inputs, position_ids=None).last_hidden_state.shape == (2, 7, 64)


@pytest.mark.parametrize("target", ["xnnpack", "cpu"])
def test_outputs_of_a_former_call_stay(exported: Any, inputs: dict[str, torch.Tensor], target: str) -> None:
    exported.to(target=target)
    first = exported(**inputs).last_hidden_state
    before = first.clone()
    second = exported(**tokens(rows=2)).last_hidden_state
    assert not torch.equal(first, second)
    assert torch.equal(first, before)


@pytest.mark.parametrize("target", ["xnnpack", "cpu"])
def test_inputs_that_are_not_contiguous_give_the_same_numbers(
    exported: Any, inputs: dict[str, torch.Tensor], target: str
) -> None:
    exported.to(target=target)
    turned = {name: value.t().contiguous().t() for name, value in inputs.items()}
    assert not turned["input_ids"].is_contiguous()
    expected = exported(**inputs).last_hidden_state
    torch.testing.assert_close(exported(**turned).last_hidden_state, expected, rtol=0, atol=0)
