"""Slow references of the layouts: each formula applied to one weight at a time, in Python integers."""

import torch


def tile_packed_to_4d(q: torch.Tensor, inner: int) -> torch.Tensor:
    """tile_packed_to_4d of q [N, K] in 0..15: int32 [N/8, K/(16 I), 32, I/2]."""
    n_size, k_size = q.shape
    words: dict[tuple[int, int, int, int], int] = {}
    for n, row in enumerate(q.tolist()):
        for k, value in enumerate(row):
            s, j = k % 32, (k % (16 * inner)) // 32
            t, p = 4 * (n % 8) + (s % 8) // 2, s // 8 + 4 * (s % 2)
            place = (n // 8, k // (16 * inner), t, j)
            words[place] = words.get(place, 0) | value << (4 * p)
    out = torch.empty(n_size // 8, k_size // (16 * inner), 32, inner // 2, dtype=torch.int32)
    for place, word in words.items():
        out[place] = word - (1 << 32 if word >> 31 else 0)
    return out


def row_major_bytes(q: torch.Tensor) -> list[int]:
    """The bytes of the mps and metal layouts: byte n K/2 + k // 2, the even k in the low nibble."""
    n_size, k_size = q.shape
    out = [0] * (n_size * k_size // 2)
    for n, row in enumerate(q.tolist()):
        for k, value in enumerate(row):
            out[n * k_size // 2 + k // 2] += value * 16 ** (k % 2)
    return out


def mma_tiled(q: torch.Tensor) -> list[list[int]]:
    """mma_tiled of q [N, K] in 0..15: int32 [N, padded K / 8], 8 where K is padded."""
    n_size, k_size = q.shape
    blocks = -(-k_size // 64)
    out = [[0] * (8 * blocks) for _ in range(n_size)]
    for n, row in enumerate(q.tolist()):
        for k, value in enumerate(row + [8] * (64 * blocks - k_size)):
            block, within = divmod(k, 64)
            step, half, lane, parity = within // 16, within % 16 // 8, within % 8 // 2, within % 2
            out[n][8 * block + 2 * lane + parity] |= value << (4 * (2 * step + half))
    return [[word - (1 << 32 if word >> 31 else 0) for word in row] for row in out]


def little_endian_bytes(words: torch.Tensor) -> list[int]:
    """The bytes of an int32 tensor, word by word, the low byte first."""
    return [(word >> shift) & 255 for word in words.flatten().tolist() for shift in (0, 8, 16, 24)]
