"""OpenvinoPartitioner: ExecuTorch's partitioner with a pass list."""

import io
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from typing import Any

from torch.export import ExportedProgram

from et_cuda_passes._versions import require_version

# These checks come before the import of ExecuTorch's module, whose error names a file that is not in its package.
require_version("openvino")
require_version("nncf")

from executorch.backends.openvino.partitioner import OpenvinoPartitioner as _Stock  # noqa: E402
from executorch.exir.backend.compile_spec_schema import CompileSpec  # noqa: E402
from executorch.exir.backend.partitioner import PartitionResult  # noqa: E402

from et_cuda_passes.executorch.partitioner import RewritingPartitioner  # noqa: E402
from et_cuda_passes.rewrite import dynamic_size  # noqa: E402


class OpenvinoPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # the class is marked final, and it has no other hook
    """ExecuTorch's ``OpenvinoPartitioner`` that first runs ``passes`` over every method.

    Args:
        compile_spec: as for the stock partitioner; None for the device CPU.
        *args: as for the stock partitioner.
        passes: see :func:`et_cuda_passes.rewrite`; None for ``default_passes("openvino")``.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        **kwargs: as for the stock partitioner.
    """

    rewrite_target = "openvino"
    _computes_only_outcomes = "OpenVINO"

    def __init__(
        self,
        compile_spec: list[CompileSpec] | None = None,
        *args: Any,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        specs = [CompileSpec("device", b"CPU")] if compile_spec is None else compile_spec
        super().__init__(specs, *args, passes=passes, expect=expect, **kwargs)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """ExecuTorch's hook.

        Raises:
            ValueError: an input has a dynamic size. The runtime would return outputs of the largest size for all.
        """
        if dynamic := dynamic_size(exported_program):
            raise ValueError(
                f"{dynamic}, and ExecuTorch's OpenVINO runtime (1.5.1) returns outputs of the largest size for every "
                "input: export the model with fixed sizes (EtConfig(dynamic=False), or no dynamic_shapes for "
                "torch.export)"
            )
        return super().transform_for_pre_decomposition(exported_program)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """ExecuTorch's hook, without what the stock partitioner prints about each operator that it does not take."""
        with redirect_stdout(io.StringIO()):
            return super().partition(exported_program)
