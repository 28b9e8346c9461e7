"""SmolLM2 with its own weights: its head is tied to its embedding."""

import pytest
import torch

import et_cuda_passes as ecp
from demo.model import smollm2
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.hf.generation import encode
from et_cuda_passes.hf.loading import Loaded, load

pytestmark = pytest.mark.slow
WORDS = (49152, 576)


@pytest.fixture(scope="module")
def smollm() -> Loaded:
    return load(Checkpoint.find(str(smollm2())), dtype="bfloat16")


def test_tied_head_of_smollm2_is_one_weight_from_quantization_to_program(smollm: Loaded) -> None:
    model = smollm.model
    model.config.use_cache = False
    inputs = {"input_ids": encode(smollm.processor, "What is the capital of France? Answer in one sentence.")}
    with torch.no_grad():
        before = model(**inputs).logits[0, -1].float()

    report = ecp.quantize_model_(model, qlinear="4w", qembedding="8w", target="cuda,cpu")
    assert [layer.form for layer in report.layers].count("4w group 32") == 210
    assert (report["model.embed_tokens"].form, report["lm_head"].form) == ("8w per axis", "8w per axis")
    assert all(layer.scheme for layer in report.layers) and not report.warnings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        quantized = model(**inputs).logits[0, -1].float()
        program = torch.export.export(model, (), inputs)
    assert before.argmax() == quantized.argmax()

    tied = [name for name, value in program.state_dict.items() if tuple(value.shape) == WORDS]
    assert tied == ["model.embed_tokens.weight", "lm_head.weight"]
    assert program.state_dict[tied[0]] is program.state_dict[tied[1]]
    for target in ("cpu", "cuda"):
        rewritten, outcome = ecp.rewrite(program, target, expect={"missed": 0, "rewritten": 212, "embedding_int8": 1})
        held = [*rewritten.state_dict.values(), *rewritten.constants.values()]
        assert [value.dtype for value in held if tuple(value.shape) == WORDS] == [torch.int8], outcome
        with torch.no_grad():
            got = rewritten.module()(**inputs).logits[0, -1].float()
        # bf16 through 30 layers.
        assert float((got - quantized).norm() / quantized.norm()) < 2.0**-4
        assert got.argmax() == quantized.argmax()
