"""Lowers for XNNPACK and runs with ExecuTorch's runtime; shared by tests of several rooms."""

from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import ExportedProgram

__all__ = ["Stock", "error", "example", "lower_and_run", "lowered", "output", "through"]


def example(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are equal in every call and every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def lowered(program: ExportedProgram, partitioner: Stock) -> bytes:
    """The ``.pte`` of ``program``."""
    buffer: bytes = to_edge_transform_and_lower(program, partitioner=[partitioner]).to_executorch().buffer
    return buffer


def output(pte: bytes, *inputs: Tensor) -> Tensor:
    """The first result of a ``.pte``, run by ExecuTorch's runtime."""
    result: Tensor = Runtime.get().load_program(pte).load_method("forward").execute(list(inputs))[0]
    return result


def lower_and_run(path: Path, *shape: int) -> None:
    """Lower a saved program as ExecuTorch does, and run it on an :func:`example`."""
    import torch.ao.quantization.fx._decomposed  # registers the operators of PT2E

    output(lowered(torch.export.load(path), Stock()), example(*shape))


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, in the Euclidean norm."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def through(partitioner: Stock, model: nn.Module, x: Tensor) -> float:
    """The error of ``model``, exported and lowered with ``partitioner``, compared with eager."""
    return error(output(lowered(torch.export.export(model, (x,)), partitioner), x), model(x))
