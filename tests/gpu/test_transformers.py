"""A decoder that transformers exports with a static cache, lowered for cuda and run by the loader on the GPU."""

from pathlib import Path

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.delegate import Program, load
from tests.gpu.lowered import relative, save

pytest.importorskip("transformers.exporters", reason="transformers is not installed: pip install '.[demo]'")

from transformers.exporters import ExportedModel

from tests.hf.models import mixtral
from tests.static_cache import Run, export, greedy, least_margin, qwen3, steps

pytestmark = pytest.mark.gpu
COUNT = 10
# With these weights the chosen tokens differ, and no choice is as close as the error of the kernels.
SEED = 15


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedModel, Program]:
    """The exported model, and its methods `prefill` and `decode` in one .pte."""
    model = qwen3(256, SEED, layers=2).bfloat16()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    exported = export(model)
    programs = {name: component.program for name, component in exported.components.items()}
    partitioners = {name: [ecp.CudaPartitioner([], expect={"rewritten": 15, "missed": 0})] for name in programs}
    with torch.no_grad():
        edge = to_edge_transform_and_lower(programs, partitioner=partitioners)
    return exported, Program(save(edge, tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def eager() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prompt, the tokens that eager chooses, and the logits of each choice."""
    model = qwen3(256, SEED, layers=2).bfloat16()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    prompt = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(SEED))
    tokens, logits = greedy(model, prompt, COUNT)
    assert least_margin(logits) > 0.1
    assert len(set(tokens.tolist())) > 4
    return prompt, tokens, logits


def test_prefill_and_decode_choose_the_tokens_of_eager(
    qwen: tuple[ExportedModel, Program], eager: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    exported, program = qwen
    prompt, tokens, logits = eager
    methods = {name: program.method(name) for name in ("prefill", "decode")}
    assert methods["decode"].mutated == (3, 4, 5, 6, 7, 8)
    places = set()
    for step, (got, cache) in enumerate(steps(exported, methods, prompt, tokens[:-1])):
        assert got.device.type == "cuda"
        assert relative(got, logits[step]) < 3e-2, step
        assert int(got.argmax()) == int(tokens[step]), step
        for layer in cache.layers:
            assert int(layer.cumulative_length) == prompt.shape[1] + step
            assert layer.keys.device.type == "cuda"
            filled = layer.keys[0, :, :, :].abs().sum((0, 2)) > 0
            assert int(filled.sum()) == prompt.shape[1] + step
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1, "the cache was written in place"


def test_cache_of_the_caller_on_the_cpu_gets_the_new_values(
    qwen: tuple[ExportedModel, Program], eager: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    exported, program = qwen
    prompt, tokens, _ = eager

    def on_cpu(name: str) -> Run:
        method = program.method(name)
        return lambda *inputs: [output.cpu() for output in method(*inputs)]

    for step, (got, cache) in enumerate(
        steps(exported, {name: on_cpu(name) for name in program.methods}, prompt, tokens[:-1])
    ):
        assert int(got.argmax()) == int(tokens[step]), step
        assert cache.layers[0].keys.device.type == "cpu"
        assert int(cache.layers[1].cumulative_length) == prompt.shape[1] + step


def test_weights_of_prefill_and_decode_are_on_the_gpu_once(
    qwen: tuple[ExportedModel, Program],
) -> None:
    program = qwen[1]
    prefill, decode = program.method("prefill").weights, program.method("decode").weights
    packed = {fqn for fqn in prefill if "packed" in fqn}
    assert packed
    for fqn in prefill.keys() & decode.keys():
        assert prefill[fqn].data_ptr() == decode[fqn].data_ptr()
    assert packed == {fqn for fqn in decode if "packed" in fqn}


@pytest.mark.parametrize(("form", "rule"), [("grouped_mm", "grouped_mm_int4"), ("batched_mm", "indexed_bmm_int4")])
def test_quantized_mixture_of_experts_agrees_with_eager(form: str, rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mixtral().bfloat16()
    for name, each in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            each.data *= 50  # the choice of experts is clear, so that rounding does not change it
    assert ecp.quantize_model_(model, qlinear="4w", target="cuda").warnings == []
    model.set_experts_implementation(form)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        program = torch.export.export(model, (tokens,), kwargs={"use_cache": False}, strict=False)
    partitioner = ecp.CudaPartitioner([], expect={rule: 2, "missed": 0})
    # As `lower` does.
    config = EdgeCompileConfig(_check_ir_validity=False)
    with torch.no_grad():
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=config)
    assert {outcome.status for outcome in partitioner.report.outcomes} == {"rewritten"}
    got = load(save(edge, tmp_path))(tokens.cuda(), False)[0]
    assert relative(got, wanted) < 2e-2
