"""Streamed rewrites: the same bytes in mapped files, sources that are freed, and no memory of a weight's size."""

import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import constant_bytes
from et_cuda_passes.mapped import MappedFiles, mapped_empty
from et_cuda_passes.rewrite import constant_pool
from et_cuda_passes.testing import Quantized, export, floats
from tests.processes import process

N, K = 1024, 1024
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Gated(nn.Module):
    """q, k and v of one input, and a gated layer: constants that are joined from several weights."""

    def __init__(self, n: int = N, k: int = K) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Quantized(n if index > 2 else 256, k, seed=index) for index in range(5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate, up = (part(x) for part in self.parts)
        return F.silu(gate) * up + (q * k * v).sum(-1, keepdim=True)


def program(n: int = N, k: int = K) -> ExportedProgram:
    return export(Gated(n, k), floats(2, k))


def packed(rewritten: ExportedProgram) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in rewritten.state_dict.items() if "packed" in name or "scale" in name}


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal", "xnnpack"])
def test_streamed_rewrite_has_the_same_bytes_and_results(tmp_path: Path, target: str) -> None:
    expected, first = ecp.rewrite(program(), target)
    found, second = ecp.rewrite(program(), target, stream=tmp_path)
    assert first.to_dict() == second.to_dict()
    assert expected.state_dict.keys() == found.state_dict.keys()
    for name, tensor in expected.state_dict.items():
        assert torch.equal(tensor, found.state_dict[name]), name
    x = floats(2, K)
    if target in ("cpu", "xnnpack"):
        assert torch.equal(expected.module()(x), found.module()(x))


@linux
def test_streamed_constants_lie_in_files_without_names(tmp_path: Path) -> None:
    found, _ = ecp.rewrite(program(), "cuda", gpu="sm_90", stream=tmp_path)
    large = [tensor for tensor in packed(found).values() if tensor.nbytes >= 1 << 16]
    files = MappedFiles()
    assert large and all(tensor in files for tensor in large)
    assert list(tmp_path.iterdir()) == []


def test_rewrite_without_stream_leaves_the_program_as_it_is() -> None:
    given = program()
    before, x = dict(given.state_dict), floats(2, K)
    result = given.module()(x)
    ecp.rewrite(given, "cuda", gpu="sm_90")
    assert given.state_dict == before and torch.equal(given.module()(x), result)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """torch.export leaves cycles that hold the model. They are collected at some time, or in a large program never."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("form", ["as exported", "decomposed"])
def test_streamed_rewrite_frees_the_sources(tmp_path: Path, form: str) -> None:
    given = program()
    given = given.run_decompositions({}) if form == "decomposed" else given
    sources = {
        name: StorageWeakRef(tensor.untyped_storage())
        for name, tensor in given.state_dict.items()
        if tensor.dtype is torch.int8
    }
    found, _ = ecp.rewrite(given, "cuda", gpu="sm_90", stream=tmp_path)
    assert len(sources) == 10 and not [name for name, source in sources.items() if not source.expired()]
    assert not [name for name, tensor in given.state_dict.items() if tensor.dtype is torch.int8]
    assert packed(found)


@pytest.mark.usefixtures("no_collection")
def test_methods_share_streamed_constants_and_the_last_one_frees_the_sources(tmp_path: Path) -> None:
    model = Gated()
    methods = [export(model, floats(rows, K)) for rows in (1, 3)]
    source = StorageWeakRef(model.parts[3].data.untyped_storage())
    del model
    pool = constant_pool(stream=tmp_path)
    one, _ = ecp.rewrite(methods[0], "cuda", gpu="sm_90", pool=pool)
    assert not source.expired()
    two, _ = ecp.rewrite(methods[1], "cuda", gpu="sm_90", pool=pool)
    assert source.expired()
    assert packed(one).keys() == packed(two).keys()
    assert all(packed(one)[name].data_ptr() == packed(two)[name].data_ptr() for name in packed(one))


def write_too_much(folder: Path, said: Path) -> None:
    given = program()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, resource.RLIM_INFINITY))
    try:
        ecp.rewrite(given, "cuda", gpu="sm_90", stream=folder)
    except OSError as error:
        said.write_text(str(error))


@linux
def test_full_disk_is_an_error_with_the_folder_and_leaves_no_file(tmp_path: Path) -> None:
    folder, said = tmp_path / "folder", tmp_path / "error.txt"
    limited = process(write_too_much, folder, said)
    limited.join()
    assert limited.exitcode == 0
    assert f"bytes in {folder} for a packed constant: File too large; free some space" in said.read_text()
    assert list(folder.iterdir()) == []


@linux
def test_pages_of_files_leave_memory_and_other_pages_stay(tmp_path: Path) -> None:
    mapped = mapped_empty((1 << 20,), torch.int8, tmp_path).fill_(3)
    other = torch.full((1 << 20,), 5, dtype=torch.int8)
    files = MappedFiles()
    assert mapped in files and mapped[-1:] in files and other not in files
    for tensor in (mapped, other, mapped[100:200], torch.empty(0)):
        files.page_out(tensor)
    assert bool((mapped == 3).all()) and bool((other == 5).all())


def test_missing_folder_is_created_and_a_file_is_refused(tmp_path: Path) -> None:
    ecp.rewrite(program(), "cuda", gpu="sm_90", stream=tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        ecp.rewrite(program(), "cuda", gpu="sm_90", stream=tmp_path / "file")


# Live bytes ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors on the CPU that operators created and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if type(t) is Tensor}
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if type(tensor) is Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_rewrite_makes_no_tensor_of_a_weights_size_beside_the_constants(target: str) -> None:
    given = program(4096, 2048)  # a gate and an up of 8 MB each
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with LiveBytes() as live:
            found, _ = ecp.rewrite(given, target, gpu="sm_90" if target == "cuda" else None)
    finally:
        torch.set_num_threads(before)
    constants = sum(tensor.nbytes for tensor in packed(found).values())
    assert constant_bytes(given) > 17e6 and constants > 8e6
    # A thread's buffers for a chunk of 1 MB of weights are at most 7 MB.
    assert constants <= live.peak <= constants + 8e6
