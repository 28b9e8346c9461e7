"""Suggestions: their ratios are those of the model that follows them, their bytes those of the packed weights."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.hf.recipe import Recipe
from et_cuda_passes.hf.suggestion import NoiseModel, Suggestion, recipe_text
from tests.hf.models import qwen, tokens

IDS = {"length": 24, "rows": 2}


def plain_model(**options: Any) -> Any:
    """A decoder of two layers, without a cache."""
    torch.manual_seed(0)
    model = qwen(**options)
    model.config.use_cache = False
    return model


def export(model: Any) -> ExportedProgram:
    ids = tokens(**IDS)["input_ids"]
    shapes = {"input_ids": {1: Dim("length", min=2, max=64)}}
    with torch.no_grad():
        return torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes)


def narrow(model: Any, **options: Any) -> Any:
    """A quantized copy, with 4 bits unless the options say otherwise."""
    copied = copy.deepcopy(model)
    ecp.quantize_model_(copied, **({"qlinear": "4w"} | options))
    return copied


def ratio(narrow_model: Any, model: Any, inputs: Any) -> float:
    """The ratio of the logits, in eager."""
    with torch.no_grad():
        wanted, got = (each(input_ids=inputs[0][0]).logits.double() for each in (model, narrow_model))
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


@pytest.fixture(scope="module")
def inputs() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(tokens(**IDS)["input_ids"],)]


@pytest.fixture(scope="module")
def noise(inputs: list[tuple[Tensor]]) -> NoiseModel:
    model = plain_model()
    return NoiseModel(export(narrow(model)), export(model), inputs)


def test_followed_suggestion_has_the_predicted_ratio(noise: NoiseModel, inputs: list[tuple[Tensor]]) -> None:
    model = plain_model()
    assert noise.before_db == pytest.approx(ratio(narrow(model), model, inputs), abs=0.01)
    counts = []
    for gain in (1.0, 3.0, 8.0):
        suggestion = noise.suggest(target_snr=noise.before_db + gain)
        assert suggestion.before_db == noise.before_db
        assert suggestion.predicted_db >= noise.before_db + gain
        followed = narrow(model, recipe=suggestion.recipe)
        assert suggestion.predicted_db == pytest.approx(ratio(followed, model, inputs), abs=0.01)
        counts.append(len(suggestion.moves))
    assert 0 < counts[0] <= counts[1] < counts[2]


def test_layer_that_is_quantized_alone_has_the_listed_ratio(noise: NoiseModel, inputs: list[tuple[Tensor]]) -> None:
    model = plain_model()
    suggestion = noise.suggest(max_bytes=noise.total_bytes + 10**6)
    # Every weight is moved, and each has one entry.
    assert len(suggestion.moves) == 15 == len({move.layer for move in suggestion.moves})
    for move in (suggestion.moves[0], suggestion.moves[-1]):
        entries = [{"pattern": move.layer, "scheme": "4w"}, {"pattern": "*", "skip": True}]
        alone = narrow(model, qlinear=None, recipe={"layer": entries})
        assert move.alone_db == pytest.approx(ratio(alone, model, inputs), abs=0.01)


def test_bytes_are_those_of_weights_scales_and_other_constants() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.norm = nn.Embedding(50, 64), nn.Linear(64, 96), nn.LayerNorm(96)
            self.wide = nn.Linear(96, 32, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.wide(self.norm(self.up(self.embed(ids))))

    model, ids = Block().bfloat16().eval(), torch.arange(50)[None]
    plain = torch.export.export(model, (ids,))
    ecp.quantize_model_(model, "4w", qembedding="4w", recipe={"layer": [{"pattern": "wide", "scheme": "8w"}]})
    noise = NoiseModel(torch.export.export(model, (ids,)), plain)
    two = 2  # bytes of bfloat16
    others = (96 + 96 + 96) * two  # the bias, and the weight and the bias of the norm
    wide = 32 * 96 + 32 * 3 * two
    embed, up = 50 * 64 // 2 + 50 * 2 * two, 96 * 64 // 2 + 96 * 2 * 2 * two
    assert noise.total_bytes == others + wide + embed + up
    suggestion = noise.suggest(max_bytes=10**6)
    assert {move.layer: move.more_bytes for move in suggestion.moves} == {
        "embed": 50 * 64 + 50 * two - embed,
        "up": 96 * 64 + 96 * two - up,
    }
    assert suggestion.bytes_after == noise.total_bytes + sum(move.more_bytes for move in suggestion.moves)


def test_budget_is_kept_and_every_byte_that_fits_is_used(noise: NoiseModel) -> None:
    costs = sorted(layer.more_bytes for layer in noise.layers)
    suggestion = noise.suggest(max_bytes=noise.total_bytes + costs[0])
    assert [move.more_bytes for move in suggestion.moves] == [costs[0]]
    none = noise.suggest(max_bytes=noise.total_bytes + costs[0] - 1)
    assert (none.moves, none.predicted_db) == ((), none.before_db)


def test_target_that_is_reached_already_moves_nothing(noise: NoiseModel) -> None:
    suggestion = noise.suggest(target_snr=noise.before_db - 1)
    assert (suggestion.moves, suggestion.bytes_after) == ((), suggestion.bytes_before)
    assert str(suggestion).startswith("suggestion: 0 layers to 8 bits")


def test_unreachable_aims_are_errors_that_say_what_can_be_reached(noise: NoiseModel) -> None:
    with pytest.raises(ValueError, match=r"target_snr=200 is out of reach: with 15 layers in 8 bits, .*, it is \d+"):
        noise.suggest(target_snr=200)
    budget = noise.total_bytes + 3000
    with pytest.raises(ValueError, match=rf"out of reach within max_bytes={budget:,}: with \d+ layers"):
        noise.suggest(target_snr=30, max_bytes=budget)
    with pytest.raises(ValueError, match="bytes without any move, more than max_bytes=10"):
        noise.suggest(max_bytes=10)
    with pytest.raises(ValueError, match="give target_snr, max_bytes, or both"):
        noise.suggest()
    with pytest.raises(ValueError, match="give target_snr, max_bytes, or both"):
        ecp.suggest_recipe(None, {})  # type: ignore[arg-type]


def test_layer_with_quantized_activations_keeps_them(inputs: list[tuple[Tensor]]) -> None:
    model = plain_model()
    program = export(narrow(model, qlinear="8da4w"))
    suggestion = ecp.suggest_recipe(program, export(model), inputs=inputs, max_bytes=10**9)
    # The embedding shares its weight with the head, whose activations are quantized.
    assert {move.scheme for move in suggestion.moves} == {"8da8w"}
    kept = [move for move in suggestion.moves if move.layer.startswith("model.layers.0.mlp")]
    some = Suggestion(tuple(kept), 0.0, 0.0, 0, 0).recipe
    report = ecp.quantize_model_(copy.deepcopy(model), qlinear="8da4w", recipe=some)
    assert sum(layer.form == "8da8w per axis" for layer in report.layers) == len(kept) == 3


def test_tied_weight_is_one_layer_with_both_readers(inputs: list[tuple[Tensor]]) -> None:
    model = plain_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    each = NoiseModel(export(narrow(model, qembedding="4w")), export(model), inputs)
    (tied,) = [layer for layer in each.layers if "embed" in layer.name or "head" in layer.name]
    assert len(tied.candidates) == 2
    suggestion = each.suggest(max_bytes=10**9)
    followed = narrow(model, qembedding="4w", recipe=suggestion.recipe)
    assert suggestion.predicted_db == pytest.approx(ratio(followed, model, inputs), abs=0.01)


def test_output_with_the_lowest_ratio_counts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 1000 * self.a(x), self.b(x)

    model, x = Two(), torch.randn(9, 64)
    plain = torch.export.export(model, (x,))
    ecp.quantize_model_(model, qlinear="4w")
    program = torch.export.export(model, (x,))
    outputs = [output.quantized_db for output in ecp.accuracy(program, None, plain).outputs]
    suggestion = ecp.suggest_recipe(program, plain, target_snr=35)
    assert suggestion.before_db == pytest.approx(min(output for output in outputs if output is not None))
    # Both must be moved, however large one of them is.
    assert {move.layer for move in suggestion.moves} == {"a", "b"}


def test_program_without_a_signal_is_an_error() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.a(x) * factor

    model, x = Zero(), torch.randn(9, 64)
    args = (x, torch.ones(1))
    plain = torch.export.export(model, args)
    ecp.quantize_model_(model, qlinear="4w")
    program = torch.export.export(model, args)
    with pytest.raises(ValueError, match="no floating-point output that is not 0"):
        ecp.suggest_recipe(program, plain, 20.0, inputs=[(x, torch.zeros(1))])
    # Infinite with the quantized weights, and with the others: infinity is no noise, and no signal either.
    with pytest.raises(ValueError, match="output 0 is infinite or NaN"):
        ecp.suggest_recipe(program, plain, 20.0, inputs=[(x, torch.full((1,), math.inf))])


def test_recipe_is_read_back_with_any_name(tmp_path: Path) -> None:
    names = ['a "quoted" name', "a*b[0]?", "back\\slash", "größe.λ"]
    layers = [{"pattern": name, "scheme": "8w", "group_size": 0} for name in names]
    layers += [{"pattern": "skipped", "skip": True}]
    recipe = Recipe.load({"layer": layers})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(recipe, "two\nlines"), encoding="utf-8")
    assert Recipe.load(path).entries == recipe.entries
    assert path.read_text(encoding="utf-8").startswith("# two\n# lines\n\n[[layer]]\n")


def test_pattern_of_a_suggestion_matches_its_layer_alone(noise: NoiseModel) -> None:
    suggestion = noise.suggest(max_bytes=10**9)
    for entry, move in itertools.product(suggestion.recipe.entries, suggestion.moves):
        assert entry.matches(move.layer) == (entry.pattern == move.layer)
