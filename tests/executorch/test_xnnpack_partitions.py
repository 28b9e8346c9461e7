"""The partitions that are lowered for XNNPACK: what each holds, and that a short lowering computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.lowered_backend_module import get_lowered_backend_modules
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch._higher_order_ops.map import map as over
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.delegate.files import read_pte
from et_cuda_passes.delegate.plan import Call, Kernel, read_plans
from et_cuda_passes.executorch.lower import lower
from et_cuda_passes.executorch.xnnpack import XnnpackPartitioner
from et_cuda_passes.testing import Quantized
from tests.xnnpack import Stock, error, example, lowered, output

ROWS, WIDTH = 6, 64


class Attention(nn.Module):
    """Attention over heads of 32 columns, a gated layer, and operators between them that the delegate does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.gate, self.up = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6))
        torch.manual_seed(0)
        for linear in self.children():
            nn.init.normal_(linear.weight, std=WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """From [1, rows, WIDTH] to the same."""
        q, k, v = (layer(x).view(1, x.shape[1], 2, WIDTH // 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k = torch.cat([-k[..., 16:], k[..., :16]], -1)
        weights = F.softmax(q @ k.transpose(2, 3) * 0.2, -1)
        x = x + self.o((weights @ v).transpose(1, 2).reshape(1, x.shape[1], WIDTH))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x + F.silu(self.gate(x)) * self.up(x)


class AllPasses(XnnpackPartitioner):
    """As ours, but every partition goes through all passes of the delegate."""

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        result = super().partition(exported_program)
        result.partition_tags = dict.fromkeys(result.partition_tags, self.delegation_spec)
        return result


def exported(model: nn.Module, rows: Any = None, quantized: bool = True) -> ExportedProgram:
    if quantized:
        quantize_(model, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    shapes = None if rows is None else ({1: rows},)
    return torch.export.export(model.eval(), (example(1, ROWS, WIDTH),), dynamic_shapes=shapes)


def delegates(program: ExportedProgram, partitioner: XnnpackPartitioner) -> list[Any]:
    edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
    return get_lowered_backend_modules(edge.exported_program().graph_module)


@pytest.mark.parametrize(
    ("rows", "quantized"),
    [
        pytest.param(Dim("rows", min=2, max=32), True, marks=pytest.mark.slow),
        (None, False),
        pytest.param(Dim("rows", min=2, max=32), False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
    ],
)
def test_one_pass_gives_the_bytes_of_all_passes(rows: Any, quantized: bool) -> None:
    program = exported(Attention(), rows, quantized)
    one, every = delegates(program, XnnpackPartitioner()), delegates(program, AllPasses())
    assert any(module.compile_specs for module in one)
    assert not any(module.compile_specs for module in every)
    assert [module.processed_bytes for module in one] == [module.processed_bytes for module in every]
    data = [[each.named_data_store_output.buffers for each in modules] for modules in (one, every)]
    assert data[0] == data[1]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def test_partition_that_other_passes_change_gets_all_passes() -> None:
    program = torch.export.export(Convolution().eval(), (example(1, 2, 8, 8),))
    (module,) = delegates(program, XnnpackPartitioner())
    assert not module.compile_specs


class Detour(nn.Module):
    """Two linears, the second of which reads the first both directly and through an operator without a delegate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.beside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y + torch.cumsum(y, 1)) + self.beside(x)


def test_partition_ends_where_a_value_leaves_the_delegate(tmp_path: Any) -> None:
    model = Detour()
    program = exported(model, quantized=False)
    modules = delegates(program, XnnpackPartitioner())
    # `beside` does not need the detour, and is in the first.
    linears = [sum("linear" in str(node.target) for node in each.original_module.graph.nodes) for each in modules]
    assert linears == [2, 1]
    (path,) = lower(ecp.rewrite(program, "xnnpack")[0], "xnnpack", tmp_path, "model")
    x = example(1, ROWS, WIDTH)
    assert error(output(path.read_bytes(), x), model(x)) < 1e-5


class Heads(nn.Module):
    """A linear, whose result is transposed by heads, and another linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH // 2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(1, x.shape[1], 2, -1).transpose(1, 2).sigmoid())


def test_view_of_one_dynamic_size_is_delegated_and_right_for_every_length(tmp_path: Any) -> None:
    model = Heads()
    program = exported(model, Dim("rows", min=2, max=32), quantized=False)
    (path,) = lower(ecp.rewrite(program, "xnnpack")[0], "xnnpack", tmp_path, "model")
    (plan,) = read_plans(read_pte(path)).values()
    assert [type(step) for step in plan.steps if isinstance(step, (Call, Kernel))] == [Call]
    for rows in (2, 7, 32):
        x = example(1, rows, WIDTH)
        assert error(output(path.read_bytes(), x), model(x)) < 1e-5


def test_attention_of_a_dynamic_length_is_right_for_every_length(tmp_path: Any) -> None:
    model = Attention()
    program = exported(model, Dim("rows", min=2, max=32), quantized=False)
    (path,) = lower(ecp.rewrite(program, "xnnpack")[0], "xnnpack", tmp_path, "model")
    for rows in (2, 7, 32):
        x = example(1, rows, WIDTH)
        assert error(output(path.read_bytes(), x), model(x)) < 1e-5


@pytest.mark.slow
def test_quantized_activation_is_shared_and_the_result_is_that_of_the_stock_partitions(tmp_path: Any) -> None:
    program = exported(Attention())
    rewritten, _ = ecp.rewrite(program, "xnnpack", expect={"keep_dynamic_int4": 6, "missed": 0})
    choose = torch.ops.torchao.choose_qparams_affine.default
    count = len(rewritten.graph.find_nodes(op="call_function", target=choose))
    assert (len(program.graph.find_nodes(op="call_function", target=choose)), count) == (6, 3)
    x = example(1, ROWS, WIDTH)
    assert torch.equal(rewritten.module()(x), program.module()(x))
    (path,) = lower(rewritten, "xnnpack", tmp_path, "model")
    assert torch.equal(output(path.read_bytes(), x), output(lowered(program, Stock()), x))


def test_operators_are_decomposed_once_if_all_nodes_of_each_have_one_answer() -> None:
    partitioner = XnnpackPartitioner()
    kept, supported = partitioner.ops_to_not_decompose(exported(Attention(), quantized=False))
    assert (kept, supported) == ([torch.ops.aten.linear.default], None)
    two = torch.export.export(Mixed().eval(), (example(ROWS, WIDTH), example(WIDTH)))
    kept, supported = partitioner.ops_to_not_decompose(two)
    assert supported is not None
    answers = [
        supported(node) for node in two.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    ]
    assert answers == [True, False]


class Mixed(nn.Module):
    """A linear with a constant bias, and one with a computed bias, which the delegate does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(self.one(x), self.one.weight, bias + 1)


class BiasReadTwice(nn.Module):
    """A linear whose bias an addition reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(torch.relu(self.layer(x)) + self.layer.bias)
        return result


def test_constant_that_a_linear_copies_is_read_outside_of_the_delegate(tmp_path: Path) -> None:
    model, x = BiasReadTwice(), example(ROWS, WIDTH)
    (path,) = lower(torch.export.export(model, (x,)), "xnnpack", tmp_path, "model")
    (plan,) = read_plans(read_pte(path)).values()
    kernels = [step.name for step in plan.steps if isinstance(step, Kernel)]
    # With the addition inside, the next line ends the process: it reads the bias in a part of the file that is no
    # longer mapped. The same file loaded as bytes runs.
    assert [name.partition(".")[0] for name in kernels] == ["aten::add"]
    found = Runtime.get().load_program(path).load_method("forward").execute([x])[0]
    assert error(found, model(x)) < 1e-5


def test_two_linears_share_their_weight_in_the_delegate() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(torch.relu(self.layer(x)))
            return result

    program = torch.export.export(Twice(), (example(ROWS, WIDTH),))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).exported_program()
    assert len(get_lowered_backend_modules(edge.graph_module)) == 1
    assert not edge.graph_module.graph.find_nodes(op="call_function", target=exir_ops.edge.aten.linear.default)


class Branches(nn.Module):
    """A linear outside of all branches, in those of two ``cond``, and in a ``map``. All results are outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Quantized(WIDTH, WIDTH, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        positive = x.sum() > 0
        first = torch.cond(positive, self.layer, lambda y: y * 3, (x,))
        second = torch.cond(positive, lambda y: torch.tanh(self.layer(y)), lambda y: self.layer(y + 1), (x,))
        return self.layer(x), first, second, over(lambda row: self.layer(row), x)


def test_linear_in_branches_is_right_and_their_results_survive_the_next_branch(tmp_path: Path) -> None:
    """executorch 1.5.1 lowers none of these linears, and the results of both conds share memory."""
    model, x = Branches(), example(ROWS, WIDTH)
    rewritten, report = ecp.rewrite(torch.export.export(model, (x,)), "xnnpack")
    assert report.counts()["rewritten"] == len(report.outcomes) == 5
    (path,) = lower(rewritten, "xnnpack", tmp_path, "model")
    (plan,) = read_plans(read_pte(path)).values()
    assert [step for step in plan.steps if isinstance(step, Call)]
    method = Runtime.get().load_program(path).load_method("forward")
    for given in (x.abs(), -x.abs()):
        assert max(map(error, method.execute([given]), model(given))) < 1e-5
