"""et_cuda_passes: one generic quantization, rewritten for each ExecuTorch backend, with an outcome for every layer.

The names in ``__all__`` are the public interface; everything else may change.
"""

import os
import sys
from typing import TYPE_CHECKING, Any


def _is_command_line() -> bool:
    """Whether this process is ``et-cuda-passes`` or ``python -m et_cuda_passes``."""
    program = next(iter(getattr(sys, "argv", ())), "")
    if program == "-m":  # Python looks for the module of -m, and imports its package for that
        options = sys.orig_argv
        return "-m" in options and options[options.index("-m") + 1 :][:1] == ["et_cuda_passes"]
    return os.path.basename(program) in ("et-cuda-passes", "et-cuda-passes.exe")


# The import of torch takes seconds, which --help does not need. The commands import the names when they use them.
if TYPE_CHECKING:
    from et_cuda_passes.api import *  # noqa: F403  (the public names)
    from et_cuda_passes.api import CoreMLPartitioner as CoreMLPartitioner
    from et_cuda_passes.api import OpenvinoPartitioner as OpenvinoPartitioner
    from et_cuda_passes.api import __all__ as __all__
elif not _is_command_line():
    import et_cuda_passes.api  # noqa: F401

if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'et_cuda_passes' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module("et_cuda_passes.api"), name)
