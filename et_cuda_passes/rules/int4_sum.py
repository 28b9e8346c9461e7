"""other + int4_linear(x) -> int4_linear(x, addend=other)

A residual connection, computed by the kernel on its sums before it rounds them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from et_cuda_passes.rules.int4_combine import Int4Combine


@dataclass(frozen=True)
class Int4Sum(Int4Combine):
    """other + int4_linear(x) -> int4_linear(x, addend=other)"""

    operator: ClassVar[Any] = torch.ops.aten.add.Tensor
    argument: ClassVar[str] = "addend"
