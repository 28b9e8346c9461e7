"""A method of a .pte as data, and as the steps that run it where all its operators lie in CUDA delegates."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from et_cuda_passes.executorch.delegate_bytes import DelegateError, Span
from et_cuda_passes.executorch.delegate_flatbuffer import Table

DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    25: torch.float8_e5m2fnuz,
    26: torch.float8_e4m3fnuz,
    27: torch.uint16,
    28: torch.uint32,
    29: torch.uint64,
}
"""ExecuTorch's ScalarType (scalar_type.fbs) and torch's own numbering, which agree, to torch dtypes."""

BACKEND = "CudaBackend"
_KINDS = (
    "nothing",
    "None",
    "int",
    "bool",
    "float",
    "tensor",
    "str",
    "list of int",
    "list of float",
    "list of bool",
    "list of tensors",
    "list of optional tensors",
)
# Moves between host and device memory, which ExecuTorch puts around a delegate; a tensor here is always on the device.
_COPIES = ("et_copy::_h2d_copy.out", "et_copy::_d2h_copy.out")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor value of a method may be.

    Attributes:
        dtype: its dtype.
        sizes: exact where ``dynamism`` is 0, upper bounds where it is 1, and nothing but so many where it is 2.
        dim_order: the dimensions from the outermost in memory to the innermost.
        dynamism: see ``sizes``.
        stored: whether its data is in the file, as a constant or as an initial state.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    dim_order: tuple[int, ...]
    dynamism: int
    stored: bool

    def objection(self, tensor: torch.Tensor) -> str | None:
        """Why ``tensor`` is none of these; None where it is one."""
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            return "is no plain tensor with data"
        if tensor.dtype != self.dtype:
            return f"has dtype {tensor.dtype}"
        shape = tuple(tensor.shape)
        fits = {0: shape == self.sizes, 1: all(a <= b for a, b in zip(shape, self.sizes, strict=False)), 2: True}
        return None if len(shape) == len(self.sizes) and fits[self.dynamism] else f"has the shape {list(shape)}"

    def __str__(self) -> str:
        sizes = {0: str(list(self.sizes)), 1: f"at most {list(self.sizes)}", 2: f"{len(self.sizes)} dimensions"}
        return f"{self.dtype} {sizes[self.dynamism]}"


@dataclass(frozen=True)
class Value:
    """A value of a method: a tensor, or a constant scalar, text or None; of lists only their kind is known."""

    kind: str
    tensor: TensorSpec | None = None
    constant: int | float | bool | str | None = None

    def __str__(self) -> str:
        if self.tensor is not None:
            return str(self.tensor)
        return self.kind if self.kind.startswith("list") else repr(self.constant)


@dataclass(frozen=True)
class BackendDelegate:
    """A delegate: its backend's name and its payload."""

    backend: str
    payload: bytes | Span


@dataclass(frozen=True)
class Call:
    """Run a delegate on values; the inputs come first in ``args``, then the outputs."""

    delegate: int
    args: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """Let value ``target`` be value ``source``."""

    source: int
    target: int


@dataclass(frozen=True)
class Free:
    """Forget a value."""

    value: int


@dataclass(frozen=True)
class Foreign:
    """What runs outside every delegate, by name."""

    name: str


Step = Call | Move | Free | Foreign


@dataclass(frozen=True)
class Plan:
    """One method; ``inputs``, ``outputs`` and all steps hold indices into ``values``."""

    name: str
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    delegates: tuple[BackendDelegate, ...]
    steps: tuple[Step, ...]

    def check_runnable(self) -> None:
        """Check that CUDA delegates and moves of values are all there is to run.

        Raises:
            DelegateError: something else is; it is named.
        """
        foreign = Counter(step.name for step in self.steps if isinstance(step, Foreign))
        if foreign:
            names = ", ".join(f"{name} ({count} x)" if count > 1 else name for name, count in foreign.items())
            raise DelegateError(
                f"method {self.name!r} runs operators outside the CUDA delegate: {names}. Lower it so that the "
                "delegate takes all of them, or run the .pte with ExecuTorch's own runtime"
            )
        calls = [step for step in self.steps if isinstance(step, Call)]
        others = {self.delegates[step.delegate].backend for step in calls} - {BACKEND}
        if others:
            raise DelegateError(
                f"method {self.name!r} runs delegates of {', '.join(sorted(others))}; only those of {BACKEND} run "
                "here: run the .pte with ExecuTorch's own runtime"
            )
        for call in calls:
            for index in call.args:
                tensor = self.values[index].tensor
                if tensor is None:
                    raise DelegateError(
                        f"method {self.name!r}: value {index}, which delegate {call.delegate} takes, is "
                        f"{self.values[index]} and no tensor"
                    )
                if tensor.stored:
                    raise DelegateError(
                        f"method {self.name!r}: value {index}, which delegate {call.delegate} takes, is a constant "
                        "or a state outside the delegate, which is not read here: run the .pte with ExecuTorch's own "
                        "runtime"
                    )


def read_plan(table: Table, data_of: Callable[[Table], bytes | Span]) -> Plan:
    """A method out of its table ``ExecutionPlan``; ``data_of`` finds a delegate's payload from its reference.

    Raises:
        DelegateError: it contradicts itself or the file.
    """
    values = tuple(_value(entry) for entry in table.tables(2, "values"))
    operators = [
        ".".join(filter(None, (entry.text(0, "name"), entry.text(1, "overload"))))
        for entry in table.tables(6, "operators")
    ]
    delegates = []
    for entry in table.tables(7, "delegates"):
        reference = entry.table(1, "processed")
        if reference is None:
            entry.fail("it has no payload")
        else:
            delegates.append(BackendDelegate(entry.text(0, "id"), data_of(reference)))
    steps = [
        _step(entry, len(values), operators, len(delegates))
        for chain in table.tables(5, "chains")
        for entry in chain.tables(2, "instructions")
    ]
    inputs, outputs = (_indices(table, field, name, len(values)) for field, name in ((3, "inputs"), (4, "outputs")))
    return Plan(table.text(0, "name"), values, inputs, outputs, tuple(delegates), tuple(steps))


def _indices(table: Table, field: int, name: str, count: int) -> tuple[int, ...]:
    indices = table.integers(field, "i", name)
    return tuple(_index(table, index, name, count) for index in indices)


def _index(table: Table, index: int, name: str, count: int) -> int:
    if not 0 <= index < count:
        table.fail(f"index {index}, of {count}", name)
    return index


def _step(entry: Table, values: int, operators: list[str], delegates: int) -> Step:
    kind, call = entry.union(0, "instr_args")
    if call is None or not 1 <= kind <= 5:
        entry.fail(f"there is no instruction of type {kind}")
        raise AssertionError
    if kind == 4:
        return Foreign("a conditional jump")
    if kind == 5:
        return Free(_index(call, call.integer(0, "i", "value_index"), "value_index", values))
    if kind == 3:
        source, target = (call.integer(field, "i", name) for field, name in ((0, "move_from"), (1, "move_to")))
        return Move(_index(call, source, "move_from", values), _index(call, target, "move_to", values))
    args = _indices(call, 1, "args", values)
    if kind == 2:
        return Call(_index(call, call.integer(0, "i", "delegate_index"), "delegate_index", delegates), args)
    name = operators[_index(call, call.integer(0, "i", "op_index"), "op_index", len(operators))]
    if name not in _COPIES:
        return Foreign(name)
    if len(args) != 3 or args[1] != args[2]:
        call.fail(f"{name} takes a source and a target that it returns, found values {list(args)}", "args")
    return Move(args[0], args[1])


def _value(entry: Table) -> Value:
    kind, table = entry.union(0, "val")
    if not 0 < kind < len(_KINDS):
        entry.fail(f"there is no value of type {kind}")
    name = _KINDS[kind]
    if table is None or name == "None" or name.startswith("list"):
        return Value(name)
    if name == "tensor":
        return Value(name, _tensor(table))
    if name == "int":
        return Value(name, constant=table.integer(0, "q", "int_val"))
    if name == "bool":
        return Value(name, constant=bool(table.integer(0, "b", "bool_val")))
    if name == "float":
        return Value(name, constant=table.real(0, "double_val"))
    return Value(name, constant=table.text(0, "string_val"))


def _tensor(table: Table) -> TensorSpec:
    code = table.integer(0, "b", "scalar_type")
    if code not in DTYPES:
        table.fail(f"there is no dtype {code}", "scalar_type")
    sizes = table.integers(2, "i", "sizes")
    if any(size < 0 for size in sizes):
        table.fail(f"{list(sizes)} has a negative size", "sizes")
    order = table.integers(3, "B", "dim_order") or tuple(range(len(sizes)))
    if sorted(order) != list(range(len(sizes))):
        table.fail(f"{list(order)} is no order of {len(sizes)} dimensions", "dim_order")
    dynamism = table.integer(8, "b", "shape_dynamism")
    if dynamism not in (0, 1, 2):
        table.fail(f"there is no dynamism {dynamism}", "shape_dynamism")
    if table.integer(1, "i", "storage_offset"):
        table.fail("it is not 0, the only one that there is", "storage_offset")
    extra = table.table(9, "extra_tensor_info")
    external = extra is not None and extra.integer(2, "b", "location") == 1
    return TensorSpec(DTYPES[code], sizes, order, dynamism, table.integer(5, "I", "data_buffer_idx") > 0 or external)
