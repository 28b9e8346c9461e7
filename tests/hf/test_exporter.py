"""The exporter and the runner: numbers equal to the quantized model in eager, on every target that runs here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from et_cuda_passes.executorch.packed import load_model
from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.artifact import ExportError
from tests.hf.models import CACHE, bert, quantized, qwen, static_cache, tokens


@pytest.mark.slow
def test_encoder_on_cpu_equals_the_quantized_model(tmp_path: Path) -> None:
    model, inputs = bert(), tokens(rows=2)
    with torch.no_grad():
        unquantized = model(**inputs)
        expected = quantized(model, qlinear="4w")(**inputs)
    exported = EtExporter().export(model, dict(inputs), EtConfig(target="cpu", qlinear="4w"))
    found = exported(**inputs)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-4)
    # 4 bits are seen in the numbers, so that the comparison above can tell the two models apart.
    assert (found.last_hidden_state - unquantized.last_hidden_state).abs().max() > 2e-3
    assert exported.report["targets"]["cpu"]["model"]["counts"]["missed"] == 0
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).last_hidden_state, unquantized.last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("targets", ["cuda,xnnpack", pytest.param("cuda,xnnpack,cpu", marks=pytest.mark.slow)])
def test_targets_of_an_encoder_give_the_numbers_of_the_quantized_model(
    targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, inputs = bert(), tokens(rows=2)
    with torch.no_grad():
        unquantized = model(**inputs)
        expected = quantized(model, qlinear="4w")(**inputs)
    config = EtConfig(target=targets, qlinear="4w", cast_to_bf16=True)
    exported = EtExporter().export(model, dict(inputs), config)
    assert {report["model"]["counts"]["missed"] for report in exported.report["targets"].values()} == {0}

    def error(found: Any) -> float:
        names = ("last_hidden_state", "pooler_output")
        return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in names)

    errors = {}
    for target in targets.split(",")[1:]:
        exported.to(target=target)
        found = exported(**inputs)
        assert type(found) is type(expected) and found.last_hidden_state.dtype is torch.float32
        errors[target] = error(found)
    # The packed program of cuda computes here by plain operators.
    build = exported.components["model"].program.builds["cuda"]
    errors["cuda"] = error(load_model(build.files[0], "cuda").program.module()(**inputs))
    assert errors.pop("xnnpack") < 1e-4
    # The roundings of a layer to bf16; 4 bits are far more.
    assert all(1e-4 < each < 3e-2 for each in errors.values())
    assert error(unquantized) > 2 * max(errors.values())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).last_hidden_state, unquantized.last_hidden_state, rtol=0, atol=0)


def generate(exported: Any, ids: torch.Tensor, steps: int) -> list[int]:
    """Greedy tokens from the runners of prefill and decode, with one cache of transformers' own."""
    cache = StaticCache(config=exported.config, max_cache_len=CACHE)
    length = ids.shape[1]
    output = exported.runners["prefill"](
        input_ids=ids,
        attention_mask={"full_attention": None},
        position_ids=torch.arange(length)[None],
        past_key_values=cache,
    )
    cache = output.past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]
    found = [int(output.logits[0, -1].argmax())]
    for position in range(length, length + steps - 1):
        before = [tensor.clone() for tensor in tensors]
        output = exported.runners["decode"](
            input_ids=torch.tensor([[found[-1]]]),
            attention_mask={"full_attention": (torch.arange(CACHE) <= position)[None, None, None]},
            position_ids=torch.tensor([[position]]),
            past_key_values=cache,
        )
        found.append(int(output.logits[0, -1].argmax()))
        # The caller's own tensors have one more entry now, and the rest is as it was.
        for old, new in zip(before, tensors, strict=True):
            if new.dim() == 0:
                assert new == old + 1
            else:
                assert (new[:, :, position] != old[:, :, position]).any()
                rest = [place for place in range(CACHE) if place != position]
                torch.testing.assert_close(new[:, :, rest], old[:, :, rest], rtol=0, atol=0)
    return found


STEPS = 12


def expected_tokens(model: Any, ids: torch.Tensor) -> list[int]:
    config = static_cache()
    config.max_new_tokens = STEPS
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, ids.shape[1] :
        ].tolist()


@pytest.fixture(scope="module")
def causal() -> Any:
    torch.manual_seed(1)
    return qwen(num_hidden_layers=1)


@pytest.fixture(scope="module")
def two_targets(causal: Any) -> Any:
    steps: list[str] = []
    config = EtConfig(target="cpu,xnnpack", qlinear="4w", dynamic=True)
    exported = EtExporter(steps.append).export_for_generation(
        causal, tokens(), config, generation_config=static_cache()
    )
    # One quantization, and one trace of each component, for both targets.
    assert steps.count("quantizing") == 1
    assert sum(step.startswith("exporting") for step in steps) == 2
    return exported


@pytest.mark.compiled
@pytest.mark.parametrize("target", ["cpu", "xnnpack"])
def test_generation_gives_the_tokens_of_the_quantized_model(causal: Any, two_targets: Any, target: str) -> None:
    torch.manual_seed(2)
    ids = torch.randint(1, 90, (1, 6))
    expected = expected_tokens(quantized(causal, qlinear="4w"), ids)
    assert expected != expected_tokens(causal, ids)
    two_targets.to(target=target)
    assert two_targets.runners["prefill"].target == target
    assert generate(two_targets, ids, STEPS) == expected


@pytest.fixture(scope="module")
def three_targets(causal: Any) -> Any:
    steps: list[str] = []
    config = EtConfig(target="cuda,xnnpack,cpu", qlinear="4w", dynamic=True, cast_to_bf16=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        exported = EtExporter(steps.append).export_for_generation(
            causal, tokens(), config, generation_config=static_cache()
        )
    assert steps.count("quantizing") == 1
    assert sum(step.startswith("exporting") for step in steps) == 2
    return exported


@pytest.mark.slow
def test_three_targets_have_one_outcome_for_each_weight(three_targets: Any) -> None:
    fqns = {}
    for target, parts in three_targets.report["targets"].items():
        for name, report in parts.items():
            assert report["counts"]["missed"] == 0
            fqns[target, name] = sorted(fqn for each in report["outcomes"] for fqn in each["fqn"].split(", "))
            details = [each["detail"] for each in report["outcomes"]]
            assert all(("computed in bf16" in detail) == (target != "xnnpack") for detail in details)
    expected = fqns["cuda", "prefill"]
    assert len(expected) == 8
    assert fqns == {(target, name): expected for target in ("cuda", "xnnpack", "cpu") for name in ("prefill", "decode")}


def first_logits(exported: Any, ids: torch.Tensor) -> torch.Tensor:
    cache = StaticCache(config=exported.config, max_cache_len=CACHE)
    arguments = prefill_arguments(ids.shape[1], cache) | {"input_ids": ids}
    return exported.runners["prefill"](**arguments).logits[0, -1]


@pytest.mark.slow
def test_three_targets_give_the_numbers_of_the_quantized_model(causal: Any, three_targets: Any) -> None:
    torch.manual_seed(2)
    ids = torch.randint(1, 90, (1, 6))
    model = quantized(causal, qlinear="4w")
    with torch.no_grad():
        expected, unquantized = (each(ids).logits[0, -1] for each in (model, causal))
    errors = {}
    for target in ("xnnpack", "cpu"):
        three_targets.to(target=target)
        found = first_logits(three_targets, ids)
        assert found.dtype is torch.float32
        errors[target] = float((found - expected).norm() / expected.norm())
    # The packed program of cuda computes here by plain operators.
    build = three_targets.components["prefill"].program.builds["cuda"]
    program = load_model(build.files[0], "cuda").program
    arguments = prefill_arguments(6, StaticCache(config=causal.config, max_cache_len=CACHE)) | {"input_ids": ids}
    found = program.module()(**arguments)["logits"][0, -1]
    errors["cuda"] = float((found - expected).norm() / expected.norm())
    assert errors["xnnpack"] < 1e-4
    # The roundings of a layer to bf16; 4 bits are far more.
    assert 1e-4 < errors["cpu"] < 3e-2 and 1e-4 < errors["cuda"] < 3e-2
    assert float((unquantized - expected).norm() / expected.norm()) > 1e-1


def test_attention_without_a_kernel_on_cuda_is_refused_with_the_fix() -> None:
    steps: list[str] = []
    with pytest.raises(
        ExportError,
        match=r"model: the attention \w+ is in float32, and ExecuTorch's kernel for cuda computes in bfloat16: load "
        "the model with dtype=torch.bfloat16, or give cast_to_bf16=True",
    ):
        EtExporter(steps.append).export(bert(), tokens(), EtConfig(target="cuda", qlinear="8w"))
    assert steps[-1] == "rewriting model for cuda"


@pytest.mark.compiled
def test_components_share_one_file_per_target(two_targets: Any) -> None:
    prefill, decode = (two_targets.components[name].program for name in ("prefill", "decode"))
    for target, name in (("cpu", "model.cpu.pt2"), ("xnnpack", "model.xnnpack.pte")):
        assert [file.name for file in prefill.builds[target].files] == [name]
        assert prefill.builds[target] == decode.builds[target]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param(None, marks=pytest.mark.slow), "8da4w"])
def test_generation_on_xnnpack_gives_the_tokens_of_the_model(causal: Any, scheme: str | None) -> None:
    torch.manual_seed(2)
    ids = torch.randint(1, 90, (1, 6))
    config = EtConfig(target="xnnpack", qlinear=scheme, dynamic=True)
    exported = EtExporter().export_for_generation(causal, tokens(), config, generation_config=static_cache())
    reference = causal if scheme is None else quantized(causal, qlinear=scheme)
    assert generate(exported, ids, STEPS) == expected_tokens(reference, ids)


def prefill_arguments(length: int, cache: Any) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(1, 90, (1, length)),
        "attention_mask": {"full_attention": None},
        "position_ids": torch.arange(length)[None],
        "past_key_values": cache,
    }


@pytest.mark.compiled
@pytest.mark.parametrize("target", ["cpu", "xnnpack"])
def test_calls_outside_of_the_export_are_errors(two_targets: Any, target: str) -> None:
    two_targets.to(target=target)
    prefill, decode = (two_targets.runners[name] for name in ("prefill", "decode"))
    empty = StaticCache(config=two_targets.config, max_cache_len=CACHE)
    with pytest.raises(ExportError, match=r"sizes of s\d+ from 2 to 31"):
        prefill(**prefill_arguments(CACHE + 1, empty))
    with pytest.raises(
        ExportError, match=r"position_ids with the shape \[1, s\d+\]; got \[1, 6\]: s\d+ is 5 in input_ids"
    ):
        prefill(**(prefill_arguments(5, empty) | {"position_ids": torch.arange(6)[None]}))
    with pytest.raises(ExportError, match="attention_mask with the keys full_attention; found none"):
        prefill(**(prefill_arguments(5, empty) | {"attention_mask": {}}))
    with pytest.raises(ExportError, match="attention_mask_full_attention=None; it cannot be a tensor"):
        prefill(**(prefill_arguments(5, empty) | {"attention_mask": {"full_attention": torch.ones(1, 5)}}))
    filled = prefill(**prefill_arguments(5, empty)).past_key_values
    with pytest.raises(ExportError, match="past_key_values as a StaticCache of another state or size"):
        prefill(**prefill_arguments(5, filled))
    step = {
        "input_ids": torch.tensor([[1]]),
        "attention_mask": {"full_attention": (torch.arange(CACHE) <= 5)[None, None, None]},
        "position_ids": torch.tensor([[5]]),
    }
    other = StaticCache(config=two_targets.config, max_cache_len=CACHE + 1)
    with torch.no_grad():
        qwen(num_hidden_layers=1)(input_ids=torch.tensor([[1, 2]]), past_key_values=other)
    with pytest.raises(ExportError, match="past_key_values as a StaticCache of another state or size"):
        decode(**step, past_key_values=other)
    assert decode(**step, past_key_values=filled).logits.shape == (1, 1, 96)


def test_copies_of_the_inputs_are_mutated_instead_on_request(two_targets: Any) -> None:
    for target in ("cpu", "xnnpack"):
        two_targets.to(target=target)
        cache = StaticCache(config=two_targets.config, max_cache_len=CACHE)
        count = cache.layers[0].cumulative_length
        two_targets.runners["prefill"](share_inputs=False, **prefill_arguments(5, cache))
        assert int(count) == 0
        two_targets.runners["prefill"](**prefill_arguments(5, cache))
        assert int(count) == 5


def test_device_of_a_cache_does_not_matter(two_targets: Any) -> None:
    two_targets.to(target="cpu")
    filled = two_targets.runners["prefill"](
        **prefill_arguments(5, StaticCache(config=two_targets.config, max_cache_len=CACHE))
    ).past_key_values
    for layer in filled.layers:
        layer.device = torch.device("cuda")
    two_targets.runners["decode"](
        input_ids=torch.tensor([[1]]),
        attention_mask={"full_attention": (torch.arange(CACHE) <= 5)[None, None, None]},
        position_ids=torch.tensor([[5]]),
        past_key_values=filled,
    )
    assert int(filled.layers[0].cumulative_length) == 6


@pytest.mark.slow
def test_weight_only_linears_for_xnnpack_take_4_bit_kernels_on_request() -> None:
    model, inputs = bert(), tokens()
    results, sizes = {}, {}
    for choice in ("fold", "dynamic-activation"):
        config = EtConfig(target="xnnpack", qlinear="4w", xnnpack_weight_only=choice)
        exported = EtExporter().export(model, dict(inputs), config)
        results[choice] = exported(**inputs).last_hidden_state
        build = exported.components["model"].program.builds["xnnpack"]
        sizes[choice] = sum(file.stat().st_size for file in build.files)
        counts = exported.report["targets"]["xnnpack"]["model"]["counts"]
        assert (counts["kept"] > 0, counts["missed"]) == (choice != "fold", 0)
    assert sizes["dynamic-activation"] < sizes["fold"] / 2
    with torch.no_grad():
        expected = quantized(model, qlinear="4w")(**inputs).last_hidden_state
        dynamic = quantized(model, qlinear="8da4w")(**inputs).last_hidden_state
    torch.testing.assert_close(results["fold"], expected, rtol=1e-4, atol=1e-4)
    near = (results["dynamic-activation"] - dynamic).norm() / dynamic.norm()
    assert float(near) < 2.0**-6
    assert not torch.equal(results["dynamic-activation"], results["fold"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "xnnpack", "xnnpack_weight_only": "dynamic"}, "known are fold, dynamic-activation"),
        ({"target": "cpu", "xnnpack_weight_only": "dynamic-activation"}, "the target is cpu: add xnnpack"),
    ],
)
def test_choice_for_weight_only_linears_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EtConfig(**options)


def test_bf16_model_for_xnnpack_is_refused_before_any_work() -> None:
    steps: list[str] = []
    refused = r"bfloat16, and xnnpack computes in float32: load the model with dtype=torch.float32"
    with pytest.raises(ExportError, match=refused + ", or leave xnnpack out"):
        EtExporter(steps.append).export(bert().bfloat16(), tokens(), EtConfig(target="xnnpack", qlinear="8da4w"))
    with pytest.raises(ExportError, match=refused + " and give cast_to_bf16=True, by which cuda and cpu cast to bf"):
        EtExporter(steps.append).export(bert().bfloat16(), tokens(), EtConfig(target="cuda,xnnpack,cpu"))
    assert not steps
