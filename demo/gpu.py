"""The last step for cuda, which needs one: from the packed program to what ExecuTorch's runtime loads."""

from __future__ import annotations

from pathlib import Path

import torch
from executorch.exir import to_edge_transform_and_lower
from torch.export import ExportedProgram

import et_cuda_passes as ecp


def lower(program: ExportedProgram, folder: Path) -> None:
    """Lower `program`, packed or not, into `folder`: model.pte, and its weights beside it in a .ptd."""
    with torch.no_grad():
        edge = to_edge_transform_and_lower(program, partitioner=[ecp.CudaPartitioner()])
        lowered = edge.to_executorch()
    folder.mkdir()
    lowered.save(str(folder / "model.pte"))
    lowered.write_tensor_data_to_file(str(folder))
