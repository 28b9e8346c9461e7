"""Measures the read bandwidth of this GPU's L2 cache, which limits a product whose tiles read the same activations.

    python -m benchmarks.cache

Four programs on every multiprocessor read the same megabytes repeatedly, each from another start. The last size exceeds
the cache, unless programs happen to read the same part at the same time.
"""

import torch
import triton
import triton.language as tl

SIZES = (1.5, 4, 12, 25, 200)
"""Megabytes (2^20 bytes)."""
BLOCK, ROUNDS, PROGRAMS = 4096, 400, 4


@triton.jit
def read(x_ptr, y_ptr, size, rounds, BLOCK: tl.constexpr):
    """Sum ``rounds`` blocks of x int32 [size] into y's block, with wrap-around; ``size`` is a multiple of BLOCK."""
    at = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.int32)
    for i in range(rounds):
        sums += tl.load(x_ptr + (pid * BLOCK * 7 + i * BLOCK) % size + at)
    tl.store(y_ptr + pid * BLOCK + at, sums)


def terabytes(megabytes: float) -> float:
    """Bytes read in a second, from the second of two timed runs."""
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
