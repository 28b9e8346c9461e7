"""`verify`: correct lowerings pass, wrong ones fail, and its numbers follow the definition."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from safetensors.torch import save_file
from torch import Tensor

from et_cuda_passes.cli.compare import compare, default_tolerance
from tests.cli.command import Run, names
from tests.saved import save


def errors(out: str) -> list[float]:
    """The relative error of each output."""
    return [float(text) for text in re.findall(r"^output \d+ .*: relative error (\S+),", out, re.MULTILINE)]


@pytest.mark.parametrize(
    ("scheme", "target", "bound"),
    [
        ("4w", "xnnpack", 1e-6),
        ("8da4w", "xnnpack", 1e-2),
        ("float", "xnnpack", 1e-6),
        pytest.param("4w", "cpu", 1e-6, marks=pytest.mark.compiled),
    ],
)
def test_correct_lowering_passes_with_the_tolerance_of_its_activations(
    scheme: str, target: str, bound: float, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = save(tmp_path, scheme)
    monkeypatch.chdir(tmp_path)
    result = command("verify", path, "--target", target)
    assert result.code == 0, result.err
    line, verdict = result.out.splitlines()
    assert line.startswith("output 0 (torch.float32 [3, 64]): relative error ")
    assert line.endswith(": ok")
    assert f"lowered for {target} agrees with the original" in verdict
    assert errors(result.out)[0] < bound
    assert ("tolerance 1.56e-02" if scheme == "8da4w" else "tolerance 1.22e-04") in line
    assert names(tmp_path) == ["model.pt2"], "verify left files behind"


@pytest.mark.slow
def test_packed_bf16_program_for_the_cpu_passes(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    assert command("lower", path, "-t", "cpu", "--stop-after", "rewrite", "-o", tmp_path).code == 0
    result = command("verify", tmp_path / "model.cpu.packed.pt2", "-t", "cpu", "--random-seed", 5)
    assert result.code == 0, result.err
    assert result.out.startswith("MODEL is packed already: the lowered program is compared with the packed one\n")
    assert errors(result.out)[0] < 0.01


def test_unreachable_tolerance_fails(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "float")
    result = command("verify", path, "-t", "xnnpack", "--tolerance", "1e-9")
    assert result.code == 1
    assert result.out.rstrip().endswith("tolerance 1.00e-09: WRONG")
    assert "1 of 1 outputs are wrong, largest relative error" in result.error


def test_silently_wrong_lowering_fails(tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = save(tmp_path, "4w")

    def stock(program: Any, target: str, folder: Path, stem: str, progress: Callable[[str], None]) -> list[Path]:
        edge = to_edge_transform_and_lower(torch.export.load(path), partitioner=[XnnpackPartitioner()])
        (folder / "wrong.pte").write_bytes(edge.to_executorch().buffer)
        return [folder / "wrong.pte"]

    monkeypatch.setattr("et_cuda_passes.cli.verifying.lower", stock)
    result = command("verify", path, "-t", "xnnpack")
    assert result.code == 1
    assert errors(result.out)[0] > 10
    assert "1 of 1 outputs are wrong" in result.error


def test_inputs_come_from_a_file_a_seed_or_the_export(
    tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module = save(tmp_path, "float")
    seen: list[Tensor] = []

    def execute(target: str, files: list[Path], args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        seen.extend(args)
        return [module(*args)]

    monkeypatch.setattr("et_cuda_passes.cli.verifying.lower", lambda *_: [])
    monkeypatch.setattr("et_cuda_passes.cli.verifying.execute", execute)
    x = torch.randn(7, 64)
    save_file({"x": x}, tmp_path / "x.safetensors")
    for arguments in ((), ("--inputs", tmp_path / "x.safetensors"), ("--random-seed", 1), ("--random-seed", 1)):
        assert command("verify", path, "-t", "xnnpack", *arguments).code == 0
    example = torch.export.load(path).example_inputs[0][0]
    assert torch.equal(seen[0], example)
    assert torch.equal(seen[1], x)
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[2], example)


def test_invalid_arguments_are_errors(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "float")

    def said(*arguments: object) -> str:
        result = command("verify", path, *arguments)
        assert (result.code, result.out) == (2, "")
        return result.error

    assert "cuda, metal, xnnpack, cpu, vulkan" in said("-t", "tpu")
    assert "do not run from Python: verify supports cuda, xnnpack, cpu" in said("-t", "metal")
    assert "a relative error is 0 or more" in said("-t", "xnnpack", "--tolerance", "-1")
    assert "a relative error is 0 or more" in said("-t", "xnnpack", "--tolerance", "nan")
    inputs = tmp_path / "x.safetensors"
    for tensors, wanted in (
        ({"0": torch.ones(1, 64), "1": torch.ones(1)}, "MODEL has 1 tensor inputs, --inputs has 2"),
        (
            {"0": torch.ones(1, 64, dtype=torch.int64)},
            "input 0 is torch.int64 [1, 64], MODEL was exported with",
        ),
        ({"0": torch.ones(65, 64)}, "the original program does not run with these inputs"),
    ):
        save_file(tensors, inputs)
        assert wanted in said("-t", "xnnpack", "--inputs", inputs)
    assert "give one of them" in said("-t", "xnnpack", "--inputs", inputs, "--random-seed", 1)


def test_verify_for_cuda_without_a_gpu_is_an_error(tmp_path: Path, command: Run, no_gpu: None) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    result = command("verify", path, "--target", "cuda")
    assert (result.code, result.out) == (1, "")
    assert "verifying for cuda needs a CUDA device" in result.error


def test_program_that_cannot_be_lowered_is_an_error(tmp_path: Path, command: Run) -> None:
    path, _ = save(tmp_path, "4w", torch.bfloat16)
    program = torch.export.load(path)
    program.state_dict["up.weight"].scale[0, 0] = float("nan")
    torch.export.save(program, path)
    result = command("verify", path, "-t", "xnnpack")
    assert result.code == 1
    assert "could not be lowered for xnnpack" in result.error


def test_relative_and_largest_error_follow_the_definition() -> None:
    wanted = torch.tensor([3.0, 4.0, 0.0])
    found = compare(2, torch.tensor([3.0, 4.0, 0.05]), wanted, 0.0101, False)
    assert (found.relative, found.largest) == (pytest.approx(0.01), pytest.approx(0.05))
    assert found.holds
    assert str(found) == (
        "output 2 (torch.float32 [3]): relative error 1.00e-02, largest 5.00e-02, tolerance 1.01e-02: ok"
    )
    assert not compare(2, torch.tensor([3.0, 4.0, 0.05]), wanted, 0.0099, False).holds
    # If the original is 0, any error is infinite, and equality has the error 0.
    assert compare(0, torch.zeros(2), torch.zeros(2), None, False).holds
    assert not compare(0, torch.full((2,), 1e-30), torch.zeros(2), 1e9, False).holds


@pytest.mark.parametrize(
    ("got", "wanted", "said"),
    [
        (torch.ones(2), torch.ones(3), r"is torch.float32 \[2\]"),
        (torch.ones(2).half(), torch.ones(2), "is torch.float16"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), "1 of 2 elements are infinite or NaN in only one"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "1 of 1 elements"),
        (torch.tensor([1, 2, 4, 4]), torch.tensor([1, 2, 3, 4]), "relative error 2.50e-01"),
        (3, 4, "is 3, the original is 4"),
        (None, torch.ones(1), "is None"),
    ],
)
def test_wrong_results_do_not_hold(got: object, wanted: object, said: str) -> None:
    found = compare(0, got, wanted, None, True)
    assert not found.holds
    assert re.search(said, str(found))
    assert str(found).endswith("WRONG")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_without_finite_elements_is_wrong(value: float) -> None:
    both = torch.full((2, 3), value)
    comparison = compare(0, both, both.clone(), None, False)
    assert not comparison.holds
    assert str(comparison).endswith("none of its 6 elements is finite, so none was compared; give other inputs: WRONG")


def test_output_without_elements_holds() -> None:
    assert compare(0, torch.ones(0, 3), torch.ones(0, 3), None, False).holds


def test_equal_infinities_and_nans_hold() -> None:
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0])
    assert compare(0, odd, odd.clone(), None, False).holds
    assert compare(0, None, None, None, False).holds
    assert compare(0, torch.tensor([True]), torch.tensor([True]), None, False).holds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_default_tolerance_lies_between_rounding_and_a_wrong_weight(dtype: torch.dtype) -> None:
    x, weight = torch.randn(64, 512, dtype=torch.float64), torch.randn(512, 512, dtype=torch.float64)
    limit = default_tolerance(dtype)
    rounded = (x.to(dtype) @ weight.to(dtype)).double()
    exact = x.to(dtype).double() @ weight.to(dtype).double()
    assert float((rounded - exact).norm() / exact.norm()) < limit / 2
    # One column of a hundred has other weights.
    broken = weight.clone()
    broken[:, ::100] = torch.randn(512, 6, dtype=torch.float64)
    assert float((x @ broken - x @ weight).norm() / (x @ weight).norm()) > 2 * limit
    assert default_tolerance(dtype, True) >= max(limit, 1 / 255)
