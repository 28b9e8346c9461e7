"""The scale_and_zero form: packing, unpacking and bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.layouts import metal, scale_and_zero


@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    given_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_scale_and_zero_interleaves_numbers(n: int, groups: int, dtype: torch.dtype, given_dtype: torch.dtype) -> None:
    scale, zero = torch.rand(n, groups).to(given_dtype), torch.rand(n, groups).to(given_dtype)
    packed = scale_and_zero.pack(scale, zero, dtype)
    assert packed.dtype == dtype and packed.shape == (groups, n, 2) and packed.is_contiguous()
    for row in range(n):
        for group in range(groups):
            assert packed[group, row].tolist() == [
                scale[row, group].to(dtype).item(),
                zero[row, group].to(dtype).item(),
            ]
    back = scale_and_zero.unpack(packed)
    assert torch.equal(back[0], scale.to(dtype)) and torch.equal(back[1], zero.to(dtype))
    assert all(t.is_contiguous() for t in back)


def test_scale_and_zero_defaults_to_bf16() -> None:
    assert scale_and_zero.pack(torch.ones(8, 2), torch.zeros(8, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pack", [scale_and_zero.pack, metal.scale_and_zero])
def test_pack_scales_rejects_nonfinite_values(pack, bad: float) -> None:  # type: ignore[no-untyped-def]
    good, spoiled = torch.ones(8, 2), torch.ones(8, 2)
    spoiled[3, 1] = bad
    for scale, zero in ((spoiled, good), (good, spoiled)):
        with pytest.raises(ValueError, match=r"NaN or infinite values in torch.bfloat16"):
            pack(scale, zero)


@pytest.mark.parametrize("pack", [scale_and_zero.pack, metal.scale_and_zero])
def test_pack_scales_rejects_values_beyond_fp16(pack) -> None:  # type: ignore[no-untyped-def]
    scale = torch.full((8, 2), 1e5)
    pack(scale, torch.zeros(8, 2), torch.float32)
    with pytest.raises(ValueError, match="use bf16 or fp32 if fp16 is too narrow"):
        pack(scale, torch.zeros(8, 2), torch.float16)


def test_metal_scales_reject_computed_zero_beyond_fp16() -> None:
    with pytest.raises(ValueError, match=r"zero - 8 \* scale has NaN or infinite values in torch.float16"):
        metal.scale_and_zero(torch.full((8, 2), 1e4), torch.zeros(8, 2), torch.float16)


@pytest.mark.parametrize("pack", [scale_and_zero.pack, metal.scale_and_zero])
def test_pack_scales_rejects_bad_input(pack) -> None:  # type: ignore[no-untyped-def]
    one = torch.ones(8, 2)
    with pytest.raises(TypeError, match=r"zero must be floating, got torch.int8; .* zero = -zero_point \* scale"):
        pack(one, torch.zeros(8, 2, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch.int8"):
        pack(one, one, torch.int8)
    with pytest.raises(ValueError, match=r"\[N, K/group\], got \(8, 2\) and \(8, 3\)"):
        pack(one, torch.ones(8, 3))
    with pytest.raises(ValueError, match=r"got \(8,\) and \(8,\)"):
        pack(torch.ones(8), torch.ones(8))
    with pytest.raises(TypeError, match=r"scale must be a torch.Tensor, got float"):
        pack(1.0, one)
    with pytest.raises(ValueError, match="zero is a meta tensor"):
        pack(one, one.to("meta"))


def test_scale_and_zero_unpack_rejects_bad_input() -> None:
    with pytest.raises(TypeError, match=r"scale_and_zero must be .*, got torch.int32"):
        scale_and_zero.unpack(torch.zeros(1, 8, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"shape \[K/group, N, 2\], got \(8, 1, 3\)"):
        scale_and_zero.unpack(torch.zeros(8, 1, 3))
