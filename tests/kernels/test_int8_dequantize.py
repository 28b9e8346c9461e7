"""The assembly of the int8 conversions, executed by the rules of the PTX ISA on every pair of bytes."""

import re

import numpy as np
import pytest
import torch

from et_cuda_passes.kernels import int8_dequantize as source
from tests.kernels.ptx import carried_out, floats, joined

MAGIC = {"bf16": source._WAIT_BF16, "f16": source._WAIT_F16, "f32": source._WAIT_F32}
CONSTANT = {"bf16": source._BF16, "f16": source._F16, "f32": source._F32}
FORMS = {
    "exact bf16": source._EXACT,
    "scaled bf16": source._SCALED,
    "affine bf16": source._AFFINE_BF16,
    "exact f16": source._EXACT_F16,
    "scaled f16": source._SCALED_F16,
    "affine f16": source._AFFINE_F16,
}


@pytest.mark.parametrize("form", FORMS)
def test_assembly_converts_every_pair_of_bytes(form: str) -> None:
    what, kind = form.split()
    pairs = np.arange(2**16, dtype=np.uint32)
    q = [half.astype(np.float64) for half in pairs.astype(np.uint16).view(np.int8).reshape(-1, 2).T]
    random = np.random.default_rng(0)
    scale = [np.abs(random.standard_normal(2**16)) * 0.01 + 0.001 for _ in range(2)]
    zero = [random.standard_normal(2**16).astype(np.float32).astype(np.float64) for _ in range(2)]
    # The scales as floats of their own kind.
    scale = list(floats(joined(scale[0], scale[1], kind), kind))
    magic = "f32" if what == "affine" else kind
    (constant,) = re.findall(r"mov\.b32 \$0, (0x\w+);", MAGIC[magic].value)
    assert int(constant, 16) == CONSTANT[magic].value
    operands: dict[str, np.ndarray] = {"$1": pairs}
    operands["$2"] = operands["$3"] = np.full(2**16, int(constant, 16), np.uint32)
    if what == "scaled":
        operands["$4"] = joined(scale[0], scale[1], kind)
    if what == "affine":
        names = ("$4", "$5", "$6", "$7")
        operands |= {n: v.astype(np.float32).view(np.uint32) for n, v in zip(names, (*scale, *zero), strict=True)}
    got = floats(carried_out(FORMS[form].value, operands, 2**16), kind)
    factor = scale if what != "exact" else [np.ones(2**16)] * 2
    offset = zero if what == "affine" else [np.zeros(2**16)] * 2
    wanted = joined(*(a * b + c for a, b, c in zip(q, factor, offset, strict=True)), kind)
    for mine, theirs in zip(got, floats(wanted, kind), strict=True):
        assert np.array_equal(mine, theirs)


def test_check_finds_a_wrong_byte() -> None:
    swapped = source._EXACT.value.replace("0x4140", "0x4041")
    pairs = np.array([0x0102], np.uint32)
    magic = np.array([0x43434343], np.uint32)
    low, high = floats(carried_out(swapped, {"$1": pairs, "$2": magic}, 1), "bf16")
    assert (low[0], high[0]) == (1.0, 2.0)
    low, high = floats(carried_out(source._EXACT.value, {"$1": pairs, "$2": magic}, 1), "bf16")
    assert (low[0], high[0]) == (2.0, 1.0)


FLOAT8 = {
    ("bf16", torch.float8_e4m3fn): (source._E4M3, source._E4M3_SCALED, source._WAIT_E4M3, source._E4M3_FACTOR),
    ("f16", torch.float8_e4m3fn): (
        source._E4M3_F16, source._E4M3_F16_SCALED, source._WAIT_E4M3_F16, source._E4M3_F16_FACTOR,
    ),
    ("bf16", torch.float8_e5m2): (source._E5M2, source._E5M2_SCALED, source._WAIT_E5M2, source._E5M2_FACTOR),
    ("f16", torch.float8_e5m2): (
        source._E5M2_F16, source._E5M2_F16_SCALED, source._WAIT_E5M2_F16, source._E5M2_F16_FACTOR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("form", FLOAT8, ids=lambda form: f"{form[0]}-{form[1]}".replace("torch.", ""))
def test_assembly_converts_every_pair_of_8_bit_floats(form: tuple[str, torch.dtype], scaled: bool) -> None:
    kind, dtype = form
    exact, product, wait, factor = FLOAT8[form]
    (constant,) = re.findall(r"mov\.b32 \$0, (0x\w+);", wait.value)
    assert int(constant, 16) == factor.value
    pairs = np.arange(2**16, dtype=np.uint32)
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.uint8).view(dtype).double().numpy().reshape(-1, 2).T
    scale = [np.abs(part) * 0.01 + 0.001 for part in np.random.default_rng(0).standard_normal((2, 2**16))]
    scale = list(floats(joined(scale[0], scale[1], kind), kind))
    operands: dict[str, np.ndarray] = {"$1": pairs, "$4": joined(scale[0], scale[1], kind)}
    operands["$2"] = operands["$3"] = np.full(2**16, factor.value, np.uint32)
    got = floats(carried_out((product if scaled else exact).value, operands, 2**16), kind)
    wanted = joined(*(n * s if scaled else n for n, s in zip(numbers, scale, strict=True)), kind)
    finite = np.isfinite(numbers).all(axis=0)
    assert finite.sum() >= 2**16 * 0.9
    for mine, theirs in zip(got, floats(wanted, kind), strict=True):
        assert np.array_equal(mine[finite], theirs[finite])
