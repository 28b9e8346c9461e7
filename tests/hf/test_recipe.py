"""Recipes: which entry decides about a layer, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import et_cuda_passes as ecp
from et_cuda_passes.hf.recipe import Recipe
from et_cuda_passes.hf.schemes import QuantizationOptions, check_schemes, promised_targets


def model() -> nn.Module:
    block = {"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)}
    return nn.ModuleDict(
        {"embed": nn.Embedding(32, 64), "block": nn.ModuleDict(block), "lm_head": nn.Linear(64, 32, bias=False)}
    )


def forms(entries: list[dict[str, Any]], **options: Any) -> dict[str, str]:
    """The scheme and group size of each layer."""
    report = ecp.quantize_model_(model(), recipe={"layer": entries}, **options)
    return {layer.fqn: layer.form for layer in report.layers}


def test_first_entry_that_matches_decides() -> None:
    entries = [
        {"pattern": "lm_head", "scheme": "8w", "group_size": 0},
        {"pattern": "*.down", "group_size": 64},
        {"pattern": "block*", "skip": True},
    ]
    assert forms(entries, qlinear="4w", qembedding="8w") == {
        "embed": "8w per axis",
        "block.up": "float",
        "block.down": "4w group 64",
        "lm_head": "8w per axis",
    }


def test_recipe_alone_leaves_the_other_layers_float() -> None:
    found = forms([{"pattern": "*.up", "scheme": "8da4w"}])
    assert found == {"embed": "float", "block.up": "8da4w group 32", "block.down": "float", "lm_head": "float"}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("block.up", {"block.up"}),
        ("block.up.weight", {"block.up"}),
        ("*", {"embed", "block.up", "block.down", "lm_head"}),
        ("block.*", {"block.up", "block.down"}),
        ("block.[ud]*", {"block.up", "block.down"}),
        (r"re:.*\.(up|down)", {"block.up", "block.down"}),
        ("re:lm_.*", {"lm_head"}),
    ],
)
def test_pattern_matches_whole_names(pattern: str, matched: set[str]) -> None:
    found = forms([{"pattern": pattern, "scheme": "4w"}])
    assert {fqn for fqn, form in found.items() if form != "float"} == matched


def test_regular_expression_matches_no_part_of_a_name() -> None:
    with pytest.raises(ValueError, match="the pattern re:up matches no linear and no embedding"):
        forms([{"pattern": "re:up", "scheme": "4w"}])


def test_report_names_the_pattern_that_decides() -> None:
    entries = [{"pattern": "*.up", "algorithm": "affine"}]
    report = ecp.quantize_model_(model(), qlinear="4w", recipe={"layer": entries})
    assert (report["block.up"].pattern, report["block.up"].algorithm) == ("*.up", "affine")
    assert (report["block.down"].pattern, report["block.down"].algorithm) == (None, "hqq")


def test_algorithm_of_an_entry_chooses_the_scales() -> None:
    quantized = {}
    source = model()
    for algorithm in ("affine", "hqq"):
        copied = model()
        copied.load_state_dict(source.state_dict())
        ecp.quantize_model_(copied, qlinear="4w", recipe={"layer": [{"pattern": "*.up", "algorithm": algorithm}]})
        quantized[algorithm] = copied["block"]
    largest = source["block"]["up"].weight.detach().view(128, 2, 32).abs().amax(-1)
    torch.testing.assert_close(quantized["affine"]["up"].weight.scale, largest / 7.5)
    assert not torch.allclose(quantized["hqq"]["up"].weight.scale, largest / 7.5)
    assert torch.equal(quantized["affine"]["down"].weight.scale, quantized["hqq"]["down"].weight.scale)


def test_entry_of_one_name_decides_about_a_shared_weight() -> None:
    for name in ("embed", "lm_head"):
        tied = model()
        tied["lm_head"].weight = tied["embed"].weight
        entries = [{"pattern": name, "skip": True}]
        report = ecp.quantize_model_(tied, qlinear="4w", qembedding="8w", recipe={"layer": entries})
        assert report["embed"].form == report["lm_head"].form == "float"
        assert report["embed"].reason == "the recipe skips it"
        assert tied["lm_head"].weight is tied["embed"].weight


def test_promise_of_an_entry_is_a_promise_of_the_options() -> None:
    options = QuantizationOptions(qlinear="8w", recipe={"layer": [{"pattern": "*.up", "scheme": "cuda:4w"}]})
    assert promised_targets(options) == {"cuda"}
    with pytest.raises(ValueError, match=r"recipe pattern \*\.up=cuda:4w promises kernels of cuda"):
        check_schemes(options, "cpu")


def test_scheme_of_an_entry_is_checked_against_the_target() -> None:
    with pytest.raises(ValueError, match=r"recipe pattern \*\.up=8da8w: metal has no kernel for 8da8w"):
        forms([{"pattern": "*.up", "scheme": "8da8w"}], qlinear="4w", target="metal")
    message = r"recipe pattern \*\.up: metal has no kernel of 8w for block\.up; metal has kernels for 4w, fpa4w, 8da4w"
    with pytest.raises(ValueError, match=message):
        forms([{"pattern": "*.up", "scheme": "8w"}], qlinear="4w", target="metal")


def test_scheme_of_an_entry_may_be_for_embeddings_alone() -> None:
    found = forms([{"pattern": "embed", "scheme": "8w"}], qlinear="4w", target="metal")
    assert (found["embed"], found["lm_head"]) == ("8w per axis", "4w group 32")


def test_file_gives_what_the_mapping_gives(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        """
        [[layer]]  # the head is sensitive
        pattern = "lm_head"
        scheme = "cuda:8w"
        group_size = 0

        [[layer]]
        pattern = 're:.*\\.up'
        skip = true
        """
    )
    mapping = {
        "layer": [{"pattern": "lm_head", "scheme": "cuda:8w", "group_size": 0}, {"pattern": r"re:.*\.up", "skip": True}]
    }
    assert Recipe.load(file).to_dict() == Recipe.load(str(file)).to_dict() == mapping
    assert Recipe.load(Recipe.load(file)).entries == Recipe.load(mapping).entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[layer]\npattern = 'x'", r"recipe.toml is not a TOML file: .*line 1"),
        ("", r"recipe.toml has no \[\[layer\]\] entry"),
        ("[layers]\n", r"recipe.toml has the unknown key 'layers'; a recipe consists of \[\[layer\]\] entries"),
        ("[layer]\npattern = 'x'", r"recipe.toml: write each layer as \[\[layer\]\], in double brackets"),
        ("[[layer]]\nscheme = '4w'", r"recipe.toml, layer 1 has no pattern"),
        ("[[layer]]\npattern = 'x'\nschema = '4w'", r"layer 1 has the unknown key 'schema'; the nearest is scheme"),
        ("[[layer]]\npattern = 'x'\nscheme = '8da4'", r"layer 1 \(x\): scheme='8da4': there is no scheme '8da4'"),
        ("[[layer]]\npattern = 'x'\ngroup_size = -1", r"layer 1 \(x\): group_size must be 0, for one scale per row"),
        ("[[layer]]\npattern = 'x'\ngroup_size = '32'", r"group_size must be 0.*got '32'"),
        ("[[layer]]\npattern = 'x'\nalgorithm = 'hq'", r"algorithm 'hq' is unknown; the nearest is hqq"),
        ("[[layer]]\npattern = 'x'\nskip = 1", r"skip is true or false; got 1"),
        ("[[layer]]\npattern = 'x'\nskip = true\nscheme = '4w'", r"skips the layers and gives them a scheme too"),
        ("[[layer]]\npattern = 'x'", r"changes nothing; give it a scheme, a group_size, an algorithm, or skip = true"),
        ("[[layer]]\npattern = 're:('\nskip = true", r"the pattern is not a regular expression: missing \)"),
        (
            "[[layer]]\npattern = 'x'\nscheme = '4w_hqq'\nalgorithm = 'affine'",
            r"4w_hqq contains the algorithm hqq; remove algorithm",
        ),
        ("[[layer]]\npattern = 'lm_haed'\nskip = true", r"the pattern lm_haed matches no linear.*nearest is lm_head"),
        ("[[layer]]\npattern = 'q*'\nskip = true", r"the pattern q\* matches no linear.*known are embed, block.up"),
        ("[[layer]]\npattern = '*.up'\ngroup_size = 64", r"no scheme is given for block.up; add scheme = \"4w\""),
        (
            "[[layer]]\npattern = '*'\nscheme = '8da4w'",
            r"embed is an embedding, and 8da4w is for linears; put an entry",
        ),
        (
            "[[layer]]\npattern = '*.up'\nscheme = '8da8w'\ngroup_size = 32",
            r"8da8w has one scale per row; remove group",
        ),
    ],
)
def test_wrong_recipe_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    layers = model()
    before = dict(layers.named_parameters())
    with pytest.raises(ValueError, match=message):
        ecp.quantize_model_(layers, qembedding="8w", recipe=file)
    assert all(before[name] is parameter for name, parameter in layers.named_parameters())


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"recipe\.toml is not a TOML file"):
        Recipe.load(file)


def test_recipe_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="the path of a TOML file, or a mapping; got a int"):
        QuantizationOptions(recipe=4)  # type: ignore[arg-type]


def test_missing_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.toml"):
        Recipe.load(tmp_path / "gone.toml")


def test_entry_without_effect_is_a_warning() -> None:
    entries = [{"pattern": "*", "scheme": "4w"}, {"pattern": "lm_head", "scheme": "8w"}]
    report = ecp.quantize_model_(model(), recipe={"layer": entries})
    assert report.warnings == ["recipe: entries before it decide about every layer that lm_head matches"]
