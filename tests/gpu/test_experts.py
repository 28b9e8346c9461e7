"""Experts on a GPU: the kernel against fp64 in every form, and a lowered mixture of experts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from et_cuda_passes.delegate import load
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import INT4_EXPERTS
from et_cuda_passes.testing import Experts, export
from tests.experts import FORMS, off
from tests.gpu.lowered import lower

pytestmark = pytest.mark.gpu
OPS = INT4_EXPERTS["mma_tiled"]
# experts, N, K, group size, zeros, dtype
SHAPES = [
    (8, 1536, 2048, 32, False, torch.bfloat16),
    (5, 576, 576, 64, True, torch.bfloat16),
    (64, 512, 1024, 128, False, torch.float16),
    (3, 45, 96, 32, True, torch.bfloat16),
]
MOST = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


class Packed:
    """Random packed weights on the GPU, and the kernel's weights in fp64, rounded once to the dtype."""

    def __init__(self, shape: tuple) -> None:
        self.e, self.n, self.k, self.group, zeros, self.dtype = shape
        torch.manual_seed(self.n)
        rows, groups = self.e * self.n, self.k // self.group
        q = torch.randint(0, 16, (rows, self.k), dtype=torch.uint8)
        scale, zero = torch.rand(rows, groups) * 0.02 + 0.005, torch.randn(rows, groups) * 0.02 * zeros
        self.packed = mma_tiled.pack(q).cuda().view(self.e, self.n, -1)
        pair = mma_tiled.scale_and_zero(scale, zero, self.dtype, self.k).cuda()
        self.pair = pair.view(pair.shape[0], self.e, self.n, -1)
        s, z = (part.to(self.dtype).double().repeat_interleave(self.group, dim=1).cuda() for part in (scale, zero))
        self.weight = ((q.cuda().double() - 8) * s + z).to(self.dtype).double().view(self.e, self.n, self.k)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=self.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 65, 300])
def test_all_experts_and_indexed_ones_agree_with_fp64(shape: tuple, rows: int) -> None:
    given = Packed(shape)
    ids = torch.randint(-given.e, given.e, (7,), device="cuda")
    for chosen, batches in ((None, given.e), (None, 1), (ids, 7), (ids.int(), 1)):
        x = given.randn(batches, rows, given.k)
        y = OPS.bmm(x, given.packed, given.pair, chosen, given.group, given.n)
        weight = given.weight if chosen is None else given.weight[ids]
        assert off(y, x.double() @ weight.transpose(1, 2)) < MOST[given.dtype]
        again = [OPS.bmm(x, given.packed, given.pair, chosen, given.group, given.n) for _ in range(3)]
        assert all(torch.equal(y, other) for other in again)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 100, 1000])
def test_groups_of_rows_agree_with_fp64(shape: tuple, rows: int) -> None:
    given = Packed(shape)
    for last in (rows, rows // 2):
        cuts = torch.randint(0, last + 1, (given.e - 1,)).sort().values
        offs = torch.cat([cuts, torch.tensor([last])]).int().cuda()
        x = given.randn(rows, given.k)
        y = OPS.grouped_mm(x, given.packed, given.pair, offs, given.group, given.n)
        starts = [0, *offs.tolist()]
        parts = [x[a:b].double() @ w.T for a, b, w in zip(starts, offs.tolist(), given.weight, strict=False)]
        wanted = torch.cat([*parts, torch.zeros(rows - last, given.n, dtype=torch.float64, device="cuda")])
        assert (y.double() - wanted).norm() <= MOST[given.dtype] * wanted.norm()
        assert not y[last:].any()
        assert torch.equal(OPS.grouped_mm(x, given.packed, given.pair, offs, given.group, given.n), y)


def test_expert_out_of_range_gives_nan() -> None:
    given = Packed(SHAPES[0])
    ids = torch.tensor([1, given.e, -given.e - 1], device="cuda")
    y = OPS.bmm(given.randn(3, 1, given.k), given.packed, given.pair, ids, given.group, given.n)
    assert y[0].isfinite().all() and y[1:].isnan().all()


@pytest.mark.parametrize("name", FORMS)
def test_lowered_experts_agree_with_eager_in_every_form(name: str, tmp_path: Path) -> None:
    rule, form, _, inputs = FORMS[name]
    model = Experts(form)
    pte, partitioner = lower(export(model, *inputs), tmp_path, expect={"missed": 0})
    assert {outcome.rule for outcome in partitioner.report.outcomes} == {rule}
    got = load(pte)(*(x.cuda() for x in inputs))[0]
    assert off(got.cpu(), model(*inputs)) < 8e-3


class Mixture(nn.Module):
    """A router and its two best gated experts, for each token in order, or for all tokens sorted by expert."""

    def __init__(self, sort: bool, experts: int = 8, hidden: int = 128, ffn: int = 192) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Slices, since ExecuTorch's verifier rejects split, and so chunk.
        self.sort, self.experts, self.ffn = sort, experts, ffn
        # The choice is clear, so that one bit does not change the expert.
        self.register_buffer("router", torch.randn(experts, hidden).bfloat16() * 4)
        self.gate_up = Experts(lambda w: w, shape=(experts, 2 * ffn, hidden))
        self.down = Experts(lambda w: w, shape=(experts, hidden, ffn))

    def forward(self, x: Tensor) -> Tensor:
        scores, order = F.linear(x, self.router).float().softmax(-1).sort(dim=-1, descending=True)
        ids, share = order[:, :2].reshape(-1), scores[:, :2].reshape(-1, 1)
        rows = x.repeat_interleave(2, dim=0)
        if self.sort:
            by_expert, place = ids.sort()
            offs = (by_expert.unsqueeze(-1) <= torch.arange(self.experts, device=x.device)).sum(0).to(torch.int32)
            both = F.grouped_mm(rows[place], self.gate_up().transpose(1, 2), offs=offs)
            gate, up = both[:, : self.ffn], both[:, self.ffn :]
            y = F.grouped_mm(F.silu(gate) * up, self.down().transpose(1, 2), offs=offs)[place.argsort()]
        else:
            both = torch.bmm(self.gate_up()[ids], rows.unsqueeze(-1)).squeeze(-1)
            gate, up = both[:, : self.ffn], both[:, self.ffn :]
            y = torch.bmm(self.down()[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * share).view(x.shape[0], 2, -1).sum(1).to(x.dtype)


@pytest.mark.parametrize(("sort", "rule"), [(True, "grouped_mm_int4"), (False, "indexed_bmm_int4")])
def test_mixture_of_experts_runs_for_any_number_of_tokens(sort: bool, rule: str, tmp_path: Path) -> None:
    model = Mixture(sort).eval()
    program = torch.export.export(
        model, (torch.randn(16, 128).bfloat16(),), dynamic_shapes=({0: Dim("tokens", min=2, max=512)},)
    )
    pte, partitioner = lower(program, tmp_path, expect={rule: 2, "missed": 0})
    assert partitioner.report.counts()["rewritten"] == 2
    run = load(pte)
    assert {name for name in run.weights if "packed" in name} == {"gate_up.data.packed", "down.data.packed"}
    for tokens in (2, 9, 64, 500):
        x = torch.randn(tokens, 128).bfloat16()
        assert off(run(x.cuda())[0].cpu(), model(x)) < 1e-2
