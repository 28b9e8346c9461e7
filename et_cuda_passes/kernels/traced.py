"""What a tensor is in the graph that is being traced."""

import operator

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

aten, prims = torch.ops.aten, torch.ops.prims
_CONVERSIONS = (aten._to_copy.default, prims.convert_element_type.default)
_COPIES = (aten.clone.default, aten.alias.default, aten.copy.default, *_CONVERSIONS)


def has_memory_of_its_own(x: Tensor) -> bool:
    """Whether Inductor will hold ``x`` in a buffer, and not as a view of another tensor.

    AOTInductor (torch 2.11) writes a descriptor's tensor into Python code as C++ if it is a view, and fails. What is no
    view for certain: inputs, constants, results of Triton kernels and of pointwise operators, which compute it where it
    lies. A copy is none: one that changes nothing is taken out later, and leaves what it copied.
    """
    if not isinstance(x, FunctionalTensor):
        return True
    node = _node_of(x)
    if node is None or node.op in ("placeholder", "get_attr"):
        return node is not None
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and source.target is triton_kernel_wrapper_functional
    if node.target in _CONVERSIONS:
        given = node.args[0]
        return isinstance(given, Node) and given.meta["val"].dtype is not x.dtype
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise and node.target not in _COPIES


def _node_of(x: FunctionalTensor) -> Node | None:
    mode = get_proxy_mode()
    if mode is None:
        return None
    found = get_proxy_slot(torch._from_functional_tensor(x.elem), mode.tracer, None)
    return None if found is None else found.proxy.node
