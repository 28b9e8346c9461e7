"""A .pt2 whose tensors stay in the mapped file is the program that is read into memory."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.executorch.packed import ModelError, check_unchanged, file_state, load
from et_cuda_passes.mapped import MappedFiles

X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Tied weights, a transposed one, a slice, an integer and an empty buffer, and a buffer that is mutated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(8, 64).t())
        self.register_buffer("part", torch.randn(10, 64)[2:4])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.second(self.first(x)) * self.count + self.part + self.empty.sum() + self.calls.sum()
        return y @ self.turned


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    torch.export.save(torch.export.export(Net(), (X,)), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_mapped_program_is_the_same(path: Path) -> None:
    read, mapped = load(path), load(path, mapped=True)
    for name, tensor in {**read.state_dict, **read.constants}.items():
        other = {**mapped.state_dict, **mapped.constants}[name]
        assert torch.equal(tensor, other) and tensor.stride() == other.stride(), name
        assert type(tensor) is type(other) and tensor.requires_grad == other.requires_grad
    assert torch.equal(read.module()(X), mapped.module()(X))
    weight = mapped.state_dict["first.weight"]
    assert weight.data_ptr() == mapped.state_dict.get("second.weight", weight).data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_whole_tensors_are_mapped(path: Path) -> None:
    program = load(path, mapped=True)
    assert program.state_dict["first.weight"] in MappedFiles()


def test_mutation_does_not_change_the_file(path: Path) -> None:
    before = path.read_bytes()
    module = load(path, mapped=True).module()
    first, second = module(X), module(X)
    assert not torch.equal(first, second)
    assert path.read_bytes() == before


def test_replaced_file_does_not_change_the_program(path: Path) -> None:
    program = load(path, mapped=True)
    expected = load(path).module()(X)
    other = path.with_name("other.pt2")
    torch.export.save(torch.export.export(nn.Linear(64, 64), (X,)), other)
    os.replace(other, path)
    assert torch.equal(program.module()(X), expected)


def test_truncated_file_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="only a part of one"):
        load(path, mapped=True)


def test_streamed_rewrite_of_a_mapped_program_has_the_same_bytes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).to(torch.bfloat16)
    int4 = torch.int4  # type: ignore[attr-defined]
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32)))
    program = torch.export.export(model, (torch.randn(2, 256, dtype=torch.bfloat16),)).run_decompositions({})
    torch.export.save(program, tmp_path / "model.pt2")
    expected, _ = ecp.rewrite(program, "cuda", gpu="sm_90")
    found, _ = ecp.rewrite(load(tmp_path / "model.pt2", mapped=True), "cuda", gpu="sm_90", stream=tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed")
    assert expected.state_dict.keys() == found.state_dict.keys()
    assert all(torch.equal(tensor, found.state_dict[name]) for name, tensor in expected.state_dict.items())


def test_file_that_is_overwritten_with_the_same_size_and_time_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    before = file_state(path)
    check_unchanged(path, before)
    time.sleep(0.02)  # the resolution of the system's clock
    path.write_bytes(b"two")
    os.utime(path, (1, 1))
    with pytest.raises(ModelError, match="changed while it was read"):
        check_unchanged(path, before, replaced=True)
