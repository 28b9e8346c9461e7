"""ExecuTorch's own operators for a quantized embedding, ``quantized_decomposed::embedding_{2bit,4bit,byte}.dtype``.

``(packed, scale, zero_point, quant_min, quant_max, ids, *, dtype)``: the rows of ``(q - zero_point) * scale`` in
``dtype``, from a table in the layout ``embedding_table`` with scales and zero points [N, K / group_size] of one dtype.
ExecuTorch registers them in Python, with an implementation that dequantizes the whole table; the kernels of its runtime
read only the rows in ``ids``.
"""

from importlib import import_module

import torch

_NAMES = {2: "embedding_2bit", 4: "embedding_4bit", 8: "embedding_byte"}


def quantized_embedding(bits: int) -> torch._ops.OpOverload:
    """The operator for a table of 2, 4 or 8 bits, in the overload with the dtype of the result.

    The other overload has a wrong fake: float32, whatever the dtype of the scales (executorch 1.5.1).
    """
    register()
    overload: torch._ops.OpOverload = getattr(torch.ops.quantized_decomposed, _NAMES[bits]).dtype
    return overload


def register() -> None:
    """Register the operators, which ``torch.export.load`` needs for a program that calls them.

    The first import of ExecuTorch takes seconds.
    """
    import_module("executorch.exir")
