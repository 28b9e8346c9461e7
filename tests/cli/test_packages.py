"""Targets, rules and operators of another package on the command line: the package of docs/how-to/add-a-target.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis

import et_cuda_passes as ecp
from tests.cli.command import Result
from tests.processes import finished

ROOT = Path(ecp.__file__).parent.parent
LOWERED = """
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

folded = ecp.Target(
    "folded", "float weights on XNNPACK", kernels={}, passes=lambda: [ecp.FoldDequantize()],
    partitioner=lambda method: XnnpackPartitioner(),
)
as_xnnpack = ecp.Target(
    "as_xnnpack", "the same", kernels={}, passes=lambda: [ecp.FoldDequantize()], lowered_as="xnnpack"
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages my_npu and lowered_here, which are not installed, and model.pt2."""
    path = tmp_path_factory.mktemp("packages")
    page = (ROOT / "docs" / "how-to" / "add-a-target.md").read_text(encoding="utf-8")
    (source,) = re.findall(r'^```python\n("""my_npu: .*?)^```', page, re.MULTILINE | re.DOTALL)
    (path / "my_npu").mkdir()
    (path / "my_npu" / "__init__.py").write_text(source)
    (path / "lowered_here.py").write_text(f"import et_cuda_passes as ecp\n{LOWERED}")
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).eval()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)))
    torch.export.save(torch.export.export(model, (torch.randn(2, 64),)), path / "model.pt2")
    return path


def run(folder: Path, *arguments: object, installed: bool = False) -> Result:
    """Run the command line in a process of its own, where the packages of ``folder`` can be imported."""
    path = [str(folder)]
    if installed:
        info = folder / "installed" / "my_npu-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_npu\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[et_cuda_passes.targets]\nmy_npu = my_npu:npu\n")
        path.append(str(info.parent))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path), "ETCP_PLUGINS": "1"}
    return finished(*arguments, folder=folder / "work", cwd=folder, variables=variables)


@pytest.mark.parametrize(
    ("target", "installed"), [("my_npu:npu", False), pytest.param("my_npu", True, marks=pytest.mark.slow)]
)
def test_target_of_another_package_is_explained(target: str, installed: bool, folder: Path) -> None:
    result = run(folder, "explain", "model.pt2", "--target", target, installed=installed)
    assert result.code == 0, result.err
    assert "my_npu: 1 candidate: 1 rewritten, 0 kept, 0 missed" in result.out
    assert "rewritten     1 x npu_linear" in result.out


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (
            "my_npu",
            "known targets are cuda, metal, xnnpack, cpu, vulkan",
        ),
        pytest.param(
            "nowhere:npu",
            "cannot be imported from nowhere:npu (ModuleNotFoundError: No module named 'nowhere')",
            marks=pytest.mark.slow,
        ),
        ("my_npu:other", "AttributeError: module 'my_npu' has no attribute 'other'"),
        pytest.param("my_npu:NpuLinear", "not an et_cuda_passes.Target", marks=pytest.mark.slow),
    ],
)
def test_target_that_is_not_found_is_an_error_with_the_fix(target: str, error: str, folder: Path) -> None:
    result = run(folder, "explain", "model.pt2", "--target", target)
    assert result.code == 2
    assert error in result.error


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The program with my_npu's operator."""
    out = folder / "packed"
    result = run(
        folder,
        "lower",
        "model.pt2",
        "-t",
        "my_npu:npu",
        "-o",
        out,
        "--stop-after",
        "rewrite",
        "--expect",
        "npu_linear=1",
    )
    assert result.code == 0, result.err
    assert sorted(path.name for path in out.iterdir()) == ["model.my_npu.packed.pt2", "report.html", "report.json"]
    return out / "model.my_npu.packed.pt2"


@pytest.mark.slow
def test_program_with_an_operator_of_another_package_names_it_and_the_fix(packed: Path, folder: Path) -> None:
    result = run(folder, "explain", packed, "--target", "cpu", "--trust")
    assert result.code == 2
    assert (
        f"{packed} calls my_npu::int8_linear, which no imported package registers: import the package" in result.error
    )
    assert "--import PACKAGE" in result.error and "entry point in the group et_cuda_passes.targets" in result.error
    assert "damaged" not in result.error
    # In a process of its own, because other tests may have registered the operator.
    code = f"import et_cuda_passes as ecp; ecp.load({str(packed)!r}, trust=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert f"ModelError: {packed} calls my_npu::int8_linear, which no imported package registers" in done.stderr


def test_program_with_an_operator_of_another_package_is_read_only_with_trust(packed: Path, folder: Path) -> None:
    result = run(folder, "explain", packed, "--target", "my_npu:npu")
    assert result.code == 2
    assert "an operator of a package that is not known to be safe" in result.error and "--trust" in result.error


@pytest.mark.parametrize(
    ("options", "target", "installed"),
    [
        pytest.param((), "my_npu:npu", False, marks=pytest.mark.slow),
        pytest.param(("--import", "my_npu"), "my_npu:npu", False, marks=pytest.mark.slow),
        ((), "my_npu", True),
    ],
)
def test_program_with_an_operator_of_another_package_is_read_after_its_import(
    options: tuple[str, ...], target: str, installed: bool, packed: Path, folder: Path
) -> None:
    result = run(folder, *options, "explain", packed, "--target", target, "--trust", installed=installed)
    assert result.code == 0, result.err
    assert "rewritten     1 x npu_linear" in result.out


@pytest.mark.parametrize(
    ("options", "installed"), [(("--import", "my_npu"), False), pytest.param((), True, marks=pytest.mark.slow)]
)
def test_import_or_entry_point_registers_the_operators_for_any_target(
    options: tuple[str, ...], installed: bool, packed: Path, folder: Path
) -> None:
    result = run(folder, *options, "explain", packed, "--target", "cpu", "--trust", installed=installed)
    assert [line.partition(":")[0] for line in result.err.splitlines()] == ["error"]
    assert "rewritten for target my_npu, which target cpu does not run" in result.error


def test_package_that_cannot_be_imported_is_an_error(folder: Path) -> None:
    result = run(folder, "--import", "nowhere", "explain", "model.pt2", "--target", "cpu")
    assert result.code == 2
    assert "nowhere cannot be imported (ModuleNotFoundError: No module named 'nowhere')" in result.err


def test_target_without_a_lowering_is_an_error_before_the_rewrite(folder: Path) -> None:
    result = run(folder, "lower", "model.pt2", "-t", "my_npu:npu", "-o", folder / "none")
    assert result.code == 2
    assert "target my_npu has no lowering: give its Target a partitioner=" in result.error
    assert "--stop-after rewrite" in result.error
    assert not (folder / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folded", pytest.param("as_xnnpack", marks=pytest.mark.slow)])
def test_target_of_another_package_is_lowered(name: str, folder: Path, tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    result = run(folder, "lower", "model.pt2", "-t", f"lowered_here:{name}", "-o", tmp_path)
    assert result.code == 0, result.err
    program = torch.export.load(folder / "model.pt2")
    x = torch.randn(2, 64)
    method = Runtime.get().load_program(tmp_path / f"model.{name}.pte").load_method("forward")
    assert method is not None
    torch.testing.assert_close(method.execute([x])[0], program.module()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_target_that_is_lowered_as_another_one_is_verified(folder: Path) -> None:
    result = run(folder, "verify", "model.pt2", "-t", "lowered_here:as_xnnpack")
    assert result.code == 0, result.err
    assert "agrees with the original" in result.out
    result = run(folder, "verify", "model.pt2", "-t", "lowered_here:folded")
    assert result.code == 2
    assert "programs for lowered_here:folded do not run from Python" in result.error
