"""``export``: from a checkpoint on disk to a folder with programs, and errors before any work.

Exports for cuda on a machine without a GPU end with the packed programs, which takes seconds.
"""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from transformers import AutoModelForCausalLM, AutoTokenizer

import et_cuda_passes as ecp
from et_cuda_passes.executorch.packed import load_model
from et_cuda_passes.hf import ExportedModel, artifact, exporter
from et_cuda_passes.hf.generation import ExportedDecoder, generate
from tests.cli.command import Result, Run, called, names
from tests.hf import checkpoints
from tests.hf.checkpoints import MIXED, llama, llama_gguf

LENGTH = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    checkpoints.causal(folder / "causal", num_hidden_layers=1)
    checkpoints.masked(folder / "masked")
    return folder


@pytest.fixture(scope="module")
def without_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


# A decoder for two targets. This machine can finish one -------------------------------------------------------------


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports") / "causal"


@pytest.fixture(scope="module")
def result(models: Path, output: Path, without_gpu: None) -> Result:
    return called(
        "export", "--model", models / "causal", "--target", "cpu,cuda", "--qlinear", "4w", "--qembedding", "8w",
        "--max-length", LENGTH, "--dtype", "bfloat16", "--output-dir", output,
        "--compile-spec", "low_memory_mode=ON",
    )  # fmt: skip


@pytest.mark.compiled
def test_folder_has_programs_tokenizer_configs_and_report(result: Result, output: Path) -> None:
    assert names(output) == [
        "config.json",
        "decode.cuda.packed.pt2",
        "decode.etcp.json",
        "export.json",
        "generation_config.json",
        "model.cpu.pt2",
        "prefill.cuda.packed.pt2",
        "prefill.etcp.json",
        "report.html",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    report = json.loads((output / "report.json").read_text())
    for target in ("cpu", "cuda"):
        counts = [report["targets"][target][name]["counts"] for name in ("prefill", "decode")]
        assert [each["missed"] for each in counts] == [0, 0]
        assert all(each["linear_int4"] + each.get("linear_int8", 0) > 0 for each in counts)
    layers = {layer["fqn"]: layer["scheme"] for layer in report["quantization"][0]["layers"]}
    assert layers["model.layers.0.mlp.up_proj"] == "4w" and layers["model.embed_tokens"] == "8w"


def test_output_has_reports_files_and_the_next_command(result: Result, output: Path) -> None:
    assert "quantized 9 of 9 layers" in result.out
    assert "prefill, decode for cpu: " in result.out and "prefill, decode for cuda: " in result.out
    size = (output / "model.cpu.pt2").stat().st_size
    assert f"{size:,}" in result.out
    assert f"next: et-cuda-passes generate {output} --trust --prompt Hello" in result.out


def test_progress_has_percent_time_and_memory(result: Result) -> None:
    lines = [line for line in result.err.splitlines() if " %  " in line and " so far, " not in line]
    percents = [int(line.split("%")[0]) for line in lines]
    assert percents == sorted(percents) and percents[-1] == 100 and len(set(percents)) == len(percents)
    assert all(line.endswith(" GB") and " s, peak memory " in line for line in lines)
    steps = " ".join(lines)
    for step in ("quantizing", "exporting prefill", "rewriting decode for cuda", "compiling decode", "writing"):
        assert step in steps


def test_unfinished_target_is_an_error_with_the_command_that_goes_on(
    result: Result, output: Path, command: Run, without_gpu: None
) -> None:
    assert result.code == 1
    assert "error: lowering to cuda needs a CUDA device" in result.error
    spec = "--compile-spec low_memory_mode=ON"
    assert result.error.endswith(f"go on with: et-cuda-passes lower {output} --target cuda {spec}")
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    again = command("lower", output, "--target", "cuda")
    assert again.code == 1 and "lowering to cuda needs a CUDA device" in again.error
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    finished = command("lower", output, "--target", "cpu")
    assert finished.code == 0 and "nothing to finish for cpu" in finished.out


def test_packed_program_of_a_component_is_read_by_lower(
    result: Result, output: Path, tmp_path: Path, command: Run, without_gpu: None
) -> None:
    for name in ("prefill", "decode"):
        packed = output / f"{name}.cuda.packed.pt2"
        assert load_model(packed, "cuda").packed
        again = command("lower", packed, "--target", "cuda", "--output-dir", tmp_path)
        assert again.code == 1 and "MODEL is packed already" in again.out and "needs a CUDA device" in again.error


def test_export_generates_the_tokens_of_the_quantized_model(result: Result, output: Path, models: Path) -> None:
    exported = ExportedModel.from_pretrained(output, target="cpu")
    model = AutoModelForCausalLM.from_pretrained(models / "causal", dtype=torch.bfloat16)
    ecp.quantize_model_(model, qlinear="4w", qembedding="8w")
    tokens = AutoTokenizer.from_pretrained(output)("the quick brown fox", return_tensors="pt").input_ids
    found = generate(ExportedDecoder(exported), tokens, 12)
    assert torch.equal(found, generate(model, tokens, 12))
    assert len(found.unique()) > 2


def test_prompt_has_any_length_and_the_cache_the_length_of_the_option(result: Result, output: Path) -> None:
    prefill, decode = (json.loads((output / f"{name}.etcp.json").read_text()) for name in ("prefill", "decode"))
    assert [bounds[0] for bounds in prefill["ranges"].values()] == [2]
    assert LENGTH - 1 <= next(iter(prefill["ranges"].values()))[1] <= LENGTH
    assert decode["ranges"] == {}
    assert json.loads((output / "generation_config.json").read_text())["max_cache_len"] == LENGTH


def test_existing_export_is_refused_without_overwrite(result: Result, output: Path, models: Path, command: Run) -> None:
    refused = command("export", "--model", models / "causal", "--target", "cpu", "--output-dir", output)
    assert refused.code == 2
    assert refused.error == f"error: {output} has an export already: name another folder, or give --overwrite"


# Other models and options, packed for cuda ----------------------------------------------------------------------------


def packed(command: Run, folder: Path, *options: object) -> tuple[Result, dict[str, Any]]:
    """The result of an export for cuda without a GPU, and its report."""
    result = command("export", "--target", "cuda", "--output-dir", folder, *options)
    assert "lowering to cuda needs" in result.error
    return result, json.loads((folder / "report.json").read_text())


def test_encoder_is_one_component_with_a_dynamic_length(
    models: Path, tmp_path: Path, command: Run, without_gpu: None
) -> None:
    result, report = packed(
        command, tmp_path / "out", "--model", models / "masked", "--qlinear", "4w", "--dtype", "bfloat16"
    )
    assert list(report["targets"]["cuda"]) == ["model"]
    assert report["targets"]["cuda"]["model"]["counts"]["missed"] == 0
    # The model has positions for 32 tokens.
    assert list(json.loads((tmp_path / "out" / "model.etcp.json").read_text())["ranges"].values()) == [[2, 32]]
    assert "next:" not in result.out


def test_task_and_options_with_underscores_are_those_of_the_export(
    models: Path, tmp_path: Path, command: Run, without_gpu: None
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[layer]]\npattern = "encoder.layer.0.output.dense"\nskip = true\n')
    _, report = packed(
        command, tmp_path / "out", "--model", models / "causal", "--task", "text-generation", "--qlinear", "4w",
        "--qlinear_group_size", 64, "--qlinear_packing_format", "tile_packed_to_4d", "--qembedding", "4w",
        "--qembedding_group_size", 32, "--group_size_fallback", "adjust", "--algorithm", "affine",
        "--max_length", 16, "--dtype", "bfloat16",
    )  # fmt: skip
    layers = {layer["fqn"]: layer for layer in report["quantization"][0]["layers"]}
    up, table = layers["model.layers.0.mlp.up_proj"], layers["model.embed_tokens"]
    assert (up["scheme"], up["group_size"], up["algorithm"]) == ("4w", 64, "affine")
    assert (table["scheme"], table["group_size"]) == ("4w", 32)
    details = {
        each["detail"] for each in report["targets"]["cuda"]["decode"]["outcomes"] if each["rule"] == "linear_int4"
    }
    assert details and all("tile_packed_to_4d" in detail for detail in details)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_cache_len"] == 16


@pytest.mark.parametrize("keep", [True, False])
def test_gguf_blocks_are_kept_or_quantized_anew(tmp_path: Path, command: Run, without_gpu: None, keep: bool) -> None:
    folder, path = llama(tmp_path / "model"), tmp_path / "mixed.gguf"
    llama_gguf(path, MIXED)
    options = ["--keep-gguf"] if keep else ["--qlinear", "4w"]
    result, report = packed(command, tmp_path / "out", "--model", folder, "--gguf", path, "--max-length", 16, *options)
    counts = report["targets"]["cuda"]["decode"]["counts"]
    assert counts["missed"] == 0
    if keep:
        assert "kept the blocks of 8 of 8 weights of the GGUF file" in result.out
        # Q4_K has 4 bits; Q5_K and Q6_K are linears of 8, as is the head that shares the embedding's blocks.
        forms = [each["detail"].partition(" -> ")[0] for each in report["targets"]["cuda"]["decode"]["outcomes"]]
        # Q4_K, Q5_K and Q6_K; the head reads the blocks of the embedding.
        assert sorted(forms) == ["int4 group 32"] * 5 + ["int5 group 32"] + ["int6 group 16"] * 3
        assert report["quantization"] == []
    else:
        assert "kept the blocks" not in result.out
        layers = report["quantization"][0]["layers"]
        assert [(each["scheme"], each["group_size"]) for each in layers] == [("4w", 32)] * 9


def test_weights_that_cannot_be_kept_in_blocks_are_quantized_anew(
    tmp_path: Path, command: Run, without_gpu: None
) -> None:
    folder, path = llama(tmp_path / "model"), tmp_path / "mixed.gguf"
    llama_gguf(path, {"blk.0.ffn_up.weight": "Q4_1"})
    options = ("--model", folder, "--gguf", path, "--keep-gguf", "--qlinear", "4w", "--max-length", 16)
    result, report = packed(command, tmp_path / "out", *options)
    assert "kept the blocks of 7 of 8 weights of the GGUF file" in result.out
    assert "model.layers.0.mlp.up_proj.weight: Q4_1 blocks have no operator that reads them" in result.out
    layers = report["quantization"][0]["layers"]
    assert [each["fqn"] for each in layers if each["scheme"]] == ["model.layers.0.mlp.up_proj"]
    assert report["targets"]["cuda"]["decode"]["counts"]["missed"] == 0


def test_error_of_a_step_is_one_line_with_the_step(
    models: Path, tmp_path: Path, command: Run, without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no such thing\nsecond line")

    monkeypatch.setattr(exporter, "save_packed", fail)
    options = ("--target", "cuda", "--dtype", "bfloat16")
    result = command("export", "--model", models / "masked", *options, "--output-dir", tmp_path / "out")
    assert result.code == 1
    assert result.error == (
        "error: saving model packed for cuda: ValueError: no such thing (--debug shows the traceback)"
    )
    assert not (tmp_path / "out").exists()


def test_dtype_without_a_kernel_is_an_error_with_the_option(
    models: Path, tmp_path: Path, command: Run, without_gpu: None
) -> None:
    result = command(
        "export", "--model", models / "causal", "--target", "cuda", "--qlinear", "cuda:4w", "--dtype", "float32",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 2
    assert result.error == (
        "error: cuda has no kernel of 4w for a model in float32; give --dtype bfloat16 or --dtype float16, or give "
        "--cast-to-bf16, which casts activations to bf16 for such kernels alone"
    )
    assert not (tmp_path / "out").exists()


def test_attention_without_a_kernel_on_cuda_is_one_line_with_the_options(
    models: Path, tmp_path: Path, command: Run, without_gpu: None
) -> None:
    result = command("export", "--model", models / "causal", "--target", "cuda", "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert result.error == (
        "error: prefill: the attention scaled_dot_product_attention is in float32, and ExecuTorch's kernel for cuda "
        "computes in bfloat16: give --dtype bfloat16, or give --cast-to-bf16"
    )
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_nothing(
    models: Path, tmp_path: Path, command: Run, without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact.shutil, "copyfile", full)
    out = tmp_path / "out"
    options = ("--target", "cuda", "--dtype", "bfloat16")
    result = command("export", "--model", models / "masked", *options, "--output-dir", out)
    assert result.code == 1
    assert result.error == f"error: writing {out}: the disk is full; free some space and run the command again"
    assert names(out) == []


@pytest.mark.parametrize(
    ("number", "problem"),
    [(errno.ENOSPC, "the disk is full"), (errno.EFBIG, "a file would be larger than the limit")],
)
def test_full_disk_of_temporary_files_names_their_folder(
    number: int,
    problem: str,
    models: Path,
    tmp_path: Path,
    command: Run,
    without_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(exporter, "save_packed", full)
    options = ("--target", "cuda", "--dtype", "bfloat16", "--output-dir", tmp_path / "out")
    result = command("export", "--model", models / "masked", *options)
    assert result.code == 1
    assert result.error.startswith(f"error: saving model packed for cuda: {problem}; ")
    assert "run the command again; temporary files are in " in result.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_export_leaves_no_files(number: signal.Signals, models: Path, tmp_path: Path) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "et_cuda_passes", "export", "--model", models / "masked", "--target", "xnnpack",
            "--output-dir", out,
        ],
        env=os.environ | {"TMPDIR": str(temporary)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "rewriting model" in line:  # lowering has begun
            process.send_signal(number)
    assert process.wait() == 128 + number
    assert not out.exists()
    assert not list(temporary.glob("et_cuda_passes-*"))


def test_model_without_positions_has_a_longest_text(tmp_path: Path, command: Run) -> None:
    model = checkpoints.encoder_decoder(tmp_path / "model")
    result = command(
        "export", "--model", model, "--target", "cpu", "--max-length", 10**9, "--output-dir", tmp_path / "out"
    )
    assert result.code == 2
    assert "--max-length 1000000000: an export has at most 1048576 tokens" in result.error


@pytest.mark.skipif(importlib.util.find_spec("PIL") is not None, reason="Pillow is installed")
def test_image_processor_without_pillow_names_the_package(tmp_path: Path, command: Run) -> None:
    model = checkpoints.image_classifier(tmp_path / "model")
    (model / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    result = command("export", "--model", model, "--target", "cpu", "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert result.error == f"error: the image processor of {model} needs Pillow: pip install pillow"


@pytest.mark.slow
def test_lower_finishes_the_folder_of_an_export(models: Path, tmp_path: Path, command: Run) -> None:
    out = tmp_path / "out"
    with inductor.patch({"cpp.cxx": "no-such-compiler"}):
        result = command(
            "export", "--model", models / "masked", "--target", "cpu", "--qlinear", "4w", "--output-dir", out
        )
        assert result.code == 1
        assert result.error.endswith(f"go on with: et-cuda-passes lower {out} --target cpu")
        assert "model.cpu.packed.pt2" in names(out)
    for options in (("--output-dir", tmp_path), ("--stop-after", "rewrite"), ("--expect", "missed=0")):
        refused = command("lower", out, "--target", "cpu", *options)
        assert refused.code == 2 and "is finished in its folder: give --target alone" in refused.error
    finished = command("lower", out, "--target", "cpu")
    assert finished.code == 0, finished.err
    assert "model.cpu.pt2" in finished.out
    assert "model.cpu.pt2" in names(out) and "model.cpu.packed.pt2" not in names(out)
    assert ExportedModel.from_pretrained(out, target="cpu").runners["model"].target == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [("bfloat16",), ("float32", "--cast-to-bf16")], ids=["bf16", "casts"])
def test_export_for_cuda_on_a_gpu_generates_and_has_the_numbers_of_the_model(
    models: Path, tmp_path: Path, command: Run, dtype: tuple[str, ...]
) -> None:
    # Heads of 64, which the attention kernels of the CUDA backend have.
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    model, out = checkpoints.causal(tmp_path / "model", **sizes), tmp_path / "out"
    result = command(
        "export", "--model", model, "--target", "cuda,cpu", "--qlinear", "cuda:4w", "--dtype", *dtype,
        "--max-length", LENGTH, "--output-dir", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert {"model.cuda.pte", "model.cuda.ptd"} <= set(names(out))
    text = command(
        "generate", out, "--target", "cuda", "--trust", "--prompt", "the quick brown fox", "--max-new-tokens", 8
    )
    assert text.code == 0, text.err
    assert "8 tokens, the first" in text.out
    # Numbers, not tokens: in bf16, the two largest logits of a model with random weights are often equal.
    for target in ("cuda", "cpu"):
        checked = command("verify", out, "--target", target, "--trust", "--model", model)
        assert checked.code == 0, checked.err


# Other targets and modalities -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options", "components"),
    [
        (checkpoints.masked, ("--target", "cpu,xnnpack", "--qlinear", "8da4w"), ["model"]),
        (checkpoints.image_classifier, ("--target", "xnnpack", "--qlinear", "8w"), ["model"]),
        (checkpoints.speech_recognizer, ("--target", "cpu", "--qlinear", "4w"), ["model"]),
        (checkpoints.text_and_image_encoders, ("--target", "xnnpack", "--qlinear", "4w"), ["model"]),
        (checkpoints.whisper, ("--target", "cpu", "--qlinear", "4w"), ["encoder", "prefill", "decode"]),
        (
            checkpoints.encoder_decoder,
            ("--target", "cpu,xnnpack", "--qlinear", "8da4w", "--max-length", 24),
            ["encoder", "prefill", "decode"],
        ),
        (
            checkpoints.image_text,
            ("--target", "xnnpack", "--qlinear", "4w", "--max-length", 32),
            ["image_encoder", "multi_modal_projector", "token_embedding", "language_model", "lm_head", "decode"],
        ),
    ],
)
def test_models_of_all_kinds_compute_what_the_model_computes(
    make: Callable[[Path], Path], options: tuple[object, ...], components: list[str], tmp_path: Path, command: Run
) -> None:
    model, out = make(tmp_path / "model"), tmp_path / "out"
    result = command("export", "--model", model, *options, "--output-dir", out)
    assert result.code == 0, result.err
    assert f"check: et-cuda-passes verify {out} " in result.out and "next:" not in result.out
    assert list(json.loads((out / "export.json").read_text())["components"]) == components
    checked = command("verify", out, "--model", model, "--trust")
    assert checked.code == 0, checked.out + checked.err
    for target in str(options[1]).split(","):
        assert all(f"\n{name} for {target}, " in checked.out for name in components)
    refused = command("generate", out, "--prompt", "the", "--trust")
    assert refused.code == 2


def test_encoder_of_a_decoder_takes_every_length(tmp_path: Path, command: Run, without_gpu: None) -> None:
    model = checkpoints.encoder_decoder(tmp_path / "model")
    packed(command, tmp_path / "out", "--model", model, "--max-length", 24, "--dtype", "bfloat16")
    inputs = {
        name: json.loads((tmp_path / "out" / f"{name}.etcp.json").read_text())
        for name in ("encoder", "prefill", "decode")
    }
    # The decoder's caches: 24 tokens of its own, and 23 states of the encoder.
    lengths = {each["shape"][-2] for each in inputs["decode"]["inputs"] if len(each.get("shape", ())) == 4}
    assert {24, 23} <= lengths
    for name in ("encoder", "prefill"):
        assert list(inputs[name]["ranges"].values()) == [[2, 23]]
    assert [1, 23] in [each["shape"] for each in inputs["prefill"]["inputs"] if each["name"] == "attention_mask"]


def test_recipe_is_in_the_manifest(models: Path, tmp_path: Path, command: Run, without_gpu: None) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[layer]]\npattern = "*.mlp.*"\nskip = true\n\n[[layer]]\npattern = "*"\nscheme = "8w"\n')
    _, report = packed(
        command, tmp_path / "out", "--model", models / "causal", "--qlinear", "4w", "--recipe", recipe,
        "--max-length", 16, "--dtype", "bfloat16",
    )  # fmt: skip
    recipe.unlink()
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    config = manifest["components"]["decode"]["metadata"]["export_config"]
    assert config["recipe"] == {"layer": [{"pattern": "*.mlp.*", "skip": True}, {"pattern": "*", "scheme": "8w"}]}
    assert report["model"] == {"task": None, "keep_gguf": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "status"), [pytest.param("fold", "rewritten", marks=pytest.mark.slow), ("dynamic-activation", "kept")]
)
def test_choice_for_weight_only_linears_on_xnnpack_is_that_of_the_option(
    choice: str, status: str, models: Path, tmp_path: Path, command: Run
) -> None:
    out = tmp_path / "out"
    result = command(
        "export", "--model", models / "masked", "--target", "xnnpack", "--qlinear", "4w", "--xnnpack-weight-only",
        choice, "--output-dir", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads((out / "report.json").read_text())["targets"]["xnnpack"]["model"]
    linears = [each for each in report["outcomes"] if each["op"] == "aten.linear"]
    assert linears and {each["status"] for each in linears} == {status}
    assert ("x quantize_activation" in result.out) == (choice != "fold")
    assert ("computes with floating-point weights" in result.out + result.err) == (choice == "fold")


@pytest.mark.slow
def test_checkpoint_in_bfloat16_is_exported_for_three_targets_at_once(
    tmp_path: Path, command: Run, without_gpu: None
) -> None:
    model = checkpoints.causal(tmp_path / "model", num_hidden_layers=1)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    out = tmp_path / "out"
    options = ("--target", "cuda,xnnpack,cpu", "--qlinear", "4w", "--max-length", 16)
    refused = command("export", "--model", model, *options, "--output-dir", out)
    assert refused.code == 2
    assert "give --dtype float32 and give --cast-to-bf16, by which cuda and cpu cast to bfloat16" in refused.error
    result = command("export", "--model", model, *options, "--dtype", "float32", "--cast-to-bf16", "--output-dir", out)
    assert result.code == 1 and result.error.endswith(f"go on with: et-cuda-passes lower {out} --target cuda")
    assert {"model.cpu.pt2", "model.xnnpack.pte", "decode.cuda.packed.pt2"} <= set(names(out))
    reports = json.loads((out / "report.json").read_text())["targets"]
    assert [each["counts"]["missed"] for parts in reports.values() for each in parts.values()] == [0] * 6
    assert "computed in bf16" in result.out


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "tpu"), "there is no target 'tpu'"),
        (("--target", "cuda", "--qlinear", "5w"), "--qlinear='5w'"),
        (("--target", "cuda", "--qlinear", "metal:4w"), "promises kernels of metal, and the target is cuda"),
        (("--target", "cuda", "--qlinear", "fpa4w"), "--qlinear=fpa4w promises kernels of metal"),
        (("--target", "xnnpack", "--qlinear", "4w", "--qlinear-packing-format", "tile_packed_to_4d"),
         "--qlinear-packing-format='tile_packed_to_4d' is not for xnnpack"),
        (("--target", "cuda", "--qlinear", "4w", "--qlinear-group-size", "33"), "--qlinear-group-size must be 0"),
        (("--target", "cuda", "--qlinear-encoder", "9w"), "--qlinear-encoder='9w'"),
        (("--target", "cuda", "--algorithm", "gptq"), "--algorithm='gptq' is unknown"),
        (("--target", "cuda", "--group-size-fallback", "pad"), "--group-size-fallback='pad' is unknown"),
        (("--target", "cuda", "--recipe", "nothing.toml"), "nothing.toml: No such file"),
        (("--target", "cuda", "--dtype", "int8"), "--dtype int8: write one of float32, bfloat16, float16"),
        (("--target", "xnnpack", "--dtype", "bfloat16"),
         "xnnpack computes in float32: give --dtype float32, or leave xnnpack out"),
        (("--target", "vulkan,coreml", "--dtype", "bfloat16"),
         "vulkan and coreml compute in float32: give --dtype float32, or leave vulkan and coreml out"),
        (("--target", "xnnpack", "--qlinear", "8da8w", "--dtype", "float16"),
         "xnnpack has no kernel of 8da8w for a model in float16; give --dtype float32"),
        (("--target", "cuda,xnnpack,cpu", "--dtype", "bfloat16"),
         "give --dtype float32 and give --cast-to-bf16, by which cuda and cpu cast to bfloat16, or leave xnnpack out"),
        (("--target", "cuda,xnnpack", "--qlinear", "cuda:4w"),
         "--cast-to-bf16, which casts activations to bf16 for such kernels alone; xnnpack computes in float32, so for "
         "both give --dtype float32 and --cast-to-bf16"),
        (("--target", "xnnpack", "--cast-to-bf16"), "--cast-to-bf16 is for kernels of cuda or metal or cpu"),
        (("--target", "xnnpack", "--xnnpack-weight-only", "dynamic"),
         "--xnnpack-weight-only='dynamic' is unknown; known are fold, dynamic-activation"),
        (("--target", "cpu", "--xnnpack_weight_only", "dynamic-activation"),
         "changes programs for xnnpack, and the target is cpu: add xnnpack to the target, or leave the option out"),
        (("--target", "cuda", "--keep-gguf"), "of a GGUF file: give one with --gguf FILE"),
        (("--target", "cuda", "--gguf", "nothing.gguf"), "there is no file nothing.gguf"),
        (("--target", "cuda", "--task", "image-classification"),
         "does not have the task image-classification; --task"),
        (("--target", "cuda", "--max-length", "100"), "--max-length 100: the model has positions for 64 tokens"),
        (("--target", "cuda", "--max-length", str(10**9)), "the model has positions for 64 tokens"),
        (("--target", "cuda", "--qlinear-encoder", "4w"), "--qlinear-encoder is given, and the model has no encoder"),
    ],
)  # fmt: skip
def test_impossible_options_are_one_line_and_nothing_is_written(
    options: tuple[str, ...], message: str, models: Path, tmp_path: Path, command: Run, without_gpu: None
) -> None:
    result = command("export", "--model", models / "causal", *options, "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert message in result.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[layer]]\npatern = 'x'\n", "patern"),
        ("[[layer]]\npattern = 'x'\nscheme = '5w'\n", "5w"),
        ("[[layer]]\npattern = 'decoder.*'\nskip = true\n", "the pattern decoder.* matches no linear and no embedding"),
        ("[[layer]\n", "recipe.toml"),
    ],
)
def test_wrong_recipe_is_one_line(
    text: str, message: str, models: Path, tmp_path: Path, command: Run, without_gpu: None
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    options = ("--target", "cuda", "--qlinear", "4w", "--dtype", "bfloat16", "--recipe", recipe)
    result = command("export", "--model", models / "causal", *options, "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert message in result.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["xnnpack", "vulkan", "coreml"])
def test_bfloat16_checkpoint_is_cast_by_the_option_alone(target: str, tmp_path: Path, command: Run) -> None:
    model = checkpoints.causal(tmp_path / "model", dtype=torch.bfloat16)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    weights.save_pretrained(model)
    result = command("export", "--model", model, "--target", target, "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert f"is in bfloat16, and {target} computes in float32: give --dtype float32" in result.error


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda out: out.write_text("x"), "is a file; name a directory"),
        (
            lambda out: (out.mkdir(), (out / "notes.txt").write_text("mine")),
            "has other files (notes.txt): name another",
        ),
    ],
)
def test_output_folder_that_holds_something_else_is_refused(
    prepare: Callable[[Path], Any], message: str, models: Path, tmp_path: Path, command: Run
) -> None:
    prepare(tmp_path / "out")
    result = command("export", "--model", models / "causal", "--target", "cpu", "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert message in result.error


def test_output_folder_of_the_model_itself_is_refused(models: Path, command: Run) -> None:
    before = names(models / "causal")
    for model in (models / "causal", models / "causal" / "model.safetensors"):
        result = command(
            "export", "--model", model, "--target", "cpu", "--output-dir", models / "causal", "--overwrite"
        )
        assert result.code == 2
        assert "is the folder of the model itself: name another" in result.error
    assert names(models / "causal") == before


def test_folder_without_a_config_and_damaged_gguf_are_one_line(tmp_path: Path, command: Run) -> None:
    (tmp_path / "empty").mkdir()
    result = command("export", "--model", tmp_path / "empty", "--target", "cpu", "--output-dir", tmp_path / "out")
    assert result.code == 2 and "has no config.json" in result.error
    path = tmp_path / "cut.gguf"
    llama_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    result = command("export", "--model", path, "--target", "cpu", "--output-dir", tmp_path / "out")
    assert result.code == 2 and "is cut short or damaged" in result.error


def test_missing_extra_is_an_error_with_the_command_that_installs_it(
    models: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    result = command("export", "--model", models / "causal", "--target", "cpu", "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert result.error == "error: export needs transformers: pip install 'et-cuda-passes[hf]'"


@pytest.mark.slow
def test_overwrite_replaces_the_export(models: Path, tmp_path: Path, command: Run, without_gpu: None) -> None:
    out = tmp_path / "out"
    packed(command, out, "--model", models / "causal", "--max-length", 16, "--dtype", "bfloat16")
    _, report = packed(command, out, "--model", models / "masked", "--dtype", "bfloat16", "--overwrite")
    assert list(report["targets"]["cuda"]) == ["model"]
    assert not list(out.glob("*decode*"))
    shutil.rmtree(out)
