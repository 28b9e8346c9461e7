"""Generation with an exported decoder, compared with the model of transformers that was exported."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[demo]'")

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3ForCausalLM,
)

from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.generation import (
    ExportedDecoder,
    GenerationError,
    encode,
    first_difference,
    generate,
    load_exported,
    load_tokenizer,
)
from et_cuda_passes.hf.loading import generation_config
from tests.static_cache import CACHE_LENGTH, CONFIG, FORMATS, GENERATION_SEED, qwen3, saved_export, small_tokenizer

PROMPT = torch.tensor([[5, 9, 33, 12, 60, 2]])


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return qwen3(seed=GENERATION_SEED)


SLOW = {"cpu", "xnnpack"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FORMATS]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_export(request.param, tmp_path_factory.mktemp("export"))


@pytest.fixture
def decoder(folder: Path) -> ExportedDecoder:
    return ExportedDecoder(load_exported(folder))


def test_greedy_tokens_are_those_of_the_model(decoder: ExportedDecoder, model: Qwen3ForCausalLM) -> None:
    assert decoder.cache_length == CACHE_LENGTH
    for length in (6, 2, 4, 1):
        tokens = generate(decoder, PROMPT[:, :length], 12)
        assert torch.equal(tokens, generate(model, PROMPT[:, :length], 12))
        assert len(tokens.unique()) > 2


def test_padding_that_the_export_was_traced_without_is_refused(decoder: ExportedDecoder) -> None:
    mask = torch.ones_like(PROMPT)
    mask[:, :2] = 0
    with pytest.raises(GenerationError, match="prefill was traced without padding, and this prompt has some"):
        decoder.generate(PROMPT, attention_mask=mask, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 7, 9, CACHE_LENGTH - 1])
def test_tokens_of_a_model_with_sliding_windows_are_those_of_the_model(
    length: int, windowed: tuple[Gemma3ForCausalLM, ExportedDecoder]
) -> None:
    model, decoder = windowed
    prompt = torch.arange(3, 3 + length)[None] % 64
    count = decoder.room(length)
    assert count is not None
    assert torch.equal(generate(decoder, prompt, count), generate(model, prompt, count))


@pytest.mark.slow
def test_saved_export_of_attention_with_added_masks_generates(tmp_path: Path) -> None:
    # The saved config does not say that the model was traced with attention in plain operators.
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(
        vocab_size=64,
        num_hidden_layers=2,
        head_dim=16,
        sliding_window=8,
        initializer_range=0.3,
        eos_token_id=None,
        **sizes,
    )
    model = Gemma2ForCausalLM(config).eval()
    assert model.config._attn_implementation == "eager"
    tokens = torch.ones(1, 6, dtype=torch.int64)
    EtExporter().export_for_generation(
        model,
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        EtConfig(target="xnnpack", dynamic=True, max_length=CACHE_LENGTH),
        generation_config=generation_config(model, CACHE_LENGTH),
    ).save_pretrained(tmp_path / "out")
    decoder = ExportedDecoder(load_exported(tmp_path / "out"))
    prompt = torch.arange(3, 12)[None]
    assert torch.equal(generate(decoder, prompt, 12), generate(model, prompt, 12))


@pytest.fixture(scope="module")
def windowed() -> tuple[Gemma3ForCausalLM, ExportedDecoder]:
    """One layer with a window of 8 tokens, and one without."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64,
            num_hidden_layers=2,
            head_dim=16,
            sliding_window=8,
            layer_types=kinds,
            initializer_range=0.3,
            max_position_embeddings=CACHE_LENGTH,
            eos_token_id=None,
            **sizes,
        )
    ).eval()
    tokens = torch.ones(1, 6, dtype=torch.int64)
    exported = EtExporter().export_for_generation(
        model,
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        EtConfig(target="xnnpack", dynamic=True, max_length=CACHE_LENGTH),
        generation_config=CONFIG,
    )
    return model, ExportedDecoder(exported)


def test_sampled_tokens_are_those_of_the_model(decoder: ExportedDecoder, model: Qwen3ForCausalLM) -> None:
    results = []
    for each in (decoder, model, decoder):
        torch.manual_seed(0)
        results.append(generate(each, PROMPT, 16, temperature=0.9))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], generate(decoder, PROMPT, 16))


def test_processors_and_criteria_of_transformers_apply(decoder: ExportedDecoder, model: Qwen3ForCausalLM) -> None:
    class Even(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 1::2] = -torch.inf
            return scores

    processors = LogitsProcessorList([Even()])
    config = GenerationConfig(max_new_tokens=10, do_sample=False, repetition_penalty=1.7, no_repeat_ngram_size=2)
    got, wanted = (
        each.generate(PROMPT, generation_config=config, logits_processor=processors)[0, 6:] for each in (decoder, model)
    )
    assert torch.equal(got, wanted)
    assert not (got % 2).any()
    stop = int(generate(model, PROMPT, 5)[3])
    stopped = decoder.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=stop)[0, 6:]
    assert int(stopped[-1]) == stop
    assert len(stopped) <= 4


def test_room_ends_where_the_exported_cache_ends(decoder: ExportedDecoder) -> None:
    room = decoder.room(6)
    assert room == CACHE_LENGTH - 6 + 1
    assert len(generate(decoder, PROMPT, room)) == room
    # A program of ours takes a prompt that leaves room for one token.
    with pytest.raises(GenerationError, match=r"the prompt has 49 tokens, but the model was exported for 4[78]: "):
        decoder.room(CACHE_LENGTH + 1)


def test_prompt_is_put_into_the_chat_template() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(encode(tokenizer, "w9 w5")[0]) == "w9 w5"
    tokenizer.chat_template = "w1 {{ messages[0]['content'] }}{% if add_generation_prompt %} w2{% endif %}"
    assert tokenizer.decode(encode(tokenizer, "w9 w5")[0]) == "w1 w9 w5 w2"
    with pytest.raises(GenerationError, match="the prompt has no tokens"):
        encode(small_tokenizer(), "")


def test_folder_that_is_no_export_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(GenerationError, match="is not an export: it is not a folder"):
        load_exported(tmp_path / "missing")
    with pytest.raises(GenerationError, match=r"is not an export: it has no export\.json"):
        load_exported(tmp_path)
    with pytest.raises(GenerationError, match="has no tokenizer: copy the tokenizer files"):
        load_tokenizer(tmp_path)
    with pytest.raises(GenerationError, match="format dynamo, which has no targets|not exported for metal"):
        load_exported(folder, target="metal")
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(GenerationError, match=r"export.json is damaged"):
        load_exported(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(GenerationError, match="the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_export_without_prefill_or_config_is_refused(folder: Path) -> None:
    exported = load_exported(folder)
    exported.config = None
    with pytest.raises(GenerationError, match=r"has no config\.json"):
        ExportedDecoder(exported)
    del exported.components["decode"]
    with pytest.raises(GenerationError, match="has no component decode, only prefill: export a decoder with"):
        ExportedDecoder(exported)


def test_length_of_the_cache_is_read_from_the_mask_if_the_config_lacks_it(folder: Path) -> None:
    exported = load_exported(folder)
    exported.generation_config = None
    assert ExportedDecoder(exported).cache_length == CACHE_LENGTH


def test_first_difference_is_the_position_of_the_first_other_token() -> None:
    one = torch.tensor([1, 2, 3])
    assert first_difference(one, one) is None
    assert first_difference(one, torch.tensor([1, 5, 3])) == 1
    assert first_difference(one, one[:2]) == 2
