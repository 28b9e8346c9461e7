"""Lowers for Core ML and reads the compressed weights of the model back; shared by tests of several rooms.

On Linux coremltools converts a program and writes the model; only macOS runs it.
"""

import io
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.libmilstoragepython import _BlobStorageReader
from executorch.backends.apple.coreml import executorchcoreml
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.partition import CoreMLPartitioner as _Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor
from torch.export import ExportedProgram

from et_cuda_passes.executorch.coreml import CoreMLPartitioner

__all__ = ["CoreMLPartitioner", "decompressed", "lowered", "stock"]

COMPRESSED = "constexpr_blockwise_shift_scale"
_READERS = {
    "INT4": "read_int4_data",
    "INT8": "read_int8_data",
    "FLOAT16": "read_fp16_data",
    "FLOAT32": "read_float_data",
}


def stock() -> Partitioner:
    """The stock partitioner for iOS 18."""
    return _Stock(compile_specs=CoreMLBackend.generate_compile_specs(minimum_deployment_target=ct.target.iOS18))


def lowered(program: ExportedProgram, partitioner: Partitioner) -> tuple[list[str], list[bytes]]:
    """The names of the operators beside the delegate, and what the delegates hold."""
    with redirect_stderr(io.StringIO()):  # progress bars
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner]).exported_program()
    calls = [node for node in edge.graph.nodes if node.op == "call_function"]
    names = [getattr(node.target, "__name__", str(node.target)) for node in calls]
    # Branches of control flow are modules too.
    modules = [getattr(edge.graph_module, node.target) for node in edge.graph.find_nodes(op="get_attr")]
    delegates = [each for each in modules if isinstance(each, LoweredBackendModule)]
    outside = [name for name in names if name not in ("executorch_call_delegate", "getitem")]
    return outside, [bytes(each.processed_bytes) for each in delegates]


def decompressed(delegate: bytes) -> list[Tensor]:
    """The compressed weights of a delegate, each computed as ``(data - offset) * scale`` in float16."""
    with tempfile.TemporaryDirectory() as folder:
        assert executorchcoreml.unflatten_directory_contents(delegate, folder)
        (package,) = Path(folder).rglob("*.mlpackage")
        program = ct.models.MLModel(str(package), skip_model_load=True).get_spec().mlProgram
        weights = next(package.rglob("weight.bin"), None)
        reader = None if weights is None else _BlobStorageReader(str(weights))
        return [_decompressed(call, reader) for call in _calls(program) if call.type == COMPRESSED]


def _calls(program: Any) -> Iterator[Any]:
    for function in program.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations


def _decompressed(call: Any, reader: Any) -> Tensor:
    parts = {name: _tensor(bound.arguments[0].value, reader) for name, bound in call.inputs.items()}
    data, scale = parts["data"], parts["scale"]
    size = data.shape[1] // scale.shape[1]
    shifted = data.float()
    if "offset" in parts:
        shifted = shifted - parts["offset"].float().repeat_interleave(size, dim=1)
    return shifted.to(scale.dtype) * scale.repeat_interleave(size, dim=1)


def _tensor(value: Any, reader: Any) -> Tensor:
    described = value.type.tensorType
    dtype = ct.proto.MIL_pb2.DataType.Name(described.dataType)
    shape = [int(dimension.constant.size) for dimension in described.dimensions]
    numbers = getattr(reader, _READERS[dtype])(value.blobFileValue.offset)
    array = np.asarray(numbers).reshape(shape)
    return torch.from_numpy(array.view(np.float16) if dtype == "FLOAT16" else array)
