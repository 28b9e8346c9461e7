"""MetalPartitioner: ExecuTorch's partitioner with a pass list."""

from executorch.backends.apple.metal.metal_partitioner import MetalPartitioner as _Stock

from et_cuda_passes.executorch.partitioner import AotiRewritingPartitioner


class MetalPartitioner(AotiRewritingPartitioner, _Stock):  # type: ignore[misc]  # the class is marked final, and it has no other hook
    """ExecuTorch's ``MetalPartitioner`` that first runs ``passes`` over every method, on the host."""

    rewrite_target = "metal"
