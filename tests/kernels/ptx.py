"""Executes the assembly of the conversions by the rules of the PTX ISA."""

import re
from typing import Any

import numpy as np
import torch

Words = np.ndarray[Any, np.dtype[np.uint32]]


_BITWISE = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "shl.b32": np.left_shift,
    "shr.b32": np.right_shift,
    "shr.u32": np.right_shift,
}


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
    return results(text, operands, count)["$0"]


def results(text: str, operands: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The final values of all operands and registers."""
    registers: dict[str, np.ndarray] = dict(operands)

    def read(name: str) -> Words:
        if name in registers:
            return registers[name].astype(np.uint32)
        return np.full(count, int(name, 0), np.uint32)

    for line in re.split(r";\s*", text.strip("{} ")):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        to, *names = rest.split(", ")
        given = [read(name) for name in names]
        if operation in ("mov.b32", "cvt.u32.u16"):
            result = given[0]
        elif operation in _BITWISE:
            result = _BITWISE[operation](given[0], given[1])
        elif operation == "lop3.b32":
            assert names[3] == "0xea", names
            result = given[0] & given[1] | given[2]
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
    return registers
