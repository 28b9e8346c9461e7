"""Weights of a GGUF file in their own blocks, instead of expanded numbers.

transformers expands a file. Here the blocks take the place of the expanded weights. llama.cpp stores some weights with
their rows in another order; a row consists of whole blocks, so that it moves as it is.
"""

from typing import Any

import gguf
import numpy as np
import torch
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from torch import nn
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from et_cuda_passes.hf.checkpoint import CheckpointError, GgufFile

KINDS = {"Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k"}
"""The types of blocks that a program can contain, as ExecuTorch names them."""
_ROWS_AT_A_TIME = 4096


def keep_blocks(model: Any, file: GgufFile) -> dict[str, str]:
    """Replace each linear's and embedding's weight by the blocks of the file, where they hold the same numbers.

    Args:
        model: loaded from the file, with expanded weights; changed.
        file: the file.

    Returns:
        For each weight that the file holds in blocks, by its FQN: why it stays expanded, or nothing if it is kept.

    Raises:
        CheckpointError: the file has no blocks that can be kept, or the names of its tensors are unknown.
    """
    if not set(KINDS) & set(file.types.values()):
        found = ", ".join(sorted(set(file.types.values())))
        raise CheckpointError(
            f"--keep-gguf keeps blocks of {', '.join(KINDS)}, and {file.path} has {found}: leave --keep-gguf out to "
            "expand the weights and quantize them anew"
        )
    reader = gguf.GGUFReader(file.path)
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise CheckpointError(
            f"--keep-gguf: the names of the tensors of the architecture {architecture} are unknown; leave it out"
        ) from error
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    reasons: dict[str, str] = {}
    for tensor in reader.tensors:
        fqn = names.get(tensor.name)
        if fqn not in parameters or tensor.tensor_type.name in ("F32", "F16", "BF16"):
            continue
        places = owners[id(parameters[fqn])]
        reasons[fqn] = _keep(tensor, parameters[fqn], places, processor)
    return reasons


def _keep(tensor: Any, parameter: nn.Parameter, places: list[tuple[nn.Module, str]], processor: Any) -> str:
    """Put the blocks of ``tensor`` where ``parameter`` is; or say why not."""
    kind = KINDS.get(tensor.tensor_type.name)
    if kind is None:
        return f"{tensor.tensor_type.name} blocks have no operator that reads them"
    if not all(isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight" for module, name in places):
        return "neither a linear nor an embedding reads it"
    rows = tensor.data.shape[0]
    try:
        order = processor.process(weights=np.arange(rows)[:, None], name=tensor.name).weights[:, 0]
    except (IndexError, KeyError, ValueError):
        order = np.arange(rows)
    if tensor.data.ndim != 2 or rows != parameter.shape[0] or sorted(order) != list(range(rows)):
        return "its rows are not those of the weight"
    blocks = ExportableGGUFTensor.from_raw(torch.from_numpy(tensor.data[order]), kind, parameter.dtype)
    # transformers' loader may change numbers, and only a comparison shows it.
    for start in range(0, rows, _ROWS_AT_A_TIME):
        part = ExportableGGUFTensor(blocks.raw[start : start + _ROWS_AT_A_TIME], kind, parameter.dtype)
        if not torch.equal(part.dequantize(), parameter.detach()[start : start + _ROWS_AT_A_TIME]):
            return "transformers changes its numbers when it loads the file"
    weight = nn.Parameter(blocks, requires_grad=False)
    for module, name in places:
        setattr(module, name, weight)
    return ""
