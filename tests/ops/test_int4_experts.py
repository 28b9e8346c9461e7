"""The operators for experts on a CPU: against fp64, with fake tensors, compiled, and their errors."""

import pytest
import torch
from torch import Tensor

from et_cuda_passes.layouts import LAYOUTS
from et_cuda_passes.ops import INT4_EXPERTS
from et_cuda_passes.testing import floats
from tests.experts import off

E, N, K, GROUP = 3, 48, 96, 32
IDS = torch.tensor([2, 0, -1, 1])
OFFS = torch.tensor([2, 2, 6], dtype=torch.int32)


def packed(layout: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights, their scales and zeros, and the weights in fp64 [E, N, K]."""
    random = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (E, N, K), dtype=torch.uint8, generator=random)
    scale = torch.rand(E, N, K // GROUP, generator=random) * 0.02 + 0.005
    zero = torch.randn(E, N, K // GROUP, generator=random) * 0.02
    s, z = (part.to(dtype).double().repeat_interleave(GROUP, dim=2) for part in (scale, zero))
    weight = (q.double() - 8) * s + z
    form = LAYOUTS[layout]
    words = torch.stack([form.pack(expert, 0, N) for expert in q])
    pairs = [form.pack_scales(a, b, dtype, K) for a, b in zip(scale, zero, strict=True)]
    return words, torch.stack(pairs, form.experts_axis), weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", INT4_EXPERTS)
def test_experts_match_fp64(layout: str, dtype: torch.dtype) -> None:
    words, pair, weight = packed(layout, dtype)
    most = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    for batches in (E, 1):
        x = floats(batches, 5, K, dtype=dtype)
        y = INT4_EXPERTS[layout].bmm(x, words, pair, None, GROUP, N)
        assert y.is_contiguous() and y.dtype == dtype
        assert off(y, x.double() @ weight.transpose(1, 2)) < most
    x = floats(7, K, dtype=dtype)
    y = INT4_EXPERTS[layout].grouped_mm(x, words, pair, OFFS, GROUP, N)
    expert = [0, 0, 2, 2, 2, 2]
    expert = torch.tensor([0, 0, 2, 2, 2, 2])
    assert off(y[:6], (weight[expert] @ x[:6].double().unsqueeze(-1)).squeeze(-1)) < most
    assert not y[6:].any()


def test_indexed_experts_share_rows_of_batch() -> None:
    words, pair, weight = packed("mma_tiled")
    for batches, shared in ((4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])):
        x = floats(batches, 3, K)
        y = INT4_EXPERTS["mma_tiled"].bmm(x, words, pair, IDS, GROUP, N)
        assert off(y, x.double()[shared] @ weight[IDS].transpose(1, 2)) < 6e-3


@pytest.mark.parametrize("batches", [0, 1])
def test_bmm_with_no_ids_is_empty(batches: int) -> None:
    words, pair, _ = packed("mma_tiled")
    y = INT4_EXPERTS["mma_tiled"].bmm(floats(batches, 3, K), words, pair, IDS[:0], GROUP, N)
    assert y.shape == (0, 3, N) and y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="x has 0 batches for 4 matrices"):
        INT4_EXPERTS["mma_tiled"].bmm(floats(0, 3, K), words, pair, IDS, GROUP, N)


def test_bmm_removes_padded_rows() -> None:
    words, pair, weight = packed("cpu")
    y = INT4_EXPERTS["cpu"].bmm(floats(E, 2, K), words, pair, None, GROUP, N - 3)
    assert off(y, floats(E, 2, K).double() @ weight[:, : N - 3].transpose(1, 2)) < 6e-3


REGISTERED = [
    ("mma_tiled", "bmm"),
    ("mma_tiled", "chosen"),
    ("mma_tiled", "grouped mm"),
    ("cpu", "bmm"),
    ("cpu", "grouped mm"),
]


@pytest.mark.parametrize(("layout", "form"), REGISTERED)
def test_experts_pass_opcheck(layout: str, form: str) -> None:
    (words, pair, _), ops, sizes = packed(layout), INT4_EXPERTS[layout], (GROUP, N)
    if form == "grouped mm":
        torch.library.opcheck(ops.grouped_mm, (floats(7, K), words, pair, OFFS, *sizes))
    else:
        x, ids = (floats(4, 2, K), IDS) if form == "chosen" else (floats(E, 2, K), None)
        torch.library.opcheck(ops.bmm, (x, words, pair, ids, *sizes))


BAD = [
    ({"words": lambda w: w[:, :40]}, "do not fit each other"),
    ({"pair": lambda p: p[..., :-1]}, "do not fit each other"),
    ({"pair": lambda p: p[:, :2]}, "do not fit each other"),
    ({"group": 64}, "group_size 64 and out_features 48 do not fit each other"),
    ({"n": 49}, "out_features 49 do not fit each other"),
    ({"x": floats(E, 2, 64)}, r"x \(3, 2, 64\), packed \(3, 48, 1[26]\), .* do not fit each other"),
    ({"x": floats(2, K)}, r"x \(2, 96\); wanted \[B, M, K\]"),
    ({"x": floats(2, 2, K)}, "x has 2 batches for 3 matrices, which they do not divide"),
]


@pytest.mark.parametrize(("changed", "said"), BAD, ids=[said for _, said in BAD])
@pytest.mark.parametrize("fake", [False, True])
def test_bmm_rejects_constants_that_do_not_fit(changed: dict, said: str, fake: bool) -> None:
    words, pair, _ = packed("mma_tiled")
    words, pair = changed.get("words", lambda w: w)(words), changed.get("pair", lambda p: p)(pair)
    x, group, n = changed.get("x", floats(E, 2, K)), changed.get("group", GROUP), changed.get("n", N)
    given = [part.to("meta") if fake else part for part in (x, words, pair)]
    with pytest.raises(ValueError, match=said):
        INT4_EXPERTS["mma_tiled"].bmm(*given, None, group, n)


def test_experts_reject_invalid_ids_and_offs() -> None:
    words, pair, _ = packed("mma_tiled")
    ops, x = INT4_EXPERTS["mma_tiled"], floats(4, 1, K)
    with pytest.raises(ValueError, match=r"ids torch.bool \(4,\); wanted 1-D, int32 or int64"):
        ops.bmm(x, words, pair, IDS > 0, GROUP, N)
    with pytest.raises(ValueError, match=r"ids torch.int64 \(2, 2\); wanted 1-D"):
        ops.bmm(x, words, pair, IDS.view(2, 2), GROUP, N)
    with pytest.raises(ValueError, match="2 offs for 3 experts"):
        ops.grouped_mm(x[:, 0], words, pair, OFFS[:2], GROUP, N)
    with pytest.raises(ValueError, match=r"x \(4, 1, 96\); wanted \[M, K\]"):
        ops.grouped_mm(x, words, pair, OFFS, GROUP, N)
    words, pair, _ = packed("cpu")
    with pytest.raises(ValueError, match="cannot be read by ids; give them to int4_bmm_mma_tiled"):
        INT4_EXPERTS["cpu"].bmm(x, words, pair, IDS, GROUP, N)


@pytest.mark.compiled
def test_experts_match_eager_when_compiled() -> None:
    def products(x: Tensor, ids: Tensor, offs: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
        tiled, own = INT4_EXPERTS["mma_tiled"], INT4_EXPERTS["cpu"]
        return (
            tiled.bmm(x.unsqueeze(1), *constants[:2], ids, GROUP, N),
            own.bmm(x.unsqueeze(0), *constants[2:], None, GROUP, N),
            own.grouped_mm(x, *constants[2:], offs, GROUP, N),
        )

    given = (
        floats(4, K),
        IDS,
        torch.tensor([1, 3, 4], dtype=torch.int32),
        *packed("mma_tiled")[:2],
        *packed("cpu")[:2],
    )
    for got, wanted in zip(torch.compile(products)(*given), products(*given), strict=True):
        assert off(got, wanted) < 4e-3
