"""A match as a rule reads it: captures as attributes, metadata of nodes, and memoized facts."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.matcher import MatchResult
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import Reason

_T = TypeVar("_T")


class Match:
    """One match of ``rule`` inside its program, for one target. Requirements, texts and ``rewrite`` read it.

    A capture ``x`` is ``m.x`` (a node, a constant, or None for an absent optional one), an option of the rule
    ``m.rule.option``.
    """

    def __init__(
        self, match: MatchResult, program: Program, target: Any, rule: Any, captures: Iterable[str] = ()
    ) -> None:
        self.match = match
        self.captures = frozenset(captures)
        self.program = program
        self.target = target
        self.rule = rule
        self.unmet: tuple[Reason, ...] = ()
        """The requirements of an earlier rule that do not hold here, for the texts of a report."""

    def __getattr__(self, name: str) -> Any:
        match = self.__dict__.get("match")
        if match is None or (name not in match.bindings and name not in self.captures):
            raise AttributeError(f"the pattern has no capture named {name!r}")
        # An optional capture is unbound if the alternative that matched does not contain it.
        value = match.bindings.get(name)
        return self.program.replacement_of(value) if isinstance(value, Node) else value

    @property
    def root(self) -> Node:
        """The node that the rewrite replaces."""
        return self.match.root

    @staticmethod
    def val(node: Node) -> torch.Tensor:
        """The fake tensor of ``node``: shape, dtype and device without data."""
        if not isinstance(node, Node):
            raise TypeError(f"m.val needs a node, not {node!r}: an optional capture may be absent")
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{node.name} has no tensor in meta['val']: torch.export sets it, and a pass must set it on the nodes "
                "that it creates"
            )
        return value

    def constant(self, name: str) -> torch.Tensor:
        """The tensor of the constant that is captured as ``name``: a parameter, a buffer or a lifted constant.

        It is for requirements of the stage "values", and for the function that :meth:`.Builder.constant` calls.

        Raises:
            Unmet: the capture is not a constant, the program mutates it, or its tensor holds no values.
        """
        node = getattr(self, name)
        if not isinstance(node, Node):
            raise Unmet(f"{name} is {node!r}, not a tensor")
        tensor = self.program.constant(node)
        if tensor is None:
            raise Unmet(f"{name} is {node.name}, which is not a parameter, buffer or constant of the program")
        if self.program.is_mutated(node):
            raise Unmet(f"{name} is {node.name}, which the program mutates while it runs")
        if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
            raise Unmet(f"{name} is {node.name}, which holds no values: its tensor is fake or on the meta device")
        return tensor.detach()

    def memoize(self, function: Callable[[Program, Node], _T], name: str) -> _T:
        """``function(program, node)`` for the node bound to ``name``, computed once per node and graph."""
        node = self.match.bindings.get(name)
        if not isinstance(node, Node):
            named = ", ".join(sorted(each for each, bound in self.match.bindings.items() if isinstance(bound, Node)))
            raise AttributeError(f"the match has no node named {name!r}; it has {named or 'none with a name'}")
        return self.program.memoize(function, node)
