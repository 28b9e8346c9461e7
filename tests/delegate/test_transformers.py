"""A decoder that transformers exports with a static cache, as a .pte without a delegate."""

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

import et_cuda_passes as ecp
from et_cuda_passes.delegate import Program

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[demo]'")

from transformers import GenerationConfig
from transformers.exporters import ExportedModel
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from tests.static_cache import export, greedy, least_margin, qwen3, steps

COUNT = 8


@pytest.fixture(scope="module")
def exported() -> ExportedModel:
    return export(qwen3(seed=15))


@pytest.fixture(scope="module")
def path(exported: ExportedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the methods of ``exported``."""
    path = tmp_path_factory.mktemp("lowered") / "model.pte"
    programs = {name: component.program for name, component in exported.components.items()}
    path.write_bytes(to_edge_transform_and_lower(programs).to_executorch().buffer)
    return path


def test_static_cache_is_updated_and_tokens_are_those_of_eager(exported: ExportedModel, path: Path) -> None:
    model = qwen3(seed=15)
    prompt = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(15))
    tokens, logits = greedy(model, prompt, COUNT)
    assert least_margin(logits) > 1e-3
    program = Program(path, device="cpu")
    methods = {name: program.method(name) for name in program.methods}
    assert methods["decode"].mutated == (3, 4, 5)
    for step, (got, cache) in enumerate(steps(exported, methods, prompt, tokens[:-1])):
        torch.testing.assert_close(got, logits[step], rtol=1e-4, atol=1e-5)
        assert int(got.argmax()) == int(tokens[step])
        for layer in cache.layers:
            assert int(layer.cumulative_length) == prompt.shape[1] + step
            assert int((layer.keys[0].abs().sum((0, 2)) > 0).sum()) == prompt.shape[1] + step


def test_outputs_are_those_of_executorch(path: Path) -> None:
    ours, file = Program(path, device="cpu").method("prefill"), Runtime.get().load_program(path)
    for length in (2, 7, 31):
        ids = torch.randint(0, 64, (1, length))
        inputs = [ids, None, torch.arange(length)[None], torch.tensor(0)]
        theirs = file.load_method("prefill").execute(inputs)
        inputs = [ids, None, torch.arange(length)[None], torch.tensor(0)]
        torch.testing.assert_close(ours(*inputs), list(theirs), rtol=1e-4, atol=1e-5)


def test_older_export_of_transformers_keeps_its_cache_in_buffers(tmp_path: Path) -> None:
    """Its static cache has two names, of which `rewrite` keeps one."""
    model = qwen3(seed=15)
    options = {"use_cache": True, "cache_implementation": "static", "max_length": 16}
    model.generation_config = GenerationConfig(**options, cache_config={"batch_size": 1, "max_cache_len": 16})
    module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)
    exported = module.export(torch.tensor([[1]]), cache_position=torch.tensor([0]), strict=False)
    with pytest.raises(AssertionError, match="expected compiled_fn to be GraphModule"):
        exported.run_decompositions({})
    rewritten, _ = ecp.rewrite(exported, "cpu")
    path = tmp_path / "model.pte"
    path.write_bytes(to_edge_transform_and_lower(rewritten).to_executorch().buffer)
    decode = Program(path, device="cpu").method()
    tokens = torch.randint(0, 64, (1, 6))
    with torch.no_grad():
        expected = model(tokens).logits[0]
    for position in range(6):
        (logits,) = decode(tokens[:, position : position + 1], torch.tensor([position]))
        torch.testing.assert_close(logits[0, 0], expected[position], rtol=1e-4, atol=1e-5)
