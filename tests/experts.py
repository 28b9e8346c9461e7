"""Products with the weights of experts for tests, each with the same product in plain operators."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.testing import floats

DEQUANTIZE = torch.ops.torchao.dequantize_affine.default
E, N, K = 4, 40, 96


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
