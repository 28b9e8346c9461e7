"""Lowered files: their names, that they appear completely or not at all, and that nothing else changes."""

import os
import platform
import signal
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.canonical_partitioners.all_node_partitioner import AllNodePartitioner
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from executorch.runtime import Runtime
from torch._higher_order_ops.map import map as over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.export.pt2_archive._package import load_pt2
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.executorch import lower as module
from et_cuda_passes.executorch.lower import (
    atomic_output,
    lower,
    missing_requirement,
    move_files,
    staging_folder,
    uninterrupted,
)
from et_cuda_passes.executorch.packed import ModelError, load_model, save_packed
from et_cuda_passes.executorch.run import execute
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.targets.compatibility import packed_layouts
from et_cuda_passes.testing import Quantized, Sketch
from tests.graph.subgraph_models import INPUTS, cond, exported, looped, mapped, scanned
from tests.saved import save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewritten(folder: Path, target: str, scheme: str = "4w", dtype: torch.dtype = torch.float32) -> Any:
    path, _ = save(folder, scheme, dtype)
    return ecp.rewrite(torch.export.load(path), target)


def test_kept_program_for_xnnpack_equals_that_of_the_stock_partitioner(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "8da4w")
    program, report = ecp.rewrite(torch.export.load(path), "xnnpack")
    assert report.counts()["kept"] == 2
    steps: list[str] = []
    files = lower(program, "xnnpack", tmp_path / "out", "stem", steps.append)
    assert files == [tmp_path / "out" / "stem.pte"]
    assert steps == ["decomposing forward", "lowering", "serializing"]
    stock = to_edge_transform_and_lower(torch.export.load(path), partitioner=[Stock()]).to_executorch()
    assert files[0].read_bytes() == stock.buffer


class OutsideBackend(BackendDetails):
    """A backend that stores its data outside the .pte, as the CUDA backend does, and computes nothing."""

    files = ("outside_blob",)

    @staticmethod
    def preprocess(program: Any, specs: Any) -> PreprocessResult:
        store = NamedDataStore()
        for name in OutsideBackend.files:
            store.add_named_data(f"key of {name}", b"weights" * 100, 1, name)
        return PreprocessResult(processed_bytes=b"code", data_store_output=store.get_named_data_store_output())


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    partitioner = AllNodePartitioner(OutsideBackend.__name__, [])
    monkeypatch.setattr("et_cuda_passes.executorch.cuda.CudaPartitioner", lambda specs, passes: partitioner)


def test_data_outside_the_pte_is_named_after_the_program(tmp_path: Path, outside: None) -> None:
    program, _ = rewritten(tmp_path, "cuda", "float")
    files = lower(program, "cuda", tmp_path / "out", "a.stem")
    assert [path.name for path in files] == ["a.stem.ptd", "a.stem.pte"]
    held = FlatTensorSerializer().deserialize(Cord(files[0].read_bytes()))
    assert b"".join(held.buffers[0:1]) == b"weights" * 100


def test_several_data_files_keep_their_names_after_that_of_the_program(
    tmp_path: Path, outside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutsideBackend, "files", ("one", "two"))
    program, _ = rewritten(tmp_path, "cuda", "float")
    files = lower(program, "cuda", tmp_path / "out", "stem")
    assert [path.name for path in files] == ["stem.one.ptd", "stem.pte", "stem.two.ptd"]


def test_lowering_that_fails_midway_writes_nothing(
    tmp_path: Path, outside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executorch.exir import ExecutorchProgramManager

    def full(self: Any, folder: str) -> None:
        assert names(Path(folder)) == ["stem.pte"]  # the first of two files is complete at this point
        raise OSError("no space left")

    monkeypatch.setattr(ExecutorchProgramManager, "write_tensor_data_to_file", full)
    program, _ = rewritten(tmp_path, "cuda", "float")
    with pytest.raises(OSError, match="no space left"):
        lower(program, "cuda", tmp_path / "out", "stem")
    assert names(tmp_path / "out") == []


def test_atomic_output_replaces_existing_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with atomic_output(tmp_path) as staging:
        (staging / "a").write_text("after")
        assert (tmp_path / "a").read_text() == "before"
    assert (tmp_path / "a").read_text() == "after"
    assert names(tmp_path) == ["a"]


def test_files_and_folders_are_moved_and_the_last_file_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda path, file: (moved.append(Path(file).name), replace(path, file)))
    for _ in range(2):
        with staging_folder(tmp_path) as staging:
            (staging / "folder").mkdir()
            for name in ("a", "b", "folder/c"):
                (staging / name).write_text(name)
            move_files(staging, tmp_path, last="a")
    assert moved == ["b", "c", "a"] * 2
    assert names(tmp_path) == ["a", "b", "folder"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_process_after_the_moves(tmp_path: Path, number: signal.Signals) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    def change() -> None:
        with uninterrupted(tmp_path):
            signal.raise_signal(number)
            (tmp_path / "written").touch()

    former = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            change()
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, former)
    assert names(tmp_path) == ["written"]


def test_folder_is_changed_by_one_process_at_a_time(tmp_path: Path) -> None:
    entered = threading.Event()

    def wait() -> None:
        with uninterrupted(tmp_path):
            entered.set()

    other = threading.Thread(target=wait)
    with uninterrupted(tmp_path):
        other.start()
        assert not entered.wait(0.2)
    other.join(10)
    assert entered.is_set()


def test_unknown_target_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown target 'tpu'"):
        lower(None, "tpu", tmp_path / "out", "stem")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_program_for_a_gpu_that_this_machine_cannot_compile_for_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exported = torch.export.export(Quantized(16, 64, seed=0), (torch.randn(2, 64).bfloat16(),))
    packed = {name: ecp.rewrite(exported, "cuda", gpu=name)[0] for name in ("sm_89", "sm_86")}
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    wanted = "names sm_89, this machine has sm_90: lower on a machine with sm_89 or sm_80 or sm_86"
    with pytest.raises(ValueError, match=wanted):
        lower(packed["sm_89"], "cuda", tmp_path / "out", "stem")
    with pytest.raises(ValueError, match="the methods name several GPUs, sm_86, sm_89: rewrite all with one gpu="):
        lower(packed, "cuda", tmp_path / "out", "stem")
    assert not (tmp_path / "out").exists()
    assert missing_requirement("cuda", "sm_89") == "a GPU that is sm_89 or sm_80 or sm_86 (this machine has sm_90)"
    assert missing_requirement("cuda", "sm_90:66") is None


def test_lowering_for_less_shared_memory_limits_the_kernels_of_executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=8, minor=0, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.delenv("ET_CUDA_TARGET_SMEM_BYTES", raising=False)
    for gpu, limit in (("sm_86", "101376"), ("sm_80:42", None), (None, None)):
        with module._shared_memory_of(gpu):
            assert os.environ.get("ET_CUDA_TARGET_SMEM_BYTES") == limit
        assert "ET_CUDA_TARGET_SMEM_BYTES" not in os.environ
    monkeypatch.setenv("ET_CUDA_TARGET_SMEM_BYTES", "150000")
    with module._shared_memory_of("sm_86"):
        assert os.environ["ET_CUDA_TARGET_SMEM_BYTES"] == "101376"
    assert os.environ["ET_CUDA_TARGET_SMEM_BYTES"] == "150000"


def test_missing_requirement_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_requirement("xnnpack") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a torch built for it" in (missing_requirement("cuda") or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch.cuda.is_available()" in (missing_requirement("cuda") or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing_requirement("cuda") is None
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(module, "_has_torchao_mps", lambda: False)
    assert "TORCHAO_BUILD_EXPERIMENTAL_MPS=1" in (missing_requirement("metal") or "")


@pytest.mark.parametrize(("target", "layout"), [("cuda", "mma_tiled"), ("metal", "metal"), ("cpu", "cpu")])
def test_packed_program_is_loaded_with_its_report(tmp_path: Path, target: str, layout: str) -> None:
    program, report = rewritten(tmp_path, target, dtype=torch.bfloat16)
    save_packed(program, report, tmp_path / "packed.pt2")
    model = load_model(tmp_path / "packed.pt2", target)
    assert model.report == report
    assert model.packed == packed_layouts(program) == {layout: 2}
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    assert torch.equal(model.program.module()(x), program.module()(x))
    for other in set(ecp.targets()) - {target}:
        with pytest.raises(ModelError, match=f"packed .* for target {target}, which target {other} does not run"):
            load_model(tmp_path / "packed.pt2", other)


def test_program_rewritten_without_packing_records_its_target(tmp_path: Path) -> None:
    program, report = rewritten(tmp_path, "xnnpack")
    save_packed(program, report, tmp_path / "packed.pt2")
    assert load_model(tmp_path / "packed.pt2", "xnnpack").report == report
    with pytest.raises(ModelError, match="rewritten for target xnnpack"):
        load_model(tmp_path / "packed.pt2", "cuda")


def test_int4_linears_in_a_branch_are_counted(tmp_path: Path) -> None:
    packed, qparams = torch.zeros(1, 1, 32, 4, dtype=torch.int32), torch.zeros(4, 8, 2, dtype=torch.bfloat16)

    class Subgraphs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def linear(x: torch.Tensor) -> torch.Tensor:
                return torch.ops.et_cuda_passes.int4_linear_tile_packed_to_4d(x, packed, qparams, None, 32, 8)

            def nothing(x: torch.Tensor) -> torch.Tensor:
                return x[:, :8].clone()

            return torch.cond(x.sum() > 0, linear, nothing, (x,))

    program = torch.export.export(Subgraphs(), (torch.ones(2, 128, dtype=torch.bfloat16),))
    assert packed_layouts(program) == {"tile_packed_to_4d": 1}


@pytest.mark.gpu
def test_program_is_lowered_for_cuda(tmp_path: Path) -> None:
    program, report = rewritten(tmp_path, "cuda", dtype=torch.bfloat16)
    assert report.counts()["linear_int4"] == 2
    files = lower(program, "cuda", tmp_path / "out", "stem")
    assert [path.name for path in files] == ["stem.ptd", "stem.pte"]
    assert b"CudaBackend" in files[1].read_bytes()
    for fqn in ("up.weight", "down.weight"):
        assert f"{fqn}.packed".encode() in files[0].read_bytes()


def test_program_packed_by_two_targets_runs_on_neither(tmp_path: Path) -> None:
    aten, sketch = torch.ops.aten, Sketch()
    weight, table = sketch.weight("weight", n=64), sketch.weight("table", n=64)
    x, ids = sketch.input("x", 2, 64, dtype=torch.bfloat16), sketch.input("ids", 3, dtype=torch.int64)
    y = sketch.call(aten.linear.default, x, weight)
    program = sketch.program(y, sketch.call(aten.embedding.default, table, ids))
    linear, _ = ecp.rewrite(program, "cpu", [ecp.LinearInt4()])
    both, _ = ecp.rewrite(linear, "cuda", [ecp.EmbeddingInt4()])
    torch.export.save(both, tmp_path / "both.pt2")
    with pytest.raises(ModelError, match=r"is packed \(cpu\), which target cuda does not run: .* as it was before$"):
        load_model(tmp_path / "both.pt2", "cuda")


def two_methods(target: str, scheme: Any) -> tuple[dict[str, Any], torch.nn.Module]:
    """Programs of one model for one row and for several, with one pool of packed constants."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)).eval()
    quantize_(model, scheme)
    pool = ConstantCache()
    inputs = {"one": torch.randn(1, 256), "many": torch.randn(5, 256)}
    return {
        name: ecp.rewrite(torch.export.export(model, (x,)), target, pool=pool)[0] for name, x in inputs.items()
    }, model


@pytest.mark.compiled
def test_methods_of_one_package_share_weights_and_compute_the_same(tmp_path: Path) -> None:
    methods, model = two_methods("cpu", IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    (path,) = lower(methods, "cpu", tmp_path, "model")
    with zipfile.ZipFile(path) as file:
        weights = sum(info.file_size for info in file.infolist() if "/weights/" in info.filename)
    # 2 x 131072 weights of 4 bits with a float32 scale per 32 of them: 160 KiB. Each stands in the file once.
    assert 160 * 1024 < weights < 1.2 * 160 * 1024
    models = load_pt2(str(path), load_weights_from_disk=True).aoti_runners
    for name, rows in (("one", 1), ("many", 5)):
        x = torch.randn(rows, 256)
        with torch.no_grad():
            torch.testing.assert_close(models[name](x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("use", [cond, mapped, scanned, looped], ids=lambda use: use.__name__)
def test_linears_in_control_flow_are_executed_by_aotinductor(tmp_path: Path, use: Any) -> None:
    before = exported(use)
    program, _ = ecp.rewrite(before, "cpu", expect={"missed": 0})
    files = lower(program, "cpu", tmp_path, "model")
    for x in INPUTS:
        with torch.no_grad():
            wanted = tree_leaves(before.module()(x))
        for got, right in zip(execute("cpu", files, (x,), {}), wanted, strict=True):
            assert (got.double() - right.double()).norm() <= 1e-2 * right.double().norm()


class Successive(torch.nn.Module):
    """Results of map, cond and scan, each read after all others have run; two cond in a map, and two map in a cond."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def both(row: torch.Tensor) -> torch.Tensor:
            first = torch.cond(row.sum() > 0, lambda y: y.cos() * 5, lambda y: y * 3, (row,))
            return first + 10 * torch.cond(row.sum() > 1, lambda y: y.sin() * 5, lambda y: y * 7, (row,))

        def maps(y: torch.Tensor) -> torch.Tensor:
            return over(lambda row: row.sin() * 2, y) + 10 * over(lambda row: row.cos() * 3 + row, y)

        rows = over(lambda row: row.sin() * 2, x)
        first = torch.cond(x.sum() > 0, maps, lambda y: y - 3, (x,))
        carry, sums = scan(lambda c, row: (c + row.sin(), c * 2 + row), x[0] * 0, x)
        second = torch.cond(x.sum() > 1, lambda y: y.cos() * 5, lambda y: y * 3, (x,))
        last, others = scan(lambda c, row: (c * 0.5 + row, c - row), carry + 1, second)
        return rows, first, carry, sums, second, last, others, over(both, x)


def test_results_of_control_flow_survive_later_control_flow_in_each_method(tmp_path: Path) -> None:
    """executorch 1.5.1 gives the branches of a cond, and the bodies of loops after it, the same memory."""
    model, sizes = Successive().eval(), {"forward": 4, "wide": 6}
    programs = {name: torch.export.export(model, (torch.randn(size, 8),)) for name, size in sizes.items()}
    (path,) = lower(programs, "xnnpack", tmp_path, "model")
    runtime = Runtime.get().load_program(path)
    for name, size in sizes.items():
        method = runtime.load_method(name)
        for x in (torch.rand(size, 8), -torch.rand(size, 8), torch.randn(size, 8)):
            for got, right in zip(method.execute([x]), model(x), strict=True):
                torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-4)


def test_while_loop_is_refused_where_executorch_has_none(tmp_path: Path) -> None:
    class Loop(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            start = (torch.zeros((), dtype=torch.int64), x)
            result: torch.Tensor = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), start)[1]
            return result

    program = torch.export.export(Loop(), (torch.randn(2, 8),))
    with pytest.raises(UsageError, match=r"forward: ExecuTorch has no while_loop .*: write the loop with torch.scan"):
        lower(program, "xnnpack", tmp_path, "model")
    assert not list(tmp_path.iterdir())


def test_methods_of_one_pte_share_weights_and_compute_the_same(tmp_path: Path) -> None:
    methods, model = two_methods("xnnpack", Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    (path,) = lower(methods, "xnnpack", tmp_path / "two", "model")
    (alone,) = lower(methods["one"], "xnnpack", tmp_path / "one", "model")
    assert path.stat().st_size < 1.2 * alone.stat().st_size
    program = Runtime.get().load_program(path)
    assert set(program.method_names) == {"one", "many"}
    for name, rows in (("one", 1), ("many", 5)):
        x = torch.randn(rows, 256)
        with torch.no_grad():
            torch.testing.assert_close(program.load_method(name).execute([x])[0], model(x), rtol=1e-3, atol=2e-2)


class Counting(torch.nn.Module):
    """A linear and two states that each call writes: one begins with numbers, the other with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("state", torch.arange(4.0) + 1)
        self.register_buffer("zeros", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + self.state + self.zeros
        self.state.add_(1)
        self.zeros.add_(2)
        return y


def test_first_values_of_a_state_are_stored(tmp_path: Path) -> None:
    model, x = Counting().eval(), torch.randn(2, 4)
    program, _ = ecp.rewrite(torch.export.export(model, (x,)), "xnnpack")
    (file,) = lower(program, "xnnpack", tmp_path, "model")
    method = Runtime.get().load_program(file).load_method("forward")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(method.execute([x])[0], model(x))
