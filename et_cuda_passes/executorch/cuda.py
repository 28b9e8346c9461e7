"""CudaPartitioner: the stock one, with a pass list."""

from et_cuda_passes._versions import require_version

# Before the imports below: ExecuTorch's own module imports triton, and says less when it is missing.
require_version("triton")

from collections.abc import Iterable, Mapping  # noqa: E402
from typing import Any  # noqa: E402

from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as _Stock  # noqa: E402
from executorch.exir.backend.compile_spec_schema import CompileSpec  # noqa: E402

from et_cuda_passes.executorch.rewriting import RewritingPartitioner, with_method_name  # noqa: E402


class CudaPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # final is advice: ExecuTorch has no other hook
    """ExecuTorch's ``CudaPartitioner`` that first runs ``passes`` over every method, on the host.

    Args:
        compile_spec: as for the stock partitioner; ``method_name`` is supplied where it is missing.
        passes: see :func:`et_cuda_passes.rewrite`; None for ``default_passes("cuda")``.
        expect: see :func:`et_cuda_passes.rewrite`; asked of every method.
    """

    _target = "cuda"

    def __init__(
        self,
        compile_spec: list[CompileSpec] | None = None,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(with_method_name(compile_spec))
        self._set_passes(passes, expect)
