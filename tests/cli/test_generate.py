"""`generate`: the text of an export and its speed, and errors about an export or a prompt that cannot be used."""

import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[demo]'")

from et_cuda_passes.hf.generation import encode
from et_cuda_passes.hf.generation import generate as tokens_of
from tests.cli.command import Run
from tests.static_cache import CACHE_LENGTH, FORMATS, GENERATION_SEED, qwen3, saved_export, small_tokenizer

PROMPT = "w5 w9 w33 w12"
ASK = ("--prompt", PROMPT, "--trust")


SLOW = {"cpu", "xnnpack"}
"""Lowered in a quarter to half a minute. The tests of ``export`` have a decoder of ours, and generate with it."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FORMATS]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_export(request.param, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def dynamo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_export("dynamo", tmp_path_factory.mktemp("export"))


def text_of(seed: int, count: int) -> str:
    tokenizer = small_tokenizer()
    return str(tokenizer.decode(tokens_of(qwen3(seed=seed), encode(tokenizer, PROMPT), count)))


def test_generate_prints_the_text_of_the_model_and_its_speed(folder: Path, command: Run) -> None:
    result = command("generate", folder, *ASK, "--max-new-tokens", 8)
    assert result.code == 0, result.err
    text, speed = result.out.splitlines()
    assert text.strip() == text_of(GENERATION_SEED, 8)
    assert re.fullmatch(r"8 tokens, the first after \d+\.\d\d s, then \d+\.\d tokens per second", speed)
    assert "loading" in result.err


def test_generate_fills_the_cache_by_default(dynamo: Path, command: Run) -> None:
    result = command("generate", dynamo, *ASK)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1].startswith(f"{CACHE_LENGTH - 4 + 1} tokens, ")


def test_temperature_option_samples_tokens(dynamo: Path, command: Run) -> None:
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        result = command("generate", dynamo, *ASK, "--max-new-tokens", 8, "--temperature", 1.5)
        texts.append(result.out.splitlines()[0])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("seed", [GENERATION_SEED, GENERATION_SEED + 1])
def test_compare_names_the_first_token_that_differs(seed: int, dynamo: Path, tmp_path: Path, command: Run) -> None:
    original = tmp_path / "original"
    qwen3(seed=seed).save_pretrained(original)
    result = command("generate", dynamo, *ASK, "--max-new-tokens", 8, "--compare", original)
    assert result.code == 0, result.err
    ours, _, theirs, verdict = result.out.splitlines()
    assert theirs == f"{original}: {text_of(seed, 8)}"
    if seed == GENERATION_SEED:
        assert verdict == "all 8 tokens are the same"
        return
    pairs = zip(ours.split(), text_of(seed, 8).split(), strict=True)
    position, (one, other) = next((index, pair) for index, pair in enumerate(pairs, 1) if len(set(pair)) == 2)
    assert verdict == f"token {position} is the first that differs: {one!r}, and {other!r} of {original}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--trust", "--prompt", " ".join(["w1"] * 49)),
            "the prompt has 49 tokens, but the model was exported for 48: shorten",
        ),
        (
            (*ASK, "--max-new-tokens", 46),
            "--max-new-tokens 46: the cache of the export has room for 45 tokens after a prompt of 4",
        ),
        (("--prompt", ""), "the prompt has no tokens"),
        ((*ASK, "--device", "nowhere"), "--device nowhere: there is no such device"),
        ((*ASK, "--device", "meta"), "--device meta: exports run on cpu and cuda only"),
        (("--trust", "--prompt", "w1 \udcff"), "the prompt is not UTF-8 (surrogates not allowed at position 3)"),
        ((*ASK, "--device", "cuda"), "--device cuda: torch finds no CUDA device here"),
        ((*ASK, "--target", "cuda"), "which has no targets: leave the target out"),
        (
            (*ASK, "--temperature", 1, "--compare", "anything"),
            "--compare compares the most likely tokens: leave --temperature out",
        ),
    ],
)
def test_prompt_or_option_that_cannot_be_used_is_named(
    arguments: tuple[object, ...], message: str, dynamo: Path, command: Run, no_gpu: None
) -> None:
    result = command("generate", dynamo, *arguments)
    assert result.code == 2
    assert message in result.error


def test_model_to_compare_with_that_cannot_be_loaded_is_named(dynamo: Path, tmp_path: Path, command: Run) -> None:
    result = command("generate", dynamo, *ASK, "--max-new-tokens", 2, "--compare", tmp_path)
    assert result.code == 2
    assert f"--compare {tmp_path} cannot be loaded" in result.error


def test_model_to_compare_with_has_all_weights(dynamo: Path, tmp_path: Path, command: Run) -> None:
    qwen3(seed=0).model.save_pretrained(tmp_path)
    result = command("generate", dynamo, *ASK, "--max-new-tokens", 2, "--compare", tmp_path)
    assert result.code == 2
    assert f"--compare {tmp_path} generates no text: it has no weights for lm_head.weight" in result.error


def test_folder_that_cannot_be_used_is_named(dynamo: Path, tmp_path: Path, command: Run) -> None:
    def error(folder: Path) -> str:
        result = command("generate", folder, *ASK)
        assert (result.code, result.out) == (2, "")
        return result.error

    assert "is not an export: it is not a folder" in error(tmp_path / "missing")
    assert "is not an export: it has no export.json" in error(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(dynamo, copy)
    (copy / "decode.pt2").write_bytes((copy / "decode.pt2").read_bytes()[:1000])
    assert f"the export in {copy} cannot be loaded" in error(copy)
    (copy / "decode.pt2").unlink()
    (copy / "export.json").write_text("{")
    assert f"{copy / 'export.json'} is damaged" in error(copy)
    shutil.copy(dynamo / "export.json", copy)
    assert f"the export in {copy} cannot be loaded" in error(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert f"{copy} has no tokenizer" in error(copy)


def test_export_is_not_executed_without_trust(dynamo: Path, command: Run) -> None:
    result = command("generate", dynamo, "--prompt", PROMPT)
    assert (result.code, result.out) == (2, "")
    assert f"{dynamo} may contain compiled libraries" in result.error
    assert "They were not executed; give --trust" in result.error


@pytest.mark.slow
def test_export_for_xnnpack_needs_no_trust(tmp_path: Path, command: Run) -> None:
    folder = saved_export("xnnpack", tmp_path)
    result = command("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 4, "--target", "xnnpack")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0].strip() == text_of(GENERATION_SEED, 4)
    for name, message in (
        ("report.json", "is damaged: delete it"),
        ("decode.etcp.json", "is damaged, or not a component"),
    ):
        (folder / name).write_text("{")
        result = command("generate", folder, "--prompt", PROMPT, "--target", "xnnpack")
        assert result.code == 2
        assert f"{folder / name} {message}" in result.error
    (folder / "decode.etcp.json").unlink()
    result = command("generate", folder, "--prompt", PROMPT, "--target", "xnnpack")
    assert f"{folder / 'decode.etcp.json'} cannot be read: No such file" in result.error
