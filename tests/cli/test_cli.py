"""The command line: written programs run, reports are true, and an error is one line."""

import json
import os
import shlex
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor

import et_cuda_passes as ecp
from et_cuda_passes.graph.report_page import render
from et_cuda_passes.targets.gpu import gpu_named_in
from et_cuda_passes.testing import Quantized
from tests.cli.command import Run, names
from tests.saved import difference, save

ROOT = Path(ecp.__file__).parent.parent

INPUTS = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (1, 5, 64)]


def test_lower_for_xnnpack_writes_a_program_that_runs(tmp_path: Path, command: Run) -> None:
    from executorch.runtime import Runtime

    path, module = save(tmp_path, "4w")
    out = tmp_path / "made" / "here"
    result = command("lower", path, "--target", "xnnpack", "--output-dir", out, "--expect", "fold_dequantize=2")
    assert result.code == 0, result.err
    assert names(out) == ["model.xnnpack.pte", "report.html", "report.json"]
    assert f"{out / 'model.xnnpack.pte'}  {(out / 'model.xnnpack.pte').stat().st_size:,}" in result.out
    assert "Int8DynamicActivationIntxWeightConfig" in result.out
    method = Runtime.get().load_program(out / "model.xnnpack.pte").load_method("forward")
    assert method is not None
    for x in INPUTS:
        assert difference(method.execute([x])[0], module(x)) < 1e-6


@pytest.mark.slow
def test_packed_embedding_for_xnnpack_is_lowered_in_a_new_process(tmp_path: Path, command: Run) -> None:
    """torch does not know ExecuTorch's operators until ExecuTorch is imported."""
    table = Quantized(13, 64, dtype=torch.float32, form=lambda ids, weight, bias: F.embedding(ids, weight))
    torch.export.save(torch.export.export(table, (torch.tensor([1, 2]),)), tmp_path / "model.pt2")
    _, report = ecp.rewrite(torch.export.load(tmp_path / "model.pt2"), "xnnpack")
    packed = tmp_path / "model.xnnpack.packed.pt2"
    assert (
        command("lower", tmp_path / "model.pt2", "-t", "xnnpack", "-o", tmp_path, "--stop-after", "rewrite").code == 0
    )
    done = subprocess.run(
        [sys.executable, "-m", "et_cuda_passes", "explain", packed, "-t", "xnnpack"], capture_output=True, text=True
    )
    assert done.stdout == f"{report}\n", done.stderr


@pytest.mark.compiled
def test_lower_for_cpu_works_directly_and_from_a_packed_program(tmp_path: Path, command: Run) -> None:
    path, module = save(tmp_path, "4w")
    packing = command("lower", path, "--target", "cpu", "--stop-after", "rewrite", "--output-dir", tmp_path)
    assert packing.code == 0, packing.err
    packed = tmp_path / "model.cpu.packed.pt2"
    # The packed program runs wherever our operators are registered.
    loaded = torch.export.load(packed).module()

    lowering = command(
        "lower", packed, "--target", "cpu", "--output-dir", tmp_path / "out", "--expect", "linear_int4=2"
    )
    assert lowering.code == 0, lowering.err
    assert "2 x by_row" in lowering.out
    assert names(tmp_path / "out") == ["model.cpu.pt2", "report.html", "report.json"]
    # The report is that of the packing, with an outcome for every layer.
    assert (tmp_path / "out" / "report.json").read_bytes() == (tmp_path / "report.json").read_bytes()

    package = str(tmp_path / "out" / "model.cpu.pt2")
    compiled = torch._inductor.aoti_load_package(package)
    for x in INPUTS:
        assert difference(loaded(x), module(x)) < 1e-6
        assert difference(compiled(x), module(x)) < 1e-6
    assert "AOTInductor package" in command("explain", package, "--target", "cpu").error


def test_lower_for_cuda_without_a_gpu_writes_the_packed_program(tmp_path: Path, command: Run, no_gpu: None) -> None:
    path, module = save(tmp_path, "4w", torch.bfloat16)
    out = tmp_path / "a folder"
    result = command("lower", path, "--target", "cuda", "--output-dir", out, "--compile-spec", "low_memory_mode=ON")
    assert result.code == 1
    assert names(out) == ["model.cuda.packed.pt2", "report.html", "report.json"]
    assert "CUDA device" in result.error
    loaded = torch.export.load(out / "model.cuda.packed.pt2").module()
    x = INPUTS[1].bfloat16()
    assert difference(loaded(x), module(x)) < 0.01

    # The command in the message is valid: it reads the packed program, and ends here in the same way.
    program, *again = shlex.split(result.error.rpartition("continue with: ")[2])
    assert program == "et-cuda-passes" and again[-2:] == ["--compile-spec", "low_memory_mode=ON"]
    second = command(*again)
    assert (second.code, second.error) == (1, result.error)
    assert names(out) == ["model.cuda.packed.pt2", "report.html", "report.json"]
    assert "2 x linear_int4" in second.out


@pytest.mark.skipif(sys.platform == "darwin", reason="may have what is missing")
def test_gpu_of_the_command_line_is_named_in_the_packed_program(tmp_path: Path, command: Run, no_gpu: None) -> None:
    path, module = save(tmp_path, "4w", torch.bfloat16)
    packed, note = tmp_path / "model.cuda.packed.pt2", "predicted, not measured, for {}; once lowered"
    result = command("lower", path, "-t", "cuda", "-o", tmp_path, "--gpu", "sm_89", "--stop-after", "rewrite")
    assert result.code == 0 and note.format("sm_89") in result.out
    assert gpu_named_in(torch.export.load(packed)) == "sm_89"
    assert note.format("sm_89") in command("explain", packed, "-t", "cuda").out
    # Another name replaces it, and explanations of the old tilings go.
    again = command("lower", packed, "-t", "cuda", "-o", tmp_path / "out", "--gpu", "sm_86:28")
    assert again.code == 1 and "needs a CUDA device" in again.error and note.format("sm_86:28") in again.out
    program = torch.export.load(tmp_path / "out" / "model.cuda.packed.pt2")
    assert gpu_named_in(program) == "sm_86:28"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"]["linear_int4"] == 2
    assert {outcome["explanation"] for outcome in report["outcomes"]} == {""}
    x = INPUTS[1].bfloat16()
    assert difference(program.module()(x), module(x)) < 0.01


@pytest.mark.parametrize("name", ["lower", "explain"])
def test_gpu_that_is_unknown_or_for_another_target_is_bad_usage(name: str, tmp_path: Path, command: Run) -> None:
    unknown = command(name, tmp_path / "model.pt2", "-t", "cuda", "--gpu", "rtx")
    assert unknown.code == 2 and "'rtx' names no known GPU: use one of sm_80" in unknown.error
    other = command(name, tmp_path / "model.pt2", "-t", "xnnpack", "--gpu", "sm_89")
    assert other.code == 2 and "target xnnpack has none: leave it out" in other.error


def test_lower_for_metal_outside_of_macos_writes_the_packed_program(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    result = command("lower", path, "--target", "metal", "--output-dir", tmp_path)
    assert result.code == 1
    assert "macOS" in result.error
    assert names(tmp_path) == ["model.metal.packed.pt2", "model.pt2", "report.html", "report.json"]


def test_lower_for_cpu_without_a_compiler_writes_the_packed_program(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        result = command("lower", path, "--target", "cpu", "--output-dir", tmp_path)
    assert result.code == 1
    assert "no-such-compiler" in result.error
    assert "model.cpu.packed.pt2" in names(tmp_path)


def test_program_packed_for_another_target_is_rejected(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    assert command("lower", path, "-t", "cuda", "--stop-after", "rewrite", "-o", tmp_path).code == 0
    result = command("lower", tmp_path / "model.cuda.packed.pt2", "-t", "cpu", "-o", tmp_path / "out")
    assert result.code == 2
    assert "packed (mma_tiled) for target cuda" in result.error
    assert not (tmp_path / "out").exists()

    # A program without a record, saved by torch.export.save alone, is recognized by its operators.
    bare = tmp_path / "bare.pt2"
    torch.export.save(torch.export.load(tmp_path / "model.cuda.packed.pt2"), bare)
    assert "for target cuda" in command("explain", bare, "-t", "xnnpack").error
    assert "2 x mma_tiled" in command("explain", bare, "-t", "cuda").out


def test_program_packed_for_another_instruction_set_is_rejected(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    packing = command("lower", path, "--target", "cpu", "--stop-after", "rewrite", "--output-dir", tmp_path)
    assert torch.backends.cpu.get_cpu_capability() in packing.out.splitlines()[-1]
    program, report = ecp.rewrite(torch.export.load(path), "cpu")
    record = {"target": "cpu", "cpu_capability": "ELSEWHERE", "report": report.to_dict()}
    torch.export.save(program, path, extra_files={"et_cuda_passes.json": json.dumps(record)})
    result = command("explain", path, "--target", "cpu")
    assert result.code == 2
    assert "ELSEWHERE" in result.error


def test_record_of_another_version_is_rejected(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "float")
    torch.export.save(torch.export.load(path), path, extra_files={"et_cuda_passes.json": '{"target": "cpu"}'})
    result = command("explain", path, "--target", "cpu")
    assert result.code == 2
    assert "pack the original program again" in result.error


def test_packing_over_the_model_itself_is_rejected(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    packed = path.rename(tmp_path / "model.cpu.packed.pt2")
    before = packed.read_bytes()
    result = command("lower", packed, "--target", "cpu", "--stop-after", "rewrite", "--output-dir", tmp_path)
    assert result.code == 2
    assert "--output-dir" in result.error
    assert packed.read_bytes() == before


def test_unmet_expectation_stops_the_lowering(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    out = tmp_path / "out"
    result = command("lower", path, "-t", "xnnpack", "-o", out, "--expect", "fold_dequantize=2", "--expect", "kept=1")
    assert result.code == 1
    assert "kept: expected 1, got 0" in result.error
    assert names(out) == ["report.html", "report.json"]


def test_failed_lowering_keeps_the_report_and_earlier_files(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    program = torch.export.load(path)
    for name, value in program.state_dict.items():
        if name.startswith("up.weight"):
            value.scale[0, 0] = float("nan")
    torch.export.save(program, path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.xnnpack.pte").write_bytes(b"of an earlier day")
    result = command("lower", path, "--target", "xnnpack", "--output-dir", out)
    assert result.code == 1
    assert "up.weight" in result.error
    assert "--debug" in result.error
    assert names(out) == ["model.xnnpack.pte", "report.html", "report.json"]
    assert (out / "model.xnnpack.pte").read_bytes() == b"of an earlier day"
    assert json.loads((out / "report.json").read_text())["counts"]["missed"] == 1


def test_explain_prints_the_report(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "8da4w")
    _, report = ecp.rewrite(torch.export.load(path), "xnnpack")
    assert command("explain", path, "--target", "xnnpack").out == f"{report}\n"
    done = command("explain", path, "--target", "xnnpack", "--json")
    assert done.code == 0
    assert json.loads(done.out)["reports"] == {"xnnpack": report.to_dict()}
    assert names(tmp_path) == ["model.pt2"]


def test_explain_prints_the_reports_of_several_targets(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    reports = {name: ecp.rewrite(torch.export.load(path), name)[1] for name in ("cpu", "xnnpack")}
    done = command("explain", path, "--target", "cpu, xnnpack")
    assert done.out == "\n\n".join(map(str, reports.values())) + "\n"
    done = command("explain", path, "--target", "cpu,xnnpack", "--json")
    assert json.loads(done.out)["reports"] == {name: report.to_dict() for name, report in reports.items()}
    assert names(tmp_path) == ["model.pt2"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("cpu,cpu", "--target cpu,cpu has cpu twice; name each target once"),
        ("cpu,qnn", "unknown target 'qnn'"),
        ("cpu,", "unknown target ''"),
    ],
)
def test_wrong_list_of_targets_is_bad_usage(target: str, said: str, tmp_path: Path, command: Run) -> None:
    result = command("explain", tmp_path / "model.pt2", "--target", target)
    assert result.code == 2
    assert said in result.error


def test_explain_names_the_gpu_for_the_targets_that_have_one(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    result = command("explain", path, "--target", "cpu,cuda", "--gpu", "sm_89")
    assert result.out.count("for sm_89; once lowered") == 1
    result = command("explain", path, "--target", "cpu,xnnpack", "--gpu", "sm_89")
    assert result.code == 2
    assert "target cpu has none: leave it out" in result.error


def test_explain_writes_a_page_of_all_targets(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    page = tmp_path / "made" / "page.html"
    done = command("explain", path, "--target", "cpu,xnnpack", "--html", page)
    assert done.code == 0, done.err
    reports = {name: ecp.rewrite(torch.export.load(path), name)[1].to_dict() for name in ("cpu", "xnnpack")}
    assert page.read_text(encoding="utf-8") == render(reports, "model.pt2")
    assert f"{page}  {page.stat().st_size:,}" in done.out
    assert names(page.parent) == ["page.html"]
    # With --json, stdout has the JSON alone.
    done = command("explain", path, "--target", "cpu", "--html", page, "--json")
    assert json.loads(done.out)["reports"] == {"cpu": reports["cpu"]}


def test_explain_writes_node_data_for_each_target(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    assert command("explain", path, "-t", "cpu", "--model-explorer", tmp_path / "graph.json").code == 0
    linears = {node.name for node in torch.export.load(path).graph.nodes if "linear" in str(node.target)}
    data = json.loads((tmp_path / "graph.json").read_text())
    assert data["results"].keys() == linears
    assert command("explain", path, "-t", "cpu,xnnpack", "--model-explorer", tmp_path / "graph.json").code == 0
    assert names(tmp_path) == ["graph.cpu.json", "graph.json", "graph.xnnpack.json", "model.pt2"]
    assert json.loads((tmp_path / "graph.cpu.json").read_text()) == data
    assert json.loads((tmp_path / "graph.xnnpack.json").read_text())["name"] == "xnnpack"


def test_explain_draws_the_rewrites(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    _, report = ecp.rewrite(torch.export.load(path), "cpu")
    assert report.drawn().count("linear_int4, once") == 2  # one linear has a bias
    assert command("explain", path, "--target", "cpu", "--drawings").out == f"{report}\n\n{report.drawn()}\n"


@pytest.mark.parametrize("option", ["--html", "--model-explorer"])
def test_report_over_the_model_or_a_folder_is_bad_usage(option: str, tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    before = path.read_bytes()
    for place, said in ((path, "is MODEL itself"), (tmp_path, "is a folder; name a file in it")):
        result = command("explain", path, "--target", "cpu", option, place)
        assert result.code == 2
        assert said in result.error
    assert path.read_bytes() == before


@pytest.mark.parametrize("option", ["--html", "--model-explorer"])
def test_report_does_not_replace_a_pipe_or_a_link(option: str, tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    pipe, real, link = tmp_path / "pipe", tmp_path / "real", tmp_path / "link"
    os.mkfifo(pipe)
    result = command("explain", path, "--target", "cpu", option, pipe)
    assert (result.code, result.out) == (2, "")
    assert f"{option} {pipe} is a device or a pipe, which the file would replace; name a file" in result.error
    assert pipe.is_fifo()
    real.write_text("before")
    link.symlink_to(real)
    assert command("explain", path, "--target", "cpu", option, link).code == 0
    assert link.is_symlink() and real.stat().st_size > 100


def test_report_that_cannot_be_written_is_named_in_the_error(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    name = "x" * 300
    result = command("explain", path, "--target", "cpu", "--html", tmp_path / name)
    assert result.code == 1
    assert result.error == f"error: {tmp_path / name}: File name too long"


def test_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m et_cuda_passes rules --json | true", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_lower_writes_the_page_beside_the_report(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "8da4w")
    assert command("lower", path, "-t", "xnnpack", "-o", tmp_path / "out").code == 0
    _, report = ecp.rewrite(torch.export.load(path), "xnnpack")
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == report.to_html("model.pt2")


def test_program_without_quantized_weights_has_no_candidates(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "float")
    result = command("explain", path, "--target", "cuda")
    assert result.code == 0
    assert "no candidates" in result.out


def bad_models(folder: Path) -> dict[str, Path]:
    """Files that are no exported program, by their fault."""
    whole, _ = save(folder, "4w")
    content = whole.read_bytes()
    bad = {name: folder / f"{name}.pt2" for name in ("missing", "empty", "random", "tensors", "directory", "package")}
    bad["empty"].touch()
    bad["random"].write_bytes(bytes(range(256)) * 20)
    torch.save({"weight": torch.ones(3)}, bad["tensors"])
    bad["directory"].mkdir()
    with zipfile.ZipFile(bad["package"], "w") as archive:
        archive.writestr("package/data/aotinductor/model/code.so", b"")
    for part in (1, 5, 9):
        # The weights are archives inside the archive, so that a truncated file may look complete.
        bad[f"truncated-{part}"] = folder / f"truncated-{part}.pt2"
        bad[f"truncated-{part}"].write_bytes(content[: len(content) * part // 10])
    start = content.find(b'{"graph_module"')
    assert start > 0
    bad["damaged"] = folder / "damaged.pt2"
    bad["damaged"].write_bytes(content[:start] + bytes(40) + content[start + 40 :])
    return bad


def test_file_without_an_exported_program_is_rejected(tmp_path: Path, command: Run) -> None:
    for what, path in bad_models(tmp_path).items():
        result = command("lower", path, "--target", "cpu", "--output-dir", tmp_path / "out")
        assert (what, result.code, result.out) == (what, 2, "")
        assert result.error == result.err.strip(), what
        assert str(path) in result.error
        assert "torch.export.save" in result.error
    assert not (tmp_path / "out").exists()


def test_traceback_is_printed_only_with_debug(tmp_path: Path, command: Run) -> None:
    path = tmp_path / "empty.pt2"
    path.touch()
    result = command("explain", path, "--target", "cpu", "--debug")
    assert result.code == 2
    assert result.err.startswith("Traceback")
    assert "error: " in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "tpu"], "cuda, metal, xnnpack, cpu, vulkan"),
        (["--target", "cpu", "--output-dir", "model.pt2"], "is a file"),
        (["--target", "cpu", "--output-dir", "model.pt2/below"], "is a file"),
        (["--target", "cpu", "--expect", "linear_int4"], "NAME=COUNT"),
        (["--target", "cpu", "--expect", "linear_int4=-1"], "NAME=COUNT"),
        (["--target", "cpu", "--expect", "linear_int5=1"], "linear_int4"),
        (["--target", "cpu", "--expect", "missed=0", "--expect", "missed=1"], "missed has a count already"),
    ],
)
def test_bad_usage_is_an_error_of_one_line(
    arguments: list[str], said: str, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These checks come before the model is loaded.
    (tmp_path / "model.pt2").write_bytes(b"not looked at")
    monkeypatch.chdir(tmp_path)
    result = command("lower", "model.pt2", *arguments)
    assert result.code == 2
    assert said in result.error
    assert names(tmp_path) == ["model.pt2"]


@pytest.mark.parametrize("name", ["report.json", "model.xnnpack.pte"])
def test_directory_at_the_path_of_an_output_is_an_error(name: str, tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w")
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    result = command("lower", path, "-t", "xnnpack", "-o", out)
    assert result.code == 1
    assert str(out / name) in result.error
    assert ".unfinished" not in result.err


@pytest.mark.parametrize("seed", ["99999999999999999999", "-1"])
def test_seed_out_of_range_is_an_error(seed: str, command: Run) -> None:
    for arguments in (["verify", "model.pt2", "-t", "cpu"], ["run", "model.pte"]):
        result = command(*arguments, "--random-seed", seed)
        assert result.code == 2
        assert "Invalid value for '--random-seed'" in result.err


@pytest.mark.parametrize(
    "arguments",
    [["lower"], ["lower", "model.pt2"], ["lower", "model.pt2", "-t", "cpu", "--stop-after", "x"], ["nothing"]],
)
def test_usage_that_typer_rejects_exits_with_2(arguments: list[str], command: Run) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert "Usage: et-cuda-passes" in result.err


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_output_directory_without_permission_is_an_error(tmp_path: Path, command: Run) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = command("lower", "model.pt2", "--target", "cpu", "--output-dir", tmp_path / "locked" / "out")
    assert result.code == 2
    assert "permission" in result.error


def test_rules_lists_passes_and_requirements(command: Run) -> None:
    listed = json.loads(command("rules", "--json").out)["targets"]
    assert list(listed) == list(ecp.targets())
    for name, about in listed.items():
        assert [entry["name"] for entry in about["passes"]] == [entry.name for entry in ecp.default_passes(name)]
    linear = next(entry for entry in listed["cuda"]["passes"] if entry["name"] == "linear_int4")
    assert linear["rewrite"].endswith("-> int4_linear(x, packed, scale_and_zero, bias)")
    assert linear["options"] == {"drop_activation_quantization": False, "kernel": None, "cast_to_bf16": False}
    assert {"wanted", "hint", "stage"} == set(linear["requires"][0])
    text = command("rules").out
    for passed in [entry for about in listed.values() for entry in about["passes"]]:
        assert f"\n\n{passed['name']}\n  {passed['rewrite']}\n" in text
        assert all(f"  requires {need['wanted']}" in text for need in passed["requires"])


def test_version_prints_the_versions(command: Run) -> None:
    result = command("--version")
    assert result.code == 0
    assert f"torch {version('torch')}" in result.out
