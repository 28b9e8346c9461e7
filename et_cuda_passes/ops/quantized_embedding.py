"""ExecuTorch's own operators for a quantized embedding, ``quantized_decomposed::embedding_{2bit,4bit,byte}.dtype``.

``(packed, scale, zero_point, quant_min, quant_max, ids, *, dtype)``: the rows of ``(q - zero_point) * scale`` in
``dtype``, from a table in the layout ``embedding_table`` with scales and zero points [N, K / group_size] of one dtype.
ExecuTorch registers them in Python, with an implementation that dequantizes the whole table; its runtime has kernels
that read the rows asked for.
"""

from importlib import import_module

import torch

_NAMES = {2: "embedding_2bit", 4: "embedding_4bit", 8: "embedding_byte"}


def quantized_embedding(bits: int) -> torch._ops.OpOverload:
    """The operator for a table of 2, 4 or 8 bits, in the overload that states the result's dtype.

    The other overload is not of use: its fake result is float32 whatever the scales are (executorch 1.5.1).
    """
    register()
    overload: torch._ops.OpOverload = getattr(torch.ops.quantized_decomposed, _NAMES[bits]).dtype
    return overload


def register() -> None:
    """Register the operators, which takes seconds where ExecuTorch was not imported before.

    A program that holds them cannot be read from a file without it.
    """
    import_module("executorch.exir")
