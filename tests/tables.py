"""Embeddings with a quantized table, for tests."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from et_cuda_passes.testing import Quantized


def look_up(ids: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """The ``form`` of a :class:`Quantized` that is an embedding."""
    return F.embedding(ids, table)


def exact(model: Quantized) -> Tensor:
    """The table as its scheme states it, in fp64."""
    spread = lambda part: part.double().repeat_interleave(model.block[1], 1)  # noqa: E731
    points = 0.0 if model.zero_point is None else spread(model.zero_point)
    return (model.data.double() - points) * spread(model.scale)


def exported(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    return torch.export.export(model.eval(), inputs)
