"""Delegated programs run: libraries compiled here for the CPU, in files written by ExecuTorch, against eager."""

import dataclasses
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from executorch.exir import schema
from torch import Tensor

from et_cuda_passes.executorch import delegate_library as loaded
from et_cuda_passes.executorch.delegate import DelegateError, Method, Program, load
from et_cuda_passes.executorch.delegate_library import Wants
from et_cuda_passes.executorch.delegate_plan import Call, Plan, TensorSpec, Value
from tests.executorch.delegated import BOUND, CUDA, Counting, K, Part, Spec, counting, entry, once, value, write

X = torch.randn(3, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def part() -> Part:
    return counting()


def forward(folder: Path, spec: Spec) -> Method:
    return load(write(folder, {"forward": spec}), device="cpu")


def test_a_delegate_gives_what_eager_gives(tmp_path: Path, part: Part) -> None:
    method, model = forward(tmp_path, once(part)), Counting()
    assert [str(wanted) for wanted in method.inputs] == ["torch.float32 at most [32, 16]"]
    for rows in (1, 2, 32):
        x = torch.randn(rows, K)
        for got, wanted in zip(method(x), model(x), strict=True):
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    # The weights are the file's, and the buffer that the method writes to keeps what it wrote.
    assert torch.equal(method.weights["linear.weight"], model.linear.weight)
    assert method.weights["calls"].tolist() == [3] * 4


def test_a_result_that_is_a_weight_is_not_written_to_by_later_calls() -> None:
    state = torch.zeros(4)

    class Library:
        wants = Wants(1, 1, ())

        def __call__(self, inputs: list[Tensor], static: bool) -> list[Tensor]:
            return [state.add_(inputs[0])[1:]]

    spec = TensorSpec(torch.float32, (4,), (0,), 1, False)
    plan = Plan("forward", (Value("tensor", spec), Value("tensor", spec)), (0,), (1,), (), (Call(0, (0, 1)),))
    libraries = cast("dict[int, loaded.Library]", {0: Library()})
    method = Method(plan, libraries, {"state": state}, torch.device("cpu"), "made up")
    first, second = method(torch.ones(4))[0], method(torch.ones(4))[0]
    assert (first.tolist(), second.tolist()) == ([1, 1, 1], [2, 2, 2])


def test_inputs_of_other_layouts_are_laid_out_as_the_library_reads_them(tmp_path: Path, part: Part) -> None:
    method = forward(tmp_path, once(part))
    wanted = method(X)[0] - 1
    odd = torch.empty(3 * K + 1)[1:].view(3, K).copy_(X)
    assert odd.data_ptr() % 16
    for calls, x in enumerate((X.T.contiguous().T, odd, X.clone().requires_grad_()), 2):
        assert torch.allclose(method(x)[0], wanted + calls, atol=1e-5)


def test_several_delegates_and_moves_between_them(tmp_path: Path, part: Part) -> None:
    values = [value(32, K, dynamism=BOUND) for _ in range(5)] + [value(), value(), schema.EValue(schema.Int(7))]
    instructions = [
        schema.KernelCall(0, [0, 1, 1]),
        schema.DelegateCall(0, [1, 2, 5]),
        schema.MoveCall(2, 3),
        schema.FreeCall(2),
        schema.DelegateCall(1, [3, 4, 6]),
        schema.KernelCall(1, [4, 2, 2]),
    ]
    copies = [("et_copy::_h2d_copy", "out"), ("et_copy::_d2h_copy", "out")]
    spec = Spec(values, [0], [2, 5, 6, 7], [part, part], [], instructions, copies)
    method, model = forward(tmp_path, spec), Counting()
    inner, first = model(X)
    outer, second = model(inner)
    got = method(X)
    assert got[3] == 7
    for result, wanted in zip(got[:3], (outer, first, second), strict=True):
        assert torch.allclose(result, wanted, rtol=1e-5, atol=1e-5)


def test_methods_of_a_program_share_weights_and_states(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"prefill": once(part), "decode": once(part)})
    program = Program(path, device="cpu")
    assert program.methods == ("prefill", "decode")
    prefill, decode = map(program.method, program.methods)
    assert program.method("prefill") is prefill
    for fqn, weight in prefill.weights.items():
        assert decode.weights[fqn].data_ptr() == weight.data_ptr()
    difference = decode(X)[0] - prefill(X)[0]
    assert torch.allclose(difference, torch.full_like(difference, -1), atol=1e-5)
    # Another object is another program.
    assert load(path, method="decode", device="cpu").weights["calls"].sum() == 0


def test_a_weight_that_is_a_view_into_its_storage(tmp_path: Path, part: Part) -> None:
    storage = torch.randn(5 + K * K)
    view = storage[5:].view(K, K)
    method = forward(tmp_path, once(dataclasses.replace(part, weights={**part.weights, "linear.weight": view})))
    assert torch.equal(method.weights["linear.weight"], view)
    assert torch.allclose(method(X)[0], X @ view.T + part.weights["linear.bias"] + 1, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "takes 1 inputs (torch.float32 at most [32, 16]), not 0"),
        ((X, X), "not 2"),
        ((1.0,), "input 0 is a float; wanted a tensor"),
        ((X.double(),), "input 0 has dtype torch.float64"),
        ((X[0],), "input 0 has the shape [16]"),
        ((X.repeat(11, 1),), "input 0 has the shape [33, 16]"),
        ((X.to_sparse(),), "input 0 is no plain tensor"),
        ((X.to("meta"),), "input 0 is no plain tensor"),
    ],
)
def test_inputs_that_a_method_does_not_take(given: tuple[object, ...], said: str, tmp_path: Path, part: Part) -> None:
    method = forward(tmp_path, once(part))
    with pytest.raises(DelegateError) as error:
        method(*given)
    assert said in str(error.value)
    assert method.weights["calls"].sum() == 0, "something ran"


def test_static_sizes_and_constant_inputs(tmp_path: Path, part: Part) -> None:
    values = [value(3, K), value(3, K), value(), schema.EValue(schema.Int(2)), schema.EValue(schema.Null())]
    method = forward(tmp_path, Spec(values, [0, 3, 4], [1], [part], [[0, 1, 2]]))
    assert method(X, 2, None)[0].shape == (3, K)
    for given, said in (((X, 3, None), "input 1 was exported as 2"), ((X, True, None), "found True")):
        with pytest.raises(DelegateError, match=said):
            method(*given)
    with pytest.raises(DelegateError, match=r"the shape \[2, 16\]; wanted torch.float32 \[3, 16\]"):
        method(X[:2], 2, None)


def wrong(weights: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = weights | {name.replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: wrong(w, linear_bias=None), "wants weights that its payload does not name: linear.bias"),
        (
            lambda w: wrong(w, linear_bias=w["linear.bias"][:0]),
            "reads weight 'linear.bias', which its",
        ),
        (lambda w: wrong(w, other=torch.ones(2)), "no use for weights that its payload names: other"),
        (lambda w: wrong(w, linear_weight=torch.ones(K, K - 1)), "wants 1024 bytes of weight 'linear.weight'"),
        (lambda w: wrong(w, linear_weight=torch.ones(K, K).int()), "'linear.weight' with ScalarType 6"),
    ],
)
def test_weights_that_are_not_the_library_s(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, tmp_path: Path, part: Part
) -> None:
    path = write(tmp_path, {"forward": once(dataclasses.replace(part, weights=change(dict(part.weights))))})
    with pytest.raises(DelegateError) as error:
        load(path, device="cpu")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "outputs", "calls", "said"),
    [
        ([0], [1], [[0, 1]], "passes 2 values to delegate 0, whose library has 1 inputs and 2 outputs"),
        ([0], [1], [[1, 0, 2]], "instruction 0 reads value 1, which nothing has written"),
        ([0], [3], [[0, 1, 2]], "an output reads value 3, which nothing has written"),
    ],
)
def test_a_method_that_does_not_fit_its_library(
    inputs: list[int], outputs: list[int], calls: list[list[int]], said: str, tmp_path: Path, part: Part
) -> None:
    values = [*once(part).values, value()]
    path = write(tmp_path, {"forward": Spec(values, inputs, outputs, [part], calls)})
    with pytest.raises(DelegateError) as error:
        load(path, device="cpu")
    assert said in str(error.value)


def test_a_result_that_is_not_what_the_program_says(tmp_path: Path, part: Part) -> None:
    spec = dataclasses.replace(once(part), values=[value(32, K, dynamism=BOUND), value(4, K), value()])
    with pytest.raises(
        DelegateError, match=r"value 1 has the shape \[3, 16\]; the program says torch.float32 \[4, 16\]"
    ):
        forward(tmp_path, spec)(X)


def test_a_static_program_that_its_library_does_not_fit_reads_nothing_beyond_its_inputs(
    tmp_path: Path, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AOTI_RUNTIME_CHECK_INPUTS", raising=False)
    values = [value(3, 5), value(3, K), value()]
    method = forward(tmp_path, dataclasses.replace(once(part), values=values))
    with pytest.raises(DelegateError, match="failed: .*the library says more on stderr"):
        method(torch.ones(3, 5))
    assert "AOTI_RUNTIME_CHECK_INPUTS" not in os.environ


def test_a_value_moved_to_one_of_another_kind(tmp_path: Path, part: Part) -> None:
    values = [*once(part).values, schema.EValue(schema.Int(3)), value(3, K)]
    instructions = [schema.MoveCall(3, 4), schema.DelegateCall(0, [4, 1, 2])]
    path = write(tmp_path, {"forward": Spec(values, [0], [1], [part], [], instructions)})
    with pytest.raises(DelegateError, match=r"instruction 0 moves value 3, 3, to value 4, torch.float32 \[3, 16\]"):
        load(path, device="cpu")


def test_a_library_that_was_changed_is_not_loaded(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"forward": once(part)})
    content = bytearray(path.read_bytes())
    content[content.index(b"\x7fELF") + len(part.library) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DelegateError, match="SHA-256"):
        load(path, device="cpu")


def test_libraries_that_are_none(tmp_path: Path, part: Part) -> None:
    with pytest.raises(DelegateError, match="does not load"):
        forward(tmp_path, once(dataclasses.replace(part, library=b"no library")))
    other = Path(torch.__file__).parent / "lib" / "libshm.so"
    with pytest.raises(DelegateError, match="is no library of AOTInductor"):
        forward(tmp_path, once(dataclasses.replace(part, library=other.read_bytes())))


def test_where_the_data_is_looked_for(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"forward": once(part)})
    data = tmp_path / "model.ptd"
    other = shutil.move(data, tmp_path / "aoti_cuda_blob.ptd")
    assert Program(path, device="cpu").data_path == other
    shutil.copy(other, tmp_path / "second.ptd")
    with pytest.raises(DelegateError, match=r"several .ptd files .*\(aoti_cuda_blob.ptd, second.ptd\)"):
        Program(path)
    assert load(path, other, device="cpu")(X)[0].shape == (3, K)
    shutil.copy(other, data)
    assert Program(path).data_path == data


def test_a_weight_of_the_gpu_is_not_run_on_the_cpu(tmp_path: Path, part: Part) -> None:
    assert entry("a", torch.ones(1), CUDA).storage_key == "cuda_fqn_weight:cuda:a"
    path = write(tmp_path, {"forward": once(dataclasses.replace(part, device=CUDA))})
    with pytest.raises(DelegateError, match="belongs on a CUDA device"):
        load(path, device="cpu")
    with pytest.raises(DelegateError, match="not on mps"):
        Program(path, device="mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"forward": once(part)})
    with pytest.raises(DelegateError, match="runs on a CUDA device, and there is none"):
        load(path)


def test_flipped_bits_of_a_file_that_runs(tmp_path: Path, part: Part) -> None:
    # Whatever still runs does so inside its own memory: with a fault, this process ends here.
    path = write(tmp_path, {"forward": once(part)})
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
