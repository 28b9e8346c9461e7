"""What rules tell of the tilings that the Triton kernel has for a weight."""

import math

from torch import Tensor

from et_cuda_passes.kernels.tiling import HOPPER, describe


def tilings_told(x: Tensor, n: int, k: int, group_size: int, bits: int = 4) -> str:
    """The tilings for a weight [n, k], by the rows of x, whose last axes hold k numbers, as far as they are known."""
    rows = math.prod(x.shape) // k if all(isinstance(size, int) for size in x.shape) else None
    chosen = describe(rows, n, k, group_size, HOPPER, bits)
    return f"tilings on {HOPPER.name} for {n} x {k}, group size {group_size}: {chosen}"
