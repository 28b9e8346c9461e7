"""Operators outside the delegates: programs without any delegate, compared with ExecuTorch's own runtime."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim

from et_cuda_passes.delegate import DelegateError, Program
from et_cuda_passes.delegate.operators import OPERATORS, bind, find_operator, kinds_of
from et_cuda_passes.delegate.plan import Dynamism, Kernel, TensorSpec, Value

LENGTH = Dim("length", min=4, max=12)


class Function(nn.Module):
    """A function as a module, with a constant and a weight."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.register_buffer("table", torch.arange(20.0).view(10, 2))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def pointwise(module: Function, x: Tensor, y: Tensor) -> list[Tensor]:
    positive = x.abs() + 0.5
    bits = (x * 10).to(torch.int32)
    return [
        x.sin() + x.cos() * x.tanh() - x.exp().log1p(),
        positive.log()
        + positive.log2()
        + positive.log10()
        + positive.rsqrt()
        + positive.sqrt()
        + positive.reciprocal(),
        x.atan() + x.sinh() + x.cosh() + x.asinh() + x.expm1() + x.erf() + torch.atan2(x, positive),
        F.gelu(x)
        + F.gelu(y, approximate="tanh")
        + F.silu(x)
        + F.relu(x)
        + F.leaky_relu(x, 0.1)
        + F.elu(x)
        + F.hardtanh(x),
        torch.where(x > y, x, y) + torch.maximum(x, y) - torch.minimum(x, 2 * y) + x.clamp(-0.5, 0.5),
        torch.div(x, y, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc") + x / y + x.fmod(0.3),
        torch.remainder(x, y) + x.pow(2) + torch.pow(2.0, x) + positive.pow(y) + (3 - x) + x.sign() + x.round(),
        (bits & 3) + (bits | 5) ^ ~bits,
        (x >= y) & ~(x == y) | (x != 0.5) & (x.isnan() | y.isinf()) ^ (x < y),
        x.to(torch.bfloat16) * y.to(torch.bfloat16),
        torch.logical_and(x > 0, y > 0).to(torch.int64) + torch.full_like(x, 7, dtype=torch.int64),
    ]


def reductions(module: Function, x: Tensor, y: Tensor) -> list[Tensor]:
    values, places = x.topk(3, dim=-1)
    return [
        x.sum(dim=(0, 1)) + x.mean(dim=(0, 1), keepdim=True) - x.amax(dim=-1, keepdim=True) * x.amin(dim=0),
        x.var(dim=-1, correction=0) + x.prod(dim=-1),
        x.cumsum(-1) + F.softmax(x, dim=-1) + F.log_softmax(y, dim=0),
        x.argmax(dim=-1) + y.argmin(dim=-1) + places[..., 0],
        (x > 0).any(dim=-1, keepdim=True),
        values,
        *x.max(dim=-1),
        *torch.min(y, dim=0),
        F.layer_norm(x, (8,), module.weight[0], module.weight[1]),
        F.group_norm(x.unsqueeze(0), 3),
        x.sum() + y.mean() + (x > 100).any(),
    ]


def shapes(module: Function, x: Tensor, y: Tensor) -> list[Tensor]:
    one, two, three = x.split([1, 2, 3])
    return [
        torch.cat([x, y, x], dim=1),
        torch.stack([x, y], dim=1).permute(2, 0, 1),
        x.t() @ y + torch.addmm(module.weight.t() @ module.weight, x.t(), y),
        torch.cat([one, three, two]).flip(0).roll(1, 1),
        *x.chunk(2, dim=1),
        x.unsqueeze(0).expand(3, 6, 8).reshape(3, 48).repeat(1, 2),
        torch.constant_pad_nd(x, (1, 2), 0.5)[1:, ::2],
        x[:, 3].select_scatter(y[0, 1], 0, 2),
        x.unsqueeze(0).squeeze(0).view(8, 6)[:, :1],
        x.tril(1) + torch.diagonal(y, 0, 0, 1).sum(),
        torch.pixel_shuffle(x.reshape(1, 4, 3, 4), 2),
        F.pad(x.reshape(1, 4, 3, 4), (1, 1, 1, 1), mode="reflect"),
        *torch.unbind(x, 0),
    ]


def indexing(module: Function, x: Tensor, y: Tensor) -> list[Tensor]:
    ids = torch.arange(6) % 3
    places = (x.abs() * 10).to(torch.int64)
    written = x.clone()
    written[:, 2] = y[:, 0]
    return [
        F.embedding(ids, module.table) + x[:, :2],
        x[ids, ids] + x[:, ids].sum(),
        x.gather(1, places % 8),
        x.index_put((ids, None, ids)[::2], y[0, 0], accumulate=True),
        x.scatter(1, places % 8, 0.25) + x.scatter_add(0, places % 6, y),
        x.index_select(1, ids) + x.masked_fill(x > 0, 0.5)[:, :6],
        written,
        torch.arange(3, 9, 2) + torch.zeros(3, dtype=torch.int64) + torch.ones(3, dtype=torch.int32),
        F.conv2d(x.view(1, 2, 3, 8), module.weight.view(2, 2, 4, 3)[:, :, :2, :2], padding=1),
        F.max_pool2d(x.view(1, 2, 3, 8), 2) + F.avg_pool2d(y.view(1, 2, 3, 8), 2),
        F.interpolate(x.view(1, 2, 3, 8), scale_factor=2.0, mode="nearest"),
    ]


def channels_last(module: Function, x: Tensor, y: Tensor) -> list[Tensor]:
    image = x.view(1, 2, 3, 8).to(memory_format=torch.channels_last)
    return [image.relu(), image.sin().contiguous()]


def sizes(module: Function, x: Tensor, y: Tensor) -> list[Tensor]:
    length = x.shape[0]
    mask = torch.arange(length)[:, None] <= torch.arange(length * 2 - 1)
    half = length // 2
    return [
        mask,
        torch.full((length + 1, half), 2.5),
        x.view(length * 2, 4).sum(0) + length,
        x[1:],
        x.unsqueeze(0).expand(2, length, 8).reshape(2 * length, 8),
        (x @ module.weight.t()).softmax(-1) * (length % 3),
    ]


def compare(path: Path, inputs: tuple[Tensor, ...], expected: list[Tensor] | None = None) -> list[Tensor]:
    """Compare the loader with ExecuTorch's runtime and with eager; the outputs."""
    program = Runtime.get().load_program(path)
    theirs = program.load_method("forward").execute([given.clone() for given in inputs])
    ours = Program(path, device="cpu").method()(*inputs)
    assert len(ours) == len(theirs)
    for index, (got, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), index
        torch.testing.assert_close(
            got, wanted, rtol=2e-4, atol=2e-5, equal_nan=True, msg=lambda text, i=index: f"{i}: {text}"
        )
    for index, (got, wanted) in enumerate(zip(ours, expected or ours, strict=True)):
        torch.testing.assert_close(
            got, wanted, rtol=2e-4, atol=2e-5, equal_nan=True, msg=lambda text, i=index: f"{i}: {text}"
        )
    return ours


@pytest.mark.parametrize("function", [pointwise, reductions, shapes, indexing, channels_last])
def test_operators_match_those_of_executorch(function: Callable[..., list[Tensor]], tmp_path: Path) -> None:
    module = Function(function)
    x, y = torch.randn(6, 8), torch.rand(6, 8) + 0.5
    program = to_edge(torch.export.export(module, (x, y))).to_executorch()
    path = tmp_path / "model.pte"
    path.write_bytes(program.buffer)
    assert all(isinstance(step, Kernel) and step.name in OPERATORS for step in Program(path).plan("forward").steps)
    with torch.no_grad():
        compare(path, (x, y), module(x, y))


@pytest.mark.parametrize("length", [4, 5, 12])
def test_sizes_that_are_computed_at_run_time_match_those_of_executorch(length: int, sized: Path) -> None:
    x = torch.randn(length, 8)
    outputs = compare(sized, (x, x))
    assert outputs[0].shape == (length, 2 * length - 1)
    assert outputs[1].shape == (length + 1, length // 2)


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = torch.randn(6, 8)
    exported = torch.export.export(Function(sizes), (x, x), dynamic_shapes=(({0: LENGTH}, {0: LENGTH}),))
    path = tmp_path_factory.mktemp("sized") / "model.pte"
    path.write_bytes(to_edge(exported).to_executorch().buffer)
    names = {step.name for step in Program(path).plan("forward").steps if isinstance(step, Kernel)}
    assert {"aten::sym_size.int", "executorch_prim::mul.Scalar", "executorch_prim::floordiv.Scalar"} <= names
    return path


def test_operators_have_schemas_with_known_types() -> None:
    for name in OPERATORS:
        schema, function = find_operator(name)
        assert callable(function)
        for argument in schema.arguments:
            assert kinds_of(str(argument.type)), name
        written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
        assert all(argument.is_out for argument in written) or written == [schema.arguments[0]], name
        assert len(schema.returns) in (len(written), 0, 1), name


TENSOR = TensorSpec(torch.float32, (2, 2), (0, 1), Dynamism.STATIC)
VALUES = (
    *(Value("tensor", TENSOR) for _ in range(3)),
    Value("int", constant=1),
    Value("None"),
    Value("list of int", items=(3, 3)),
    Value("list of int", items=(3, 0)),
    Value("list of tensors", items=(0, 1)),
    Value("list of tensors", items=(0, 0)),
    Value("str", constant="tanh"),
)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("aten::mm.out", (0, 1, 2), "has 3 values, but its schema .* needs 4"),
        ("aten::mm.out", (0, 3, 2, 2), "value 3, 1, as its argument 'mat2', which must be tensor"),
        ("aten::mm.out", (0, 1, 2, 1), r"writes to values \[2\], but its result is value 1"),
        ("aten::view_copy.out", (0, 5, 1, 1), None),
        ("aten::view_copy.out", (0, 6, 1, 1), "the item that is value 0 is torch.float32"),
        ("aten::view_copy.out", (0, 4, 1, 1), "value 4, None, as its argument 'size', which must be list of int"),
        ("aten::mean.out", (0, 4, 3, 4, 1, 1), "argument 'keepdim', which must be bool"),
        ("aten::max.dim_max", (2, 3, 4, 0, 1, 7), "argument 'keepdim'"),
        ("aten::copy_", (0, 1, 3, 0), "argument 'non_blocking', which must be bool"),
        ("aten::gelu.out", (0, 9, 1, 1), None),
        ("aten::gelu.out", (0, 3, 1, 1), "argument 'approximate', which must be str"),
        ("aten::split_copy.Tensor_out", (2, 3, 3, 7, 7), None),
        ("aten::split_copy.Tensor_out", (2, 3, 3, 8, 8), r"writes to values \[0, 0\]"),
        ("executorch_prim::add.Scalar", (3, 3, 3), None),
        (
            "executorch_prim::add.Scalar",
            (3, 3, 0),
            "writes its result to value 0, .* which must be int or float or bool",
        ),
        ("executorch_prim::et_view", (0, 5, 3), "writes its result to value 3, 1, which must be tensor"),
    ],
)
def test_call_that_does_not_fit_its_schema_is_refused(name: str, args: tuple[int, ...], message: str | None) -> None:
    if message is None:
        bind(Kernel(name, args), VALUES)
        return
    with pytest.raises(DelegateError, match=message):
        bind(Kernel(name, args), VALUES)


def test_damaged_programs_end_in_an_error_or_in_a_run(sized: Path, tmp_path: Path) -> None:
    # An operator that reads outside of its tensors would end this process.
    content = sized.read_bytes()
    path = tmp_path / "model.pte"
    x = torch.randn(5, 8)
    outcomes = set()
    for at in random.sample(range(len(content)), 400):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :])
        try:
            outcomes.add(len(Program(path, device="cpu").method()(x, x)))
        except DelegateError:
            outcomes.add(0)
    assert outcomes == {0, 6}


def test_result_larger_than_planned_is_refused_before_it_needs_memory(tmp_path: Path) -> None:
    model = Function(lambda module, x: torch.arange(0, 1234) + x)
    exported = torch.export.export(model, (torch.ones(1, dtype=torch.int64),))
    content = to_edge(exported).to_executorch().buffer
    end, huge = (number.to_bytes(8, "little") for number in (1234, 1 << 40))
    assert content.count(end) == 1
    path = tmp_path / "model.pte"
    path.write_bytes(content.replace(end, huge))
    with pytest.raises(DelegateError, match=rf"has shape \[{1 << 40}\], but the program has torch.int64 \[1234\]"):
        Program(path, device="cpu").method()(torch.ones(1, dtype=torch.int64))
