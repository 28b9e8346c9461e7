"""MetalPartitioner: the stock one, with a pass list."""

from executorch.backends.apple.metal.metal_partitioner import MetalPartitioner as _Stock

from et_cuda_passes.executorch.rewriting import AotiRewritingPartitioner


class MetalPartitioner(AotiRewritingPartitioner, _Stock):  # type: ignore[misc]  # final is advice: there is no other hook
    """ExecuTorch's ``MetalPartitioner`` that first runs ``passes`` over every method, on the host."""

    _target = "metal"
