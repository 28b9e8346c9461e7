"""CudaPartitioner: the stock one, with a pass list."""

from et_cuda_passes._versions import require_version

# Before the imports below: ExecuTorch's own module imports triton, and says less when it is missing.
require_version("triton")

from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as _Stock  # noqa: E402

from et_cuda_passes.executorch.rewriting import AotiRewritingPartitioner  # noqa: E402
from et_cuda_passes.rules.split import ReplaceSplit  # noqa: E402


class CudaPartitioner(AotiRewritingPartitioner, _Stock):  # type: ignore[misc]  # final is advice: there is no other hook
    """ExecuTorch's ``CudaPartitioner`` that first runs ``passes`` over every method, on the host.

    :class:`~et_cuda_passes.rules.split.ReplaceSplit` comes last where it is not among them: the backend lowers no
    ``split`` or ``chunk``.
    """

    _target = "cuda"
    _always = (ReplaceSplit(),)
