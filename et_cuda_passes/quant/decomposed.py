"""Weights whose dequantize was decomposed before it could be matched: the commonest way to lose every candidate."""

from typing import cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.branches import Branches
from et_cuda_passes.graph.ops import called

aten = torch.ops.aten
_CONVERSIONS = frozenset({aten._to_copy.default, aten.to.dtype})
# What follows the conversion in a decomposed dequantize; a table of integers that is only converted is none.
STEPS = frozenset({aten.sub.Tensor, aten.mul.Tensor})
_VIEWS = frozenset({aten.view.default, aten.unsqueeze.default})


def decomposed_weights(exported: ExportedProgram) -> list[str]:
    """The names of integer matrices that the program itself converts to floating point, in graph order.

    The default decomposition table takes ``dequantize_affine`` apart, into a view, a conversion, a subtraction and a
    multiplication; ``run_decompositions({})`` leaves it whole.
    """
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names: dict[Node, str] = {}
    found: dict[str, None] = {}
    branches = Branches(exported.graph_module, exported.graph)
    for node in branches.nodes():
        value, operand = node.meta.get("val"), branches.outer(node)
        source = cast(Node, node.args[0]) if node.args else None
        if operand is not None:
            names.update({node: names[operand]} if operand in names else {})
        elif node.op == "placeholder" and isinstance(value, torch.Tensor):
            if node.name in targets and value.dtype in (torch.int8, torch.uint8) and value.dim() > 1:
                names[node] = targets[node.name]
        elif called(node) in _VIEWS and source in names:
            names[node] = names[source]
        elif called(node) in _CONVERSIONS and source in names and _scaled_as_float(node):
            found[names[source]] = None
    return list(found)


def _scaled_as_float(conversion: Node) -> bool:
    value = conversion.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dtype.is_floating_point
        and any(called(user) in STEPS for user in conversion.users)
    )
