"""other * int4_linear(x) -> int4_linear(x, factor=other)

Computed by the kernel on its sums before it rounds them, as for a gate that is no int4 linear itself.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from et_cuda_passes.rules.int4_combine import Int4Combine


@dataclass(frozen=True)
class Int4Product(Int4Combine):
    """other * int4_linear(x) -> int4_linear(x, factor=other)"""

    operator: ClassVar[Any] = torch.ops.aten.mul.Tensor
    argument: ClassVar[str] = "factor"
