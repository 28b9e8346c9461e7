"""The former path of :mod:`et_cuda_passes.delegate`."""

raise ImportError("et_cuda_passes.executorch.delegate is now et_cuda_passes.delegate")
