"""A target that this machine cannot lower to: packed programs, a clear error, and the rest of the work elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

from et_cuda_passes.hf import EtConfig, EtExporter, ExportedModel, exporter, finish_export
from et_cuda_passes.hf.artifact import ExportError
from tests.hf.models import bert, quantized, qwen, static_cache, tokens

LACKING = "a CUDA device"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_without_a_gpu_gives_packed_programs_and_says_how_to_go_on(tmp_path: Path) -> None:
    model = qwen(num_hidden_layers=1).bfloat16()
    config = EtConfig(target="cuda", qlinear="4w", dynamic=True)
    exported = EtExporter().export_for_generation(model, tokens(), config, generation_config=static_cache())
    for name in ("prefill", "decode"):
        counts = exported.report["targets"]["cuda"][name]["counts"]
        assert (counts["rewritten"], counts["missed"]) == (8, 0)
    exported.save_pretrained(tmp_path / "out")
    assert {"prefill.cuda.packed.pt2", "decode.cuda.packed.pt2"} <= set(names(tmp_path / "out"))
    message = (
        rf"not lowered for cuda: .* lacked {LACKING}.*finish the saved folder with et_cuda_passes.hf.finish_export"
    )
    with pytest.raises(ExportError, match=message):
        ExportedModel.from_pretrained(tmp_path / "out")
    with pytest.raises(ExportError, match=f"lowering to cuda needs {LACKING}"):
        finish_export(tmp_path / "out")


@pytest.mark.slow
def test_packed_programs_are_finished_where_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = qwen(num_hidden_layers=1), tokens()
    with monkeypatch.context() as patched:
        patched.setattr(
            exporter, "missing_requirement", lambda target, gpu=None: "a compiler" if target == "cpu" else None
        )
        config = EtConfig(target="cpu", qlinear="4w")
        exported = EtExporter().export_for_generation(model, inputs, config, generation_config=static_cache())
        exported.save_pretrained(tmp_path / "out")
    before, page = names(tmp_path / "out"), (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").write_text("of another version")
    # In another process, in which transformers has registered no cache yet.
    code = f"from et_cuda_passes.hf import finish_export; print(finish_export({str(tmp_path / 'out')!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    packed = {"prefill.cpu.packed.pt2", "decode.cpu.packed.pt2"}
    assert set(names(tmp_path / "out")) == set(before) - packed | {"model.cpu.pt2"}
    assert (tmp_path / "out" / "report.html").read_text() == page
    assert finish_export(tmp_path / "out") == []
    again = ExportedModel.from_pretrained(tmp_path / "out")
    found = again.runners["prefill"](
        input_ids=inputs["input_ids"],
        attention_mask={"full_attention": None},
        position_ids=torch.arange(7)[None],
        past_key_values=StaticCache(config=model.config, max_cache_len=32),
    ).logits
    with torch.no_grad():
        expected = quantized(model, qlinear="4w")(inputs["input_ids"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no export: export.json cannot be read"):
        finish_export(tmp_path)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ExportError, match="export.json is damaged"):
        finish_export(tmp_path)


def test_metal_is_packed_too(tmp_path: Path) -> None:
    exported = EtExporter().export(bert().bfloat16(), tokens(), EtConfig(target="metal", qlinear="4w"))
    assert [file.name for file in exported.program.builds["metal"].files] == ["model.metal.packed.pt2"]
    assert exported.report["targets"]["metal"]["model"]["counts"]["missed"] == 0
