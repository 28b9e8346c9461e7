"""CudaPartitioner: ExecuTorch's partitioner with a pass list."""

from et_cuda_passes._versions import require_version

# This check comes before the imports below: ExecuTorch's module imports triton, and its error is less clear.
require_version("triton")

from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as _Stock  # noqa: E402

from et_cuda_passes.executorch.partitioner import AotiRewritingPartitioner  # noqa: E402
from et_cuda_passes.rules.split import ReplaceSplit  # noqa: E402


class CudaPartitioner(AotiRewritingPartitioner, _Stock):  # type: ignore[misc]  # the class is marked final, and it has no other hook
    """ExecuTorch's ``CudaPartitioner`` that first runs ``passes`` over every method, on the host.

    :class:`~et_cuda_passes.rules.split.ReplaceSplit` runs last, unless the list contains it: the backend lowers no
    ``split`` or ``chunk``.
    """

    rewrite_target = "cuda"
    _always = (ReplaceSplit(),)
