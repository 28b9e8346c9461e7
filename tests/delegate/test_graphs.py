"""Methods that a CUDA graph cannot capture are refused before anything runs; graphs themselves need a GPU."""

from pathlib import Path

import pytest
import torch
from executorch.exir import schema

from et_cuda_passes.delegate import DelegateError, Program, load
from et_cuda_passes.delegate.graphs import capture_problem
from tests.delegate.delegated import BOUND, K, Part, Spec, single_call, value, write

CUDA = torch.device("cuda")


def refusal(folder: Path, spec: Spec, device: str = "cuda") -> str:
    path = write(folder, {"forward": spec})
    with pytest.raises(DelegateError) as error:
        load(path, device=device, cuda_graph=True)
    assert str(error.value).startswith(f"{path}: method 'forward' cannot be captured in a CUDA graph: ")
    return str(error.value).partition("CUDA graph: ")[2]


def static(part: Part) -> Spec:
    return Spec([value(3, K), value(3, K), value()], [0], [1, 2], [part], [[0, 1, 2]])


def test_dynamic_input_is_refused(tmp_path: Path, part: Part) -> None:
    assert refusal(tmp_path, single_call(part)) == (
        "input 0, torch.float32 at most [32, 16], has a dynamic size, and a graph has fixed ones: export the method "
        "with static sizes, such as one token, or load it without cuda_graph=True"
    )


def test_dynamic_intermediate_result_is_refused(tmp_path: Path, part: Part) -> None:
    spec = Spec([value(3, K), value(32, K, dynamism=BOUND), value()], [0], [1, 2], [part], [[0, 1, 2]])
    assert "an intermediate result, torch.float32 at most [32, 16], has a dynamic size" in refusal(tmp_path, spec)


def test_operator_whose_result_the_host_reads_is_refused(tmp_path: Path, part: Part) -> None:
    values = [value(3, K), value(3, K), value(), schema.EValue(schema.Int(0))]
    steps = [schema.DelegateCall(0, [0, 1, 2]), schema.KernelCall(0, [2, 3])]
    spec = Spec(values, [0], [1], [part], [], steps, [("aten::_local_scalar_dense", "")])
    assert "the host reads the result of aten::_local_scalar_dense" in refusal(tmp_path, spec)


def test_method_on_the_cpu_is_refused(tmp_path: Path, part: Part) -> None:
    assert refusal(tmp_path, static(part), "cpu") == (
        "it runs on cpu, and a CUDA graph needs a CUDA device: load it without cuda_graph=True"
    )


def test_static_method_can_be_captured(tmp_path: Path, part: Part) -> None:
    path = write(tmp_path, {"forward": static(part)})
    assert capture_problem(Program(path).plan("forward"), CUDA) is None
    if not torch.cuda.is_available():
        with pytest.raises(DelegateError, match="needs a CUDA device, and torch finds no such device"):
            load(path, cuda_graph=True)
