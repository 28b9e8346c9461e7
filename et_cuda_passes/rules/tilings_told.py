"""What rules tell of the tilings that the Triton kernel has for a weight."""

import math

from torch import Tensor

from et_cuda_passes.kernels.choose import Weight, describe
from et_cuda_passes.kernels.gpus import HOPPER


def tilings_told(x: Tensor, n: int, k: int, group_size: int, bits: int = 4) -> str:
    """The tilings for a weight [n, k], by the rows of x, whose last axes hold k numbers, as far as they are known."""
    rows = math.prod(x.shape) // k if all(isinstance(size, int) for size in x.shape) else None
    chosen = describe(HOPPER, Weight(n, k, group_size, bits), rows)
    return f"tilings on {HOPPER.name} for {n} x {k}, group size {group_size}: {chosen}"
