"""Memory planning of ExecuTorch that keeps the results of control flow until they are read."""

from itertools import zip_longest
from typing import Any

import torch
from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
from executorch.exir.passes import MemoryPlanningPass
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.passes.infra.pass_base import PassResult

from et_cuda_passes.graph.subgraphs import CONTROL_FLOW


class KeepResultsOfControlFlow(MemoryPlanningPass):  # type: ignore[misc]  # ExecuTorch's class is untyped
    """ExecuTorch's planning, but no two subgraphs share memory if the program has several calls of control flow.

    A result of a ``cond`` stays in the memory of its branch. executorch 1.5.1 gives that memory to the branches of the
    next ``cond`` and to the bodies of a ``map`` or ``scan`` too, which overwrite the result if it is still needed. The
    results of a ``map`` or ``scan`` are copied out of its body.
    """

    def run(
        self, graph_module: torch.fx.GraphModule, graph_signature: ExportGraphSignature | None = None
    ) -> PassResult:
        """ExecuTorch's hook, called with each method."""
        graphs = [each.graph for each in graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
        calls = [node for graph in graphs for node in graph.nodes if node.target in CONTROL_FLOW]
        self.memory_planning_algo = _Successive() if len(calls) > 1 else MemoryPlanningAlgorithmSuite()
        return super().run(graph_module, graph_signature)  # type: ignore[no-any-return]


class _Successive(MemoryPlanningAlgorithmSuite):  # type: ignore[misc]
    """Memory of each graph after that of all graphs before it."""

    def __init__(self) -> None:
        super().__init__()
        self._used: list[int] = []

    def __call__(self, alignment: int, specs: object, graph_module: Any, *rest: object) -> list[int]:
        graph_module.input_mem_buffer_sizes = list(self._used)
        planned = super().__call__(alignment, specs, graph_module, *rest)
        # A graph without tensors of its own plans nothing, and returns zeros.
        self._used = [max(sizes) for sizes in zip_longest(self._used, planned, fillvalue=0)]
        return list(self._used)
