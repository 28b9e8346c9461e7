"""Programs lowered to CUDA delegates, run from Python: state, shared weights, inputs, damage, and the command line."""

import gc
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.delegate import DelegateError, Program, load
from tests.cli.command import Run
from tests.gpu.lowered import lower, quantized, relative, save

pytestmark = pytest.mark.gpu
FEATURES, HIDDEN = 256, 512


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pte with `prefill` of 1 to 64 rows and `decode` of one."""
    model = quantized(FEATURES, HIDDEN)
    rows = ({0: Dim("rows", min=1, max=64)},)
    prefill = torch.export.export(model, (torch.randn(7, FEATURES).bfloat16(),), dynamic_shapes=rows)
    decode = torch.export.export(model, (torch.randn(1, FEATURES).bfloat16(),))
    pte, _ = lower({"prefill": prefill, "decode": decode}, tmp_path_factory.mktemp("two"))
    return pte


def test_weights_of_two_methods_are_on_the_gpu_once(two: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    program = Program(two)
    assert set(program.methods) == {"prefill", "decode"}
    assert torch.cuda.memory_allocated() == before, "reading puts nothing on the GPU"
    prefill = program.method("prefill")
    once = torch.cuda.memory_allocated() - before
    decode = program.method("decode")
    assert torch.cuda.memory_allocated() - before == once
    stored = sum(weight.untyped_storage().nbytes() for weight in prefill.weights.values())
    # The allocator rounds up to blocks of 512 bytes.
    assert stored <= once <= stored + 512 * len(prefill.weights)
    assert {fqn: weight.data_ptr() for fqn, weight in prefill.weights.items()} == {
        fqn: weight.data_ptr() for fqn, weight in decode.weights.items()
    }
    model = quantized(FEATURES, HIDDEN)
    for method, rows in ((prefill, 1), (prefill, 5), (prefill, 64), (decode, 1)):
        x = torch.randn(rows, FEATURES).bfloat16()
        assert relative(method(x.cuda())[0], model(x)) < 8e-3


def test_inputs_may_be_on_the_cpu_and_in_other_layouts(two: Path) -> None:
    method = load(two, method="prefill")
    x = torch.randn(6, FEATURES).bfloat16()
    (wanted,) = method(x.cuda())
    assert wanted.device.type == "cuda"
    odd = torch.empty(6 * FEATURES + 1, dtype=torch.bfloat16, device="cuda")[1:].view(6, FEATURES).copy_(x)
    for given in (x, x.T.contiguous().T.cuda(), odd):
        assert torch.equal(method(given)[0], wanted)


def test_inputs_that_do_not_fit_a_method_are_errors(two: Path) -> None:
    method = load(two, method="prefill")
    for x in (
        torch.ones(65, FEATURES),
        torch.ones(3, FEATURES).float(),
        torch.ones(FEATURES),
        torch.ones(2, 2, FEATURES),
    ):
        given = x if x.shape == (3, FEATURES) else x.bfloat16()
        with pytest.raises(DelegateError, match="input 0 has"):
            method(given.cuda())
    with pytest.raises(DelegateError, match="takes 1 inputs"):
        method()


class Cache(nn.Module):
    """A module that adds its inputs to a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.add_(x)
        return self.cache * 2


def test_methods_share_mutated_buffers(tmp_path: Path) -> None:
    model = Cache()
    programs = {name: torch.export.export(model, (torch.ones(4, 32),)) for name in ("prefill", "decode")}
    with torch.no_grad():
        pte = save(to_edge_transform_and_lower(programs, partitioner=[ecp.CudaPartitioner([])]), tmp_path)
    program = Program(pte)
    x = torch.randn(4, 32)
    for step, name in enumerate(("prefill", "decode", "decode"), 1):
        assert torch.allclose(program.method(name)(x)[0].cpu(), 2 * step * x, rtol=1e-5)
    # Another object has its own state.
    assert torch.allclose(load(pte, method="decode")(x)[0].cpu(), 2 * x, rtol=1e-5)


def test_changed_library_and_weights_of_another_program_are_errors(two: Path, tmp_path: Path) -> None:
    content = bytearray(two.read_bytes())
    content[content.index(b"\x7fELF") + 4096] ^= 1
    (tmp_path / "model.pte").write_bytes(content)
    (data,) = two.parent.glob("*.ptd")
    program = Program(tmp_path / "model.pte", data)
    with pytest.raises(DelegateError, match="SHA-256"):
        [program.method(name) for name in program.methods]
    model = torch.nn.Linear(32, 8).bfloat16()
    other, _ = lower(torch.export.export(model, (torch.ones(2, 32).bfloat16(),)), tmp_path)
    (foreign,) = other.parent.glob("*.ptd")
    with pytest.raises(DelegateError, match="is this the .ptd of this .pte"):
        Program(two, foreign)


# This runs in a separate process: an illegal memory access would break the GPU for every later test.
DAMAGED = """
import sys, torch
from et_cuda_passes.delegate import DelegateError, load
path, data = sys.argv[1:3]
content = open(path, "rb").read()
x = torch.ones(1, %d, dtype=torch.bfloat16)
ran = refused = 0
for place in sys.argv[3:]:
    at, bit = map(int, place.split(":"))
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 1 << bit]))
    try:
        load(path, data, "decode")(x)
        torch.cuda.synchronize()
        ran += 1
    except DelegateError:
        refused += 1
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content[at : at + 1])
print(ran, refused)
"""


def test_flipped_bits_end_in_an_error_or_in_a_run_within_its_own_memory(two: Path, tmp_path: Path) -> None:
    (data,) = two.parent.glob("*.ptd")
    pte = tmp_path / "model.pte"
    pte.write_bytes(two.read_bytes())
    start = two.read_bytes().index(b"\x7fELF")
    places = random.Random(0).sample([(at, bit) for at in range(start) for bit in range(8)], 150)
    arguments = [f"{at}:{bit}" for at, bit in places]
    script = [sys.executable, "-c", DAMAGED % FEATURES, str(pte), str(data), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ran, refused = map(int, done.stdout.split())
    assert ran + refused == len(places)
    assert ran and refused


def test_command_line_runs_the_program(two: Path, tmp_path: Path, command: Run) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    (data,) = two.parent.glob("*.ptd")
    x = torch.randn(3, FEATURES).bfloat16()
    safetensors.save_file({"x": x}, tmp_path / "x.safetensors")
    arguments = ["run", two, "--data", data, "--method", "prefill", "--inputs", tmp_path / "x.safetensors"]
    assert "was not executed; give --trust" in command(*arguments).error
    result = command(*arguments, "--trust", "--benchmark")
    assert result.code == 0, result.err
    assert result.out.startswith(f"output 0: torch.bfloat16 [3, {FEATURES}], mean ")
    assert "prefill: median " in result.out


def test_command_line_verifies_the_program(tmp_path: Path, command: Run) -> None:
    x = torch.randn(5, FEATURES).bfloat16()
    torch.export.save(torch.export.export(quantized(FEATURES, HIDDEN), (x,)), tmp_path / "model.pt2")
    result = command("verify", tmp_path / "model.pt2", "--target", "cuda")
    assert result.code == 0, result.err
    assert "agrees with the original" in result.out
    assert command("verify", tmp_path / "model.pt2", "--target", "cuda", "--tolerance", "0").code == 1
