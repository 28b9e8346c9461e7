"""Run the files that :func:`et_cuda_passes.executorch.lower.lower` wrote, in the runtime of their target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from et_cuda_passes._versions import is_at_least

EXECUTABLE = ("cuda", "xnnpack", "cpu", "openvino")
"""The targets whose runtime is available in Python."""
_RUNTIME_TORCH = "2.13"
"""The first torch whose tensors the runtime of executorch 1.5.1 reads. With 2.11: "tensor does not have a device"."""


def runtime_problem() -> str:
    """Why ExecuTorch's runtime for Python cannot run programs for XNNPACK; empty if it can."""
    if not is_at_least("torch", _RUNTIME_TORCH):
        return f"it reads tensors of torch {_RUNTIME_TORCH} and later, and this is torch {torch.__version__}"
    try:
        from executorch.runtime import Runtime

        backends = Runtime.get().backend_registry.registered_backend_names
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return "" if "XnnpackBackend" in backends else f"it has the backends {', '.join(sorted(backends))} alone"


def execute(target: str, files: list[Path], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Run a lowered program once. THIS EXECUTES CODE FROM THE FILES: pass only files that ``lower`` wrote here.

    Args:
        target: one of :data:`EXECUTABLE`.
        files: the result of ``lower``.
        args: the positional arguments of the exported program, with tensors on the CPU.
        kwargs: the keyword arguments, likewise.

    Returns:
        The flattened outputs, with tensors on the CPU.

    Raises:
        ValueError: the target has no runtime in Python.
        Exception: any error of the runtime.
    """
    run = {"cuda": _cuda, "xnnpack": _executorch, "cpu": _cpu, "openvino": _executorch}.get(target)
    if run is None:
        raise ValueError(f"programs for {target!r} cannot run in Python, only those for {', '.join(EXECUTABLE)}")
    with torch.no_grad():
        outputs = run(files, args, kwargs)
    # A runtime may return tensors in its own memory, which it frees.
    return [output.detach().cpu().clone() if isinstance(output, torch.Tensor) else output for output in outputs]


def _cuda(files: list[Path], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    from et_cuda_passes.delegate import load

    data = next((path for path in files if path.suffix == ".ptd"), None)
    return load(_only(files, ".pte"), data)(*tree_leaves((args, kwargs)))


def _executorch(files: list[Path], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    if problem := runtime_problem():
        raise RuntimeError(f"ExecuTorch's runtime for Python cannot be used: {problem}")
    import executorch.kernels.quantized  # noqa: F401  (the kernels of quantized_embedding)
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(_only(files, ".pte")).load_method("forward")
    # The runtime ignores strides and reads the memory as dense.
    leaves = [leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
    return list(method.execute(leaves))


def _cpu(files: list[Path], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    from torch._inductor import aoti_load_package

    return list(tree_leaves(aoti_load_package(str(_only(files, ".pt2")))(*args, **kwargs)))


def _only(files: list[Path], suffix: str) -> Path:
    (path,) = (path for path in files if path.suffix == suffix)
    return path
