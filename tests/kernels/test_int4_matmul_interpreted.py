"""The kernels in Triton's interpreter, on ragged shapes, against fp64: see ``interpreted.py``."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from et_cuda_passes.quant.float_forms import TWICE_FLOAT4
from tests.kernels.interpreted import HERE, INTERPRETED, dtypes

if INTERPRETED:
    import triton
    import triton.language as tl

    from et_cuda_passes.kernels.epilogue import activate

    @triton.jit
    def activated(x_ptr, y_ptr, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(y_ptr + at, activate(tl.load(x_ptr + at), ACTIVATION, False))


# rows, N, K, group size, block_m, extra_m, block_n, block_k, segments, slots, zeros, bias, activation, factor, addend
CASES = [
    (1, 16, 64, 32, 8, 0, 16, 64, 1, 0, False, False, "", False, False),
    (3, 40, 96, 32, 8, 0, 16, 64, 2, 0, False, False, "silu", False, False),
    (17, 70, 256, 64, 16, 0, 32, 128, 1, 0, True, True, "gelu", False, True),
    (5, 33, 384, 128, 8, 0, 16, 128, 1, 4, True, True, "", True, False),
    (9, 64, 640, 32, 8, 0, 16, 128, 1, 7, False, True, "relu", True, True),
    (9, 64, 320, 64, 8, 0, 16, 64, 1, 5, True, False, "gelu_tanh", False, False),
    (2, 24, 1152, 32, 8, 0, 16, 128, 4, 0, True, True, "", False, False),
    (20, 66, 192, 32, 16, 0, 32, 64, 1, 264, False, False, "", False, True),
    (7, 17, 448, 64, 8, 0, 16, 64, 4, 0, False, False, "silu", True, True),
    # Tiles of many rows, which are loaded without a mask.
    (70, 24, 128, 32, 128, 0, 16, 64, 1, 0, False, False, "", False, False),
    (150, 20, 192, 64, 128, 0, 16, 64, 1, 3, True, False, "", False, True),
    # The last step has half as many columns of x.
    (140, 24, 224, 32, 128, 0, 16, 64, 1, 0, True, True, "", False, False),
    # Steps within a group; in the second and third case the last step is partial.
    (3, 40, 384, 128, 8, 0, 16, 64, 1, 0, True, False, "", False, False),
    (5, 24, 640, 128, 8, 0, 16, 256, 1, 2, True, False, "", False, False),
    (2, 20, 320, 64, 8, 0, 16, 128, 2, 0, True, False, "", False, False),
    (6, 36, 512, 128, 8, 0, 16, 64, 2, 0, True, False, "", False, False),
    (4, 16, 1152, 128, 8, 0, 16, 64, 1, 5, False, True, "silu", False, False),
    # Tiles with two pieces of rows; the second has none, one, some or all of its rows below M, in one tile and in more.
    (150, 20, 192, 64, 128, 64, 16, 64, 1, 0, True, True, "silu", True, True),
    (100, 20, 128, 32, 128, 64, 16, 64, 1, 0, False, False, "", False, False),
    (333, 24, 128, 32, 128, 32, 16, 64, 1, 0, False, True, "gelu", False, True),
    (97, 17, 640, 128, 64, 32, 16, 64, 1, 0, True, False, "", True, False),
    (33, 40, 384, 64, 32, 16, 16, 128, 1, 0, True, True, "relu", False, True),
    (81, 24, 96, 32, 64, 16, 16, 64, 1, 0, False, True, "", False, False),
    (50, 20, 1152, 128, 32, 16, 16, 256, 1, 0, True, False, "gelu_tanh", False, True),
    (385, 16, 64, 32, 256, 128, 16, 64, 1, 0, False, False, "", False, False),
    # Groups of 16; K is no multiple of 32 in most.
    (1, 16, 64, 16, 8, 0, 16, 64, 1, 0, False, False, "", False, False),
    (3, 40, 80, 16, 8, 0, 16, 64, 2, 0, True, True, "silu", False, False),
    (5, 33, 304, 16, 8, 0, 16, 128, 1, 3, True, False, "", False, True),
    (70, 24, 112, 16, 64, 16, 16, 64, 1, 0, False, True, "", False, False),
    (9, 17, 528, 16, 8, 0, 16, 256, 1, 0, True, False, "", True, False),
    # Split tiles with two pieces of rows.
    (200, 24, 256, 32, 128, 64, 16, 64, 1, 3, True, True, "silu", False, True),
    (47, 24, 640, 64, 32, 16, 16, 64, 1, 5, False, False, "", True, False),
    (97, 40, 576, 64, 64, 32, 16, 128, 1, 7, True, True, "gelu", False, False),
    (100, 24, 480, 32, 64, 16, 16, 64, 1, 4, True, False, "", False, True),
]


ACTIVATE = {
    "": lambda y: y,
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


@HERE
@pytest.mark.parametrize("case", CASES, ids=str)
@dtypes()
def test_int4_product_agrees_with_fp64(case: tuple, dtype: torch.dtype, most: float) -> None:
    check_product(case, dtype, most, float4=False)


# Without zeros; nvfp4 has groups of 16, mxfp4 of 32.
FLOATS = [
    (1, 16, 64, 16, 8, 0, 16, 64, 1, 0, False, False, "", False, False),
    (17, 40, 176, 16, 16, 0, 32, 128, 1, 3, False, True, "silu", False, True),
    (3, 24, 96, 32, 8, 0, 16, 64, 2, 0, False, True, "", True, False),
    (70, 33, 256, 32, 32, 16, 16, 128, 1, 0, False, False, "gelu", False, False),
]


@HERE
@pytest.mark.parametrize("case", FLOATS, ids=str)
@dtypes()
def test_float4_product_agrees_with_fp64(case: tuple, dtype: torch.dtype, most: float) -> None:
    check_product(case, dtype, most, float4=True)


@HERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=["nvfp4", "mxfp4"])
def test_float4_weights_are_those_of_the_operator_bit_for_bit(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """A product with the identity returns the weight."""
    from et_cuda_passes.kernels import linear_launch, triton_launch
    from et_cuda_passes.kernels.tiling import Tiling
    from et_cuda_passes.layouts import mma_tiled
    from et_cuda_passes.ops import DEQUANTIZE_FLOAT4

    n, k, group = 32, 192, 16 if scale_dtype is torch.float8_e4m3fn else 32
    random = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=random)
    codes = torch.stack((data & 15, data >> 4), dim=-1).view(n, k)
    exponents = torch.randint(-9, 8, (n, k // group), generator=random).double()
    scale = (2.0**exponents * (1 + (group == 16) * torch.randint(0, 8, exponents.shape) / 8)).float().to(scale_dtype)
    wanted = DEQUANTIZE_FLOAT4(data, scale, None, group, dtype)
    qparams = mma_tiled.scale_and_zero(scale.float(), None, dtype, k)
    y = torch.full((k, n), float("nan"), dtype=dtype)
    tiling = Tiling(128, 16, 64, 1, 0, 4, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "launch", in_interpreter)
        given = (torch.eye(k, dtype=dtype), k, mma_tiled.pack(codes), qparams, linear_launch.Epilogue(), y, None)
        linear_launch.launch_int4(*given, group, tiling, 1, False, 1, float4=True)
    assert torch.equal(y.T, wanted)


def check_product(case: tuple, dtype: torch.dtype, most: float, float4: bool) -> None:
    """Compare the kernel in one tiling with fp64, and require equal bits from every way to read x."""
    from et_cuda_passes.kernels.int4_matmul import int4_matmul
    from et_cuda_passes.kernels.tiles import add_parts
    from et_cuda_passes.layouts import mma_tiled

    m, n, k, group, block_m, extra_m, block_n, block_k, segments, slots, *flags = case
    zeros, has_bias, activation, has_f, has_a = flags
    tile_m = block_m + extra_m
    random = torch.Generator().manual_seed(m * n * k)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=random)
    scale = torch.rand(n, k // group, generator=random) * 0.05 + 0.01
    zero = torch.randn(n, k // group, generator=random) * 0.05 * zeros
    x = torch.randn(m, k, generator=random).to(dtype)
    bias, factor, addend = (torch.randn(*shape, generator=random).to(dtype) for shape in ((n,), (m, n), (m, n)))
    packed, qparams = mma_tiled.pack(q), mma_tiled.scale_and_zero(scale, zero, dtype, k)
    y = torch.full((m, n), float("nan"), dtype=dtype)

    tiles, steps = -(-m // tile_m) * -(-n // block_n), -(-packed.shape[1] * 8 // block_k)
    grid, rest, parts = tiles, 0, qparams
    if slots:
        rest = tiles % slots
        grid = tiles - rest + rest * min(slots // max(rest, 1), steps)
        parts = torch.full((slots, tile_m, block_n), float("nan"))
    finish = {"HAS_BIAS": has_bias, "ACTIVATION": activation, "HAS_FACTOR": has_f, "HAS_ADDEND": has_a}
    finish |= {"USE_ASM": False, "GATED": False}
    shape = {"BLOCK_N": block_n, "BLOCK_K": block_k, "SLOTS": slots, "SALT": 1}
    even = k % (block_k * segments) == 0
    # Tensor descriptors of both ranks give the same bits: they read zeros beyond K, up to the padding of the words. In
    # fp16 each case has one of them.
    described = (2, 3) if (even or block_k == mma_tiled.BLOCK) and segments == 1 else ()
    described = described[m % 2 : m % 2 + 1] if dtype is torch.float16 else described
    form = {"HAS_ZERO": qparams.shape[0] == 2, "GROUP_SIZE": group, "SEGMENTS": segments}
    form |= {"BLOCK_M": block_m, "EXTRA_M": extra_m}
    others = (bias, factor, addend)
    results = []
    for bulk in (0, *described):
        first = [1] * (bulk - 2)
        given, extra = (
            TensorDescriptor.from_tensor(x.view(*first, m, k), [*first, rows, block_k]) if bulk and rows else x
            for rows in (block_m, extra_m)
        )
        int4_matmul[(grid,)](
            given,
            extra,
            packed,
            qparams,
            *others,
            y,
            parts,
            m,
            n,
            k // (16 if group == 16 else 32),
            **shape,
            **form,
            **finish,
            FLOAT4=float4,
            EVEN_K=even or bulk > 0,
            BULK=bulk,
            WGMMA=False,
        )
        if rest:
            sums = {**shape, **finish, "TILE_M": tile_m, "BULK": bulk, "HEIGHT": 8}
            add_parts[(rest, tile_m // 8)](parts, *others, y, m, n, -(-k // 32), **sums)
        results.append(y.clone())
        y.fill_(float("nan"))
    assert all(torch.equal(result, results[0]) for result in results)
    y = results[0]

    s, z = (part.to(dtype).double().repeat_interleave(group, dim=1) for part in (scale, zero))
    numbers = torch.tensor(TWICE_FLOAT4).double()[q.int()] / 2 if float4 else q.double() - 8
    weight = numbers * s + z
    wanted = x.double() @ weight.T + (bias.double() if has_bias else 0)
    wanted = ACTIVATE[activation](wanted) * (factor.double() if has_f else 1) + (addend.double() if has_a else 0)
    assert ((y.double() - wanted).norm() / wanted.norm()).item() < most


# rows, out_features, block_m, extra_m, block_n, segments, waves, zeros, bias, activation, addend
GATES = [
    (1, 8, 8, 0, 16, 4, 0, False, False, "silu", False),
    (5, 40, 8, 0, 32, 2, 0, True, True, "gelu", True),
    (19, 72, 16, 0, 64, 1, 0, False, True, "", False),
    (17, 56, 16, 0, 32, 1, 5, True, True, "gelu_tanh", True),
    (70, 24, 128, 0, 16, 1, 3, False, False, "relu", False),
    (51, 24, 32, 16, 16, 1, 0, True, True, "silu", True),
    (100, 40, 64, 32, 32, 1, 5, False, True, "gelu", True),
]


def alternating_rows(gate: torch.Tensor, up: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight rows of ``gate``, eight of ``up``, and so on along ``dim``."""
    eights = [part.unflatten(dim, (-1, 8)) for part in (gate, up)]
    return torch.stack(eights, dim + 1).flatten(dim, dim + 2).contiguous()


def in_interpreter(kernel: Any, grid: Any, given: Mapping[str, Any], writes: Sequence[str], _: str) -> list[Any]:
    """``triton_launch.launch`` in the interpreter."""
    off = {name: False for name in ("USE_ASM", "WGMMA") if name in given}
    kernel[grid](**{n: value for n, value in given.items() if n not in ("num_warps", "num_stages")} | off, SALT=1)
    return [given[name] for name in writes]


@HERE
@dtypes()
@pytest.mark.parametrize("case", GATES, ids=str)
def test_gated_product_agrees_with_fp64(
    case: tuple, dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from et_cuda_passes.kernels import linear_launch, triton_launch
    from et_cuda_passes.kernels.tiling import Tiling
    from et_cuda_passes.layouts import mma_tiled

    m, n, block_m, extra_m, block_n, segments, waves, zeros, has_bias, activation, has_addend = case
    k, group = 256, 64
    random = torch.Generator().manual_seed(m * n)
    q = [torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=random) for _ in range(2)]
    scale = [torch.rand(n, k // group, generator=random) * 0.05 + 0.01 for _ in range(2)]
    zero = [torch.randn(n, k // group, generator=random) * 0.05 * zeros for _ in range(2)]
    bias = [torch.randn(n, generator=random).to(dtype) for _ in range(2)]
    x, addend = (torch.randn(*shape, generator=random).to(dtype) for shape in ((m, k), (m, n)))
    packed = alternating_rows(*(mma_tiled.pack(part) for part in q), 0)
    pairs = (mma_tiled.scale_and_zero(s, z, dtype, k) for s, z in zip(scale, zero, strict=True))
    both = alternating_rows(*bias, 0) if has_bias else None
    epilogue = linear_launch.Epilogue(both, activation, None, addend if has_addend else None, gated=True)
    y = torch.full((m, n), float("nan"), dtype=dtype)
    tiling = Tiling(block_m, block_n, 64, segments, waves, 4, 3, extra_m=extra_m)
    parts = torch.full((max(waves, 1) * tiling.tile_m * block_n,), float("nan"))
    monkeypatch.setattr(triton_launch, "launch", in_interpreter)
    # A GPU with one multiprocessor runs ``waves`` programs at once.
    linear_launch.launch_int4(x, m, packed, alternating_rows(*pairs, 1), epilogue, y, parts, group, tiling, 1, False, 1)

    def exact(which: int) -> torch.Tensor:
        s, z = (part[which].to(dtype).double().repeat_interleave(group, dim=1) for part in (scale, zero))
        wanted = x.double() @ ((q[which].double() - 8) * s + z).T
        return wanted + bias[which].double() if has_bias else wanted

    wanted = ACTIVATE[activation](exact(0)) * exact(1) + (addend.double() if has_addend else 0)
    assert ((y.double() - wanted).norm() / wanted.norm()).item() < most


@HERE
@pytest.mark.parametrize("activation", [name for name in ACTIVATE if name])
def test_activation_agrees_with_fp64_at_every_size(activation: str) -> None:
    x = torch.cat([torch.linspace(-40, 40, 8188), torch.tensor([1e30, -1e30, float("inf"), float("nan")])])
    y = torch.full_like(x, 7.0)
    activated[(1,)](x, y, activation, x.numel())
    *_, large, small, infinite, not_a_number = y.tolist()
    assert (large, abs(small), infinite) == (x[-4].item(), 0.0, float("inf")) and not_a_number != not_a_number
    # The reference of gelu uses erfc: with 1 + erf it loses all digits below -6, even in fp64.
    exact = {"gelu": lambda t: t * torch.special.erfc(-t * 0.5**0.5) / 2}.get(activation, ACTIVATE[activation])
    got, wanted = y[:-4].double(), exact(x[:-4].double())
    off = (got - wanted).abs()
    assert bool((off <= 2e-6 * wanted.abs() + 3e-7).all())
    near = x[:-4].abs() < 5
    assert bool((off[near] <= 2e-3 * wanted[near].abs() + 1e-12).all())
