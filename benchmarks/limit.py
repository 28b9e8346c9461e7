"""Limits of this machine: the rate of a copy, of a large product of cuBLAS in bf16, and the start of a kernel."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F

from benchmarks.int4 import microseconds


@dataclass(frozen=True)
class Limit:
    """Bytes a second of a copy, operations a second of a product, microseconds of a kernel for one element."""

    bandwidth: float
    rate: float
    start: float = 0.0

    @classmethod
    def measured(cls) -> Self:
        """Measured on the GPU of this machine. The product has random data, since zeros would be faster."""
        a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        bandwidth = 2 * a.numel() / microseconds([lambda: b.copy_(a)] * 4) * 1e6
        n = 8192
        x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * n**3 / microseconds([lambda: F.linear(x, y)] * 3) * 1e6
        one = torch.zeros(1, device="cuda")
        return cls(bandwidth, rate, microseconds([lambda: one.add_(1)] * 200))

    def microseconds(self, nbytes: float, operations: float) -> float:
        """The larger of the times of moving and of computing."""
        return max(nbytes / self.bandwidth, operations / self.rate) * 1e6

    def __str__(self) -> str:
        return f"copy {self.bandwidth / 1e12:.2f} TB/s, cuBLAS {self.rate / 1e12:.0f} TFLOP/s"
