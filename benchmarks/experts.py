"""The int4 product of experts beside bf16: microseconds by model and number of tokens, on the GPU of this machine.

    python -m benchmarks.experts [--group 32] [--models Mixtral OLMoE] [--tokens 1 4 16 64 256 1024 4096]

Each token is routed to TOP of the model's experts, drawn at random. Two forms are timed, which transformers writes:

- ``bmm``: one matrix for each token and expert, chosen by ids (a few tokens). In bf16 the chosen weights are gathered
  and multiplied by ``torch.bmm``, as in eager.
- ``grouped_mm``: rows sorted by expert (many tokens). In bf16 it is ``torch.nn.functional.grouped_mm``.

Every call of a CUDA graph has a routing of its own, so that few tokens do not find their experts in the L2 cache. The
limit is the larger of two times: the packed weights of all experts that a routing reads, at the bandwidth of a copy,
and the operations at the rate of a large product of cuBLAS.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.int4 import microseconds
from benchmarks.limit import Limit
from et_cuda_passes.kernels.linear_launch import INT4_GROUP_SIZES
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import INT4_EXPERTS

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
MOST_BMM = 64
"""Largest number of tokens for which the ``bmm`` form is timed: its bf16 form gathers a matrix for every row."""
ROUTINGS = 8
MOST_APART = 1e-2
OPS = INT4_EXPERTS["mma_tiled"]


@dataclass(frozen=True)
class Model:
    """One product of a mixture of experts: weights [experts, n, k], of which a token has ``top``."""

    experts: int
    top: int
    n: int
    k: int


MODELS = {
    "Mixtral-8x7B gate and up": Model(8, 2, 28672, 4096),
    "Mixtral-8x7B down": Model(8, 2, 4096, 14336),
    "Qwen3-30B-A3B gate and up": Model(128, 8, 1536, 2048),
    "Qwen3-30B-A3B down": Model(128, 8, 2048, 768),
    "OLMoE gate and up": Model(64, 8, 2048, 2048),
    "OLMoE down": Model(64, 8, 2048, 1024),
}


@dataclass(frozen=True)
class Weights:
    """Packed experts with scales in bf16, and the same weights in bf16 [E, N, K]."""

    packed: Tensor
    pair: Tensor
    dense: Tensor
    group: int

    @classmethod
    def random(cls, model: Model, group: int) -> "Weights":
        """On the GPU, one expert repeated with other scales, since packing runs on the CPU."""
        e, n, k = model.experts, model.n, model.k
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scale = torch.rand(n, k // group) * 0.01 + 0.01
        words = mma_tiled.pack(q).cuda()
        pair = mma_tiled.scale_and_zero(scale, torch.zeros_like(scale), torch.bfloat16, k).cuda()
        factors = 2.0 ** torch.randint(-1, 2, (e,)).cuda()  # exact in bf16
        one = ((q.cuda().float() - 8) * scale.bfloat16().float().cuda().repeat_interleave(group, 1)).bfloat16()
        dense = torch.stack([one * factor for factor in factors.bfloat16()])
        pairs = torch.stack([pair * factor for factor in factors.bfloat16()], dim=1)
        return cls(words.expand(e, *words.shape).contiguous(), pairs.contiguous(), dense, group)


def routing(model: Model, tokens: int) -> Tensor:
    """Expert of every row, int64 [tokens * top]: different experts for the rows of a token."""
    return torch.rand(tokens, model.experts, device="cuda").topk(model.top).indices.reshape(-1)


def ends(model: Model, ids: Tensor) -> Tensor:
    """Where the rows of each expert end after a sort, int32 [E]."""
    return torch.bincount(ids, minlength=model.experts).cumsum(0).to(torch.int32)


def bmm_forms(weights: Weights, x: Tensor, ids: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """bf16 and int4, for rows x [rows, K] and their experts."""
    rows, n = x.unsqueeze(1), weights.dense.shape[1]
    return (
        lambda: torch.bmm(rows, weights.dense[ids].transpose(1, 2)),
        lambda: OPS.bmm(rows, weights.packed, weights.pair, ids, weights.group, n),
    )


def grouped_forms(weights: Weights, x: Tensor, offs: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """bf16 and int4, for rows x [rows, K] that are sorted by expert."""
    n = weights.dense.shape[1]
    return (
        lambda: F.grouped_mm(x, weights.dense.transpose(1, 2), offs=offs),
        lambda: OPS.grouped_mm(x, weights.packed, weights.pair, offs, weights.group, n),
    )


def times(model: Model, group: int, tokens: Sequence[int], limit: Limit) -> dict[str, list[float | None]]:
    """Microseconds by form and number of tokens, and the limit."""
    weights = Weights.random(model, group)
    names = ("bmm bf16", "bmm int4", "grouped_mm bf16", "grouped_mm int4", "limit")
    found: dict[str, list[float | None]] = {name: [] for name in names}
    for count in tokens:
        x = torch.randn(count * model.top, model.k, device="cuda", dtype=torch.bfloat16)
        routings = [routing(model, count) for _ in range(ROUTINGS)]
        offs = [ends(model, ids) for ids in routings]
        forms = {"grouped_mm": [grouped_forms(weights, x, each) for each in offs]}
        if count <= MOST_BMM:
            forms["bmm"] = [bmm_forms(weights, x, ids) for ids in routings]
        for form in ("bmm", "grouped_mm"):
            pairs = forms.get(form, [])
            if pairs:
                check(*pairs[0], f"{form}, {count} tokens")
            for kind, calls in zip(("bf16", "int4"), zip(*pairs, strict=True) if pairs else ((), ()), strict=True):
                found[f"{form} {kind}"].append(microseconds(calls) if calls else None)
        read = sum(int((torch.bincount(ids) > 0).sum()) for ids in routings) / ROUTINGS
        nbytes = read * (model.n * model.k / 2 + model.n * model.k / group * 2)
        found["limit"].append(limit.microseconds(nbytes, 2 * count * model.top * model.n * model.k))
    return found


def check(bf16: Callable[[], Tensor], int4: Callable[[], Tensor], what: str) -> None:
    """Both forms have the same weights, so their results agree."""
    wanted, got = bf16().float(), int4().float()
    off = ((got - wanted).norm() / wanted.norm()).item()
    if not off <= MOST_APART:
        raise RuntimeError(f"{what}: int4 and bf16 differ by {off:.1e}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=32, choices=INT4_GROUP_SIZES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="beginnings of their names")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.manual_seed(0)
    limit, console = Limit.measured(), Console(width=160)
    console.print(
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {limit}, group size {options.group}; microseconds"
    )
    for name, model in MODELS.items():
        if not name.startswith(tuple(options.models)):
            continue
        table = Table(f"{name}: {model.experts} x {model.n} x {model.k}, {model.top} a token")
        for count in options.tokens:
            table.add_column(f"{count}")
        found = times(model, options.group, options.tokens, limit)
        for label, row in found.items():
            table.add_row(label, *("" if value is None else f"{value:.1f}" for value in row))
        for form in ("bmm", "grouped_mm"):
            pairs = zip(found[f"{form} int4"], found[f"{form} bf16"], strict=True)
            table.add_row(f"{form}: int4 / bf16", *("" if a is None or b is None else f"{a / b:.2f}" for a, b in pairs))
        console.print(table)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
