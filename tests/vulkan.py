"""Lowers for Vulkan and reads the delegate's graph back, with its constants; shared by tests of several rooms."""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from executorch.backends.vulkan import serialization
from executorch.backends.vulkan.serialization.vulkan_graph_schema import VkDataType, VkGraph, VkTensor
from executorch.backends.vulkan.serialization.vulkan_graph_serialize import extract_vk_flatbuffer
from executorch.exir import to_edge_transform_and_lower
from executorch.exir._serialize._dataclass import _json_to_dataclass
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor
from torch.export import ExportedProgram

from et_cuda_passes.executorch.vulkan import VulkanPartitioner, _Stock

__all__ = [
    "DYNAMIC",
    "KERNELS",
    "LINEAR",
    "TABLE",
    "Lowered",
    "VulkanPartitioner",
    "_Stock",
    "lowered",
    "unpacked",
    "weight_in",
]

LINEAR, DYNAMIC, TABLE = "et_vk.linear_q4gsw", "et_vk.linear_dq8ca_q4gsw", "et_vk.embedding_q4gsw"
KERNELS = tuple(f"{name}.default" for name in (LINEAR, DYNAMIC, TABLE))

_DTYPES = {
    VkDataType.UINT8: torch.uint8,
    VkDataType.INT8: torch.int8,
    VkDataType.INT32: torch.int32,
    VkDataType.FLOAT32: torch.float32,
    VkDataType.FLOAT16: torch.float16,
}


@dataclass
class Lowered:
    """The contents of a lowered program.

    Attributes:
        outside: names of the operators beside the delegate.
        calls: the operators of the delegate with their arguments: tensors of constants, numbers, or the name of a
            type for everything else.
    """

    outside: list[str]
    calls: list[tuple[str, list[Any]]]

    @property
    def names(self) -> list[str]:
        """The names of the delegate's operators."""
        return [name for name, _ in self.calls]


def lowered(program: ExportedProgram, partitioner: Partitioner) -> Lowered:
    """Lower ``program`` and read the delegates' graphs back."""
    edge = to_edge_transform_and_lower(program, partitioner=[partitioner]).exported_program()
    outside, calls = [], []
    # The branches of control flow are modules too.
    modules = [each for each in edge.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    for module, node in ((owner, node) for owner in modules for node in owner.graph.nodes):
        if node.op == "call_function" and node.target is not torch.ops.higher_order.executorch_call_delegate:
            outside.append(getattr(node.target, "__name__", str(node.target)))
        if node.op == "get_attr" and isinstance(delegate := getattr(module, node.target), LoweredBackendModule):
            calls += _calls(delegate)
    return Lowered([name for name in outside if name != "getitem"], calls)


def _graph(content: bytes) -> VkGraph:
    """As ``flatbuffer_to_vk_graph``, which raises a JSONDecodeError for infinite numbers (executorch 1.5.1).

    Attention has one. flatc writes ``-inf``, and Python reads ``-Infinity``.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        schema, binary = folder / "schema.fbs", folder / "schema.bin"
        schema.write_bytes((files(serialization) / "schema.fbs").read_bytes())
        binary.write_bytes(content)
        _flatc_decompile(name, str(schema), str(binary), ["--raw-binary"])
        text = (folder / "schema.json").read_text()
    graph: VkGraph = _json_to_dataclass(json.loads(re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", text)), VkGraph)
    return graph


def _calls(delegate: Any) -> list[tuple[str, list[Any]]]:
    graph = _graph(bytes(extract_vk_flatbuffer(delegate.processed_bytes)))
    data = delegate.named_data_store_output

    def value(index: int) -> Any:
        held = graph.values[index].value
        if isinstance(held, VkTensor) and held.constant_id >= 0:
            key = graph.constants[held.constant_id].named_key
            content = data.buffers[data.pte_data[key].buffer_index]
            return torch.frombuffer(bytearray(content), dtype=_DTYPES[held.datatype]).reshape(held.dims)
        numbers = [getattr(held, name) for name in ("int_val", "bool_val", "double_val") if hasattr(held, name)]
        return numbers[0] if numbers else type(held).__name__

    return [(call.name, [value(index) for index in call.args]) for call in graph.chain]


def unpacked(packed: Tensor) -> Tensor:
    """The integers [N, K] of a packed weight: each byte holds an even k in its low half, as value + 8."""
    assert packed.dtype is torch.uint8
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8) - 8


def weight_in(call: str, args: list[Any]) -> Tensor:
    """The weight [N, K] that the operator computes with, from its constants and its group size."""
    if call.startswith(TABLE):
        packed, scales, size = args[0], args[1], args[2]
    elif call.startswith(LINEAR):
        packed, scales, size = args[1], args[2].T, args[3]
    else:
        packed, sums, scales, size = args[3], args[4], args[5].T, args[6]
        n = packed.shape[0]
        assert torch.equal(sums[:, :n], unpacked(packed).to(torch.int32).reshape(n, -1, size).sum(-1).T)
    integers = unpacked(packed)
    assert scales.shape == (integers.shape[0], integers.shape[1] // size)
    return integers.to(scales.dtype) * scales.repeat_interleave(size, dim=1)
