"""`run`: execution of a method, its conditions, and the printed summary."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from executorch.exir import schema
from safetensors.torch import save_file

from tests.cli.command import Run
from tests.delegate.delegated import Counting, K, Spec, counting, single_call, value, write
from tests.saved import save

X = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
CPU = ("--device", "cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"x": X}, tmp_path / "x.safetensors")
    return write(tmp_path, {"forward": single_call(counting())})


@pytest.mark.compiled
def test_run_prints_a_summary_of_each_output(model: Path, command: Run) -> None:
    result = command("run", model, "--inputs", model.with_name("x.safetensors"), "--trust", *CPU)
    assert result.code == 0, result.err
    y, total = (output.detach().double() for output in Counting()(X))
    lines = result.out.splitlines()
    assert [line.partition(", mean ")[0] for line in lines] == [
        "output 0: torch.float32 [3, 16]",
        "output 1: torch.float32 []",
    ]
    for line, wanted in zip(lines, (y, total), strict=True):
        times = re.search(r"mean (\S+), largest (\S+)$", line)
        assert times is not None
        assert float(times[1]) == pytest.approx(float(wanted.mean()), rel=1e-4)
        assert float(times[2]) == pytest.approx(float(wanted.abs().max()), rel=1e-4)
    assert "loading forward of" in result.err


def test_random_inputs_depend_on_the_seed(model: Path, command: Run) -> None:
    by_default, zero, one = (
        command("run", model, "--trust", *CPU, *seed).out for seed in ((), ("--random-seed", 0), ("--random-seed", 1))
    )
    assert "output 0: torch.float32 [32, 16], mean" in by_default
    assert by_default == zero != one


def test_benchmark_prints_the_times(model: Path, command: Run) -> None:
    result = command("run", model, "--trust", "--benchmark", *CPU)
    line = result.out.splitlines()[-1]
    times = re.match(r"forward: median (\S+) us, fastest (\S+) us, 90 % under (\S+) us \((\d+) runs ", line)
    assert times is not None
    median, fastest, most = map(float, times.groups()[:3])
    assert 0 < fastest <= median <= most
    assert int(times[4]) >= 20


def test_nothing_is_executed_without_trust(
    model: Path, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("et_cuda_passes.cli.running.Program.method", lambda *_: pytest.fail("loaded"))
    result = command("run", model, *CPU)
    assert (result.code, result.out) == (2, "")
    assert "was not executed; give --trust" in result.error


def test_constants_are_inserted_between_the_inputs(command: Run, tmp_path: Path) -> None:
    spec = single_call(counting())
    spec = dataclasses.replace(spec, values=[*spec.values, schema.EValue(schema.Int(5))], inputs=[3, 0], outputs=[3, 2])
    path = write(tmp_path, {"forward": spec})
    save_file({"0": X}, tmp_path / "x.safetensors")
    result = command("run", path, "--inputs", tmp_path / "x.safetensors", "--trust", *CPU)
    assert result.code == 0, result.err
    assert result.out.startswith("output 0: 5\noutput 1: torch.float32 []")


def test_invalid_inputs_are_errors(model: Path, command: Run, tmp_path: Path) -> None:
    def said(*arguments: object) -> str:
        result = command("run", model, "--trust", *CPU, *arguments)
        assert (result.code, result.out) == (2, "")
        return result.error

    assert "give one of them" in said("--inputs", tmp_path / "x.safetensors", "--random-seed", 1)
    assert "cannot be read as safetensors" in said("--inputs", tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    assert "cannot be read as safetensors" in said("--inputs", tmp_path / "bad.safetensors")
    for tensors, wanted in (
        ({"a": X, "b": X.clone()}, "holds a, b: name the inputs 0, 1, ... in order"),
        ({"0": X, "1": X.clone()}, "takes 1 inputs (torch.float32 at most [32, 16]), not 2"),
        ({"0": X.double()}, "input 0 has dtype torch.float64"),
        ({"0": X.repeat(11, 1)}, "input 0 has shape [33, 16]"),
    ):
        save_file(tensors, tmp_path / "y.safetensors")
        assert wanted in said("--inputs", tmp_path / "y.safetensors")
    assert "unknown device" in said("--device", "gpu7")


def test_invalid_files_are_errors(model: Path, command: Run, tmp_path: Path) -> None:
    content = model.read_bytes()
    (tmp_path / "cut.pte").write_bytes(content[: len(content) // 2])
    for arguments, wanted in (
        ((tmp_path / "missing.pte",), "missing.pte cannot be read"),
        ((tmp_path / "cut.pte", "--data", tmp_path / "model.ptd"), "cut.pte: segments["),
        ((model, "--data", model), "is not a .ptd data file"),
        ((model, "--method", "decode"), "has no method 'decode'; it has forward"),
    ):
        result = command("run", *arguments, "--trust", *CPU)
        assert (result.code, result.out) == (2, "")
        assert wanted in result.error


def test_operators_outside_the_delegate_are_named(command: Run, tmp_path: Path) -> None:
    calls = [schema.KernelCall(0, [0, 0, 1])]
    values = [value(2), value(2)]
    path = write(tmp_path, {"forward": Spec(values, [0], [1], [], [], calls, [("mine::relu", "out")])})
    result = command("run", path, "--trust", *CPU)
    assert result.code == 2
    assert "operators outside the CUDA delegate that are not available here: mine::relu.out" in result.error

    saved, _ = save(tmp_path, "float")
    assert command("lower", saved, "--target", "xnnpack", "--output-dir", tmp_path / "out").code == 0
    result = command("run", tmp_path / "out" / "model.xnnpack.pte", "--trust")
    assert result.code == 2
    assert "runs delegates of XnnpackBackend, but only delegates of CudaBackend can run here" in result.error


def test_library_that_does_not_load_is_an_error(command: Run, tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": single_call(dataclasses.replace(counting(), library=b"no library"))})
    result = command("run", path, "--trust", *CPU)
    assert result.code == 1
    assert "does not load" in result.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_run_without_a_gpu_is_an_error(model: Path, command: Run) -> None:
    result = command("run", model, "--trust")
    assert result.code == 1
    assert "needs a CUDA device, and torch finds no such device" in result.error
