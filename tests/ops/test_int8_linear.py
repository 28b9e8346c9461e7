"""The int8 linear: against fp64 for every rank, group size and form of zeros, its decompositions, and its errors."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

from et_cuda_passes.ops import INT8_LINEAR

aten = torch.ops.aten
N, K = 13, 64


def parts(group: int, zeros: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers, scales and zeros of a random weight [N, K]."""
    random = torch.Generator().manual_seed(group)
    packed = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=random)
    scale = (torch.rand(N, K // group, generator=random) * 0.1 + 0.01).to(dtype)
    return packed, scale, torch.randn(N, K // group, generator=random) if zeros else None


def dense(packed: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> np.ndarray:
    """The weight of the constants in fp64."""
    spread = lambda t: t.double().numpy().repeat(group, axis=1)  # noqa: E731
    return packed.double().numpy() * spread(scale) + (0 if zero is None else spread(zero))


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (2, 1, 3, K), (0, K)])
@pytest.mark.parametrize("group", [K, 32, 1])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_linear_matches_fp64_for_every_rank_and_group(
    shape: tuple[int, ...], group: int, zeros: bool, with_bias: bool
) -> None:
    packed, scale, zero = parts(group, zeros)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, N) if with_bias else None
    y = INT8_LINEAR(x, packed, scale, zero, bias, group)
    wanted = x.double().numpy() @ dense(packed, scale, zero, group).T + (0 if bias is None else bias.double().numpy())
    assert (y.dtype, y.shape) == (torch.float32, (*shape[:-1], N))
    np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [K, 32])
def test_int8_linear_rounds_16_bit_result_once(dtype: torch.dtype, group: int) -> None:
    packed, scale, _ = parts(group, False, dtype)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = INT8_LINEAR(x, packed, scale, None, None, group).double().numpy()
    weight = dense(packed, scale, None, group)
    wanted = x.double().numpy() @ weight.T
    roundoff = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    # The kernel rounds its result; the reference rounds each weight as well.
    allowed = np.abs(wanted) * roundoff + np.abs(x.double().numpy()) @ np.abs(weight).T * (
        1e-5 if group == K else roundoff
    )
    assert bool((np.abs(got - wanted) <= allowed).all())


@pytest.mark.parametrize("group", [K, 32])
@pytest.mark.parametrize("zeros", [False, True])
def test_int8_linear_passes_opcheck(group: int, zeros: bool) -> None:
    arguments = (torch.randn(2, 3, K), *parts(group, zeros), torch.randn(N), group)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(INT8_LINEAR, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"group": 32}, "do not fit each other"),
        ({"group": 0}, "do not fit each other"),
        ({"packed": torch.zeros(N, K, dtype=torch.uint8)}, "do not fit each other"),
        ({"zero": torch.zeros(N, 2)}, "do not fit each other"),
        ({"x": torch.randn(2, 32)}, "weight of K = 64"),
        ({"bias": torch.zeros(1)}, r"wanted torch.float32 \[13\]"),
        ({"bias": torch.zeros(2, N)}, r"wanted torch.float32 \[13\]"),
        ({"bias": torch.zeros(N).bfloat16()}, r"wanted torch.float32 \[13\]"),
    ],
)
def test_linear_rejects_constants_that_do_not_fit(change: dict[str, object], text: str) -> None:
    packed, scale, _ = parts(K, False)
    given = {"x": torch.randn(2, K), "packed": packed, "scale": scale, "zero": None, "bias": None, "group": K} | change
    with pytest.raises(ValueError, match=text):
        INT8_LINEAR(*given.values())


class Linear(torch.nn.Module):
    """The operator over its constants."""

    def __init__(self, device: str, group: int, zeros: bool, scales: torch.dtype) -> None:
        super().__init__()
        for name, value in zip(("packed", "scale", "zero"), parts(group, zeros, scales), strict=True):
            fake = None if value is None else torch.empty(value.shape, dtype=value.dtype, device=device)
            self.register_buffer(name, fake)
        self.group = group

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (INT8_LINEAR(x, self.packed, self.scale, self.zero, None, self.group),)


def given_to_inductor(
    device: str, group: int, zeros: bool, scales: torch.dtype = torch.bfloat16, rows: int = 6, outputs: int = N
) -> list[object]:
    with FakeTensorMode():
        x = torch.empty(rows, K, dtype=torch.bfloat16, device=device)
        module = Linear(device, group, zeros, scales)
        if outputs != N:
            module.packed, module.scale = module.packed[:outputs], module.scale[:outputs]
    graph_module, _ = aot_export_module(module, (x,), trace_joint=False)
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def test_int8_linear_decomposes_into_cpu_kernel_if_supported() -> None:
    kernel = aten._weight_int8pack_mm.default
    assert kernel in given_to_inductor("cpu", K, False)
    for form in (("cpu", 32, False), ("cpu", K, True), ("cpu", K, False, torch.float32)):
        # Inductor fuses the product of one row with the dequantization.
        for rows, product in ((1, aten.mv.default), (6, aten.mm.default)):
            other = given_to_inductor(*form, rows=rows)
            assert product in other
            assert kernel not in other
            assert INT8_LINEAR not in other
    assert kernel not in given_to_inductor("cpu", K, False, outputs=1)  # AOTInductor makes a number of its scale


def test_int8_linear_of_large_weight_is_computed_in_ranges_of_rows() -> None:
    """The weight in fp32 has 33 MB: nine pieces of different sizes."""
    n, k, group = 2051, 4096, 32
    random = torch.Generator().manual_seed(0)
    packed = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=random)
    scale, zero = torch.rand(n, k // group, generator=random), torch.randn(n, k // group, generator=random)
    x = torch.randn(2, k, generator=random)
    for tables in ((scale, zero), (scale, None)):
        y = INT8_LINEAR(x, packed, *tables, None, group)
        wanted = x.double().numpy() @ dense(packed, *tables, group).T
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-4, atol=np.abs(wanted).max() * 1e-5)


def test_int8_linear_decomposes_into_plain_operators_without_kernel() -> None:
    found = given_to_inductor("mps", K, False)
    assert INT8_LINEAR not in found and aten.mm.default in found


def test_int8_linear_stays_in_decomposed_program() -> None:
    packed, scale, _ = parts(32, False)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = INT8_LINEAR(x, packed, scale, None, None, 32)
            return result

    program = torch.export.export(Module(), (torch.randn(2, K),)).run_decompositions()
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [INT8_LINEAR]


@pytest.mark.parametrize("k", [8, 40, 100])
def test_int8_linear_avoids_cpu_kernel_that_writes_past_result(k: int) -> None:
    x, packed = torch.randn(2, k).bfloat16(), torch.randint(-128, 128, (N, k), dtype=torch.int8)
    got = INT8_LINEAR(x, packed, torch.ones(N, 1).bfloat16(), None, None, k)
    wanted = x.double() @ packed.double().T
    assert (got.double() - wanted).norm() / wanted.norm() < 4e-3
