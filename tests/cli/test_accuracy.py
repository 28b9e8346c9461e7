"""The command ``accuracy``: its output, its exit codes, its refusals, and a recipe that ``export`` takes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.export import Dim
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

import et_cuda_passes as ecp
from et_cuda_passes.hf.recipe import Recipe
from tests.cli.command import Run
from tests.hf import checkpoints
from tests.saved import SCHEMES, Mlp


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in bfloat16: quantized, as it was before, its weights, and inputs."""
    folder = tmp_path_factory.mktemp("accuracy")
    torch.manual_seed(0)
    model = Mlp().bfloat16().eval()
    narrow = copy.deepcopy(model)
    quantize_(narrow, SCHEMES["4w"])
    x = torch.randn(3, 64).bfloat16()
    paths = {name: folder / f"{name}.pt2" for name in ("narrow", "float")}
    for name, each in (("narrow", narrow), ("float", model)):
        program = torch.export.export(each, (x,), dynamic_shapes=({0: Dim("rows", min=1, max=64)},))
        torch.export.save(program, paths[name])
    paths["weights"] = folder / "weights.safetensors"
    save_file({name: value.detach() for name, value in model.named_parameters()}, paths["weights"])
    for rows in (5, 9):
        paths[f"x{rows}"] = folder / f"x{rows}.safetensors"
        save_file({"x": torch.randn(rows, 64).bfloat16()}, paths[f"x{rows}"])
    return paths


def test_accuracy_prints_the_ratios_of_layers_and_output(files: dict[str, Path], command: Run) -> None:
    result = command("accuracy", files["narrow"], "--float", files["float"], "--target", "cpu")
    assert result.code == 0, result.err
    expected = ecp.accuracy(ecp.load(files["narrow"]), "cpu", ecp.load(files["float"]))
    assert result.out == f"{expected}\n"
    assert "signal-to-noise ratios in dB, 1 input set" in result.out
    assert "2 of 2 layers, worst first" in result.out
    assert [line.partition(":")[0] for line in result.err.splitlines()] == [
        f" 33 %  loading {files['narrow']}",
        f" 66 %  loading {files['float']}",
        "100 %  measuring the layers",
    ]


def test_json_has_the_same_numbers(files: dict[str, Path], command: Run) -> None:
    inputs = ("--inputs", files["x5"], "--inputs", files["x9"])
    result = command("accuracy", files["narrow"], "--float", files["weights"], "-t", "cpu", *inputs, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["target"], found["input_sets"], found["notes"]) == ("cpu", 2, [])
    assert {layer["layer"] for layer in found["layers"]} == {"up.weight", "down.weight"}
    for layer in found["layers"]:
        assert 15 < layer["quantized_db"] < 35
        assert 42 < layer["limit_db"] < layer["rewritten_db"]
        assert layer["beyond_rounding"] is False
    assert [output["name"] for output in found["outputs"]] == ["linear_1"]


def test_random_inputs_come_from_the_seed(files: dict[str, Path], command: Run) -> None:
    first, same, other = (
        command("accuracy", files["narrow"], "-t", "cpu", "--random-seed", seed).out for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other


def test_fail_below_exits_with_1_and_names_the_worst_layer(files: dict[str, Path], command: Run) -> None:
    arguments = ("accuracy", files["narrow"], "-t", "cpu", "--fail-below")
    assert command(*arguments, 42).code == 0
    result = command(*arguments, 300)
    assert result.code == 1
    assert "2 of 2 layers" in result.out
    assert "2 layers are below 300 dB after the rewrite; the worst is " in result.error


def test_invalid_options_are_errors(files: dict[str, Path], command: Run, tmp_path: Path) -> None:
    def said(*arguments: Any, code: int = 2) -> str:
        result = command("accuracy", files["narrow"], *arguments)
        assert (result.code, result.out) == (code, ""), result
        return result.error

    floats = ("--float", files["float"])
    recipe = ("--recipe", tmp_path / "recipe.toml")
    assert "give --float, --target, or both" in said()
    assert "--fail-below, --html and --model-explorer are about the rewrite for a target" in said(
        *floats, "--fail-below", 3
    )
    assert "--fail-below nan: give a number of dB" in said("-t", "cpu", "--fail-below", "nan")
    assert "a suggestion compares with floating-point weights: give --float" in said(
        "-t", "cpu", "--target-snr", 30, *recipe
    )
    assert "give it with --target-snr or --max-bytes" in said(*floats, *recipe)
    assert "give it with --target-snr or --max-bytes" in said(*floats, "--target-snr", 30)
    for option in ("--html", "--model-explorer"):
        assert f"{option} {files['narrow']} is MODEL itself" in said("-t", "cpu", option, files["narrow"])
    assert f"--recipe {tmp_path} is a folder" in said(*floats, "--target-snr", 30, "--recipe", tmp_path)
    assert "--algorithm gptq: give hqq or affine" in said(*floats, "--algorithm", "gptq")
    assert "give one of them" in said("-t", "cpu", "--inputs", files["x5"], "--random-seed", 1)
    assert "cuda, metal, xnnpack, cpu, vulkan" in said("-t", "tpu")
    assert "does not exist" in said("--float", tmp_path / "none.pt2")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"x")
    assert "cannot be read as safetensors" in said("--float", bad)
    save_file({"x": torch.randn(3, 63).bfloat16()}, bad)
    assert "[3, 63], the program takes torch.bfloat16" in said("-t", "cpu", "--inputs", bad)
    assert "no quantized weight has a floating-point one" in said("--float", bad)


def test_page_and_node_data_have_the_ratios(files: dict[str, Path], command: Run, tmp_path: Path) -> None:
    page, nodes = tmp_path / "page.html", tmp_path / "nodes.json"
    arguments = ("accuracy", files["narrow"], "--float", files["float"], "-t", "cpu")
    result = command(*arguments, "--html", page, "--model-explorer", nodes)
    assert result.code == 0, result.err
    assert str(page) in result.out and str(nodes) in result.out
    measured = ecp.accuracy(ecp.load(files["narrow"]), "cpu", ecp.load(files["float"]))
    text = page.read_text(encoding="utf-8")
    assert "<h1>narrow.pt2</h1>" in text
    assert f"{measured.outputs[0].quantized_db:.1f} dB</b> quantized against float" in text
    values = [each["value"] for each in json.loads(nodes.read_text())["results"].values()]
    assert sorted(value.rpartition(", ")[2] for value in values) == sorted(
        f"{layer.quantized_db:.0f} dB" for layer in measured.layers
    )


def test_packed_program_is_refused(files: dict[str, Path], command: Run, tmp_path: Path) -> None:
    assert command("lower", files["narrow"], "-t", "cpu", "--stop-after", "rewrite", "-o", tmp_path).code == 0
    result = command("accuracy", tmp_path / "narrow.cpu.packed.pt2", "-t", "cpu")
    assert result.code == 2
    assert "packed already: give the program as it was before" in result.error


def test_suggestion_is_printed_and_written_as_a_recipe(files: dict[str, Path], command: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    suggest = ("accuracy", files["narrow"], "--float", files["float"], "--recipe", recipe)
    result = command(*suggest, "--target-snr", 25)
    assert result.code == 0, result.err
    assert "suggestion: 2 layers to 8 bits" in result.out
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == [
        " 66 %  measuring the whole output",
        " 83 %  measuring 2 layers one by one",
        "100 %  choosing layers",
    ]
    assert str(recipe) in result.out
    entries = Recipe.load(recipe).entries
    assert {entry.pattern for entry in entries} == {"up", "down"}
    assert {(str(entry.scheme), entry.group_size) for entry in entries} == {("8w", 0)}
    report = ecp.quantize_model_(Mlp(), qlinear="4w", recipe=recipe)
    assert {layer.form for layer in report.layers} == {"8w per axis"}

    recipe.unlink()
    result = command(*suggest, "--target-snr", 3, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["suggestion"]["moves"] == []
    assert not recipe.exists()

    result = command(*suggest, "--target-snr", 200)
    assert result.code == 1
    assert "2 of 2 layers, worst first" in result.out  # what was measured is a result all the same
    assert "--target-snr 200 is out of reach: with 2 layers in 8 bits" in result.error
    result = command(*suggest, "--target-snr", 200, "--json")
    document = json.loads(result.out)
    assert (result.code, len(document["layers"]), document["suggestion"]) == (1, 2, None)
    assert not recipe.exists()
    result = command(*suggest, "--max-bytes", 10)
    assert result.code == 1
    assert "without any move, more than --max-bytes 10" in result.error


def test_export_follows_the_recipe(tmp_path: Path, command: Run, no_gpu: None) -> None:
    checkpoint = checkpoints.causal(tmp_path / "model", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.config.use_cache = False
    ids = torch.arange(12)[None]
    for name in ("float", "narrow"):
        if name == "narrow":
            ecp.quantize_model_(model, qlinear="4w")
        with torch.no_grad():
            torch.export.save(torch.export.export(model, (), {"input_ids": ids}), tmp_path / f"{name}.pt2")
    narrow, floats, recipe = (tmp_path / name for name in ("narrow.pt2", "float.pt2", "recipe.toml"))
    suggest = ("accuracy", narrow, "--float", floats, "--recipe", recipe, "--json")
    before = json.loads(command(*suggest, "--target-snr", -50).out)["suggestion"]["before_db"]
    result = command(*suggest, "--target-snr", before + 2)
    assert result.code == 0, result.err
    moved = {move["layer"] for move in json.loads(result.out)["suggestion"]["moves"]}

    out = tmp_path / "out"
    exported = command(
        "export", "--model", checkpoint, "--target", "cuda", "--qlinear", "4w", "--recipe", recipe, "--max-length", 16,
        "--dtype", "bfloat16", "--output-dir", out,
    )  # fmt: skip
    assert "lowering to cuda needs a CUDA device" in exported.error
    layers = json.loads((out / "report.json").read_text())["quantization"][0]["layers"]
    assert {layer["fqn"] for layer in layers if layer["scheme"] == "8w"} == moved
    assert {layer["scheme"] for layer in layers if layer["fqn"] not in moved} <= {"4w", None}
    assert 0 < len(moved) < 8
