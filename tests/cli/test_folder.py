"""``verify`` and ``run`` on the folder of an export: what is compared, and what each finds."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from et_cuda_passes.hf import EtConfig, EtExporter, ExportedModel
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.hf.loading import generation_config, load
from tests.cli.command import Run
from tests.hf import checkpoints
from tests.hf.models import bert, static_cache, tokens

LENGTH = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    checkpoints.causal(folder / "causal", num_hidden_layers=1)
    # Other weights of the same shapes.
    torch.manual_seed(2)
    checkpoints.saved(checkpoints.qwen(num_hidden_layers=1), folder / "other", checkpoints.tokenizer())
    return folder


@pytest.fixture(scope="module")
def decoder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder for xnnpack, whose programs contain no library."""
    folder = tmp_path_factory.mktemp("exports") / "decoder"
    loaded = load(Checkpoint.find(str(models / "causal")), max_length=LENGTH)
    EtExporter().export_for_generation(
        loaded.model,
        loaded.inputs,
        EtConfig(target="xnnpack", qlinear="8da4w", dynamic=True, max_length=LENGTH),
        generation_config=generation_config(loaded.model, LENGTH),
    ).save_pretrained(folder, processor=loaded.processor)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder for two targets, with a dynamic length."""
    folder = tmp_path_factory.mktemp("exports") / "encoder"
    config = EtConfig(target="xnnpack,cpu", qlinear="4w", dynamic=True, max_length=16)
    EtExporter().export(bert(), tokens(), config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / folder.name))


@pytest.mark.slow
def test_components_are_compared_with_the_model_at_three_lengths(decoder: Path, models: Path, command: Run) -> None:
    result = command("verify", decoder, "--model", models / "causal")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "files: 1 file of 2 components are those that the export wrote, by size and SHA-256"
    labels = [line.partition(": ")[0].partition(", ")[2] for line in lines[1:-1]]
    name = next(iter(json.loads((decoder / "prefill.etcp.json").read_text())["ranges"]))
    assert labels == [
        f"{name}=1", f"{name}=16", f"{name}=31",
        "1 token in the cache", "16 tokens in the cache", "31 tokens in the cache",
    ]  # fmt: skip
    assert all(line.endswith(": ok") for line in lines[1:-1])
    assert lines[-1].startswith(f"verdict: prefill, decode of {decoder} for xnnpack agrees with {models / 'causal'}")


def test_other_weights_are_wrong(decoder: Path, models: Path, command: Run) -> None:
    result = command("verify", decoder, "--model", models / "other")
    assert result.code == 1
    assert "outputs are WRONG" in result.out and "output logits" in result.out
    assert "outputs are wrong, largest relative error" in result.error


def test_another_model_is_refused(decoder: Path, tmp_path: Path, command: Run) -> None:
    result = command("verify", decoder, "--model", checkpoints.masked(tmp_path / "masked"))
    assert result.code == 2
    assert "give the model that was exported" in result.error
    result = command("verify", decoder, "--model", tmp_path / "nothing")
    assert result.code == 2 and f"--model: there is no file or folder {tmp_path / 'nothing'}" in result.error


def test_error_in_the_cache_of_one_component_is_found(
    decoder: Path, models: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from et_cuda_passes.hf.runner import EtModelRunner

    run = EtModelRunner.run

    def wrong(self: Any, leaves: list[Any]) -> Any:
        outputs = run(self, leaves)
        if self.component.name == "decode" and outputs.logits.shape[1] == 1:
            outputs.past_key_values.layers[0].values.mul_(1.1)
        return outputs

    monkeypatch.setattr(EtModelRunner, "run", wrong)
    result = command("verify", decoder, "--model", models / "causal")
    assert result.code == 1
    assert "prefill for xnnpack" in result.out and "output past_key_values.1" in result.out
    assert not any("WRONG" in line for line in result.out.splitlines() if line.startswith("prefill"))


@pytest.mark.slow
def test_targets_are_compared_with_each_other_without_the_model(encoder: Path, command: Run) -> None:
    result = command("verify", encoder, "--trust")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("model for cpu, ") and line.endswith(": ok") for line in lines[1:-1])
    assert "agrees between xnnpack and cpu" in lines[-1] and "Nothing was compared with the model" in lines[-1]


@pytest.mark.slow
def test_kernels_in_bf16_in_a_float32_model_have_the_tolerance_of_bf16(tmp_path: Path, command: Run) -> None:
    config = EtConfig(target="cpu,xnnpack", qlinear="4w", cast_to_bf16=True, dynamic=True, max_length=16)
    model = bert()
    model.save_pretrained(tmp_path / "model")
    EtExporter().export(model, tokens(), config).save_pretrained(tmp_path / "out")
    result = command("verify", tmp_path / "out", "--trust")
    assert result.code == 0, result.err
    alone = [
        command("verify", tmp_path / "out", "--trust", "--target", name, "--model", tmp_path / "model")
        for name in ("cpu", "xnnpack")
    ]
    assert [each.code for each in alone] == [0, 0], alone
    errors = [float(re.findall(r"largest relative error (\S+)", each.out)[0]) for each in alone]
    # Only the target that casts rounds to bf16.
    assert 2**-12 < errors[0] < 2**-5 and errors[1] < 2**-14


def test_outputs_that_are_all_0_are_no_comparison(tmp_path: Path, command: Run) -> None:
    model = bert()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "model")
    config = EtConfig(target="xnnpack", dynamic=True, max_length=16)
    EtExporter().export(model, tokens(), config).save_pretrained(tmp_path / "out")
    for options in ((), ("--model", tmp_path / "model")):
        result = command("verify", tmp_path / "out", *options)
        assert result.code == 1
        assert "all outputs are 0, as those of a model with other weights could be" in result.error


def test_one_target_without_the_model_is_compared_with_nothing(decoder: Path, command: Run) -> None:
    result = command("verify", decoder, "--component", "decode")
    assert result.code == 0, result.err
    assert "its numbers were compared with nothing" in result.out
    assert "give --model with the model that was exported" in result.out


@pytest.mark.compiled
def test_libraries_are_not_executed_without_trust(encoder: Path, command: Run, tmp_path: Path) -> None:
    for arguments in (("verify", encoder), ("verify", encoder, "--target", "cpu"), ("run", encoder, "--target", "cpu")):
        result = command(*arguments)
        assert result.code == 2
        assert "contains compiled libraries for cpu" in result.error and "Nothing was executed" in result.error
    assert command("verify", encoder, "--target", "xnnpack").code == 0


def test_inputs_of_a_file_are_those_of_the_component(encoder: Path, tmp_path: Path, command: Run) -> None:
    path = tmp_path / "inputs.safetensors"
    given = tokens(length=5)
    save_file({str(index): tensor for index, tensor in enumerate(given.values())}, path)
    expected = ExportedModel.from_pretrained(encoder, target="xnnpack")(**given).last_hidden_state
    result = command("run", encoder, "--target", "xnnpack", "--inputs", path)
    assert result.code == 0, result.err
    assert f"output 0: torch.float32 [1, 5, 64], mean {expected.double().mean():.6g}" in result.out
    checked = command("verify", encoder, "--trust", "--inputs", path)
    assert checked.code == 0 and "the inputs of --inputs" in checked.out
    save_file({"0": torch.zeros(1, 17, dtype=torch.int64), "1": torch.ones(1, 17, dtype=torch.int64)}, path)
    refused = command("run", encoder, "--target", "xnnpack", "--inputs", path)
    assert refused.code == 2 and "the export has sizes of" in refused.error
    save_file({"0": torch.zeros(1, 4, dtype=torch.int64)}, path)
    refused = command("run", encoder, "--target", "xnnpack", "--inputs", path)
    assert refused.code == 2 and "--inputs has 1 tensors, and model takes 2: input_ids int64" in refused.error


def test_component_runs_again_and_again(decoder: Path, command: Run) -> None:
    result = command("run", decoder, "--component", "decode", "--benchmark")
    assert result.code == 0, result.err
    assert "output 0: torch.float32 [1, 1, 96]" in result.out
    assert "decode: median " in result.out


def test_random_inputs_depend_on_the_seed(decoder: Path, encoder: Path, command: Run) -> None:
    first, again, other = (
        command("run", encoder, "--target", "xnnpack", "--random-seed", seed).out for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "{decoder}"), "has the components prefill, decode: choose one with --component"),
        (("run", "{decoder}", "--component", "encoder"), "--component encoder: {decoder} has prefill, decode"),
        (("run", "{decoder}", "--component", "decode", "--target", "cpu"), "was exported for xnnpack"),
        (("run", "{decoder}", "--method", "decode"), "leave --data, --method and --device out"),
        (("verify", "{decoder}", "--inputs", "x.safetensors"), "give --component, of prefill, decode"),
        (("verify", "{decoder}", "--target", "tpu"), "--target tpu: {decoder} was exported for xnnpack"),
        (("verify", "{decoder}", "--gguf", "x.gguf"), "--gguf has the weights of --model: give both"),
        (("verify", "model.pt2"), "--target is missing"),
        (("verify", "model.pt2", "--target", "cpu", "--component", "decode"), "for the folder of an export"),
        (("run", "model.pte", "--component", "decode"), "for the folder of an export"),
    ],
)
def test_wrong_options_are_one_line(arguments: tuple[str, ...], message: str, decoder: Path, command: Run) -> None:
    result = command(*(each.format(decoder=decoder) for each in arguments))
    assert result.code == 2
    assert message.format(decoder=decoder) in result.error


def damage_program(folder: Path) -> None:
    path = folder / "model.xnnpack.pte"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def swap_components(folder: Path) -> None:
    first, second = folder / "prefill.etcp.json", folder / "decode.etcp.json"
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_program, "model.xnnpack.pte is not the file that the export wrote"),
        (swap_components, "are of different exports, or one is damaged"),
        (lambda folder: (folder / "decode.etcp.json").unlink(), "decode.etcp.json cannot be read"),
        (lambda folder: (folder / "export.json").write_text("{"), "export.json is damaged"),
    ],
)
@pytest.mark.parametrize("name", ["verify", "generate", "run"])
def test_damaged_export_is_one_line(
    name: str, damage: Callable[[Path], Any], message: str, decoder: Path, copy: Callable[[Path], Path], command: Run
) -> None:
    folder = copy(decoder)
    damage(folder)
    options = {"generate": ("--prompt", "the", "--target", "xnnpack"), "run": ("--component", "decode")}.get(name, ())
    result = command(name, folder, *options)
    assert result.code in (1, 2)
    assert message in result.error


def test_folder_can_be_moved_and_have_any_name(decoder: Path, tmp_path: Path, models: Path, command: Run) -> None:
    folder = Path(shutil.copytree(decoder, tmp_path / "a folder, with commas" / "größe"))
    assert command("verify", folder, "--model", models / "causal").code == 0
    result = command("generate", folder, "--prompt", "the quick", "--target", "xnnpack", "--max-new-tokens", 3)
    assert result.code == 0, result.err


def test_packed_target_is_not_executed(models: Path, tmp_path: Path, command: Run, no_gpu: None) -> None:
    loaded = load(Checkpoint.find(str(models / "causal")), dtype="bfloat16", max_length=LENGTH)
    EtExporter().export_for_generation(
        loaded.model,
        loaded.inputs,
        EtConfig(target="cuda", qlinear="4w", dynamic=True, max_length=LENGTH),
        generation_config=static_cache(LENGTH),
    ).save_pretrained(tmp_path / "out")
    result = command("verify", tmp_path / "out")
    assert result.code == 0, result.err
    assert "cuda: not executed: it is packed, and not lowered yet" in result.out
    assert "none of its targets runs here, so nothing was executed" in result.out
    result = command("verify", tmp_path / "out", "--target", "cuda")
    assert result.code == 1 and "cannot be executed for cuda" in result.error
