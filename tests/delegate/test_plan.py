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
from et_cuda_passes.delegate.plan import Call, Free, Move, read_plans
from tests.delegate.delegated import PART, Spec, small, value, write


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
    assert own.steps == (Move(0, 1), Call(0, (1, 2)), Move(2, 3), Free(1))
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
            lambda: kernels(("aten::add", "out"), ("aten::relu", "")),
            r"operators outside the CUDA delegate: aten::add.out \(2 x\), aten::relu\. Lower the model",
        ),
        (lambda: small(instructions=[schema.JumpFalseCall(5, 0)]), "outside the CUDA delegate: a conditional jump"),
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
            lambda: small(values=[*small().values, value(2, stored=1)], instructions=[schema.DelegateCall(0, [10, 2])]),
            "value 10, which is passed to delegate 0, is a constant or a state outside the delegate",
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
