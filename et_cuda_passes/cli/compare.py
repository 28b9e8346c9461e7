"""Compares the outputs of a lowered program with those of the original."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from et_cuda_passes.cli.documents import Compared, finite


@dataclass(frozen=True)
class Comparison:
    """One output compared with the original's.

    Attributes:
        what: the output, with its dtype and shape.
        relative: |result - original| / |original| in the 2-norm, over the finite elements; for integers and bool the
            fraction of elements that differ.
        largest: the largest difference of an element.
        tolerance: upper limit of ``relative``.
        problem: a difference that no tolerance allows; empty if there is no such difference.
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

    def entry(self, target: str, component: str | None = None, case: str | None = None) -> Compared:
        """The entry of a JSON document."""
        relative, largest = finite(self.relative), finite(self.largest)
        return Compared(component, target, case, self.what, relative, largest, self.tolerance, self.problem, self.holds)

    def __str__(self) -> str:
        if self.problem:
            return f"{self.what}: {self.problem}: WRONG"
        verdict = "ok" if self.holds else "WRONG"
        return (
            f"{self.what}: relative error {self.relative:.2e}, largest {self.largest:.2e}, "
            f"tolerance {self.tolerance:.2e}: {verdict}"
        )


def default_tolerance(dtype: torch.dtype, quantized_activations: bool = False) -> float:
    """The upper limit of the relative error of an output.

    In 16 bits and less it is 4 units in the last place (2^-5 for bfloat16, 2^-8 for float16): operands, weights,
    accumulated and final values are each rounded once, by the kernels of the target in another order than in eager. In
    32 and 64 bits it is 1024 units (2^-13 for float32): sums of thousands of values in another order dominate the
    error. With activations quantized to 8 bits it is at least 2^-6: an activation that differs in the last bit may be
    rounded to the next step, 1/255 of the range. Integers must be equal.
    """
    if not dtype.is_floating_point:
        return 0.0
    units = 4 if dtype.itemsize <= 2 else 1024
    return max(units * torch.finfo(dtype).eps, 2**-6 if quantized_activations else 0.0)


def compare(name: int | str, got: Any, wanted: Any, tolerance: float | None, quantized_activations: bool) -> Comparison:
    """Compare the output ``name`` with the original's; ``tolerance`` None for :func:`default_tolerance`."""
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        problem = "" if type(got) is type(wanted) and got == wanted else f"is {got!r}, the original is {wanted!r}"
        return Comparison(f"output {name}", 0.0, 0.0, 0.0, problem)
    what = f"output {name} ({wanted.dtype} {list(wanted.shape)})"
    limit = default_tolerance(wanted.dtype, quantized_activations) if tolerance is None else tolerance
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
        problem = f"none of its {a.numel()} elements is finite, so none was compared; give other inputs"
        return Comparison(what, math.inf, math.inf, limit, problem)
    difference, size = (a - b)[finite], float(b[finite].norm())
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    if exact:
        relative = float((difference != 0).double().mean()) if difference.numel() else 0.0
    else:
        error = float(difference.norm())
        relative = error / size if size else (math.inf if error else 0.0)
    return Comparison(what, relative, largest, limit)
