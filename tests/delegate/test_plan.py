"""Methods as data: read as ExecuTorch reads them, and refused if they are not valid or not runnable."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executorch.exir import schema
from executorch.exir._serialize._program import deserialize_pte_binary

from et_cuda_passes.delegate import DelegateError, Program
from et_cuda_passes.delegate.files import read_pte
from et_cuda_passes.delegate.plan import Call, Copy, Free, Kernel, Move, read_plans
from tests.delegate.delegated import PART, Spec, small, value, write, write_with_operators


def test_plans_match_the_deserializer_of_executorch(tmp_path: Path) -> None:
    path = write(tmp_path, {"prefill": small(), "decode": small(inputs=[0])})
    theirs, ours = deserialize_pte_binary(path.read_bytes()), read_pte(path)
    plans = read_plans(ours)
    assert list(plans) == [plan.name for plan in theirs.program.execution_plan] == ["prefill", "decode"]
    for plan in theirs.program.execution_plan:
        own = plans[plan.name]
        assert (own.inputs, own.outputs) == (tuple(plan.inputs), tuple(plan.outputs))
        assert [delegate.backend for delegate in own.delegates] == [delegate.id for delegate in plan.delegates]
        inline = theirs.program.backend_delegate_data[plan.delegates[0].processed.index]
        assert own.delegates[0].payload.read() == bytes(inline.data)  # type: ignore[union-attr]
        for mine, other in zip(own.values[:4], plan.values[:4], strict=True):
            assert mine.tensor is not None
            assert (list(mine.tensor.sizes), list(mine.tensor.dim_order)) == (other.val.sizes, other.val.dim_order)
            assert mine.tensor.dynamism == other.val.shape_dynamism
            assert mine.tensor.dtype == torch.bfloat16
    assert [entry.constant for entry in own.values[4:]] == [-7, True, 0.5, "text", None, None]
    assert own.values[9].kind == "list of int"
    assert own.steps == (Copy(0, 1), Call(0, (1, 2)), Move(2, 3), Free(1))
    named = theirs.named_data
    assert {key: span.read() for key, span in ours.named_data.items()} == {
        key: named.buffers[entry.buffer_index] for key, entry in named.pte_data.items()
    }


def kernels(*names: tuple[str, str]) -> Spec:
    calls = [schema.KernelCall(index, [0, 0, 1]) for index in (*range(len(names)), 0)]
    return small(instructions=[*small().instructions, *calls][4:], operators=names)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            lambda: kernels(("mine::add", "out"), ("aten::relu", ""), ("aten::mm", "out")),
            r"operators outside the CUDA delegate that are not available here: mine::add.out \(2 x\), aten::relu\. "
            "Lower the model",
        ),
        (lambda: small(instructions=[schema.JumpFalseCall(5, 0)]), "has branches or loops outside the CUDA delegate"),
        (
            lambda: small(parts=[dataclasses.replace(PART, backend="XnnpackBackend")]),
            "runs delegates of XnnpackBackend, but only delegates of CudaBackend can run here",
        ),
        (
            lambda: small(instructions=[schema.DelegateCall(0, [4, 2])]),
            "value 4, which is passed to delegate 0, is -7 and not a tensor",
        ),
        (lambda: small(instructions=[schema.DelegateCall(0, [9, 2])]), "is list of int and not a tensor"),
        (
            lambda: kernels(("aten::mm", "out")),
            r"aten::mm.out has 3 values, but its schema .* needs 4",
        ),
    ],
)
def test_plan_with_other_operators_is_not_runnable(spec: Callable[[], Spec], message: str, tmp_path: Path) -> None:
    program = Program(write(tmp_path, {"forward": spec(), "other": small()}))
    with pytest.raises(DelegateError, match=message):
        program.plan("forward")
    # Other methods stay runnable.
    program.plan("other")
    with pytest.raises(DelegateError, match="has no method 'decode'; it has forward, other"):
        program.plan("decode")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": [10]}, r"execution_plan\[0\].inputs at byte \d+: index 10 is out of range for 10 entries"),
        ({"outputs": [-1]}, r"outputs at byte \d+: index -1 is out of range for 10 entries"),
        (
            {"instructions": [schema.DelegateCall(1, [0])]},
            r"instructions\[0\].instr_args.delegate_index .*: index 1 is out of range for 1 entries",
        ),
        (
            {"instructions": [schema.DelegateCall(0, [0, 99])]},
            "args at byte .*: index 99 is out of range for 10 entries",
        ),
        ({"instructions": [schema.KernelCall(3, [])]}, "op_index at byte .*: index 3 is out of range for 1 entries"),
        ({"instructions": [schema.KernelCall(0, [0, 1])]}, "has the arguments source, target and target again"),
        ({"instructions": [schema.MoveCall(0, 10)]}, "move_to"),
        ({"instructions": [schema.MoveCall(-1, 0)]}, "move_from"),
        ({"instructions": [schema.FreeCall(10)]}, "value_index"),
        ({"values": [value(-1)]}, "has a negative size"),
        ({"values": [value(*[1] * 17)]}, "17 dimensions are more than the 16"),
        ({"values": [value(2, stored=1)]}, "data_buffer_idx at byte .*: index 1 is out of range for 1 tensors"),
        ({"values": [value(2, stored=1, place=0)]}, "the file has no segment with its data"),
        ({"values": [schema.EValue(schema.IntList([1]))]}, "items at byte .*: index 1 is out of range for 1 entries"),
        ({"values": [schema.EValue(schema.TensorList([-1]))]}, "items at byte .*: index -1 is out of range"),
        (
            {"values": [schema.EValue(schema.OptionalTensorList([-1, -2]))]},
            "items at byte .*: index -2 is out",
        ),
        ({"values": [value(2, dynamism=3)]}, "dynamism 3 does not exist"),
    ],
)
def test_invalid_plan_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small(**changes)})
    with pytest.raises(DelegateError, match=message):
        Program(path)


def test_two_methods_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"one": small(), "two": small()})
    path.write_bytes(path.read_bytes().replace(b"two", b"one"))
    with pytest.raises(DelegateError, match="a second method has the name 'one'"):
        Program(path)


def test_values_and_data_match_the_deserializer_of_executorch(tmp_path: Path) -> None:
    path = write_with_operators(tmp_path)
    theirs = deserialize_pte_binary(path.read_bytes())
    (plan,), (own,) = theirs.program.execution_plan, read_plans(read_pte(path)).values()
    for index in range(9, 14):
        assert list(own.values[index].items) == plan.values[index].val.items
    constant, state, inner, outside = (own.values[index].tensor for index in (14, 15, 16, 17))
    assert constant and state and inner and outside
    assert (constant.place, state.place, inner.place) == (None, (1, 64), (1, 128))
    assert constant.data and constant.data.read() == theirs.program.constant_buffer[1].storage
    assert state.data and theirs.mutable_data and state.data.read() == theirs.mutable_data[1].storage
    assert (inner.stored, outside.key) == (False, "outside")
    assert own.steps[3:7] == (
        Kernel("aten::mm.out", (14, 15, 16, 16)),
        Kernel("aten::copy_", (15, 16, 5, 15)),
        Kernel("aten::cat.out", (12, 4, 18, 18)),
        Kernel("executorch_prim::mul.Scalar", (4, 4, 4)),
    )


def test_data_that_is_too_large_for_its_segment_is_refused(tmp_path: Path) -> None:
    spec = small(values=[*small().values, value(5, stored=1)])
    path = write(tmp_path, {"forward": spec}, constants=[torch.arange(4.0)])
    with pytest.raises(DelegateError, match=r"it has 20 bytes from byte \d+ of a segment of \d+ bytes"):
        Program(path)


def test_data_that_no_file_has_is_refused(tmp_path: Path) -> None:
    spec = small(values=[*small().values, value(5, key="outside")])
    for external, message in (({}, "have no data 'outside'"), ({"outside": torch.zeros(6)}, "20 bytes of .*, not 24")):
        program = Program(write(tmp_path, {"forward": spec}, external=external))
        with pytest.raises(DelegateError, match=message):
            program.plan("forward")
