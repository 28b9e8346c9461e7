"""The assembly of the int8 conversions, executed by the rules of the PTX ISA on every pair of bytes."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from et_cuda_passes.kernels import int8_dequantize as source

Words = np.ndarray[Any, np.dtype[np.uint32]]


def floats(words: Words, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high float of each word, in fp64."""
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float16
    halves = torch.from_numpy(words.view(np.int16).copy()).view(dtype).double().numpy()
    return halves[0::2], halves[1::2]


def joined(low: np.ndarray, high: np.ndarray, kind: str) -> Words:
    """Two floats in a word, each rounded once."""
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float16
    pairs = torch.from_numpy(np.stack([low, high], axis=1).astype(np.float32)).to(dtype)
    return pairs.view(torch.int16).numpy().reshape(-1).view(np.uint32)


def permuted(a: Words, b: Words, selector: int) -> Words:
    """``prmt.b32``: byte i of the result is the byte of (a, b) whose number is nibble i of the selector."""
    both = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], axis=1)
    chosen = [both[:, selector >> (4 * place) & 7] for place in range(4)]
    return np.ascontiguousarray(np.stack(chosen, axis=1)).view(np.uint32)[:, 0]


def carried_out(text: str, operands: dict[str, np.ndarray], count: int) -> Words:
    """The final value of operand 0."""
    registers: dict[str, np.ndarray] = dict(operands)

    def read(name: str) -> Words:
        if name in registers:
            return registers[name].astype(np.uint32)
        return np.full(count, int(name, 16), np.uint32)

    for line in re.split(r";\s*", text.strip("{} ")):
        operation, _, rest = line.partition(" ")
        if not operation or operation == ".reg":
            continue
        to, *names = rest.split(", ")
        given = [read(name) for name in names]
        if operation in ("mov.b32", "cvt.u32.u16"):
            result = given[0]
        elif operation in ("and.b32", "xor.b32"):
            result = given[0] & given[1] if operation == "and.b32" else given[0] ^ given[1]
        elif operation == "prmt.b32":
            result = permuted(given[0], given[1], int(names[2], 16))
        elif operation in ("add.rn.f32", "fma.rn.f32"):
            exact = [word.view(np.float32).astype(np.float64) for word in given]
            total = exact[0] + exact[1] if operation == "add.rn.f32" else exact[0] * exact[1] + exact[2]
            result = total.astype(np.float32).view(np.uint32)
        elif found := re.fullmatch(r"cvt\.rn\.(b?f16x2)\.f32", operation):
            # The first operand goes to the upper half.
            result = joined(given[1].view(np.float32), given[0].view(np.float32), found[1])
        elif found := re.fullmatch(r"(add|mul|fma)\.rn\.(b?f16x2)", operation):
            parts = [floats(word, found[2]) for word in given]
            if found[1] == "add":
                halves = [a + b for a, b in zip(*parts, strict=True)]
            elif found[1] == "mul":
                halves = [a * b for a, b in zip(*parts, strict=True)]
            else:
                halves = [a * b + c for a, b, c in zip(*parts, strict=True)]
            result = joined(halves[0], halves[1], found[2])
        else:
            raise AssertionError(f"no instruction that is known here: {line}")
        registers[to] = result
    return registers["$0"]


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
