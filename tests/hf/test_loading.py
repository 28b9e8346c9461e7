"""From a checkpoint to a model, its tokenizer or processor, and sample inputs; and clear errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Phi3Config, Phi3ForCausalLM

from et_cuda_passes.hf.checkpoint import Checkpoint, CheckpointError
from et_cuda_passes.hf.loading import Loaded, load, model_class, tasks_of
from tests.hf import checkpoints
from tests.hf.checkpoints import HEADS, KV_HEADS, MIXED, llama, llama_gguf
from tests.hf.models import llava, t5


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.causal(tmp_path_factory.mktemp("models") / "causal")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.masked(tmp_path_factory.mktemp("models") / "masked")


def loaded(model: Path, gguf: Path | None = None, **options: Any) -> Loaded:
    return load(Checkpoint.find(str(model), gguf), **options)


def same_weights(first: Any, second: dict[str, torch.Tensor]) -> bool:
    state = first.state_dict()
    return all(torch.equal(state[name], value) for name, value in second.items())


# Folders and safetensors ----------------------------------------------------------------------------------------------


def test_folder_gives_model_tokenizer_and_text(causal: Path) -> None:
    found = loaded(causal)
    assert type(found.model).__name__ == "Qwen3ForCausalLM"
    assert same_weights(found.model, load_file(causal / "model.safetensors"))
    assert found.generates and found.max_length == 64 and not found.model.training
    # The words of the sample text in the tokenizer's vocabulary.
    assert found.inputs["input_ids"].shape == found.inputs["attention_mask"].shape
    assert found.inputs["input_ids"][0, 1:4].tolist() == [3, 4, 5]


def test_safetensors_file_of_another_name_is_loaded_with_the_config_beside_it(causal: Path, tmp_path: Path) -> None:
    weights = load_file(causal / "model.safetensors")
    shutil.copy(causal / "config.json", tmp_path)
    save_file({name: (value + 1).to(torch.bfloat16) for name, value in weights.items()}, tmp_path / "tuned.safetensors")
    found = loaded(tmp_path / "tuned.safetensors")
    assert found.model.dtype == torch.bfloat16
    assert found.processor is None
    assert same_weights(found.model, load_file(tmp_path / "tuned.safetensors"))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_option(causal: Path, name: str) -> None:
    assert loaded(causal, dtype=name).model.dtype == getattr(torch, name)


def test_max_length_is_at_most_the_positions_of_the_model(causal: Path) -> None:
    assert loaded(causal, max_length=16).max_length == 16
    with pytest.raises(CheckpointError, match="--max-length 65: the model has positions for 64 tokens"):
        loaded(causal, max_length=65)


def test_config_of_another_model_is_an_error_with_the_weight(causal: Path, tmp_path: Path) -> None:
    shutil.copytree(causal, tmp_path / "model")
    config = json.loads((causal / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight has the shape \[64, 128\], and the config says \[64, 96\]"
    ):
        loaded(tmp_path / "model")


def test_max_length_is_at_most_the_length_at_which_the_model_drops_its_cache(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=24,
        pad_token_id=0,
        rope_parameters=rope | {"original_max_position_embeddings": 24},
        **sizes,
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    assert loaded(tmp_path).max_length == 24
    with pytest.raises(CheckpointError, match="--max-length 25: beyond 24 tokens the model computes its whole cache"):
        loaded(tmp_path, max_length=25)


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_task_chooses_the_class(masked: Path) -> None:
    config = AutoConfig.from_pretrained(masked)
    assert model_class(config, None).__name__ == "BertForMaskedLM"
    assert model_class(config, "feature-extraction").__name__ == "BertModel"
    assert model_class(config, "text-classification").__name__ == "BertForSequenceClassification"
    assert "image-classification" not in tasks_of(config)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("image-classification", "type bert does not have the task image-classification; --task takes .*fill-mask"),
        ("fil-mask", "has no task fil-mask, which is unknown; --task takes .*fill-mask"),
    ],
)
def test_task_that_the_model_does_not_have_is_an_error_with_those_it_has(masked: Path, task: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(masked, task=task)


def test_task_without_weights_in_the_checkpoint_is_an_error(masked: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights for .*classifier.bias and others of Bert"):
        loaded(masked, task="text-classification")


def test_sequence_to_sequence_tasks_are_those_of_an_encoder_decoder() -> None:
    assert model_class(t5().config, "translation").__name__ == "T5ForConditionalGeneration"


# Sample inputs --------------------------------------------------------------------------------------------------------


def test_image_model_without_a_processor_gets_an_image_of_its_size(tmp_path: Path) -> None:
    found = loaded(checkpoints.image_classifier(tmp_path))
    assert not found.generates
    assert found.inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert found.model(**found.inputs).logits.shape == (1, 2)


def test_speech_model_gets_a_second_at_the_rate_of_its_extractor(tmp_path: Path) -> None:
    found = loaded(checkpoints.speech_recognizer(tmp_path))
    assert found.inputs["input_values"].shape == (1, 8000)
    assert type(found.processor).__name__ == "Wav2Vec2FeatureExtractor"


def test_whisper_gets_features_and_generates(tmp_path: Path) -> None:
    found = loaded(checkpoints.whisper(tmp_path))
    assert found.generates
    assert found.inputs["input_features"].shape == (1, 80, 100)
    assert type(found.processor).__name__ == "WhisperFeatureExtractor"


def test_image_text_model_gets_as_many_tokens_as_an_image_has(tmp_path: Path) -> None:
    model = llava()
    found = loaded(checkpoints.saved(model, tmp_path))
    assert int((found.inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert torch.isfinite(found.model(**found.inputs).logits).all()


# GGUF -----------------------------------------------------------------------------------------------------------------


def expected(written: dict[str, np.ndarray], name: str, kind: str, heads: int = 0) -> torch.Tensor:
    """The numbers of a tensor of the file. llama.cpp puts the halves of each head, which rotate together, in turns."""
    numbers = torch.from_numpy(gguf.dequantize(written[name], gguf.GGMLQuantizationType[kind]))
    if not heads:
        return numbers
    rows, columns = numbers.shape
    return numbers.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_blocks_are_the_weights_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "mixed.gguf"
    written = llama_gguf(path, MIXED)
    name = str(dtype).removeprefix("torch.")
    expanded, kept = loaded(path, dtype=name), loaded(path, dtype=name, keep_gguf=True)
    assert len(kept.kept) == 8 and not any(kept.kept.values())
    assert not expanded.kept
    layer = kept.model.model.layers[0]
    for weight, tensor, kind, heads in (
        (layer.self_attn.q_proj.weight, "attn_q", "Q4_K", HEADS),
        (layer.self_attn.k_proj.weight, "attn_k", "Q4_K", KV_HEADS),
        (layer.self_attn.v_proj.weight, "attn_v", "Q5_K", 0),
        (layer.mlp.down_proj.weight, "ffn_down", "Q6_K", 0),
    ):
        assert isinstance(weight, ExportableGGUFTensor)
        numbers = expected(written, f"blk.0.{tensor}.weight", kind, heads)
        assert torch.equal(weight.dequantize(torch.float32), numbers)
    assert kept.model.lm_head.weight is kept.model.model.embed_tokens.weight
    with torch.no_grad():
        first, second = expanded.model(**expanded.inputs).logits, kept.model(**kept.inputs).logits
    assert torch.equal(first, second) and first.std() > 0


def test_gguf_beside_a_folder_takes_its_config_and_tokenizer(tmp_path: Path) -> None:
    folder, path = llama(tmp_path / "model"), tmp_path / "weights.gguf"
    written = llama_gguf(path)
    found = loaded(folder, path, dtype="float32")
    assert found.processor is not None and found.inputs["input_ids"][0, 1:4].tolist() == [3, 4, 5]
    weight = found.model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, expected(written, "blk.0.attn_q.weight", "Q4_K", HEADS))


def test_block_types_without_an_operator_are_expanded_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "mixed.gguf"
    llama_gguf(path, {"blk.0.ffn_up.weight": "Q4_1"})
    found = loaded(path, keep_gguf=True)
    reasons = {fqn: reason for fqn, reason in found.kept.items() if reason}
    assert reasons == {"model.layers.0.mlp.up_proj.weight": "Q4_1 blocks have no operator that reads them"}
    assert type(found.model.model.layers[0].mlp.up_proj.weight) is torch.nn.Parameter


def test_keeping_blocks_of_a_file_without_any_that_can_be_kept_is_an_error(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "old.gguf", usual="Q4_1")
    with pytest.raises(CheckpointError, match="keeps blocks of Q4_K, Q5_K, Q6_K, and .* has F32, Q4_1: leave"):
        loaded(tmp_path / "old.gguf", keep_gguf=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def other_magic(path: Path) -> None:
    path.write_bytes(b"GGML" + path.read_bytes()[4:])


def unknown_type(path: Path) -> None:
    """The number of the type stands after the name, the number of axes, and the axes."""
    data, name = bytearray(path.read_bytes()), b"blk.0.attn_q.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8
    data[place : place + 4] = (200).to_bytes(4, "little")
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is cut short or damaged .*: copy or download it again"),
        (cut_in_the_header, "is cut short or damaged .*: copy or download it again"),
        (other_magic, "is not a GGUF file"),
        (unknown_type, "of a type that gguf does not know .*200.*: convert the file to another type"),
        (Path.unlink, "there is no file or folder"),
    ],
)
def test_damaged_gguf_is_an_error_before_any_work(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "model.gguf"
    llama_gguf(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.find(str(path))


def test_gguf_of_an_unsupported_architecture_is_an_error(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "model.gguf", architecture="gptneox")
    with pytest.raises(CheckpointError, match="gptneox is not supported"):
        loaded(tmp_path / "model.gguf")


# Bad input ------------------------------------------------------------------------------------------------------------


def test_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json: copy it from where the weights come from$"):
        Checkpoint.find(str(tmp_path))
    llama_gguf(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"for the GGUF file, give --model .*model.gguf"):
        Checkpoint.find(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.bin", "neither a folder nor a .safetensors or .gguf file"),
        ("model-00001-of-00002.safetensors", "one part of a checkpoint: give the folder"),
        ("model.safetensors", "has no config.json"),
    ],
)
def test_file_that_is_no_whole_checkpoint_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.find(str(tmp_path / name))


def test_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        Checkpoint.find(str(tmp_path / "nothing"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "the config of .* cannot be read"),
        (lambda folder: change_config(folder, model_type="new"), "the config of .* cannot be read"),
        (lambda folder: change_config(folder, model_type="new", auto_map={"AutoConfig": "code.Config"}),
         "the config of .* cannot be read: .*contains custom code"),
        (lambda folder: change_config(folder, architectures=["NewForCausalLM"]), "has no NewForCausalLM"),
        (lambda folder: change_config(folder, hidden_size=32, head_dim=8), "config.json is of another model"),
        (lambda folder: cut(folder / "model.safetensors"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: OSError"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer or processor of .* cannot be loaded"),
        (without_a_weight, "has no weights for model.norm.weight of Qwen3ForCausalLM"),
    ],
)  # fmt: skip
def test_damaged_folder_is_an_error(causal: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = Path(shutil.copytree(causal, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        loaded(folder)
