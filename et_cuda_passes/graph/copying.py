"""A copy of a program's graph that can be changed, and the nodes of one copy found again in another."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from et_cuda_passes.graph.branches import Branches
from et_cuda_passes.graph.ops import Target

Places = set[tuple[str, Target]]
"""Where nodes stand, and what they call."""


def copied(exported: ExportedProgram) -> tuple[torch.nn.Module, Graph]:
    """The submodules that control flow calls, and the graph; tensors stay shared, only structure is copied.

    The values in ``node.meta`` get a shape environment of their own: a guard on a dynamic size of the copy does not
    change the program that was copied.
    """
    tensors = {id(tensor): tensor for tensor in (*exported.state_dict.values(), *exported.constants.values())}
    root = torch.nn.Module()
    for name, child in exported.graph_module.named_children():
        root.add_module(name, copy.deepcopy(child, tensors))
    graph = Graph()
    ours: dict[Node, Node] = {}
    graph.output(graph.graph_copy(exported.graph, ours)).meta.update(exported.graph.output_node().meta)
    for old, new in ours.items():
        # The copy renames what looks like a Python builtin, `input` say; the signature goes by the old names.
        new.name = old.name
    shapes = _PrivateShapes()
    for each in (graph, *(module.graph for module in root.modules() if isinstance(module, GraphModule))):
        for node in each.nodes:
            for key in _VALUES & node.meta.keys():
                node.meta[key] = shapes.move(node.meta[key])
    return root, graph


_VALUES = {"val", "tensor_meta", "example_value"}
"""The entries of ``node.meta`` that hold sizes."""


class _PrivateShapes:
    """Copies of values that refer to copies of their fake mode and of its shape environment."""

    def __init__(self) -> None:
        self._environments: dict[ShapeEnv, ShapeEnv] = {}
        self._modes: dict[FakeTensorMode, FakeTensorMode] = {}
        self._moved: dict[int, tuple[Any, Any]] = {}
        """By the identity of a tensor: the tensor, which is held so that its identity stays its own, and its copy."""

    def move(self, value: Any) -> Any:
        """``value``, or a copy of it where it belongs to an environment with symbols; containers are copied."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._moved:
                self._moved[id(value)] = (value, self._tensor(value))
            return self._moved[id(value)][1]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._number(value)
        if isinstance(value, torch.Size):
            return torch.Size(map(self.move, value))
        return value if pytree.tree_is_leaf(value) else pytree.tree_map(self.move, value)

    def _number(self, number: Any) -> Any:
        node = number.node
        environment = getattr(node, "shape_env", None)
        if environment is None:
            return number
        return type(number)(SymNode(node.expr, self._environment(environment), node.pytype, node._hint, node.constant))

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return self._fake(tensor)
        if not is_traceable_wrapper_subclass(tensor):
            return tensor
        attributes, context = tensor.__tensor_flatten__()
        parts = {name: self.move(getattr(tensor, name)) for name in attributes}
        if all(part is getattr(tensor, name) for name, part in parts.items()):
            return tensor
        sizes, strides = map(self.move, tensor.shape), map(self.move, tensor.stride())
        return type(tensor).__tensor_unflatten__(parts, context, torch.Size(sizes), tuple(strides))

    def _fake(self, tensor: FakeTensor) -> torch.Tensor:
        old = tensor.fake_mode
        if old.shape_env is None or not old.shape_env.var_to_range or tensor.layout is not torch.strided:
            return tensor  # without symbols there is nothing to guard on
        if old not in self._modes:
            self._modes[old] = FakeTensorMode(
                allow_fallback_kernels=old.allow_fallback_kernels,
                allow_non_fake_inputs=old.allow_non_fake_inputs,
                shape_env=self._environment(old.shape_env),
                static_shapes=old.static_shapes,
            )
        sizes, strides, offset = (self.move(form) for form in (tensor.shape, tensor.stride(), tensor.storage_offset()))
        with self._modes[old]:
            new = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
            if not isinstance(offset, int) or offset:
                new = new.as_strided(sizes, strides, offset)
        assert isinstance(new, FakeTensor)
        new.constant = tensor.constant
        return new.requires_grad_(tensor.requires_grad)

    def _environment(self, old: ShapeEnv) -> ShapeEnv:
        if old not in self._environments:
            new = copy.copy(old)
            for name, value in vars(old).items():
                if isinstance(value, dict):
                    value = copy.copy(value)
                    value.update((key, list(item)) for key, item in value.items() if isinstance(item, list))
                    setattr(new, name, value)
                elif isinstance(value, (list, set)):
                    setattr(new, name, copy.copy(value))
            new.fake_tensor_cache = {}  # its values refer to the old environment
            self._environments[old] = new
        return self._environments[old]


def places(nodes: Iterable[Node], branches: Branches) -> Places:
    """By what ``nodes`` can be found again in another copy of their program: where they stand and what they call."""
    return {(branches.path(node), node.target) for node in nodes}


def counterparts(wanted: Places, branches: Branches) -> set[Node]:
    """The nodes at the places ``wanted`` in another copy; those that are gone are left out."""
    return {node for node in branches.nodes() if (branches.path(node), node.target) in wanted} if wanted else set()
