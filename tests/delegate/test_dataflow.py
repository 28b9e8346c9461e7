"""Methods with operators outside the delegates: what they write in place, what they keep, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, schema, to_edge
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.runtime import Runtime
from torch import Tensor, nn

from et_cuda_passes.delegate import DelegateError, Method, Program, load
from et_cuda_passes.delegate.dataflow import View, analyse
from et_cuda_passes.delegate.plan import Copy, Move
from tests.delegate.delegated import BOUND, Counting, K, Part, Spec, X, load_forward, value, write

FALSE, ONE = schema.EValue(schema.Bool(False)), schema.EValue(schema.Int(1))
OPERATORS = [
    ("et_copy::_h2d_copy", "out"),
    ("aten::copy_", ""),
    ("aten::add", "out"),
    ("executorch_prim::et_view", "default"),
]
H2D, COPY_, ADD, ET_VIEW = range(len(OPERATORS))


class Cache(nn.Module):
    """Adds ``new`` to the input ``cache``, to a buffer, and to a buffer with an initial value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(3, 4))
        self.register_buffer("initial", torch.arange(12.0).view(3, 4))

    def forward(self, new: Tensor, cache: Tensor, count: Tensor) -> Tensor:
        cache.add_(new)
        count.add_(1)
        self.sum.add_(new)
        self.initial.mul_(new)
        return (self.sum + self.initial).view(2, 6) + cache.reshape(2, 6) * count


def lowered(folder: Path, **config: Any) -> Path:
    exported = torch.export.export(Cache(), (torch.ones(3, 4), torch.ones(3, 4), torch.tensor(0)))
    options = ExecutorchBackendConfig(passes=[InitializedMutableBufferPass(["initial"])], **config)
    path = folder / "model.pte"
    path.write_bytes(to_edge(exported).to_executorch(options).buffer)
    return path


def test_inputs_and_buffers_are_written_as_by_executorch(tmp_path: Path) -> None:
    path = lowered(tmp_path)
    method, model = load(path, device="cpu"), Cache()
    program = Runtime.get().load_program(path)
    theirs = program.load_method("forward")
    assert method.mutated == (1, 2)
    cache, count = torch.rand(3, 4), torch.tensor(0)
    eager = cache.clone(), count.clone()
    other = [cache.clone(), count.clone()]
    for _ in range(3):
        new = torch.rand(3, 4)
        expected = model(new, *eager)
        wanted = [output.clone() for output in theirs.execute([new, *other])]
        # ExecuTorch wrote to its copies of the inputs.
        other = wanted[:2]
        outputs = method(new, cache, count)
        torch.testing.assert_close(outputs, wanted)
        torch.testing.assert_close(outputs, [*eager, expected])
        torch.testing.assert_close((cache, count), eager)
        assert outputs[0].data_ptr() == cache.data_ptr()
    # Another object begins anew.
    assert torch.equal(load(path, device="cpu")(new, torch.zeros(3, 4), torch.tensor(0))[0], new)


def test_inputs_whose_memory_is_not_planned_are_written(tmp_path: Path) -> None:
    # Compared with eager only: ExecuTorch's Python runtime does not read such an input (executorch 1.5.1).
    path = lowered(tmp_path, memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
    method, model = load(path, device="cpu"), Cache()
    cache, count = torch.rand(3, 4), torch.tensor(7)
    eager = cache.clone(), count.clone()
    for _ in range(3):
        new = torch.rand(3, 4)
        torch.testing.assert_close(method(new, cache, count)[2], model(new, *eager))
        torch.testing.assert_close((cache, count), eager)


def test_input_that_is_copied_gets_the_new_value_back(tmp_path: Path) -> None:
    method = load(lowered(tmp_path), device="cpu")
    new = torch.rand(3, 4)
    transposed = torch.zeros(4, 3).t()
    misaligned = torch.zeros(13)[1:].view(3, 4)
    with_gradient = torch.zeros(3, 4, requires_grad=True)
    for cache in (transposed, misaligned, with_gradient):
        count = torch.tensor(4)
        outputs = method(new, cache, count)
        assert torch.equal(cache, new)
        assert torch.equal(outputs[0], new)
        assert count == 5


def test_mutated_input_that_shares_memory_is_refused(tmp_path: Path) -> None:
    method = load(lowered(tmp_path), device="cpu")
    new, cache, count = torch.rand(3, 4), torch.zeros(3, 4), torch.tensor(0)
    both = torch.zeros(24)
    with torch.inference_mode():
        inference = torch.zeros(3, 4)
        assert torch.equal(method(new, inference, count)[0], new)
    for inputs, message in (
        ((cache, cache, count), "input 1, which the program writes to, shares memory with input 0"),
        ((both[4:16].view(3, 4), both[12:].view(3, 4), count), "shares memory with input 0. Clone one"),
        ((new, torch.zeros(4).expand(3, 4), count), "input 1, which the program writes to, is expanded"),
        ((new, inference, count), "was created in inference mode"),
    ):
        with pytest.raises(DelegateError, match=message):
            method(*inputs)
    assert not both.any() and not cache.any(), "something was written"
    method(both[:12].view(3, 4), both[12:].view(3, 4), count)


def test_output_that_views_a_buffer_is_not_changed_by_later_calls(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sum", torch.zeros(3, 4))
            self.register_buffer("constant", torch.ones(5))

        def forward(self, new: Tensor) -> tuple[Tensor, Tensor]:
            self.sum.add_(new)
            return self.sum, self.constant

    path = tmp_path / "model.pte"
    path.write_bytes(to_edge(torch.export.export(Sum(), (torch.ones(3, 4),))).to_executorch().buffer)
    method = load(path, device="cpu")
    first, constant = method(torch.ones(3, 4))
    constant.zero_()
    second, constant = method(torch.ones(3, 4))
    assert (first.unique().tolist(), second.unique().tolist(), constant.unique().tolist()) == ([1], [2], [1])


def spec(values: list[schema.EValue], inputs: list[int], outputs: list[int], *steps: object) -> Spec:
    return Spec(values, inputs, outputs, [], [], steps, OPERATORS)


def test_copy_keeps_the_old_value_if_its_source_is_written_later(tmp_path: Path) -> None:
    values = [*(value(4) for _ in range(4)), FALSE, ONE]
    steps = (
        schema.KernelCall(H2D, [0, 1, 1]),
        schema.KernelCall(ADD, [0, 0, 5, 2, 2]),
        schema.KernelCall(COPY_, [0, 2, 4, 0]),
        schema.KernelCall(ADD, [0, 1, 5, 3, 3]),
    )
    method = load_forward(tmp_path, spec(values, [0], [3, 1], *steps))
    x = torch.ones(4)
    total, old = method(x)
    assert (x.tolist(), total.tolist(), old.tolist()) == ([2] * 4, [3] * 4, [1] * 4)
    path = tmp_path / "model.pte"
    assert analyse(Program(path).plan("forward"), {}, "").steps[0] == Copy(0, 1)
    # The copy is read before its source is written.
    read_first = spec(values, [0], [2], steps[0], schema.KernelCall(ADD, [1, 0, 5, 2, 2]), steps[2])
    path = write(tmp_path, {"forward": read_first}, "first")
    assert analyse(Program(path).plan("forward"), {}, "").steps[0] == Move(0, 1)
    assert load(path, device="cpu")(x)[0].tolist() == [4] * 4 == x.tolist()
    # A copy of the copy is read after the source is written.
    chain = schema.KernelCall(H2D, [1, 3, 3])
    read_last = spec(values, [0], [3], steps[0], chain, schema.KernelCall(ADD, [1, 0, 5, 2, 2]), steps[2])
    path = write(tmp_path, {"forward": read_last}, "last")
    assert analyse(Program(path).plan("forward"), {}, "").steps[:2] == (Move(0, 1), Copy(1, 3))
    assert load(path, device="cpu")(x)[0].tolist() == [4] * 4
    assert x.tolist() == [8] * 4
    unwritten = spec(values, [0], [3, 1], *steps[:2], schema.KernelCall(ADD, [2, 1, 5, 3, 3]))
    flow = analyse(
        Program(write(tmp_path, {"forward": unwritten}, "other"), tmp_path / "other.ptd").plan("forward"), {}, ""
    )
    assert flow.steps[0] == Move(0, 1)


def test_view_without_an_instruction_is_found_by_its_place(tmp_path: Path) -> None:
    values = [value(4, place=0), value(4, place=64), value(2, 2, place=64), value(2, 2), ONE]
    steps = schema.KernelCall(ADD, [0, 0, 4, 1, 1]), schema.KernelCall(ADD, [2, 2, 4, 3, 3])
    path = write(tmp_path, {"forward": spec(values, [0], [3], *steps)})
    method = load(path, device="cpu")
    assert torch.equal(method(torch.arange(4.0))[0], torch.tensor([[0.0, 4], [8, 12]]))
    assert View(1, 2) in analyse(Program(path).plan("forward"), {}, "").steps


@pytest.mark.compiled
def test_delegates_and_operators_use_constants_outside_the_delegate(tmp_path: Path, part: Part) -> None:
    constant, outside = torch.randn(K), torch.randn(3, K)
    values = [
        value(3, K),
        value(K, stored=1),
        value(3, K),
        value(3, K),
        value(),
        value(3, K, key="outside"),
        value(3, K),
        value(3, K),
        value(),
        ONE,
    ]
    steps = [
        schema.KernelCall(ADD, [0, 1, 9, 2, 2]),
        schema.DelegateCall(0, [2, 3, 4]),
        schema.DelegateCall(1, [5, 7, 8]),
        schema.KernelCall(ADD, [3, 7, 9, 6, 6]),
    ]
    made = Spec(values, [0], [6, 4, 8], [part, part], [], steps, OPERATORS)
    path = write(tmp_path, {"forward": made}, constants=[constant], external={"outside": outside})
    model = Counting()
    (first, total), (second, other) = model(X + constant), model(outside)
    for got, expected in zip(load(path, device="cpu")(X), (first + second, total, other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "inputs", "steps", "message"),
    [
        (
            [value(2, stored=1), value(2), FALSE],
            [1],
            [schema.KernelCall(COPY_, [0, 1, 2, 0])],
            "instruction 0 writes to value 0, which is a constant",
        ),
        (
            [value(2, stored=1), value(2), value(2), FALSE],
            [1],
            [schema.MoveCall(0, 2), schema.KernelCall(COPY_, [2, 1, 3, 2])],
            "instruction 1 writes to value 2, which is a constant",
        ),
        (
            [value(2), value(2), ONE],
            [0],
            [schema.KernelCall(ADD, [0, 0, 2, 0, 0])],
            "instruction 0 overwrites value 0, which is an input, a constant or a state",
        ),
        (
            [value(2), value(2), ONE],
            [0],
            [schema.KernelCall(ADD, [0, 0, 2, 1, 1])] * 2,
            "instruction 1 writes to value 1, which was written before",
        ),
        (
            [value(2), value(2), ONE],
            [0],
            [schema.KernelCall(ADD, [0, 1, 2, 1, 1])],
            "instruction 0 reads value 1, which was not written before",
        ),
        (
            [value(2), value(2), FALSE],
            [0],
            [schema.KernelCall(COPY_, [1, 0, 2, 1])],
            "instruction 0 reads value 1, which was not written before",
        ),
        (
            [schema.EValue(schema.IntList([])), schema.EValue(schema.IntList([]))],
            [],
            [schema.MoveCall(0, 1)],
            "instruction 0 reads value 0, a list of int, which only an operator can read",
        ),
        (
            [value(4, place=0), value(2, place=0), value(4), ONE],
            [0],
            [schema.KernelCall(ADD, [0, 1, 3, 2, 2])],
            r"reads value 1, torch.float32 \[2\], which was not written before, and is no view of value 0",
        ),
        (
            [value(4, place=0), value(4, place=0, dynamism=BOUND), value(4), ONE],
            [0],
            [schema.KernelCall(ADD, [0, 1, 3, 2, 2])],
            "which was not written before, and is no view of value 0",
        ),
    ],
)
def test_invalid_reads_and_writes_are_refused(
    values: list[schema.EValue], inputs: list[int], steps: list[object], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {"forward": spec(values, inputs, [], *steps)}, constants=[torch.ones(2)])
    with pytest.raises(DelegateError, match=message):
        load(path, device="cpu")


def test_operator_with_a_list_of_results_writes_each(tmp_path: Path) -> None:
    values = [value(5, 2), schema.EValue(schema.Int(2)), schema.EValue(schema.Int(0))]
    values += [value(2, 2), value(2, 2), value(1, 2), schema.EValue(schema.TensorList([3, 4, 5]))]
    split = schema.KernelCall(0, [0, 1, 2, 6, 6])
    x = torch.randn(5, 2)
    outputs = load_forward(
        tmp_path, Spec(values, [0], [5, 3, 4], [], [], [split], [("aten::split_copy", "Tensor_out")])
    )(x)
    assert torch.equal(torch.cat([outputs[1], outputs[2], outputs[0]]), x)


def test_operator_that_fails_names_its_instruction(tmp_path: Path) -> None:
    values = [value(4, dynamism=BOUND), value(3), value(4), ONE]
    method: Method = load_forward(tmp_path, spec(values, [0, 1], [2], schema.KernelCall(ADD, [0, 1, 3, 2, 2])))
    with pytest.raises(DelegateError, match="instruction 0, aten::add.out, failed: .*broadcast"):
        method(torch.ones(4), torch.ones(3))
    with pytest.raises(DelegateError, match=r"value 2 has shape \[3\], but the program has torch.float32 \[4\] there"):
        method(torch.ones(3), torch.ones(3))


def test_constants_that_overlap_are_refused(tmp_path: Path) -> None:
    values = [value(size, stored=1) for size in range(900, 1000)]
    path = write(tmp_path, {"forward": spec(values, [], [0])}, constants=[torch.ones(1000)])
    with pytest.raises(DelegateError, match="its constants have more bytes than its files"):
        load(path, device="cpu")
