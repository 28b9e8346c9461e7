"""Parses the equation of an einsum that multiplies rows by experts' matrices into its axes."""

from dataclasses import dataclass

from et_cuda_passes.graph.errors import Unmet


@dataclass(frozen=True)
class ExpertEinsum:
    """The axes of an einsum that multiplies rows by experts' matrices.

    A letter names each axis. The weights have the axes ``batch``, then N and K in either order.

    Attributes:
        x: the letters of x, in its order.
        out: the letters of the result, in its order.
        batch: letters that number the matrices: the letter of the experts, or the letters of the ids.
        shared: the leading letters of ``batch`` that x has too. Along the others all matrices read the same rows.
        rows: letters that only x has.
        n, k: letters of the matrices' axes.
        as_columns: whether the weights are [..., K, N].
    """

    x: str
    out: str
    batch: str
    shared: str
    rows: str
    n: str
    k: str
    as_columns: bool


def parse_einsum(equation: str, weights: int) -> ExpertEinsum:
    """The axes of ``equation``, which has two operands; ``weights`` is the index of the operand that holds the weights.

    Raises:
        Unmet: the equation is no product of rows with matrices.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    letters = "".join((*operands, out))
    plain = arrow and len(operands) == 2 and letters.isalpha()
    if not plain or any(len({*part}) != len(part) for part in (*operands, out)):
        raise _no_product(equation)
    w, x = operands[weights], operands[1 - weights]
    summed = [letter for letter in w[-2:] if letter in x and letter not in out]
    own = [letter for letter in w[-2:] if letter not in x and letter in out]
    batch = w[:-2]
    shared = "".join(letter for letter in batch if letter in x)
    rows = "".join(letter for letter in x if letter not in w)
    if len(summed) != 1 or len(own) != 1 or not batch.startswith(shared) or {*out} != {*batch, *rows, *own}:
        raise _no_product(equation)
    return ExpertEinsum(x, out, batch, shared, rows, own[0], summed[0], w[-1] == own[0])


def _no_product(equation: str) -> Unmet:
    return Unmet(f"the equation {equation!r}, which is no product of rows with matrices: write it as linear or bmm")
