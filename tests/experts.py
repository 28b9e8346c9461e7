"""Small mixtures of experts for tests: stacked weights as plain buffers read through dequantize_affine."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchao.quantization.quant_primitives  # noqa: F401  (registers dequantize_affine)
from torch import Tensor, nn
from torch.export import ExportedProgram

# The package's name is not used here: hypothesis draws constants from the imported modules, and a plan must not change
# with the package.
DEQUANTIZE = torch.ops.torchao.dequantize_affine.default
E, N, K = 4, 40, 96
BF16 = torch.bfloat16


class Experts(nn.Module):
    """``form(weight, *inputs)`` over a random stack [E, N, K], or [E, K, N] if ``columns``.

    Args:
        form: the computation on the dequantized stack.
        block: elements along each axis of the stored stack that share a scale; groups of 32 along K by default.
        low, high: the quantized range, both ends included.
        zero_points: "random" within the range, or None for no zero point tensor at all.
        columns: whether the stack is stored as [E, K, N].
        dtype: dtype of the dequantized weight and the scales.
        shape: E, N and K.
    """

    def __init__(
        self,
        form: Callable[..., Any],
        block: tuple[int, ...] | None = None,
        low: int = -8,
        high: int = 7,
        zero_points: str | None = "random",
        columns: bool = False,
        dtype: torch.dtype = BF16,
        shape: tuple[int, ...] = (E, N, K),
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        experts, n, k = shape
        stored = (experts, k, n) if columns else shape
        self.block = list(block or ((1, 32, 1) if columns else (1, 1, 32)))
        self.form, self.low, self.high, self.dtype, self.columns = form, low, high, dtype, columns
        blocks = [size // of for size, of in zip(stored, self.block, strict=True)]
        self.register_buffer("data", torch.randint(low, high + 1, stored, generator=random).to(torch.int8))
        self.register_buffer("scale", (torch.rand(blocks, generator=random) * 0.02 + 0.005).to(dtype))
        self.zero_point: Tensor | None = None
        if zero_points is not None:
            points = torch.randint(low, high + 1, blocks, generator=random).to(torch.int8)
            del self.zero_point
            self.register_buffer("zero_point", points)

    def forward(self, *inputs: Tensor) -> Any:
        scheme = (self.data.dtype, self.low, self.high, self.dtype)
        return self.form(DEQUANTIZE(self.data, self.block, self.scale, self.zero_point, *scheme), *inputs)

    def exact(self) -> Tensor:
        """The weights in fp64, as [E, N, K]."""
        expanded = []
        for part in (self.scale, self.zero_point):
            table = torch.zeros(self.scale.shape) if part is None else part
            for axis, size in enumerate(self.block):
                table = table.repeat_interleave(size, dim=axis)
            expanded.append(table.double())
        weight = (self.data.double() - expanded[1]) * expanded[0]
        return weight.transpose(1, 2) if self.columns else weight


def export(model: nn.Module, *inputs: Tensor, dynamic: Any = None, decompose: bool = False) -> ExportedProgram:
    """The exported program, or its decomposition into core operators that keeps the dequantize."""
    shapes = None if dynamic is None else {"inputs": dynamic}
    with torch.no_grad():
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)
        if not decompose:
            return program
        table = torch.export.default_decompositions()
        table.pop(DEQUANTIZE, None)
        return program.run_decompositions(table)


def floats(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


IDS = torch.tensor([1, 3, 1, 0, 2, 3])
OFFS = torch.tensor([2, 2, 9, 11], dtype=torch.int32)


def grouped(weight: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """The definition of grouped mm, row by row."""
    expert = [int((offs <= row).sum()) for row in range(x.shape[0])]
    return torch.stack([weight[e] @ x[row] for row, e in enumerate(expert)])


# name -> the rule that rewrites it, the product, the same product in plain operators, and its inputs
FORMS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = {
    "bmm": (
        "bmm_int4",
        lambda w, x: torch.bmm(x, w.transpose(1, 2)),
        lambda w, x: torch.stack([x[e] @ w[e].T for e in range(E)]),
        (floats(E, 5, K),),
    ),
    "matmul, one batch for all": (
        "bmm_int4",
        lambda w, x: x @ w.mT,
        lambda w, x: torch.stack([x @ w[e].T for e in range(E)]),
        (floats(5, K),),
    ),
    "bmm, the weights on the left": (
        "bmm_int4",
        lambda w, x: torch.bmm(w, x.transpose(1, 2)).view(-1),
        lambda w, x: torch.stack([w[e] @ x[e].T for e in range(E)]).reshape(-1),
        (floats(E, 5, K),),
    ),
    "grouped mm of batches": (
        "bmm_int4",
        lambda w, x: F.grouped_mm(x, w.transpose(-2, -1)),
        lambda w, x: torch.stack([x[e] @ w[e].T for e in range(E)]),
        (floats(E, 5, K),),
    ),
    "index": (
        "indexed_bmm_int4",
        lambda w, x, ids: torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1),
        lambda w, x, ids: torch.stack([w[e] @ row for e, row in zip(ids, x, strict=True)]),
        (floats(6, K), IDS),
    ),
    "index, rows on the left": (
        "indexed_bmm_int4",
        lambda w, x, ids: torch.bmm(x, w[ids].transpose(1, 2)),
        lambda w, x, ids: torch.stack([rows @ w[e].T for e, rows in zip(ids, x, strict=True)]),
        (floats(6, 3, K), IDS - 2),
    ),
    "index of the transposed stack": (
        "indexed_bmm_int4",
        lambda w, x, ids: torch.bmm(x, w.transpose(1, 2)[ids]),
        lambda w, x, ids: torch.stack([rows @ w[e].T for e, rows in zip(ids, x, strict=True)]),
        (floats(6, 3, K), IDS),
    ),
    "index_select": (
        "indexed_bmm_int4",
        lambda w, x, ids: torch.bmm(w.index_select(0, ids), x),
        lambda w, x, ids: torch.stack([w[e] @ rows for e, rows in zip(ids, x, strict=True)]),
        (floats(6, K, 2), IDS.int()),
    ),
    "grouped mm": (
        "grouped_mm_int4",
        lambda w, x, offs: F.grouped_mm(x, w.transpose(-2, -1), offs=offs),
        grouped,
        (floats(11, K), OFFS),
    ),
    "einsum of all": (
        "einsum_int4",
        lambda w, x: torch.einsum("tk,enk->ten", x, w),
        lambda w, x: torch.stack([x @ w[e].T for e in range(E)], dim=1),
        (floats(5, K),),
    ),
    "einsum, its operands in another order": (
        "einsum_int4",
        lambda w, x: torch.einsum("e n k, t e k -> n t e", w, x),
        lambda w, x: torch.stack([w[e] @ x[:, e].T for e in range(E)], dim=2),
        (floats(5, E, K),),
    ),
    "einsum of a token's experts": (
        "einsum_int4",
        lambda w, x, ids: torch.einsum("ti,taoi->tao", x, w[ids]),
        lambda w, x, ids: torch.stack([torch.stack([w[e] @ row for e in of]) for of, row in zip(ids, x, strict=True)]),
        (floats(3, K), IDS.view(3, 2)),
    ),
    "einsum, rows for each of them": (
        "einsum_int4",
        lambda w, x, ids: torch.einsum("tai,taoi->tao", x, w[ids]),
        lambda w, x, ids: (w[ids] @ x.unsqueeze(-1)).squeeze(-1),
        (floats(3, 2, K), IDS.view(3, 2)),
    ),
    "select": (
        "linear_int4",
        lambda w, x: F.linear(x, w[1]) * F.linear(x, w[-1]),
        lambda w, x: (x @ w[1].T) * (x @ w[3].T),
        (floats(5, K),),
    ),
    "unbind": (
        "linear_int4",
        lambda w, x: torch.cat([F.linear(x, expert) for expert in w]),
        lambda w, x: torch.cat([x @ w[e].T for e in range(E)]),
        (floats(5, K),),
    ),
    "slice": (
        "linear_int4",
        lambda w, x: x @ w[2:3].squeeze(0).t(),
        lambda w, x: x @ w[2].T,
        (floats(5, K),),
    ),
    "split": (
        "linear_int4",
        lambda w, x: sum(F.linear(x, expert.squeeze(0)) for expert in w.split(1)),
        lambda w, x: x @ w.sum(dim=0).T,
        (floats(5, K),),
    ),
}
