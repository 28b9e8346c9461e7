"""`export` for several targets of which one cannot take the schemes or the model, and for the keep targets."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from tests.cli.command import Run, names
from tests.hf import checkpoints
from tests.plugins import install


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "masked"
    checkpoints.masked(folder)
    return folder


def test_target_that_cannot_take_a_scheme_is_left_out_with_a_table(model: Path, tmp_path: Path, command: Run) -> None:
    output = tmp_path / "out"
    result = command(
        "export",
        "--model",
        model,
        "--target",
        "xnnpack,metal",
        "--qlinear",
        "8w",
        "--dtype",
        "float32",
        "--output-dir",
        output,
    )
    assert result.code == 1
    first = result.err.splitlines()[0]
    assert first.startswith("metal is left out: --qlinear=8w: metal has no kernel for 8w; metal has kernels for 4w")
    assert "model.xnnpack.pte" in names(output) and not [name for name in names(output) if "metal" in name]
    rows = [line for line in result.out.splitlines() if line.startswith(("xnnpack  ", "metal  "))]
    assert rows[0] == "xnnpack  written"
    assert rows[1].startswith("metal    left out: --qlinear=8w: metal has no kernel for 8w")
    assert "metal is left out" in result.error


def test_json_has_the_targets_that_are_left_out(model: Path, tmp_path: Path, command: Run) -> None:
    result = command(
        "export", "--model", model, "--target", "cuda,metal", "--qlinear", "8w", "--dtype", "float32",
        "--cast-to-bf16", "--output-dir", tmp_path / "out", "--json",
    )  # fmt: skip
    found = json.loads(result.out)
    assert result.code == 1 and list(found["left_out"]) == ["metal"] and list(found["reports"]) == ["cuda"]


def test_strict_refuses_before_the_model_is_loaded(tmp_path: Path, command: Run) -> None:
    result = command(
        "export", "--model", tmp_path / "none", "--target", "cpu,metal", "--qlinear", "8w", "--strict",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 2 and result.error.startswith(
        "error: --strict: metal: --qlinear=8w: metal has no kernel for 8w"
    )
    assert not (tmp_path / "out").exists()


def test_strict_refuses_a_target_that_folds(tmp_path: Path, command: Run) -> None:
    result = command(
        "export", "--model", tmp_path / "none", "--target", "coreml,vulkan", "--qlinear", "8w", "--strict",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 2
    assert "vulkan: --qlinear=8w: it computes with floating-point weights; vulkan has kernels for 4w" in result.error


def test_strict_refuses_a_model_with_dynamic_sizes_for_openvino(model: Path, tmp_path: Path, command: Run) -> None:
    result = command(
        "export", "--model", model, "--target", "xnnpack,openvino", "--qlinear", "8da4w", "--dtype", "float32",
        "--strict", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 2 and not (tmp_path / "out" / "export.json").exists()
    assert result.error.startswith("error: --strict: openvino: it takes inputs of fixed sizes")


def test_targets_that_are_all_left_out_for_different_reasons_are_refused(tmp_path: Path, command: Run) -> None:
    result = command(
        "export", "--model", tmp_path / "none", "--target", "mlx,metal", "--qlinear", "8w", "--output-dir",
        tmp_path / "out",
    )  # fmt: skip
    assert result.code == 2
    assert "metal has no kernel for 8w" in result.error and "target mlx is not lowered here" in result.error


@pytest.fixture
def no_compiler(tmp_path: Path) -> Iterator[None]:
    """A C++ compiler that fails, in an empty cache of compiled code."""
    with inductor.patch({"cpp.cxx": ("/bin/false",)}), fresh_cache(dir=str(tmp_path)):
        yield


@pytest.mark.usefixtures("no_compiler")
def test_error_in_the_lowering_of_one_target_leaves_the_others(model: Path, tmp_path: Path, command: Run) -> None:
    output = tmp_path / "out"
    result = command(
        "export", "--model", model, "--target", "cpu,metal", "--qlinear", "4w", "--dtype", "float32",
        "--output-dir", output,
    )  # fmt: skip
    assert result.code == 1
    rows = [line for line in result.out.splitlines() if line.startswith(("cpu  ", "metal  "))]
    assert [row.split()[:2] for row in rows] == [["metal", "written"], ["cpu", "failed:"]]
    assert "failed: compiling with AOTInductor: " in rows[-1] and "Traceback" not in result.err
    assert result.error.startswith("error: cpu failed: compiling with AOTInductor: ")
    assert "model.metal.packed.pt2" in names(output) and "model.cpu.pt2" not in names(output)
    assert list(json.loads((output / "report.json").read_text())["targets"]) == ["metal"]
    assert list(json.loads((output / "model.etcp.json").read_text())["targets"]) == ["metal"]


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "options",
    [("--target", "metal,cpu", "--strict"), pytest.param(("--target", "cpu"), marks=pytest.mark.slow)],
    ids=str,
)
def test_strict_export_or_the_last_target_writes_nothing_after_an_error(
    options: tuple[str, ...], model: Path, tmp_path: Path, command: Run
) -> None:
    result = command(
        "export", "--model", model, *options, "--qlinear", "4w", "--dtype", "float32", "--output-dir",
        tmp_path / "out",
    )  # fmt: skip
    assert result.code == 1 and result.error.startswith("error: cpu: compiling with AOTInductor: ")
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


def test_scheme_that_no_target_takes_is_refused(tmp_path: Path, command: Run) -> None:
    result = command(
        "export", "--model", tmp_path / "none", "--target", "metal", "--qlinear", "8w", "--output-dir", tmp_path / "out"
    )
    assert result.code == 2 and "metal has no kernel for 8w" in result.error


@pytest.mark.parametrize(
    ("target", "text"),
    [("mlx", "give the rewritten program to ExecuTorch's MLXPartitioner"), ("tensorrt", "torch-tensorrt after 2.14")],
)
def test_target_without_a_lowering_is_refused_with_what_lowers_it(
    target: str, text: str, tmp_path: Path, command: Run
) -> None:
    result = command(
        "export", "--model", tmp_path / "none", "--target", target, "--qlinear", "4w", "--output-dir", tmp_path / "out"
    )
    assert result.code == 2
    assert result.error.startswith(f"error: target {target} is not lowered here: ") and text in result.error


def test_text_model_for_openvino_is_refused_before_it_is_traced(model: Path, tmp_path: Path, command: Run) -> None:
    result = command(
        "export", "--model", model, "--target", "openvino", "--qlinear", "4w", "--dtype", "float32", "--output-dir",
        tmp_path / "out",
    )  # fmt: skip
    assert result.code == 2
    assert "--target openvino: it takes inputs of fixed sizes, and those of a model of text are dynamic" in result.error
    assert not (tmp_path / "out" / "export.json").exists()


@pytest.mark.slow
def test_export_for_keep_targets_writes_a_program_for_each(model: Path, tmp_path: Path, command: Run) -> None:
    output = tmp_path / "out"
    result = command(
        "export",
        "--model",
        model,
        "--target",
        "vulkan,coreml",
        "--qlinear",
        "4w",
        "--dtype",
        "float32",
        "--output-dir",
        output,
    )
    assert result.code == 0, result.err
    assert {"model.vulkan.pte", "model.coreml.pte"} <= set(names(output))
    assert "keep_vulkan_linear" in result.out and "keep_coreml_weight" in result.out


# Targets of other packages --------------------------------------------------------------------------------------------

NPU = """
import torch

import et_cuda_passes as ecp
from et_cuda_passes.executorch.xnnpack import XnnpackPartitioner


def npu(name, **options):
    return ecp.Target(name, "an accelerator", {}, lambda: list(ecp.default_passes("xnnpack")), **options)


lowered = npu("my_npu", partitioner=lambda method: XnnpackPartitioner())
unlowered = npu("other_npu")


def too_large(method):
    return torch.empty(1 << 60)


def on_a_full_disk(method):
    try:
        with open("/dev/full", "wb") as file:
            file.write(b"program")
    except OSError as error:
        raise RuntimeError("the partitioner failed") from error


without_memory = npu("hungry_npu", partitioner=too_large)
without_disk = npu("writing_npu", partitioner=on_a_full_disk)
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Targets of other packages.

    my_npu is lowered; other_npu has no lowering; the lowerings of hungry_npu and writing_npu need more memory and more
    disk than there is; the package of bad_npu cannot be imported.
    """
    for package, source, entry in (
        ("my-npu", NPU, "lowered"),
        ("other-npu", NPU, "unlowered"),
        ("hungry-npu", NPU, "without_memory"),
        ("writing-npu", NPU, "without_disk"),
        ("bad-npu", "import nowhere_at_all", "npu"),
    ):
        install(tmp_path / "plugins", package, source, entry, "targets")
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.setenv("ETCP_PLUGINS", "1")
    yield
    for module in ("my_npu", "other_npu", "hungry_npu", "writing_npu"):
        sys.modules.pop(module, None)


@pytest.mark.usefixtures("plugins")
def test_export_writes_a_program_for_a_target_of_another_package(tmp_path: Path, command: Run) -> None:
    model, output = checkpoints.image_classifier(tmp_path / "model"), tmp_path / "out"
    result = command(
        "export", "--model", model, "--target", "my_npu", "--qlinear", "my_npu:8da4w", "--output-dir", output
    )
    assert result.code == 0, result.err
    assert "model.my_npu.pte" in names(output) and "7 x keep_dynamic_int4" in result.out
    result = command("verify", output, "--model", model, "--target", "my_npu", "--trust")
    assert result.code == 1 and "programs for my_npu do not run in Python" in result.error


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
def test_target_that_lacks_memory_fails_alone_and_one_on_a_full_disk_ends_the_export(
    tmp_path: Path, command: Run
) -> None:
    model, output = checkpoints.image_classifier(tmp_path / "model"), tmp_path / "out"
    arguments = ("export", "--model", model, "--qlinear", "8da4w", "--output-dir", output, "--target")
    result = command(*arguments, "writing_npu,my_npu")
    assert result.code == 1 and "writing_npu failed" not in result.err
    assert "the disk is full; free some space and run the command again" in result.error
    assert not output.exists() or names(output) == []
    result = command(*arguments, "hungry_npu,my_npu")
    assert result.code == 1
    assert result.error.startswith("error: hungry_npu failed: ") and "there is not enough memory" in result.error
    assert "model.my_npu.pte" in names(output) and "model.hungry_npu.pte" not in names(output)


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("other_npu", "target other_npu has no lowering: give its Target a partitioner="),
        ("bad_npu", "target 'bad_npu' cannot be imported from bad_npu:npu (ModuleNotFoundError"),
        ("my_npu:lowered", "targets that have a name: give this one an entry point"),
        ("no_npu", "there is no target 'no_npu'; the nearest are other_npu, my_npu, hungry_npu"),
    ],
)
def test_target_of_another_package_without_a_lowering_is_refused_before_work(
    target: str, message: str, tmp_path: Path, command: Run
) -> None:
    result = command(
        "export", "--model", tmp_path / "none", "--target", target, "--qlinear", "4w", "--output-dir", tmp_path / "out"
    )
    assert result.code == 2 and message in result.error
