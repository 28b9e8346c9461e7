"""How fast the L2 cache of this GPU is read: what bounds a product whose tiles all read the same activations.

    python -m benchmarks.cache

Four programs on every multiprocessor read the same megabytes again and again, each from another place on. The last size
is beyond the cache, as far as programs do not happen to read the same part of it at one time.
"""

import torch
import triton
import triton.language as tl

SIZES = (1.5, 4, 12, 25, 200)
"""Megabytes (2^20 bytes)."""
BLOCK, ROUNDS, PROGRAMS = 4096, 400, 4


@triton.jit
def read(x_ptr, y_ptr, size, rounds, BLOCK: tl.constexpr):
    """Sum ``rounds`` blocks of x int32 [size], which ``size`` of a multiple of BLOCK wraps around, into y's block."""
    at = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.int32)
    for i in range(rounds):
        sums += tl.load(x_ptr + (pid * BLOCK * 7 + i * BLOCK) % size + at)
    tl.store(y_ptr + pid * BLOCK + at, sums)


def terabytes(megabytes: float) -> float:
    """Read in a second, the second of two runs timed."""
    size = int(megabytes * 2**20 / 4) // BLOCK * BLOCK
    x = torch.randint(0, 9, (size,), device="cuda", dtype=torch.int32)
    programs = PROGRAMS * torch.cuda.get_device_properties(0).multi_processor_count
    y = torch.empty(programs * BLOCK, device="cuda", dtype=torch.int32)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        begin.record()
        read[(programs,)](x, y, size, ROUNDS, BLOCK=BLOCK, num_warps=8)
        end.record()
        end.synchronize()
    return programs * ROUNDS * BLOCK * 4 / begin.elapsed_time(end) / 1e9


def main() -> None:
    """Print a line for every size."""
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    for megabytes in SIZES:
        print(f"{megabytes} MB: {terabytes(megabytes):.2f} TB/s")


if __name__ == "__main__":
    main()
