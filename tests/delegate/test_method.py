"""Methods whose libraries are compiled here for the CPU, in files written by ExecuTorch, compared with eager."""

import dataclasses
from pathlib import Path
from typing import cast

import pytest
import torch
from executorch.exir import schema
from torch import Tensor

from et_cuda_passes.delegate import DelegateError, Method, load
from et_cuda_passes.delegate.library import Library, LibrarySignature
from et_cuda_passes.delegate.plan import Call, Dynamism, Plan, TensorSpec, Value
from tests.delegate.delegated import BOUND, Counting, K, Part, Spec, X, load_forward, single_call, value, write


def test_method_matches_eager(tmp_path: Path, part: Part) -> None:
    method, model = load_forward(tmp_path, single_call(part)), Counting()
    assert [str(expected) for expected in method.inputs] == ["torch.float32 at most [32, 16]"]
    for rows in (1, 2, 32):
        x = torch.randn(rows, K)
        for got, expected in zip(method(x), model(x), strict=True):
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    # The weights are those of the file, and the buffer has what the method wrote to it.
    assert torch.equal(method.weights["linear.weight"], model.linear.weight)
    assert method.weights["calls"].tolist() == [3] * 4


def test_output_that_views_a_weight_is_not_changed_by_later_calls() -> None:
    state = torch.zeros(4)

    class WritesToItsWeight:
        signature = LibrarySignature(1, 1, ())

        def __call__(self, inputs: list[Tensor], static: bool) -> list[Tensor]:
            return [state.add_(inputs[0])[1:]]

    spec = TensorSpec(torch.float32, (4,), (0,), Dynamism.BOUND)
    plan = Plan("forward", (Value("tensor", spec), Value("tensor", spec)), (0,), (1,), (), (Call(0, (0, 1)),))
    libraries = cast("dict[int, Library]", {0: WritesToItsWeight()})
    method = Method(plan, libraries, {"state": state}, {}, torch.device("cpu"), "an example")
    first, second = method(torch.ones(4))[0], method(torch.ones(4))[0]
    assert (first.tolist(), second.tolist()) == ([1, 1, 1], [2, 2, 2])


def test_method_copies_inputs_with_another_memory_layout(tmp_path: Path, part: Part) -> None:
    method = load_forward(tmp_path, single_call(part))
    expected = method(X)[0] - 1
    odd = torch.empty(3 * K + 1)[1:].view(3, K).copy_(X)
    assert odd.data_ptr() % 16
    for calls, x in enumerate((X.T.contiguous().T, odd, X.clone().requires_grad_()), 2):
        assert torch.allclose(method(x)[0], expected + calls, atol=1e-5)


def test_method_runs_several_delegates_with_moves_between_them(tmp_path: Path, part: Part) -> None:
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
    method, model = load_forward(tmp_path, spec), Counting()
    inner, first = model(X)
    outer, second = model(inner)
    got = method(X)
    assert got[3] == 7
    for result, expected in zip(got[:3], (outer, first, second), strict=True):
        assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "takes 1 inputs (torch.float32 at most [32, 16]), not 0"),
        ((X, X), "not 2"),
        ((1.0,), "input 0 is a float; expected a tensor"),
        ((X.double(),), "input 0 has dtype torch.float64"),
        ((X[0],), "input 0 has shape [16]"),
        ((X.repeat(11, 1),), "input 0 has shape [33, 16]"),
        ((X.to_sparse(),), "input 0 is not a plain tensor"),
        ((X.to("meta"),), "input 0 is not a plain tensor"),
    ],
)
def test_method_checks_inputs_before_it_runs(
    given: tuple[object, ...], message: str, tmp_path: Path, part: Part
) -> None:
    method = load_forward(tmp_path, single_call(part))
    with pytest.raises(DelegateError) as error:
        method(*given)
    assert message in str(error.value)
    assert method.weights["calls"].sum() == 0, "something ran"


def test_method_checks_static_sizes_and_constant_inputs(tmp_path: Path, part: Part) -> None:
    values = [value(3, K), value(3, K), value(), schema.EValue(schema.Int(2)), schema.EValue(schema.Null())]
    method = load_forward(tmp_path, Spec(values, [0, 3, 4], [1], [part], [[0, 1, 2]]))
    assert method(X, 2, None)[0].shape == (3, K)
    for given, message in (((X, 3, None), "input 1 was exported as the constant 2"), ((X, True, None), "found True")):
        with pytest.raises(DelegateError, match=message):
            method(*given)
    with pytest.raises(DelegateError, match=r"shape \[2, 16\]; expected torch.float32 \[3, 16\]"):
        method(X[:2], 2, None)


@pytest.mark.parametrize(
    ("inputs", "outputs", "calls", "message"),
    [
        ([0], [1], [[0, 1]], "passes 2 values to delegate 0, whose library has 1 inputs and 2 outputs"),
        ([0], [1], [[1, 0, 2]], "instruction 0 reads value 1, which was not written before"),
        ([0], [3], [[0, 1, 2]], "an output reads value 3, which was not written before"),
    ],
)
def test_method_rejects_calls_that_do_not_fit_its_library(
    inputs: list[int], outputs: list[int], calls: list[list[int]], message: str, tmp_path: Path, part: Part
) -> None:
    values = [*single_call(part).values, value()]
    path = write(tmp_path, {"forward": Spec(values, inputs, outputs, [part], calls)})
    with pytest.raises(DelegateError) as error:
        load(path, device="cpu")
    assert message in str(error.value)


def test_method_rejects_an_output_of_a_library_with_another_shape(tmp_path: Path, part: Part) -> None:
    spec = dataclasses.replace(single_call(part), values=[value(32, K, dynamism=BOUND), value(4, K), value()])
    with pytest.raises(
        DelegateError, match=r"value 1 has shape \[3, 16\], but the program has torch.float32 \[4, 16\] there"
    ):
        load_forward(tmp_path, spec)(X)


def test_method_rejects_a_move_to_a_value_of_another_kind(tmp_path: Path, part: Part) -> None:
    values = [*single_call(part).values, schema.EValue(schema.Int(3)), value(3, K)]
    instructions = [schema.MoveCall(3, 4), schema.DelegateCall(0, [4, 1, 2])]
    path = write(tmp_path, {"forward": Spec(values, [0], [1], [part], [], instructions)})
    with pytest.raises(DelegateError, match=r"instruction 0 moves value 3, 3, to value 4, torch.float32 \[3, 16\]"):
        load(path, device="cpu")
