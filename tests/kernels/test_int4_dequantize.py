"""The assembly of the int4 conversions, executed by the rules of the PTX ISA on every nibble of two words."""

import numpy as np
import pytest

from et_cuda_passes.kernels import int4_dequantize as source
from et_cuda_passes.quant.float_forms import TWICE_FLOAT4
from tests.kernels.ptx import floats, joined, results

FORMS = {
    "bf16 integers": (source._BF16_SCALED, source._BF16_SPLIT_SCALED),
    "f16 integers": (source._F16_SCALED, source._F16_SPLIT_SCALED),
    "bf16 affine": (source._BF16_AFFINE, source._BF16_SPLIT_AFFINE),
    "f16 affine": (source._F16_AFFINE, source._F16_SPLIT_AFFINE),
    "bf16 float4": (source._BF16_FLOAT4_SCALED, source._BF16_FLOAT4_SPLIT),
    "f16 float4": (source._F16_FLOAT4_SCALED, source._F16_FLOAT4_SPLIT),
}
COUNT = 4096


@pytest.mark.parametrize("split", [False, True], ids=["one scale", "two scales"])
@pytest.mark.parametrize("half", ["low", "high"])
@pytest.mark.parametrize("form", FORMS)
def test_assembly_converts_every_nibble(form: str, half: str, split: bool) -> None:
    kind, what = form.split()
    random = np.random.default_rng(0)
    # Every pair of nibbles of the two words occurs.
    words = random.integers(0, 2**32, (2, COUNT), dtype=np.uint64).astype(np.uint32)

    def table() -> tuple[np.ndarray, np.ndarray]:
        low, high = np.abs(random.standard_normal((2, COUNT))) * 0.01 + 0.001
        return floats(joined(low, high, kind), kind)

    scales, zeros = [table(), table()], [table(), table()]
    operands = {"$4": words[0], "$5": words[1]}
    names = ["$6", "$7"] if split else ["$6"]
    operands |= {name: joined(*pair, kind) for name, pair in zip(names, scales, strict=False)}
    if what == "affine":
        names = ["$8", "$9"] if split else ["$7"]
        operands |= {name: joined(*pair, kind) for name, pair in zip(names, zeros, strict=False)}
    begin = source._BEGIN_FLOAT4 if what == "float4" else source._BEGIN
    text = begin.value + (source._LOW if half == "low" else source._HIGH).value + FORMS[form][split].value
    found = results(text, operands, COUNT)
    for nibble in range(4):
        of = nibble // 2 if split else 0
        codes = [(word >> np.uint32(4 * nibble + 16 * (half == "high"))) & np.uint32(15) for word in words]
        numbers = np.array(TWICE_FLOAT4) / 2 if what == "float4" else np.arange(16.0) - 8
        exact = [numbers[code] * scale for code, scale in zip(codes, scales[of], strict=True)]
        if what == "affine":
            exact = [value + zero for value, zero in zip(exact, zeros[of], strict=True)]
        for mine, theirs in zip(floats(found[f"${nibble}"], kind), floats(joined(*exact, kind), kind), strict=True):
            assert np.array_equal(mine, theirs)
