"""The int4 linears: against recorded results of the CUDA operator, against fp64, and their decomposition per device."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._inductor.decomposition import decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from et_cuda_passes import layouts
from et_cuda_passes.ops import INT4_LINEARS

GOLDEN = load_file(Path(__file__).parents[1] / "golden_arrays" / "int4pack_cuda.safetensors")
CASES = sorted({name.rpartition(".")[0] for name in GOLDEN})
LAYOUTS = sorted(INT4_LINEARS)


def packed_weight(layout: str, n: int, k: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, np.ndarray]:
    """A random weight packed in a layout, and its values in fp64, computed from the rounded scales."""
    generator = torch.Generator().manual_seed(n * k + group)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, k // group, generator=generator) * 0.1 + 0.01).to(dtype)
    zero = (torch.randn(n, k // group, generator=generator) * 0.1).to(dtype)
    repeat = lambda t: t.double().numpy().repeat(group, axis=1)  # noqa: E731
    form = layouts.LAYOUTS[layout]
    pair = form.pack_scales(scale, zero, dtype, k)
    # S and Z of metal are rounded apart from scale and zero.
    rounded = layouts.metal.scale_and_zero(scale, zero, dtype) if layout == "metal" else (scale, zero)
    weight = (q.double().numpy() - form.zero_offset) * repeat(rounded[0]) + repeat(rounded[1])
    return form.pack(q, 0, n), pair, weight


@pytest.mark.parametrize("case", CASES)
def test_reference_matches_recorded_cuda_results(case: str) -> None:
    part = {key.rpartition(".")[2]: value for key, value in GOLDEN.items() if key.startswith(case + ".")}
    group = int(case.split("_g")[1].split("_")[0])
    op = INT4_LINEARS["tile_packed_to_4d"].op
    y = op(part["x"], part["packed"], part["scale_and_zero"], None, group, part["y"].shape[1])
    # Both accumulate in fp32 and round once, so they differ by at most one bf16 step, where the sum is near a midpoint.
    step = part["y"].float().abs() * 2**-7 + 1e-3
    assert bool(((y.float() - part["y"].float()).abs() <= step).all())
    assert (y != part["y"]).float().mean() < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_int4_linear_matches_fp64_for_every_rank(layout: str, shape: tuple[int, ...], with_bias: bool) -> None:
    # The rows of mma_tiled have no padding.
    packed, pair, weight = packed_weight(layout, 45 if layout == "mma_tiled" else 48, 64, 32, torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, 45) if with_bias else None
    y = INT4_LINEARS[layout].op(x, packed, pair, bias, 32, 45)
    wanted = x.double().numpy() @ weight[:45].T + (bias.double().numpy() if bias is not None else 0)
    assert y.shape == (*shape[:-1], 45)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_linear_accepts_strided_input(layout: str) -> None:
    packed, pair, weight = packed_weight(layout, 16, 64, 32, torch.float32)
    x = torch.randn(64, 3).t()
    y = INT4_LINEARS[layout].op(x, packed, pair, None, 32, 16)
    np.testing.assert_allclose(y.numpy(), x.double().numpy() @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_linear_passes_opcheck(layout: str) -> None:
    packed, pair, _ = packed_weight(layout, 13 if layout == "mma_tiled" else 16, 64, 32, torch.bfloat16)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    torch.library.opcheck(
        INT4_LINEARS[layout].op,
        (x, packed, pair, None, 32, 13),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("group", "features", "in_features", "text"),
    [
        (64, 16, 512, "do not fit each other|x .* for a weight of K = 0"),
        (32, 17, 512, "do not fit each other"),
        (32, 16, 96, "weight of K = 512"),
    ],
)
def test_linear_rejects_constants_that_do_not_fit(
    layout: str, group: int, features: int, in_features: int, text: str
) -> None:
    packed, pair, _ = packed_weight(layout, 16, 512, 32, torch.float32)
    with pytest.raises(ValueError, match=text):
        INT4_LINEARS[layout].op(torch.randn(2, in_features), packed, pair, None, group, features)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 16), (1, 16), (3, 1), (1,), (15,)], ids=str)
def test_int4_linear_rejects_bias_of_other_shape(layout: str, shape: tuple[int, ...]) -> None:
    packed, pair, _ = packed_weight(layout, 16, 64, 32, torch.float32)
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(ValueError, match=r"bias torch.float32 .*wanted torch.float32 \[16\]"):
            INT4_LINEARS[layout].op(torch.zeros(3, 64), packed, pair, torch.zeros(shape), 32, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_linear_rejects_bias_of_other_dtype(layout: str) -> None:
    """The sum would have another dtype than the fake result."""
    packed, pair, _ = packed_weight(layout, 16, 64, 32, torch.bfloat16)
    with pytest.raises(ValueError, match="bias torch.float32"):
        INT4_LINEARS[layout].op(torch.zeros(3, 64).bfloat16(), packed, pair, torch.zeros(16), 32, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_linear_accepts_strided_bias(layout: str) -> None:
    packed, pair, weight = packed_weight(layout, 16, 64, 32, torch.float32)
    x = torch.randn(3, 64)
    for bias in (torch.randn(32)[::2], torch.randn(16, 3)[:, 1], torch.randn(1).expand(16)):
        y = INT4_LINEARS[layout].op(x, packed, pair, bias, 32, 16)
        wanted = x.double().numpy() @ weight.T + bias.double().numpy()
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-4)


KERNELS = [
    ("tile_packed_to_4d", "cuda", torch.ops.aten._weight_int4pack_mm.default),
    ("mps", "mps", torch.ops.aten._weight_int4pack_mm.default),
    ("cpu", "cpu", torch.ops.aten._weight_int4pack_mm_for_cpu.default),
]


@pytest.mark.parametrize(("layout", "device", "kernel"), KERNELS)
def test_int4_linear_decomposes_into_device_kernel(layout: str, device: str, kernel: torch._ops.OpOverload) -> None:
    op = INT4_LINEARS[layout].op
    packed, pair, _ = packed_weight(layout, 16, 64, 32, torch.bfloat16)
    with FakeTensorMode():
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device=device)
        fakes = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in (packed, pair)]
        graph = make_fx(lambda *a: op(*a, None, 32, 16), decomposition_table={op: decompositions[op]})(x, *fakes).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert kernel in called
    assert op not in called


def test_int4_linear_stays_on_device_without_kernel() -> None:
    op = INT4_LINEARS["tile_packed_to_4d"].op
    packed, pair, _ = packed_weight("tile_packed_to_4d", 16, 64, 32, torch.bfloat16)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    graph = make_fx(lambda *a: op(*a, None, 32, 16), tracing_mode="fake", decomposition_table={op: decompositions[op]})(
        x, packed, pair
    ).graph
    assert op in [node.target for node in graph.nodes]


def test_reference_matches_cpu_kernel() -> None:
    packed, pair, _ = packed_weight("cpu", 32, 128, 64, torch.float32)
    x = torch.randn(5, 128)
    form = INT4_LINEARS["cpu"]
    torch.testing.assert_close(form.reference(x, packed, pair, 64), form.op(x, packed, pair, None, 64, 32))
