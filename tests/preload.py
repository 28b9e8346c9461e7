"""Imports what the commands import, once for all processes that are forked."""

from executorch.exir import to_edge_transform_and_lower

import et_cuda_passes.api
from et_cuda_passes.cli import main
from et_cuda_passes.executorch import lower, packed, xnnpack
from et_cuda_passes.hf import exporter, finish, loading

__all__ = [
    "et_cuda_passes", "exporter", "finish", "loading", "lower", "main", "packed", "to_edge_transform_and_lower",
    "xnnpack",
]  # fmt: skip
