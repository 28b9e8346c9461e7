"""CudaPartitioner: ExecuTorch's partitioner with a pass list."""

from collections.abc import Iterable, Mapping
from typing import Any

from et_cuda_passes._versions import require_version

# This check comes before the imports below: ExecuTorch's module imports triton, and its error is less clear.
require_version("triton")

from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as _Stock  # noqa: E402
from executorch.exir.backend.compile_spec_schema import CompileSpec  # noqa: E402

from et_cuda_passes.executorch.partitioner import AotiRewritingPartitioner  # noqa: E402
from et_cuda_passes.kernels.device import SHARED_MEMORY_LIMIT, compile_problem, needed_limit  # noqa: E402
from et_cuda_passes.rules.split import ReplaceSplit  # noqa: E402


class CudaPartitioner(AotiRewritingPartitioner, _Stock):  # type: ignore[misc]  # the class is marked final, and it has no other hook
    """ExecuTorch's ``CudaPartitioner`` that first runs ``passes`` over every method, on the host.

    :class:`~et_cuda_passes.rules.split.ReplaceSplit` runs last, unless the list contains it: the backend lowers no
    ``split`` or ``chunk``.

    Args:
        compile_spec: as for the stock partitioner; ``method_name`` is added if it is missing.
        passes: see :func:`et_cuda_passes.rewrite`; None for the target's default passes.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        gpu: see :func:`et_cuda_passes.rewrite`; None for the GPU of this machine.
        **options: ``stream``, ``cache`` and ``device``; see :func:`et_cuda_passes.rewrite`. With ``stream`` the
            programs that are lowered are given up.

    Raises:
        ValueError: this machine has a GPU, and cannot compile a program that runs on ``gpu``.
    """

    rewrite_target = "cuda"
    _always = (ReplaceSplit(),)

    def __init__(
        self,
        compile_spec: list[CompileSpec] | None = None,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        gpu: str | None = None,
        **options: Any,
    ) -> None:
        if gpu is not None:
            if problem := compile_problem(gpu):
                raise ValueError(problem)
            if limit := needed_limit(gpu):
                raise ValueError(
                    f"gpu={gpu!r} has less shared memory than the GPU of this machine, for which ExecuTorch tunes its "
                    f"own kernels: set the environment variable {SHARED_MEMORY_LIMIT}={limit}"
                )
        super().__init__(compile_spec, passes, expect, **options)
        self._gpu = gpu
