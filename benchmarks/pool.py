"""Random memory of a GPU whose parts serve as weights of any number and shape, without generating or packing."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compiling import run
from benchmarks.int4 import quick_microseconds
from et_cuda_passes.kernels.tiling import Tiling
from et_cuda_passes.layouts import mma_tiled

MOST_WRONG = 4e-3
ALIGNED = 256
"""Alignment of weights in bytes."""
SAMPLE = 96
"""Number of columns and of rows of a result that are compared with fp64."""
int4pack = torch.ops.aten._weight_int4pack_mm
Call = Callable[[], Tensor]


def rotation(nbytes: int, cache: int) -> int:
    """The number of weights of this size that exceed twice a cache of ``cache`` bytes."""
    return max(1, -(-2 * cache // nbytes))


def starts(nbytes: int, cache: int) -> list[int]:
    """The offset of each weight of the rotation in bytes."""
    stride = -(-nbytes // ALIGNED) * ALIGNED
    return [number * stride for number in range(rotation(nbytes, cache))]


def room(sizes: Iterable[int], cache: int) -> int:
    """Bytes for the rotations of weights of these sizes."""
    return max(starts(nbytes, cache)[-1] + -(-nbytes // ALIGNED) * ALIGNED for nbytes in sizes)


class Pool:
    """Random bytes for the weights, scales and dense weights of ``shapes`` (N, K, group size)."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], rows: int, bits: int = 4, *, dense: bool = True) -> None:
        """``rows`` is the largest number of rows of x."""
        self.bits, self.cache = bits, torch.cuda.get_device_properties(0).L2_cache_size
        torch.manual_seed(0)
        words = room((self.weight_bytes(n, k) for n, k, _ in shapes), self.cache)
        self._words = torch.randint(-(2**31), 2**31 - 1, (words // 4,), device="cuda", dtype=torch.int32)
        scales = max(
            -(-2 * self._scales(n, k, group) // ALIGNED) * ALIGNED * rotation(self.weight_bytes(n, k), self.cache)
            for n, k, group in shapes
        )
        self._scale = torch.empty(scales // 2, device="cuda", dtype=torch.bfloat16).uniform_(0.01, 0.02)
        self._x = torch.randn(rows * max(k for _, k, _ in shapes), device="cuda", dtype=torch.bfloat16)
        most = room((2 * n * k for n, k, _ in shapes), self.cache) // 2 if dense else 0
        self._dense = torch.empty(most, device="cuda", dtype=torch.bfloat16).normal_()

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of a packed weight."""
        return n * (mma_tiled.padded(k) // 2 if self.bits == 4 else k)

    def _scales(self, n: int, k: int, group: int) -> int:
        # tinygemm's scales and zeros are twice as many.
        return max(n * mma_tiled.scale_row(k, group), 2 * n * (k // group)) if self.bits == 4 else n * (k // group)

    def x(self, m: int, k: int) -> Tensor:
        """Activations [m, k]."""
        return self._x[: m * k].view(m, k)

    def dense_calls(self, n: int, k: int, m: int) -> list[Call]:
        """cuBLAS in bf16, for each weight of the rotation."""
        x, size = self.x(m, k), n * k
        weights = (self._dense[at // 2 : at // 2 + size].view(n, k) for at in starts(2 * size, self.cache))
        return [partial(F.linear, x, weight) for weight in weights]

    def pairs(self, n: int, k: int, group: int) -> list[tuple[Tensor, Tensor]]:
        """The weights of a rotation in the layout of the Triton kernel."""
        nbytes, scales = self.weight_bytes(n, k), self._scales(n, k, group)
        dtype, width = (torch.int32, mma_tiled.padded(k) // 8) if self.bits == 4 else (torch.int8, k)
        row = mma_tiled.scale_row(k, group) if self.bits == 4 else k // group
        shape = (1, n, row) if self.bits == 4 else (n, row)
        stride = -(-2 * scales // ALIGNED) * ALIGNED // 2
        found = []
        for number, at in enumerate(starts(nbytes, self.cache)):
            packed = self._words.view(torch.int8)[at : at + nbytes].view(dtype).view(n, width)
            found.append((packed, self._scale[number * stride : number * stride + n * row].view(shape)))
        return found

    def triton_calls(self, n: int, k: int, group: int, m: int, tiling: Tiling) -> list[Call]:
        """The Triton kernel in one tiling, for each weight of the rotation."""
        x = self.x(m, k)
        return [partial(run, tiling, x, packed, qparams, group) for packed, qparams in self.pairs(n, k, group)]

    def tinygemm_calls(self, n: int, k: int, group: int, m: int, inner: int) -> list[Call]:
        """torch's own int4 kernel, for each weight of the rotation; ``inner`` is inner_k_tiles."""
        x, nbytes, pairs = self.x(m, k), n * k // 2, 2 * n * (k // group)
        stride = -(-2 * pairs // ALIGNED) * ALIGNED // 2
        calls: list[Call] = []
        for number, at in enumerate(starts(self.weight_bytes(n, k), self.cache)):
            words = self._words.view(torch.int8)[at : at + nbytes].view(torch.int32)
            packed = words.view(n // 8, k // (16 * inner), 32, inner // 2)
            pair = self._scale[number * stride : number * stride + pairs].view(k // group, n, 2)
            calls.append(partial(int4pack, x, packed, group, pair))
        return calls

    def error(self, n: int, k: int, group: int, m: int, tiling: Tiling) -> float:
        """The error of the Triton kernel against fp64, over SAMPLE rows and columns with the last ones."""
        packed, qparams = self.pairs(n, k, group)[0]
        x = self.x(m, k)
        y = run(tiling, x, packed, qparams, group)
        rows, columns = (torch.linspace(0, size - 1, min(size, SAMPLE), device="cuda").long() for size in (m, n))
        scale = qparams.view(n, -1)[columns, : k // group].double().repeat_interleave(group, dim=1)
        q = mma_tiled.unpack(packed[columns])[:, :k].double() - 8 if self.bits == 4 else packed[columns].double()
        exact = q * scale
        if self.bits == 4 or group != k:  # one scale a row is multiplied at the end
            exact = exact.bfloat16().double()
        wanted = x[rows].double() @ exact.T
        return float((y[rows][:, columns].double() - wanted).norm() / wanted.norm())

    def time(self, n: int, k: int, group: int, m: int, tiling: Tiling, *, check: bool = True) -> float:
        """Microseconds of a call of the Triton kernel; with ``check`` its result is first compared with fp64.

        Raises:
            RuntimeError: the result is wrong.
        """
        off = self.error(n, k, group, m, tiling) if check else 0.0
        if not off < MOST_WRONG:
            raise RuntimeError(f"wrong by {off:.1e}")
        return quick_microseconds(self.triton_calls(n, k, group, m, tiling))


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
