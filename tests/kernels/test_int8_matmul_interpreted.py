"""The 8-bit kernel in Triton's interpreter, on ragged shapes, against fp64; see test_int4_matmul_interpreted.py."""

import pytest
import torch

from tests.kernels.interpreted import HERE, dtypes

# rows, N, K, group size, block_m, block_n, block_k, segments, slots, zeros, bias
CASES = [
    (1, 16, 64, 64, 8, 16, 64, 1, 0, False, False),
    (3, 40, 96, 32, 8, 16, 64, 2, 0, False, True),
    (5, 33, 48, 48, 8, 16, 64, 1, 0, False, True),
    (9, 20, 80, 80, 8, 16, 64, 1, 0, True, False),
    (17, 70, 256, 64, 16, 32, 128, 1, 0, True, True),
    (5, 33, 384, 128, 8, 16, 128, 1, 4, True, True),
    (9, 64, 640, 32, 8, 16, 128, 1, 7, False, True),
    (9, 64, 576, 64, 8, 16, 64, 1, 5, False, False),
    (9, 64, 768, 256, 8, 16, 64, 1, 5, False, False),
    (9, 64, 1280, 256, 8, 16, 128, 1, 5, True, True),
    (7, 50, 1040, 1040, 8, 16, 128, 1, 5, False, True),
    (2, 24, 1152, 128, 8, 16, 128, 4, 0, False, False),
    (2, 24, 1152, 1152, 8, 16, 128, 4, 0, False, True),
    (3, 1, 208, 208, 8, 16, 64, 4, 0, True, False),
    (20, 66, 192, 64, 16, 32, 64, 1, 264, True, False),
    (4, 18, 272, 16, 8, 16, 128, 1, 3, True, True),
    (4, 18, 416, 16, 8, 16, 64, 2, 0, False, False),
    (70, 24, 128, 32, 128, 16, 64, 1, 0, False, False),
]


@HERE
@pytest.mark.parametrize("case", CASES, ids=str)
@dtypes()
def test_int8_product_agrees_with_fp64(case: tuple, dtype: torch.dtype, most: float) -> None:
    check_product(case, dtype, most)


FLOATS = [
    (3, 40, 96, 96, 8, 16, 64, 2, 0, False, True),
    (9, 64, 640, 32, 8, 16, 128, 1, 7, False, True),
    (17, 70, 256, 128, 16, 32, 128, 1, 0, False, False),
]


@HERE
@pytest.mark.parametrize("case", FLOATS, ids=str)
@pytest.mark.parametrize("float8", [4, 5], ids=["e4m3fn", "e5m2"])
@dtypes()
def test_float8_product_agrees_with_fp64(case: tuple, dtype: torch.dtype, most: float, float8: int) -> None:
    check_product(case, dtype, most, float8)


def check_product(case: tuple, dtype: torch.dtype, most: float, float8: int = 0) -> None:
    """Compare the kernel in one tiling with fp64."""
    from et_cuda_passes.kernels.int8_matmul import int8_matmul
    from et_cuda_passes.kernels.tiles import add_parts

    m, n, k, group, block_m, block_n, block_k, segments, slots, zeros, has_bias = case
    random = torch.Generator().manual_seed(m * n * k)
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=random)
    kind = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}.get(float8)
    if kind is not None:
        # Every finite number of small size, the subnormals among them: fp16 holds the products.
        small = torch.arange(256, dtype=torch.uint8).view(kind)
        small = small[small.float().abs() < 500]
        q = small[torch.randint(0, len(small), (n, k), generator=random)].view(torch.int8)
    scale = (torch.rand(n, k // group, generator=random) * 0.005 + 0.001).to(dtype)
    zero = torch.randn(n, k // group, generator=random) * 0.05 if zeros else None
    x = torch.randn(m, k, generator=random).to(dtype)
    bias = torch.randn(n, generator=random).to(dtype)
    y = torch.full((m, n), float("nan"), dtype=dtype)

    tiles, steps = -(-m // block_m) * -(-n // block_n), -(-k // block_k)
    grid, rest, parts = tiles, 0, scale
    if slots:
        rest = tiles % slots
        grid = tiles - rest + rest * min(slots // max(rest, 1), steps)
        parts = torch.full((slots, block_m, block_n), float("nan"))
    unit = k & -k
    shape = {"BLOCK_N": block_n, "BLOCK_K": block_k, "SLOTS": slots, "SALT": 1}
    form = {"UNIT": unit, "EVEN_K": k % (block_k * segments) == 0, "HAS_ZERO": zeros, "SEGMENTS": segments}
    form |= {"GROUP_SIZE": group if group != k else 0, "PAIRS": group != k and k // group % 2 == 0}
    offset = scale if zero is None else zero
    int8_matmul[(grid,)](
        x, q, scale, offset, bias, y, parts, m, n, k // unit, **shape, **form, BLOCK_M=block_m, HAS_BIAS=has_bias,
        FLOAT8=float8, USE_ASM=False, WGMMA=False,
    )  # fmt: skip
    if rest:
        finish = {"HAS_BIAS": has_bias, "ACTIVATION": "", "HAS_FACTOR": False, "HAS_ADDEND": False, "USE_ASM": False}
        finish["GATED"] = False
        add_parts[(rest, block_m // 8)](
            parts, bias, scale, scale, y, m, n, -(-k // 32), **shape, **finish, TILE_M=block_m, BULK=0, HEIGHT=8
        )  # fmt: skip

    numbers = q.double() if kind is None else q.view(kind).double()
    weight = numbers * scale.double().repeat_interleave(group, dim=1)
    weight = weight if zero is None else weight + zero.double().repeat_interleave(group, dim=1)
    wanted = x.double() @ weight.T + (bias.double() if has_bias else 0)
    assert ((y.double() - wanted).norm() / wanted.norm()).item() < most
