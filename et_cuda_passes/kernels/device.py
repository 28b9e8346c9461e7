"""The GPU that a program is compiled for: the one that its operators name, or the one that is present."""

import os
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from et_cuda_passes.kernels.gpus import HOPPER, GpuArch, compilers_of, gpu_arch, gpu_of_capability, runs_on

SHARED_MEMORY_LIMIT = "ET_CUDA_TARGET_SMEM_BYTES"
"""ExecuTorch's environment variable: bytes of shared memory that a lowered kernel may use."""


def present_gpu(device: torch.device | None = None) -> GpuArch | None:
    """The GPU of ``device``, by default the current one; None if this machine has no GPU.

    Raises:
        ValueError: the GPU is older than every known one.
    """
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return _limited(gpu_of_capability((properties.major, properties.minor), properties.multi_processor_count))


def named_gpu(name: str) -> GpuArch:
    """The GPU of a name, with the shared memory that a kernel may use here.

    Raises:
        ValueError: the name is unknown, or ET_CUDA_TARGET_SMEM_BYTES is no positive number.
    """
    return _limited(gpu_arch(name))


def gpu_of(device: torch.device) -> GpuArch:
    """The GPU of ``device``; an H100 if this machine has no GPU."""
    return present_gpu(device) or _limited(HOPPER)


def gpu_for(x: Tensor, name: str) -> GpuArch:
    """The GPU whose tilings a launch with the input ``x`` gets: the GPU ``name``, or for "" that of x.

    An eager launch is compiled for the GPU of x, and gets its tilings if the named GPU would not run the code.

    Raises:
        ValueError: the launch is traced for compilation, and code of this machine's GPU does not run on the named one.
    """
    if not name:
        return gpu_of(x.device)
    if (problem := compile_problem(name)) is None:
        return named_gpu(name)
    if isinstance(x, (FakeTensor, FunctionalTensor)):
        raise ValueError(problem)
    return gpu_of(x.device)


def compile_problem(name: str) -> str | None:
    """Why this machine cannot compile a program for the GPU ``name``, and what to do; None if it can or has no GPU.

    AOTInductor compiles and tunes kernels for the GPU that is present; it has no option for another one.
    """
    gpu = named_gpu(name)
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if runs_on(capability, gpu.capability):
        return None
    present = "sm_{}{}".format(*capability)
    return f"the program names {gpu.name}, this machine has {present}: lower on a machine with {_any_of(gpu)}"


def gpu_requirement(name: str) -> str | None:
    """The GPU that a lowering for ``name`` needs and this machine lacks, as a noun phrase; None if it has one."""
    if compile_problem(name) is None:
        return None
    present = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return f"a GPU that is {_any_of(named_gpu(name))} (this machine has {present})"


def needed_limit(name: str) -> int | None:
    """The value that ET_CUDA_TARGET_SMEM_BYTES needs, so that all kernels fit the GPU ``name``; None if it has it.

    Our kernels fit without it. ExecuTorch's are tuned for the GPU that is present, which may have more shared memory.
    """
    gpu, present = named_gpu(name), present_gpu()
    return gpu.program_memory if present is not None and present.program_memory > gpu.program_memory else None


def _any_of(gpu: GpuArch) -> str:
    return " or ".join(compilers_of(gpu))


def _limited(gpu: GpuArch) -> GpuArch:
    text = os.environ.get(SHARED_MEMORY_LIMIT)
    if text is None:
        return gpu
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{SHARED_MEMORY_LIMIT}={text}: it is a number of bytes, such as 101376 for sm_86")
    return replace(gpu, program_memory=min(gpu.program_memory, int(text)))
