"""The benchmark of Voxtral's networks: they agree with transformers', and the measurements are as described."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

import et_cuda_passes as ecp
from benchmarks.voxtral import clock
from benchmarks.voxtral.dimensions import SCALES
from benchmarks.voxtral.lowering import lower, partitioners, passes
from benchmarks.voxtral.measuring import compare, measure, weight_bytes
from benchmarks.voxtral.model import Voxtral
from benchmarks.voxtral.programs import export
from benchmarks.voxtral.reference import refer
from benchmarks.voxtral.variants import DEFAULT, HINT, VARIANTS
from benchmarks.voxtral.weights import GROUP_SIZE, Form, build
from tests.helpers import NO_DEVICE

TINY, FULL = SCALES["tiny"], SCALES["full"]
LINEARS = {"audio_encoder": 14, "token_embedding": 0, "text_decoder": 15}


@pytest.fixture(scope="module")
def programs() -> dict[str, ExportedProgram]:
    return export(build(TINY, "int4", "cpu")[0], TINY, HINT)


@pytest.fixture(scope="module")
def full() -> Voxtral:
    with torch.device("meta"):
        return Voxtral(FULL).bfloat16()


def transformers_voxtral(model: Voxtral) -> Any:
    """transformers' model of the same sizes, with the weights of ``model``."""
    transformers = pytest.importorskip("transformers")
    d = TINY
    config = transformers.VoxtralConfig(
        audio_config={
            "hidden_size": d.audio_features,
            "intermediate_size": d.audio_hidden,
            "num_hidden_layers": d.audio_layers,
            "num_attention_heads": d.audio_heads,
            "num_mel_bins": d.mel,
            "max_source_positions": d.positions,
        },
        text_config={
            "vocab_size": d.vocabulary,
            "hidden_size": d.features,
            "intermediate_size": d.hidden,
            "num_hidden_layers": d.layers,
            "num_attention_heads": d.heads,
            "num_key_value_heads": d.kv_heads,
            "head_dim": d.head_dim,
            # rope_theta and rms_norm_eps have Voxtral's values by default.
        },
        audio_token_id=24,
    )
    own = transformers.VoxtralForConditionalGeneration(config).eval()
    state = {
        **{f"model.{name}": value for name, value in model.audio_encoder.state_dict().items()},
        "model.language_model.embed_tokens.weight": model.token_embedding.embed_tokens.weight,
        **{
            name if name.startswith("lm_head") else f"model.{name}": value
            for name, value in model.text_decoder.state_dict().items()
        },
    }
    own.load_state_dict(state)
    return own


def test_both_networks_compute_what_transformers_does() -> None:
    """Prefill and decode steps with a longer cache agree with one pass over all tokens without a cache."""
    model, _ = build(TINY, "float", "cpu", dtype=torch.float32)
    own = transformers_voxtral(model)
    mel = torch.randn(1, TINY.mel, TINY.frames)
    tokens = torch.randint(TINY.vocabulary, (1, 12))
    with torch.no_grad():
        audio = own.model.get_audio_features(mel).pooler_output
        torch.testing.assert_close(model.audio_encoder(mel)[0], audio, rtol=1e-4, atol=1e-4)
        wanted = own(input_ids=tokens, use_cache=False).logits
        embedded = model.token_embedding(tokens)
        parts = [(0, 9), (9, 10), (10, 11), (11, 12)]
        got = [model.text_decoder(embedded[:, low:high], torch.arange(low, high)) for low, high in parts]
    torch.testing.assert_close(torch.cat(got, dim=1), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.3, "logits that tell something"


def test_new_text_needs_no_reset() -> None:
    model, _ = build(TINY, "float", "cpu", dtype=torch.float32)
    first, second = torch.randn(2, 1, 10, TINY.features)
    with torch.no_grad():
        wanted = model.text_decoder(second, torch.arange(10)).clone()
        model.text_decoder(first, torch.arange(10))
        got = [model.text_decoder(second[:, i : i + 1], torch.tensor([i])) for i in range(10)]
    torch.testing.assert_close(torch.cat(got, dim=1), wanted, rtol=1e-4, atol=1e-4)


def test_only_linears_are_quantized() -> None:
    model, digest = build(TINY, "int4", "cpu")
    plain, same = build(TINY, "float", "cpu")
    dense, again = build(TINY, "dequantized", "cpu")
    assert digest == same == again
    counted = dict.fromkeys(LINEARS, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            counted[name.partition(".")[0]] += 1
            weight, original = module.weight, plain.get_submodule(name).weight
            assert weight.block_size == (1, GROUP_SIZE)
            assert weight.zero_point.count_nonzero() == 0
            assert (int(weight.qdata.min()), int(weight.qdata.max())) in ((-8, 7), (-7, 7))
            dequantized = weight.qdata * weight.scale.repeat_interleave(GROUP_SIZE, 1)
            assert torch.equal(dense.get_submodule(name).weight, dequantized)
            # Half a step of the largest of 32 normal numbers over 7, rms.
            assert 0.05 < (dequantized - original).float().norm() / original.float().norm() < 0.15
        else:
            for part, value in module.named_parameters(recurse=False):
                assert torch.equal(value, getattr(plain.get_submodule(name), part))
    assert counted == TINY.linears == LINEARS
    assert all(value.dtype == torch.bfloat16 for value in plain.parameters())


def test_methods_share_no_name_of_a_weight(programs: dict[str, ExportedProgram]) -> None:
    """In a .ptd a name identifies one weight of all methods."""
    names = [name for program in programs.values() for name in [*program.state_dict, *program.constants]]
    assert len(names) == len(set(names))
    caches = [name for name in programs["text_decoder"].constants if name.endswith((".keys", ".values"))]
    assert len(caches) == 2 * TINY.layers
    functional = programs["text_decoder"].run_decompositions({})
    assert set(functional.graph_signature.buffers_to_mutate.values()) == set(caches)


def test_one_program_takes_every_length(programs: dict[str, ExportedProgram]) -> None:
    model, _ = build(TINY, "int4", "cpu")
    run, embed = programs["text_decoder"].module(), programs["token_embedding"].module()
    for low, high in ((0, TINY.cache), (0, 5), (5, 6), (6, 13), (13, 14)):
        tokens, at = torch.randint(TINY.vocabulary, (1, high - low)), torch.arange(low, high)
        with torch.no_grad():
            embedded = embed(tokens)
            assert torch.equal(embedded, model.token_embedding(tokens))
            got, wanted = run(embedded, at), model.text_decoder(embedded, at)
        assert got.shape == (1, high - low, TINY.vocabulary)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["tinygemm", "ours", "unfused", "ungated"])
def test_linears_are_all_rewritten(name: str, programs: dict[str, ExportedProgram]) -> None:
    for method, program in programs.items():
        _, report = ecp.rewrite(program, "cuda", passes(VARIANTS[name]))
        counts = report.counts()
        assert (counts["rewritten"], counts["missed"]) == (LINEARS[method], 0)
        if name == "tinygemm":
            assert all("-> tinygemm" in outcome.detail for outcome in report.outcomes)
        # q, k and v are fused; gate and up have other readers.
        layers = {"audio_encoder": TINY.audio_layers, "text_decoder": TINY.layers, "token_embedding": 0}[method]
        assert counts.get("fused_linear_int4", 0) == (0 if name == "unfused" else 3 * layers)
        gates = TINY.layers if method == "text_decoder" and name in ("ours", "unfused") else 0
        assert report.applied.get("fuse_gate", 0) == gates


def test_variant_has_its_partitioners() -> None:
    for name in VARIANTS:
        for method, created in partitioners(VARIANTS[name], TINY).items():
            assert isinstance(created[0], ecp.CudaPartitioner) == (name in ("tinygemm", "ours", "unfused", "ungated"))
            specs = {spec.key: spec.value for spec in created[0].delegation_spec.compile_specs}
            assert specs["method_name"] == method.encode()
    assert set(DEFAULT) < set(VARIANTS)
    assert VARIANTS["bf16-prompt"].hint(FULL) == 388
    assert VARIANTS["ours"].hint(FULL) == HINT


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the lowering goes on")
def test_lowering_lacks_nothing_but_the_device(tmp_path: Path) -> None:
    small = replace(TINY, layers=1, audio_layers=1)
    with pytest.raises((AssertionError, RuntimeError), match=NO_DEVICE):
        lower(VARIANTS["ours"], small, tmp_path / "ours", "cpu")


def test_full_disk_is_an_error_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    with pytest.raises(RuntimeError, match=r"has 1 GB free, lowering bf16 takes 19"):
        lower(VARIANTS["bf16"], FULL, tmp_path / "bf16", "cpu")


def test_full_size_is_that_of_voxtral(full: Voxtral) -> None:
    """Parameters of Voxtral-Mini-3B by part, as they follow from its configuration."""
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in full.named_children()}
    linears: dict[str, list[nn.Linear]] = {
        name: [m for m in part.modules() if isinstance(m, nn.Linear)] for name, part in full.named_children()
    }
    assert {name: len(found) for name, found in linears.items()} == FULL.linears
    assert {name: sum(m.weight.numel() for m in found) for name, found in linears.items()} == FULL.linear_weights
    assert FULL.linears == {"audio_encoder": 194, "token_embedding": 0, "text_decoder": 211}
    # Whisper large v3's encoder is 637 M, the projector 25 M.
    assert 660e6 < count["audio_encoder"] < 664e6
    assert count["token_embedding"] == 131072 * 3072
    assert 3.61e9 < count["text_decoder"] < 3.62e9
    held = 2 * sum(count.values()) + sum(buffer.nbytes for name, buffer in full.named_buffers() if "rotary" not in name)
    assert FULL.bf16_bytes == pytest.approx(held, rel=2e-3)


def test_operations_of_a_call_agree_with_the_counter_of_torch(full: Voxtral) -> None:
    mel = torch.empty(1, FULL.mel, FULL.frames, device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        full.audio_encoder(mel)
    assert counter.get_total_flops() == FULL.flops["audio_encoder"]
    x = torch.empty(1, FULL.prompt, FULL.features, device="meta", dtype=torch.bfloat16)
    at = torch.arange(FULL.prompt, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        full.text_decoder(x, at)
    # Attention is counted over the whole cache; causal attention needs half of the prompt's square.
    square = 4 * FULL.layers * FULL.heads * FULL.head_dim * FULL.prompt
    assert counter.get_total_flops() - square * FULL.cache == FULL.flops["prefill"] - square * FULL.prompt / 2
    assert FULL.flops["decode"] == pytest.approx(2 * FULL.linear_weights["text_decoder"], rel=0.06)


def test_compare_finds_relative_and_largest_errors() -> None:
    wanted = torch.tensor([[[4.0, 2.0, 0.0], [1.0, 3.0, 2.0], [0.0, 5.0, 1.0]]])
    assert compare(wanted, wanted) == {"relative_error": 0, "rows": 3, "same": 3, "shortfall": 0}
    got = wanted.clone()
    got[0, 1] = torch.tensor([1.0, 2.0, 3.0])
    found = compare(got, wanted)
    assert (found["rows"], found["same"]) == (3, 2)
    assert found["shortfall"] == pytest.approx(1 / 3)
    assert found["relative_error"] == pytest.approx((2 / wanted.square().sum().item()) ** 0.5)


def loader(form: Form, change: Callable[[Voxtral], None] = lambda model: None) -> Callable[[str], Callable[..., Any]]:
    """The methods of a model in eager, with results in a list like those of a loaded artifact."""
    model, _ = build(TINY, form, "cpu")
    change(model)
    return lambda name: lambda *inputs: [model.get_submodule(name)(*inputs)]


@pytest.mark.slow
def test_artifact_is_compared_with_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LEAST", 2)
    monkeypatch.setattr(clock, "SECONDS", 0)
    path = tmp_path / "dequantized.pt"
    written = refer("dequantized", TINY, path, "cpu")
    assert set(written["latency"]) == {"audio_encoder", "token_embedding", "prefill", "decode"}

    found = measure(loader("int4"), path, TINY, "cpu")
    rows = {case: correct["rows"] for case, correct in found["correct"].items()}
    assert rows == {"audio_encoder": 12, "token_embedding": 20, "prefill": 20, "decode": 8}
    for correct in found["correct"].values():
        assert correct["relative_error"] < 1e-3
        assert correct["same"] == correct["rows"]
    assert set(found["load_s"]) == set(LINEARS)
    assert all(times["calls"] == 2 and times["min_ms"] <= times["median_ms"] for times in found["latency"].values())
    assert all(spent["kernels"] > 1 for spent in found["profile"].values())

    # The reference gets the unquantized weights, which are the wrong ones.
    other = measure(loader("float"), path, TINY, "cpu")["correct"]
    assert other["token_embedding"]["relative_error"] == 0
    for case in ("audio_encoder", "prefill", "decode"):
        assert other[case]["relative_error"] > 0.05

    def forget(model: Voxtral) -> None:
        """Decode with an empty cache of the last layer."""
        attention = model.text_decoder.language_model.layers[-1].self_attn

        def zero(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if inputs[0].shape[1] > 1:
                attention.values.zero_()

        attention.register_forward_hook(zero)

    lost = measure(loader("int4", forget), path, TINY, "cpu")["correct"]
    assert lost["decode"]["relative_error"] > 0.05 > lost["prefill"]["relative_error"]


def test_cache_is_not_counted_as_a_weight() -> None:
    held: dict[str, Tensor] = {"a.weight": torch.zeros(4), "layers.0.self_attn.keys": torch.zeros(100)}
    method = type("Method", (), {"weights": {**held, "layers.0.self_attn.values": torch.zeros(100)}})
    assert weight_bytes(method()) == 16
