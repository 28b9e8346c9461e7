"""Products with a packed weight on the CPU in plain operators, which Inductor fuses with the dequantization.

The product of one row becomes a loop that reads the packed weight once, and sums in fp32. With more rows, pieces of the
weight are dequantized and multiplied one after another.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE_BYTES, _MOST_PIECES = 4 << 20, 16
"""A product dequantizes pieces of a weight, of so many bytes unless they would be more pieces than that.

A piece stays in a cache. glibc takes an allocation of more than 32 MB from the system in every call, and each new page
costs time. Each piece is compiled, so their number is limited.
"""


def multiply_in_pieces(x: Tensor, tables: list[Tensor | None], dense: Callable[..., Tensor]) -> Tensor:
    """x [M, K] times ``dense`` [N, K] of ranges of the rows of ``tables``, in the dtype of x.

    In float16 it computes in float32: torch's product of float16 matrices takes twice as long where the CPU has no such
    arithmetic, and rounds more. A weight of one row is multiplied in fp32 too.

    Args:
        x: the activations.
        tables: of the weight, each [N, ...] or None.
        dense: computes rows of the weight in fp32 from the same rows of each table.
    """
    rows = next(table.shape[0] for table in tables if table is not None)
    if rows == 1:
        return torch.mv(x.float(), dense(*tables)[0]).to(x.dtype).unsqueeze(1)
    dtype = torch.float32 if x.dtype is torch.float16 else x.dtype
    size = rows * x.shape[1] * dtype.itemsize
    count = min(-(-size // _PIECE_BYTES), _MOST_PIECES, rows)
    parts = [(None,) * count if table is None else table.tensor_split(count) for table in tables]
    operand = x.to(dtype)
    products = [F.linear(operand, dense(*piece).to(dtype)).to(x.dtype) for piece in zip(*parts, strict=True)]
    return products[0] if count == 1 else torch.cat(products, dim=1)


def stored(values: Tensor) -> Tensor:
    """A vector that Inductor stores: it stores the input of ``as_strided``.

    Otherwise it fuses the computation of the values into the loop over the weight, which repeats it for each row.
    """
    return torch.as_strided(values.contiguous(), values.shape, (1,))
