"""Weights whose dequantize was decomposed before it could be matched: the commonest way to lose every candidate."""

from typing import cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.subgraphs import Subgraphs

aten = torch.ops.aten
_CONVERSIONS = frozenset({aten._to_copy.default, aten.to.dtype})
# What follows the conversion in a decomposed dequantize; a table of integers that is only converted is none.
DEQUANTIZE_STEPS = frozenset({aten.sub.Tensor, aten.mul.Tensor})
_VIEW_OPS = frozenset({aten.view.default, aten.unsqueeze.default})


def decomposed_weights(exported: ExportedProgram) -> list[str]:
    """The names of integer matrices that the program itself scales as floating point, in graph order.

    The default decomposition table takes ``dequantize_affine`` apart, into a view, a conversion, a subtraction and a
    multiplication by another constant; ``run_decompositions({})`` leaves it whole. A buffer that the program writes is
    no weight.
    """
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**targets, **signature.inputs_to_lifted_tensor_constants}
    written = set(signature.buffers_to_mutate.values())
    fixed: set[Node] = set()
    names: dict[Node, str] = {}
    conversions: list[Node] = []
    subgraphs = Subgraphs(exported.graph_module, exported.graph)
    for node in subgraphs.nodes():
        value, source = node.meta.get("val"), subgraphs.captured_operand(node)
        if op_of(node) in _VIEW_OPS | _CONVERSIONS:
            source = cast(Node, node.args[0])
        if source in fixed or (source is None and constants.get(node.name, "") not in {"", *written}):
            fixed.add(node)
        if source in names:
            names[node] = names[source]
            conversions += [node] if op_of(node) in _CONVERSIONS else []
        elif node in fixed and node.name in targets and _is_integer_matrix(value):
            names[node] = targets[node.name]
    return list(dict.fromkeys(names[node] for node in conversions if _scaled_as_float(node, fixed)))


def _is_integer_matrix(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8) and value.dim() > 1


def _scaled_as_float(conversion: Node, fixed: set[Node]) -> bool:
    value = conversion.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    less = (user for user in conversion.users if op_of(user) is aten.sub.Tensor and user.args[0] is conversion)
    moved = [conversion, *less]
    scaled = (user for node in moved for user in node.users if op_of(user) is aten.mul.Tensor)
    return any(source in fixed for user in scaled for source in user.all_input_nodes if source not in moved)
