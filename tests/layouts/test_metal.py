"""The metal layout, and its scales and zeros of q * S + Z."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.layouts import metal, mps
from tests.layouts import reference


@given(
    n=st.integers(1, 40),
    eighth=st.integers(1, 20),
    chunk_bytes=st.integers(1, 5_000),
    signed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_metal_follows_formula_and_unpack_inverts_pack(
    n: int, eighth: int, chunk_bytes: int, signed: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 16, (n, 8 * eighth), dtype=torch.uint8, generator=random)
    q, offset = (wanted.to(torch.int8) - 8, 8) if signed else (wanted, 0)
    packed = metal.pack(q, offset, chunk_bytes=chunk_bytes)
    assert packed.shape == (n, 4 * eighth) and packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.flatten().tolist() == reference.row_major_bytes(wanted)
    assert torch.equal(metal.unpack(packed), wanted)


def test_metal_bytes_equal_mps_bytes() -> None:
    q = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    assert reference.little_endian_bytes(mps.pack(q, 8)) == metal.pack(q).flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_metal_scales_without_zero_are_exact(dtype: torch.dtype) -> None:
    scale = torch.rand(8, 4) + 0.01
    s, z = metal.scale_and_zero(scale, torch.zeros(8, 4), dtype)
    assert s.dtype == z.dtype == dtype and s.is_contiguous() and z.is_contiguous()
    assert torch.equal(s, scale.to(dtype))
    q = torch.arange(16.0, dtype=torch.float64)[:, None, None]
    assert torch.equal(q * s.double() + z.double(), (q - 8) * scale.to(dtype).double())


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)])
def test_metal_scales_with_zero_are_rounded_once(dtype: torch.dtype, unit: float) -> None:
    scale = torch.rand(64, 4) + 0.01
    zero = -scale * torch.randint(-8, 8, (64, 4))
    s, z = (t.double() for t in metal.scale_and_zero(scale, zero, dtype))
    q = torch.arange(16.0, dtype=torch.float64)[:, None, None]
    off = (q * s + z) - ((q - 8) * scale.double() + zero.double())
    # `unit` is the largest relative error of one rounding. That of S counts |q - 8| times; Z is rounded to fp32 and
    # then to the dtype.
    assert (off.abs() <= unit * 8 * scale.double() + (unit + 2**-24) * 1.01 * z.abs()).all()


def test_metal_scales_are_contiguous() -> None:
    scale, zero = torch.rand(4, 8).t(), torch.rand(4, 8).t()
    s, z = metal.scale_and_zero(scale, zero, torch.float32)
    assert s.is_contiguous() and z.is_contiguous() and torch.equal(s, scale)
