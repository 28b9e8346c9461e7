"""The demo's last step, which needs a GPU."""

from pathlib import Path

import pytest
import torch

from demo.program import export, quantize, save_rewritten
from tests.demo.tiny import CACHE_LENGTH, tiny_model


@pytest.mark.gpu
def test_saved_packed_program_is_lowered_to_a_pte_and_a_ptd(tmp_path: Path) -> None:
    from et_cuda_passes.executorch.lower import lower

    # Heads of 64, as the demo's model has.
    generic = export(quantize(tiny_model(hidden_size=256)), CACHE_LENGTH)
    save_rewritten(generic, "cuda", tmp_path / "cuda.pt2")
    lower(torch.export.load(tmp_path / "cuda.pt2"), "cuda", tmp_path / "cuda", "model")
    created = sorted((tmp_path / "cuda").iterdir())
    assert {path.suffix for path in created} == {".pte", ".ptd"}
    assert all(path.stat().st_size for path in created)
