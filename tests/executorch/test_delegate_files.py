"""Delegated programs in files: read as ExecuTorch's own readers read them, and refused, never more, when damaged."""

import dataclasses
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from executorch.backends.cuda.cuda_weight_collector import CudaWeightEntry, encode_cuda_weight_metadata
from executorch.exir import schema
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.executorch.delegate import DelegateError, Program
from et_cuda_passes.executorch.delegate_flatbuffer import Flatbuffer
from et_cuda_passes.executorch.delegate_format import read_ptd, read_pte
from et_cuda_passes.executorch.delegate_plan import Call, Free, Move
from tests.executorch.delegated import BOUND, CUDA, Part, Spec, value, write

WEIGHTS = {"up.weight.packed": torch.arange(24, dtype=torch.int32).view(2, 3, 4), "up.bias": torch.ones(5).bfloat16()}
PART = Part(b"\x7fELF, as if", WEIGHTS, CUDA)


def small(**changes: object) -> Spec:
    """A method with every kind of value and step that is read."""
    values = [
        value(3, 8, dtype=torch.bfloat16),
        value(3, 8, dtype=torch.bfloat16),
        value(4, 5, dtype=torch.bfloat16, dynamism=BOUND),
        value(4, 5, dtype=torch.bfloat16, dynamism=BOUND),
        schema.EValue(schema.Int(-7)),
        schema.EValue(schema.Bool(True)),
        schema.EValue(schema.Double(0.5)),
        schema.EValue(schema.String("text")),
        schema.EValue(schema.Null()),
        schema.EValue(schema.IntList([1, 2])),
    ]
    instructions = [
        schema.KernelCall(0, [0, 1, 1]),
        schema.DelegateCall(0, [1, 2]),
        schema.MoveCall(2, 3),
        schema.FreeCall(1),
    ]
    spec = Spec(values, [0, 4, 8], [3, 5], [PART], [], instructions, [("et_copy::_h2d_copy", "out")])
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def read(path: Path) -> Program:
    """All that is read and checked before a library is loaded."""
    program = Program(path)
    for name in program.methods:
        program.plan(name)
    return program


def test_a_program_is_what_executorch_reads(tmp_path: Path) -> None:
    path = write(tmp_path, {"prefill": small(), "decode": small(inputs=[0])})
    theirs, ours = deserialize_pte_binary(path.read_bytes()), read_pte(path)
    assert list(ours.plans) == [plan.name for plan in theirs.program.execution_plan] == ["prefill", "decode"]
    for plan in theirs.program.execution_plan:
        own = ours.plans[plan.name]
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
    assert {key: span.read() for key, span in ours.named.items()} == {
        key: named.buffers[entry.buffer_index] for key, entry in named.pte_data.items()
    }


def test_data_is_what_executorch_reads(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()}).with_suffix(".ptd")
    theirs = FlatTensorSerializer().deserialize(path.read_bytes())
    ours = read_ptd(path).named
    assert len(ours) == 2
    assert {key: b"".join(span.chunks()) for key, span in ours.items()} == {
        key: theirs.buffers[entry.buffer_index] for key, entry in theirs.named_data.items()
    }


def test_weights_are_what_the_stock_backend_describes(tmp_path: Path) -> None:
    (payload,) = read(write(tmp_path, {"forward": small()}))._payloads["forward"].values()
    assert payload.library == PART.key
    for weight, (fqn, tensor) in zip(payload.weights, WEIGHTS.items(), strict=True):
        assert (weight.fqn, weight.dtype, weight.device) == (fqn, tensor.dtype, "cuda")
        assert (weight.sizes, weight.strides, weight.offset) == (tuple(tensor.shape), tensor.stride(), 0)
        assert weight.end == weight.nbytes == tensor.nbytes


def outcome(path: Path) -> str:
    """Whether the files are read or refused; whatever else they do is a failure of the test."""
    try:
        read(path)
    except DelegateError:
        return "refused"
    return "read"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    path = write(tmp_path_factory.mktemp("whole"), {"forward": small()})
    assert outcome(path) == "read"
    return path, {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".pte", ".ptd")}


Whole = tuple[Path, dict[str, bytes]]


def with_damage(whole: Whole, suffix: str, versions: Iterator[bytes]) -> list[str]:
    """The outcome of each version of one of the two files; the file is whole again afterwards."""
    path, contents = whole
    outcomes = []
    try:
        for version in versions:
            path.with_suffix(suffix).write_bytes(version)
            outcomes.append(outcome(path))
    finally:
        path.with_suffix(suffix).write_bytes(contents[suffix])
    return outcomes


@pytest.mark.parametrize("suffix", [".pte", ".ptd"])
def test_a_file_that_was_cut_anywhere(suffix: str, whole: Whole) -> None:
    content = whole[1][suffix]
    outcomes = with_damage(whole, suffix, (content[:size] for size in range(len(content))))
    assert set(outcomes) == {"refused"}


@pytest.mark.parametrize("suffix", [".pte", ".ptd"])
def test_a_file_with_a_flipped_bit_anywhere(suffix: str, whole: Whole) -> None:
    content = whole[1][suffix]
    places = ((at, bit) for at in range(len(content)) for bit in range(8))
    versions = (content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :] for at, bit in places)
    # A flip in padding, in a name of nothing or in weights changes no structure.
    assert set(with_damage(whole, suffix, versions)) == {"refused", "read"}


@pytest.mark.parametrize("suffix", [".pte", ".ptd"])
def test_a_file_with_extreme_numbers_anywhere(suffix: str, whole: Whole) -> None:
    content = whole[1][suffix]
    extremes = [struct.pack("<I", number) for number in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)]
    versions = (content[:at] + word + content[at + 4 :] for at in range(0, len(content) - 3, 4) for word in extremes)
    assert "refused" in with_damage(whole, suffix, versions)


@given(patches=st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6))
def test_a_file_with_several_patches(whole: Whole, patches: list[tuple[int, bytes]]) -> None:
    for suffix, content in whole[1].items():
        patched = bytearray(content)
        for at, patch in patches:
            at %= len(content)
            patched[at : at + len(patch)] = patch
        with_damage(whole, suffix, iter([bytes(patched)]))


def test_a_flatbuffer_whose_parts_overlap_is_not_unfolded() -> None:
    # A root table with 10,000 references to one table that holds 10,000 numbers: 50 KB that unfold to 400 MB.
    many = 10_000
    vtable = struct.pack("<HHH", 6, 8, 4)
    root = struct.pack("<iI", 6, 4)
    head = struct.pack("<I", 10) + vtable + root
    inner = len(head) + 4 + 4 * many + len(vtable)
    start = len(head) + 4
    references = b"".join(struct.pack("<I", inner - (start + 4 * index)) for index in range(many))
    numbers = struct.pack("<iI", 6, 4) + struct.pack(f"<I{many}I", many, *range(many))
    buffer = Flatbuffer(head + struct.pack("<I", many) + references + vtable + numbers, "made.pte")
    tables = buffer.root().tables(0, "parts")
    assert len(tables) == many
    assert tables[0].integers(0, "I", "numbers") == tuple(range(many))
    with pytest.raises(DelegateError, match="its parts overlap"):
        [table.integers(0, "I", "numbers") for table in tables]


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()})
    for name, content in (
        ("empty", b""),
        ("text", b"no program at all"),
        ("data", path.with_suffix(".ptd").read_bytes()),
    ):
        other = tmp_path / f"{name}.pte"
        other.write_bytes(content)
        with pytest.raises(DelegateError, match=rf"{name}.pte is not a .pte program of this version: bytes 4 to 8 are"):
            Program(other)
    with pytest.raises(DelegateError, match="is not a .ptd data file"):
        Program(path, path)
    for missing in (tmp_path / "missing.pte", tmp_path):
        with pytest.raises(DelegateError, match="cannot be read"):
            Program(missing)
    with pytest.raises(DelegateError, match="cannot be read"):
        Program(path, tmp_path / "missing.ptd")


def test_a_program_without_its_data(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()})
    path.with_suffix(".ptd").unlink()
    with pytest.raises(
        DelegateError, match="there is no data 'cuda_fqn_weight:cuda:up.weight.packed' in the files; is"
    ):
        Program(path)


def described(*entries: CudaWeightEntry) -> bytes:
    return encode_cuda_weight_metadata(PART.key, list(entries))


BIAS = CudaWeightEntry("up.bias", "cuda_fqn_weight:cuda:up.bias", 10, 15, CUDA, 0, (5,), (1,))


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "it begins with b''"),
        (b"key\nother key", "executorch 1.5 writes that: lower again"),
        (encode_cuda_weight_metadata("elsewhere", []), "there is no data 'elsewhere'"),
        (described(BIAS)[:-1], "bytes are wanted, and the data ends"),
        (described(BIAS) + b"\0", "1 bytes are left over"),
        (described(BIAS, BIAS), "'up.bias' at byte .*: it is there twice"),
        (described(dataclasses.replace(BIAS, storage_key="none")), "there is no data 'none'"),
        (described(dataclasses.replace(BIAS, storage_nbytes=8)), "8 bytes are wanted, .* has 10"),
        (described(dataclasses.replace(BIAS, dtype=8)), "there is no dtype 8"),
        (described(dataclasses.replace(BIAS, device_type=2)), "there is no device type 2"),
        (described(dataclasses.replace(BIAS, sizes=(6,))), "its view ends at byte 12 of a storage of 10"),
        (described(dataclasses.replace(BIAS, strides=(2,))), "its view ends at byte 18 of"),
        (described(dataclasses.replace(BIAS, storage_offset=1)), "its view ends at byte 12 of"),
        (described(dataclasses.replace(BIAS, sizes=(0,), storage_offset=1 << 40)), "its view ends"),
        (described(dataclasses.replace(BIAS, sizes=(1 << 62,) * 2, strides=(1 << 62,) * 2)), "its view ends"),
        (described(dataclasses.replace(BIAS, sizes=(-5,))), "have a negative"),
        (described(dataclasses.replace(BIAS, strides=(-1,))), "have a negative"),
        (described(dataclasses.replace(BIAS, storage_offset=-1)), "have a negative"),
        (described(dataclasses.replace(BIAS, sizes=(1,) * 65, strides=(1,) * 65)), "65 dimensions"),
    ],
)
def test_a_payload_that_makes_no_sense(payload: bytes, said: str, tmp_path: Path) -> None:
    # A delegate without a payload stays in the program itself, any other one goes into a segment.
    path = write(tmp_path, {"forward": small(parts=[dataclasses.replace(PART, payload=payload)])})
    with pytest.raises(DelegateError, match=said) as error:
        Program(path)
    assert "method 'forward': delegate 0" in str(error.value)


def kernels(*names: tuple[str, str]) -> Spec:
    calls = [schema.KernelCall(index, [0, 0, 1]) for index in (*range(len(names)), 0)]
    return small(instructions=[*small().instructions, *calls][4:], operators=names)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            lambda: kernels(("aten::add", "out"), ("aten::relu", "")),
            r"operators outside the CUDA delegate: aten::add.out \(2 x\), aten::relu\. Lower it",
        ),
        (lambda: small(instructions=[schema.JumpFalseCall(5, 0)]), "outside the CUDA delegate: a conditional jump"),
        (
            lambda: small(parts=[dataclasses.replace(PART, backend="XnnpackBackend")]),
            "runs delegates of XnnpackBackend; only those of CudaBackend run here",
        ),
        (lambda: small(instructions=[schema.DelegateCall(0, [4, 2])]), "value 4, which delegate 0 takes, is -7 and no"),
        (lambda: small(instructions=[schema.DelegateCall(0, [9, 2])]), "is list of int and no tensor"),
        (
            lambda: small(values=[*small().values, value(2, stored=1)], instructions=[schema.DelegateCall(0, [10, 2])]),
            "value 10, which delegate 0 takes, is a constant or a state outside the delegate",
        ),
    ],
)
def test_a_method_that_runs_something_else(spec: Callable[[], Spec], said: str, tmp_path: Path) -> None:
    program = Program(write(tmp_path, {"forward": spec(), "other": small()}))
    with pytest.raises(DelegateError, match=said):
        program.plan("forward")
    # What one method cannot do is no harm to another.
    program.plan("other")
    with pytest.raises(DelegateError, match="has no method 'decode'; it has forward, other"):
        program.plan("decode")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": [10]}, r"execution_plan\[0\].inputs at byte \d+: index 10, of 10"),
        ({"outputs": [-1]}, r"outputs at byte \d+: index -1, of 10"),
        ({"instructions": [schema.DelegateCall(1, [0])]}, r"instructions\[0\].instr_args.delegate_index .* 1, of 1"),
        ({"instructions": [schema.DelegateCall(0, [0, 99])]}, "args at byte .*: index 99, of 10"),
        ({"instructions": [schema.KernelCall(3, [])]}, "op_index at byte .*: index 3, of 1"),
        ({"instructions": [schema.KernelCall(0, [0, 1])]}, "takes a source and a target that it returns"),
        ({"instructions": [schema.MoveCall(0, 10)]}, "move_to"),
        ({"instructions": [schema.MoveCall(-1, 0)]}, "move_from"),
        ({"instructions": [schema.FreeCall(10)]}, "value_index"),
        ({"values": [value(-1)]}, "has a negative size"),
        ({"values": [value(2, dynamism=3)]}, "there is no dynamism 3"),
    ],
)
def test_a_method_that_contradicts_itself(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small(**changes)})
    with pytest.raises(DelegateError, match=said):
        Program(path)


def test_two_methods_of_one_name(tmp_path: Path) -> None:
    path = write(tmp_path, {"one": small(), "two": small()})
    path.write_bytes(path.read_bytes().replace(b"two", b"one"))
    with pytest.raises(DelegateError, match="a second method is called 'one'"):
        Program(path)


def test_one_key_twice(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()})
    first, _ = read_ptd(path.with_suffix(".ptd")).named
    payload = DataPayload([b"1", b"2"], {first: DataEntry(0, 1, None), PART.key: DataEntry(1, 1, None)})
    data = tmp_path / "both.ptd"
    data.write_bytes(bytes(FlatTensorSerializer().serialize(payload)))
    with pytest.raises(DelegateError, match=f"both hold '{PART.key}'"):
        Program(path, data)
    twin = DataPayload([b"1", b"2"], {"aa": DataEntry(0, 1, None), "ab": DataEntry(1, 1, None)})
    data.write_bytes(bytes(FlatTensorSerializer().serialize(twin)).replace(b"ab", b"aa"))
    with pytest.raises(DelegateError, match="'aa' is there twice"):
        Program(path, data)
