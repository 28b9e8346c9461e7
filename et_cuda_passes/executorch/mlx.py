"""MLXPartitioner: ExecuTorch's partitioner with a pass list."""

from et_cuda_passes.executorch.lower import missing_requirement

# This check comes before the import below, whose error says nothing about the package.
if problem := missing_requirement("mlx"):
    raise ImportError(f"et_cuda_passes needs {problem}")

from executorch.backends.mlx.partitioner import MLXPartitioner as _Stock

from et_cuda_passes.executorch.partitioner import RewritingPartitioner


class MLXPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # ExecuTorch's class is untyped
    """ExecuTorch's ``MLXPartitioner`` that first runs ``passes`` over every method. It has not been run."""

    rewrite_target = "mlx"
    _computes_only_outcomes = "MLX"
