"""Weights that an export left wrapped: a tensor subclass read as it is, its dequantize not yet in the graph.

``run_decompositions({})`` unwraps most. torchao's ``NVFP4Tensor`` it does not before torch 2.14: the constants that
its dequantize makes are not found again.
"""

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from et_cuda_passes.graph.finish import finish_program
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.program import Program
from et_cuda_passes.quant.advised import SuggestedSchemes


def wrapped_weights(exported: ExportedProgram) -> dict[str, Any]:
    """Parameters, buffers and constants of a tensor subclass that an operator reads whole, by FQN, in graph order."""
    signature = exported.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**exported.constants, **exported.state_dict}
    found = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        value = held.get(targets.get(node.name, ""))
        whole = isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)
        if whole and any(op_of(user) is not ACCESS_SUBCLASS_TENSOR for user in node.users):
            found[targets[node.name]] = value
    return found


def unwrapped(exported: ExportedProgram) -> tuple[ExportedProgram, str]:
    """The program with its wrapped weights' parts and their dequantize in the graph; itself where there are none.

    Returns:
        The program, and why its wrapped weights could not be unwrapped; empty where all is well.
    """
    weights = wrapped_weights(exported)
    if not weights:
        return exported, ""
    try:
        # Of a copy: a retrace may add guards to the shape environment of the program that it is given.
        program = finish_program(Program(exported)).run_decompositions({})
    except Exception as error:  # whatever a subclass makes of being traced
        why = str(error).partition("\n")[0].rstrip(".")
    else:
        if not wrapped_weights(program):
            return program, ""
        why = "they stay wrapped"
    kinds = sorted({type(weight).__name__ for weight in weights.values()})
    # It unwraps all or none, and does not say at which it failed.
    return exported, why if len(kinds) == 1 else f"{why}; {', '.join(kinds)} stand in one program"


def is_wrapped(value: torch.Tensor | None) -> bool:
    """Whether ``value`` is a tensor subclass made of other tensors."""
    return value is not None and is_traceable_wrapper_subclass(value)


def bits_of(weight: Any) -> int:
    """Bits an element of a tensor subclass's weight, told from the largest of its parts."""
    parts: list[torch.Tensor] = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    stored = max(part.numel() * part.element_size() for part in parts)
    return 8 * stored // max(1, int(weight.numel()))


def wrapped_reason(weight: Any, why: str, advised: SuggestedSchemes) -> str:
    """What a wrapped weight is, ``why`` it stays so, and what to do."""
    bits = bits_of(weight)
    return (
        f"its weight is {type(weight).__name__}, {bits} bits an element, and run_decompositions({{}}) does not unwrap "
        f"it ({why}): quantize with {advised.for_bits(bits)}"
    )
