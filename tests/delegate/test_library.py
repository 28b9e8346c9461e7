"""Libraries compiled here for the CPU, in files written by ExecuTorch: their weights and inputs are checked."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from et_cuda_passes.delegate import DelegateError, load
from tests.delegate.delegated import K, Part, load_forward, single_call, value, write


def wrong(weights: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = weights | {name.replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: wrong(w, linear_bias=None), "needs weights that its payload does not have: linear.bias"),
        (
            lambda w: wrong(w, linear_bias=w["linear.bias"][:0]),
            "reads weight 'linear.bias', which is empty",
        ),
        (lambda w: wrong(w, other=torch.ones(2)), "does not use weights that its payload has: other"),
        (lambda w: wrong(w, linear_weight=torch.ones(K, K - 1)), "needs 1024 bytes of weight 'linear.weight'"),
        (lambda w: wrong(w, linear_weight=torch.ones(K, K).int()), "'linear.weight' with ScalarType 6"),
    ],
)
def test_library_rejects_other_weights_than_its_own(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path, part: Part
) -> None:
    path = write(tmp_path, {"forward": single_call(dataclasses.replace(part, weights=change(dict(part.weights))))})
    with pytest.raises(DelegateError) as error:
        load(path, device="cpu")
    assert message in str(error.value)


def test_library_with_static_inputs_checks_their_sizes(
    tmp_path: Path, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AOTI_RUNTIME_CHECK_INPUTS", raising=False)
    values = [value(3, 5), value(3, K), value()]
    method = load_forward(tmp_path, dataclasses.replace(single_call(part), values=values))
    with pytest.raises(DelegateError, match="failed: .*see stderr for the details"):
        method(torch.ones(3, 5))
    assert "AOTI_RUNTIME_CHECK_INPUTS" not in os.environ


def test_library_rejects_a_file_of_another_kind(tmp_path: Path, part: Part) -> None:
    with pytest.raises(DelegateError, match="does not load"):
        load_forward(tmp_path, single_call(dataclasses.replace(part, library=b"no library")))
    other = Path(torch.__file__).parent / "lib" / "libshm.so"
    with pytest.raises(DelegateError, match="is not a library of AOTInductor"):
        load_forward(tmp_path, single_call(dataclasses.replace(part, library=other.read_bytes())))
