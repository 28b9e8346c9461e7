"""Small delegated programs, a .pte and a .ptd each, written by ExecuTorch's own serializers."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from executorch.backends.cuda.cuda_weight_collector import CudaWeightEntry, encode_cuda_weight_metadata
from executorch.exir import schema
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.tensor import scalar_type_enum
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from torch import Tensor, nn
from torch.export import Dim

from et_cuda_passes.delegate import Method, Program, load

STATIC, BOUND = schema.TensorShapeDynamism.STATIC, schema.TensorShapeDynamism.DYNAMIC_BOUND
CPU, CUDA = 0, 1


def value(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    dynamism: int = STATIC,
    stored: int = 0,
    place: int | None = None,
    key: str | None = None,
) -> schema.EValue:
    """A tensor value: ``stored`` in the .pte or under ``key`` in the .ptd, at ``place`` in planned memory."""
    order = list(range(len(sizes)))
    allocation = None if place is None else schema.AllocationDetails(1, place, 0)
    extra = None if key is None else schema.ExtraTensorInfo(0, key, schema.TensorDataLocation.EXTERNAL)
    return schema.EValue(
        schema.Tensor(
            scalar_type_enum(dtype),
            0,
            list(sizes),
            order,
            False,
            0,
            stored,
            allocation,
            dynamism,
            extra_tensor_info=extra,
        )
    )


def entry(fqn: str, tensor: Tensor, device: int) -> CudaWeightEntry:
    """A weight as the stock backend describes it."""
    return CudaWeightEntry(
        fqn,
        f"cuda_fqn_weight:{('cpu', 'cuda')[device]}:{fqn}",
        tensor.untyped_storage().nbytes(),
        int(scalar_type_enum(tensor.dtype)),
        device,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
    )


@dataclass
class Part:
    """A delegate: the bytes of its library and its weights by FQN; ``payload`` replaces the encoded weights."""

    library: bytes
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    device: int = CPU
    backend: str = "CudaBackend"
    payload: bytes | None = None

    @property
    def key(self) -> str:
        return hashlib.sha256(self.library).hexdigest() + "_so_blob"

    def encoded(self) -> bytes:
        entries = [entry(fqn, tensor, self.device) for fqn, tensor in self.weights.items()]
        return encode_cuda_weight_metadata(self.key, entries) if self.payload is None else self.payload


@dataclass
class Spec:
    """A method. Without ``instructions`` its parts run in order, each on the values in ``calls``."""

    values: Sequence[schema.EValue]
    inputs: Sequence[int]
    outputs: Sequence[int]
    parts: Sequence[Part]
    calls: Sequence[Sequence[int]] = ()
    instructions: Sequence[object] | None = None
    operators: Sequence[tuple[str, str]] = ()

    def plan(self, name: str, first: int) -> schema.ExecutionPlan:
        calls = [schema.DelegateCall(index, list(args)) for index, args in enumerate(self.calls)]
        instructions = [
            schema.Instruction(step) for step in (calls if self.instructions is None else self.instructions)
        ]
        references = [
            schema.BackendDelegateDataReference(schema.DataLocation.INLINE, first + index)
            for index in range(len(self.parts))
        ]
        specs = [CompileSpec("method_name", b"forward")]
        return schema.ExecutionPlan(
            name,
            schema.ContainerMetadata("", ""),
            list(self.values),
            list(self.inputs),
            list(self.outputs),
            [schema.Chain([], [], instructions, None)],
            [schema.Operator(*operator) for operator in self.operators],
            [
                schema.BackendDelegate(part.backend, reference, specs)
                for part, reference in zip(self.parts, references, strict=True)
            ],
            [0],
        )


def raw(tensor: Tensor) -> bytes:
    """The bytes of a contiguous tensor."""
    return bytes(tensor.view(torch.uint8).numpy())


def write(
    folder: Path,
    methods: Mapping[str, Spec],
    stem: str = "model",
    *,
    constants: Sequence[Tensor] = (),
    states: Sequence[Tensor] = (),
    external: Mapping[str, Tensor] = MappingProxyType({}),
) -> Path:
    """Write ``folder``/``stem``.pte and .ptd in the form that ExecuTorch's lowering gives them.

    A value whose ``stored`` is 1 has the first of ``constants`` or, with a place, of ``states``.
    """
    plans, inline, store = [], [], NamedDataStore()
    storages: dict[str, bytes] = {}
    for name, spec in methods.items():
        plans.append(spec.plan(name, len(inline)))
        for part in spec.parts:
            inline.append(schema.BackendDelegateInlineData(part.encoded()))
            store.add_named_data(part.key, part.library)
            for fqn, tensor in part.weights.items():
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                storages[entry(fqn, tensor, part.device).storage_key] = bytes(whole.numpy())
    named = store.get_named_data_store_output()
    constant_buffer, mutable_data = (
        [schema.Buffer(b""), *(schema.Buffer(raw(tensor)) for tensor in tensors)] for tensors in (constants, states)
    )
    program = schema.Program(0, plans, constant_buffer, inline, [], schema.SubsegmentOffsets(0, []), None, None)
    file = PTEFile(program, mutable_data if states else None, NamedDataStoreOutput(named.buffers, named.pte_data, {}))
    path = folder / f"{stem}.pte"
    path.write_bytes(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))
    storages |= {key: raw(tensor) for key, tensor in external.items()}
    entries = {key: DataEntry(index, 1, None) for index, key in enumerate(storages)}
    data = FlatTensorSerializer().serialize(DataPayload(list(storages.values()), entries))
    (folder / f"{stem}.ptd").write_bytes(bytes(data))
    return path


K = 16  # AOTInductor compiles constants of up to 8 numbers into the code
X = torch.randn(3, K, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """linear(x) plus the number of calls, and the sum of x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(K, K)
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        return self.linear(x) + self.calls[0], x.sum()


@functools.cache
def _counting_library() -> bytes:
    x = torch.randn(3, K)
    exported = torch.export.export(Counting(), (x,), dynamic_shapes=({0: Dim("rows", min=1, max=32)},))
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        "aot_inductor.link_libtorch": False,
    }
    with torch.no_grad():
        files = torch._inductor.aot_compile(exported.module(), (x,), options=options)
    (library,) = (path for path in files if isinstance(path, str) and path.endswith(".so"))
    return Path(library).read_bytes()


def counting() -> Part:
    """`Counting` compiled for the CPU as the CUDA backend compiles: weights outside the library, torch not linked."""
    weights = {name: tensor.detach().clone() for name, tensor in Counting().state_dict().items()}
    return Part(_counting_library(), weights)


def single_call(part: Part) -> Spec:
    """A method that is one call of `counting()`."""
    values = [value(32, K, dynamism=BOUND), value(32, K, dynamism=BOUND), value()]
    return Spec(values, [0], [1, 2], [part], [[0, 1, 2]])


def load_forward(folder: Path, spec: Spec) -> Method:
    """The method of ``spec``, loaded on the CPU."""
    return load(write(folder, {"forward": spec}), device="cpu")


WEIGHTS = {"up.weight.packed": torch.arange(24, dtype=torch.int32).view(2, 3, 4), "up.bias": torch.ones(5).bfloat16()}
PART = Part(b"\x7fELF, as if", WEIGHTS, CUDA)


def small(**changes: object) -> Spec:
    """A method with every kind of value and step that is read; ``changes`` replace fields of it."""
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


def with_operators() -> Spec:
    """`small()` with every other kind of value, with data outside the delegate, and with operators."""
    spec = small()
    values = [
        *spec.values[:9],
        schema.EValue(schema.IntList([4, 4])),
        schema.EValue(schema.DoubleList([0.5, 2.0])),
        schema.EValue(schema.BoolList([True, False])),
        schema.EValue(schema.TensorList([2, 3])),
        schema.EValue(schema.OptionalTensorList([-1, 2])),
        value(2, 2, stored=1),
        value(2, 2, stored=1, place=64),
        value(2, 2, place=128),
        value(4, key="outside"),
        value(4, 10, dtype=torch.bfloat16, dynamism=BOUND),
        value(4, place=128),
    ]
    instructions = [
        *spec.instructions[:3],
        schema.KernelCall(1, [14, 15, 16, 16]),
        schema.KernelCall(2, [15, 16, 5, 15]),
        schema.KernelCall(3, [12, 4, 18, 18]),
        schema.KernelCall(4, [4, 4, 4]),
        schema.FreeCall(1),
    ]
    operators = [
        *spec.operators,
        ("aten::mm", "out"),
        ("aten::copy_", ""),
        ("aten::cat", "out"),
        ("executorch_prim::mul", "Scalar"),
    ]
    return small(values=values, instructions=instructions, operators=operators, inputs=[0, 8], outputs=[3, 5, 19])


def write_with_operators(folder: Path) -> Path:
    """A file of the method `with_operators()`."""
    constant, state, outside = torch.arange(4.0).view(2, 2), torch.ones(2, 2), torch.zeros(4)
    return write(
        folder, {"forward": with_operators()}, constants=[constant], states=[state], external={"outside": outside}
    )


def read_program(path: Path) -> Program:
    """Read and check everything that is read before a library is loaded."""
    program = Program(path)
    for name in program.methods:
        program.plan(name)
    return program
