"""CoreMLPartitioner: ExecuTorch's partitioner with a pass list, and with an error instead of a wrong result."""

from collections.abc import Iterable, Mapping
from typing import Any

import coremltools as ct
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.compiler.coreml_preprocess import COMPILE_SPEC_KEYS
from executorch.backends.apple.coreml.partition import CoreMLPartitioner as _Stock
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import PartitionResult
from torch.export import ExportedProgram

from et_cuda_passes.executorch.partitioner import RewritingPartitioner
from et_cuda_passes.graph.subgraphs import CONTROL_FLOW

_TARGET = ct.target.iOS18
"""The first deployment target that has compressed weights in groups."""


class CoreMLPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # ExecuTorch's class is untyped
    """ExecuTorch's ``CoreMLPartitioner`` that first runs ``passes`` over every method.

    Args:
        compile_specs: as for the stock partitioner. Without a minimum deployment target, that of iOS 18 is added.
        passes: see :func:`et_cuda_passes.rewrite`; None for ``default_passes("coreml")``.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        **kwargs: as for the stock partitioner.

    Raises:
        ValueError: the deployment target is older than iOS 18, which has no weights in groups.
    """

    rewrite_target = "coreml"
    _computes_only_outcomes = "Core ML"

    def __init__(
        self,
        *,
        compile_specs: list[CompileSpec] | None = None,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        specs = list(compile_specs or [])
        found = CoreMLBackend.min_deployment_target_from_compile_specs(specs)
        if found is None:
            specs = [spec for spec in specs if spec.key != COMPILE_SPEC_KEYS.MIN_DEPLOYMENT_TARGET.value]
            specs.append(CoreMLBackend.generate_minimum_deployment_target_compile_spec(_TARGET))
        elif found < _TARGET:
            raise ValueError(
                f"the compile specs have minimum_deployment_target={found.name}, and weights in groups need iOS18: "
                "give CoreMLBackend.generate_compile_specs(minimum_deployment_target=ct.target.iOS18)"
            )
        super().__init__(compile_specs=specs, passes=passes, expect=expect, **kwargs)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """ExecuTorch's hook.

        The stock partitioner claims the branches of control flow, without the call that reads them, and ExecuTorch
        stops with an assertion.
        """
        result = super().partition(exported_program)
        for node in exported_program.graph.find_nodes(op="get_attr"):
            if any(user.target in CONTROL_FLOW for user in node.users):
                node.meta.pop("delegation_tag", None)
        return result
