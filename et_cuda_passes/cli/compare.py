"""How far what a lowered program gives is from what the original gives."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One output against the original's.

    Attributes:
        what: the output, with its dtype and shape.
        relative: |result - original| / |original| in the 2-norm, over the elements that are finite; for integers and
            bool the share of elements that differ.
        largest: the largest difference of an element.
        tolerance: what ``relative`` may be.
        problem: what no tolerance allows; empty where there is nothing.
    """

    what: str
    relative: float
    largest: float
    tolerance: float
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether the output is right."""
        return not self.problem and self.relative <= self.tolerance

    def __str__(self) -> str:
        if self.problem:
            return f"{self.what}: {self.problem}: WRONG"
        verdict = "ok" if self.holds else "WRONG"
        return (
            f"{self.what}: relative error {self.relative:.2e}, largest {self.largest:.2e}, "
            f"tolerance {self.tolerance:.2e}: {verdict}"
        )


def default_tolerance(dtype: torch.dtype, dynamic_activations: bool = False) -> float:
    """What the relative error of an output may be.

    In 16 bits and less, 4 units in the last place (2^-5 for bfloat16, 2^-8 for float16): operands, weights, accumulated
    and final values are each rounded once, by the kernels of the target in another order than in eager. In 32 and 64
    bits the rounding of a value is small against that of sums of thousands in another order: 1024 units (2^-13 for
    float32). Activations quantized to 8 bits on the way may fall on the other side of a step of 1/255 of their range
    when they differ by the last bit: 2^-6. An integer is right or wrong.
    """
    if not dtype.is_floating_point:
        return 0.0
    units = 4 if dtype.itemsize <= 2 else 1024
    return max(units * torch.finfo(dtype).eps, 2**-6 if dynamic_activations else 0.0)


def compare(index: int, got: Any, wanted: Any, tolerance: float | None, dynamic_activations: bool) -> Comparison:
    """Compare an output with the original's; ``tolerance`` None for :func:`default_tolerance`."""
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        problem = "" if type(got) is type(wanted) and got == wanted else f"is {got!r}, the original's is {wanted!r}"
        return Comparison(f"output {index}", 0.0, 0.0, 0.0, problem)
    what = f"output {index} ({wanted.dtype} {list(wanted.shape)})"
    limit = default_tolerance(wanted.dtype, dynamic_activations) if tolerance is None else tolerance
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return Comparison(what, math.inf, math.inf, limit, f"is {got.dtype} {list(got.shape)}")
    exact = not wanted.dtype.is_floating_point
    a, b = got.detach().cpu().double().flatten(), wanted.detach().cpu().double().flatten()
    finite = a.isfinite() & b.isfinite()
    alike = finite | (a == b) | (a.isnan() & b.isnan())
    if not bool(alike.all()):
        count = int((~alike).sum())
        return Comparison(
            what,
            math.inf,
            math.inf,
            limit,
            f"{count} of {a.numel()} elements are infinite or NaN in only one of the two",
        )
    if a.numel() and not bool(finite.any()):
        problem = f"none of its {a.numel()} elements is finite, so that none was compared; give other inputs"
        return Comparison(what, math.inf, math.inf, limit, problem)
    difference, size = (a - b)[finite], float(b[finite].norm())
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    if exact:
        relative = float((difference != 0).double().mean()) if difference.numel() else 0.0
    else:
        error = float(difference.norm())
        relative = error / size if size else (math.inf if error else 0.0)
    return Comparison(what, relative, largest, limit)
