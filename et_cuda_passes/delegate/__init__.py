"""Run a .pte that was lowered to CUDA delegates from Python, without ExecuTorch and its C++ runtime.

    program = Program("model.pte")                 # reads and checks model.pte and the .ptd beside it
    prefill, decode = program.method("prefill"), program.method("decode")
    (logits,) = prefill(tokens)

Operators outside the delegates, such as the copies that write a KV cache back to its input, run by torch's own kernels
on the same device.

A .pte contains a compiled library. :class:`Program` only reads the files. :meth:`Program.method` and :func:`load`
execute the library, so use them only with files that you trust.
"""

from et_cuda_passes.delegate.files import DelegateError
from et_cuda_passes.delegate.method import Method
from et_cuda_passes.delegate.program import Program, load

__all__ = ["DelegateError", "Method", "Program", "load"]
