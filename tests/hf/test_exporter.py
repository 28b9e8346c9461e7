"""The exporter and the runner: numbers equal to the quantized model in eager, on every target that runs here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.exporters import ExportedModel as TransformersExportedModel

from et_cuda_passes.hf import EtConfig, EtExporter, ExportedModel
from et_cuda_passes.hf.exporter import structural_copy
from et_cuda_passes.hf.schemes import quantize_model_
from tests.hf.models import bert, tokens


def quantized(model: Any, **options: Any) -> Any:
    copied = structural_copy(model)
    quantize_model_(copied, **options)
    return copied


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
    assert (found.last_hidden_state - unquantized.last_hidden_state).abs().max() > 1e-2
    assert exported.report["targets"]["cpu"]["model"]["counts"]["missed"] == 0
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).last_hidden_state, unquantized.last_hidden_state, rtol=0, atol=0)
