"""Weights that an export left wrapped: a tensor subclass read as it is, its dequantize not yet in the graph."""

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from et_cuda_passes.graph.ops import ACCESS, called


def wrapped_weights(exported: ExportedProgram) -> dict[str, Any]:
    """Parameters and buffers of a tensor subclass that an operator reads whole, by FQN, in graph order."""
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        value = exported.state_dict.get(targets.get(node.name, ""))
        whole = isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)
        if whole and any(called(user) is not ACCESS for user in node.users):
            found[targets[node.name]] = value
    return found


def unwrapped(exported: ExportedProgram) -> tuple[ExportedProgram, str]:
    """The program with its wrapped weights' parts and their dequantize in the graph; itself where there are none.

    Returns:
        The program, and what could not be unwrapped, for a warning; empty where all is well.
    """
    weights = wrapped_weights(exported)
    if not weights:
        return exported, ""
    kinds = ", ".join(sorted({type(weight).__name__ for weight in weights.values()}))
    first = next(iter(weights))
    try:
        program = exported.run_decompositions({})
    except Exception as error:  # whatever a subclass makes of being traced
        why = str(error).partition("\n")[0]
    else:
        if not wrapped_weights(program):
            return program, ""
        why = "they stay wrapped"
    return exported, (
        f"{len(weights)} weights of type {kinds} ({first}, ...) stand wrapped in the program, and "
        f"run_decompositions({{}}) does not unwrap them ({why}): quantize with IntxWeightOnlyConfig instead"
    )
