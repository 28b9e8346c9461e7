"""Programs whose libraries are compiled here for the CPU: methods, weights, data and devices."""

import dataclasses
import importlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from et_cuda_passes.delegate import DelegateError, Program, load
from tests.delegate.delegated import CUDA, K, Part, X, entry, load_forward, single_call, write


def test_methods_share_weights_and_buffers(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"prefill": single_call(part), "decode": single_call(part)})
    program = Program(path, device="cpu")
    assert program.methods == ("prefill", "decode")
    prefill, decode = map(program.method, program.methods)
    assert program.method("prefill") is prefill
    for fqn, weight in prefill.weights.items():
        assert decode.weights[fqn].data_ptr() == weight.data_ptr()
    difference = decode(X)[0] - prefill(X)[0]
    assert torch.allclose(difference, torch.full_like(difference, -1), atol=1e-5)
    # Another object has its own buffers.
    assert load(path, method="decode", device="cpu").weights["calls"].sum() == 0


def test_weight_may_be_a_view_into_its_storage(tmp_path: Path, part: Part) -> None:
    storage = torch.randn(5 + K * K)
    view = storage[5:].view(K, K)
    method = load_forward(
        tmp_path, single_call(dataclasses.replace(part, weights={**part.weights, "linear.weight": view}))
    )
    assert torch.equal(method.weights["linear.weight"], view)
    assert torch.allclose(method(X)[0], X @ view.T + part.weights["linear.bias"] + 1, atol=1e-5)


def test_program_rejects_a_changed_library(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"forward": single_call(part)})
    content = bytearray(path.read_bytes())
    content[content.index(b"\x7fELF") + len(part.library) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DelegateError, match="SHA-256"):
        load(path, device="cpu")


def test_program_finds_its_data_in_the_same_folder(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"forward": single_call(part)})
    data = tmp_path / "model.ptd"
    other = shutil.move(data, tmp_path / "aoti_cuda_blob.ptd")
    assert Program(path, device="cpu").data_path == other
    shutil.copy(other, tmp_path / "second.ptd")
    with pytest.raises(
        DelegateError, match=r"several .ptd files are in the folder of .*\(aoti_cuda_blob.ptd, second.ptd\)"
    ):
        Program(path)
    assert load(path, other, device="cpu")(X)[0].shape == (3, K)
    shutil.copy(other, data)
    assert Program(path).data_path == data


def test_program_rejects_a_device_that_its_weights_are_not_for(tmp_path: Path, part: Part) -> None:
    assert entry("a", torch.ones(1), CUDA).storage_key == "cuda_fqn_weight:cuda:a"
    path = write(tmp_path, {"forward": single_call(dataclasses.replace(part, device=CUDA))})
    with pytest.raises(DelegateError, match="must be on a CUDA device"):
        load(path, device="cpu")
    with pytest.raises(DelegateError, match="but not on mps"):
        Program(path, device="mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_program_without_a_gpu_names_the_cause(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"forward": single_call(part)})
    with pytest.raises(DelegateError, match="needs a CUDA device, and torch finds no such device"):
        load(path)


def test_flipped_bits_end_in_an_error_or_in_a_run(tmp_path: Path, part: Part) -> None:
    # A run that reads outside its own memory would end this process.
    path = write(tmp_path, {"forward": single_call(part)})
    content = path.read_bytes()
    start = content.index(b"\x7fELF")
    payload = range(content.index(b"ETCUDAFQN3"), start)
    flips = [(at, bit) for at in range(start) for bit in range(8)]
    outcomes = set()
    for at, bit in random.Random(0).sample(flips, 100) + [(at, 0) for at in payload]:
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << bit]))
        try:
            outcomes.add(len(load(path, device="cpu")(X)))
        except DelegateError:
            outcomes.add(0)
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(content[at : at + 1])
    assert outcomes == {0, 2}


def test_room_is_imported_without_executorch() -> None:
    program = "import sys, et_cuda_passes.delegate; print('executorch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "False\n"
    )


def test_former_module_path_names_the_new_one() -> None:
    with pytest.raises(ImportError, match="is now et_cuda_passes.delegate"):
        importlib.import_module("et_cuda_passes.executorch.delegate")
