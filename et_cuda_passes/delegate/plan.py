"""A method of a .pte as data, and as the steps that run it if all its operators are in CUDA delegates."""

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

import torch

from et_cuda_passes.delegate.files import DTYPES, DelegateError, ProgramFile, Span, Table

BACKEND = "CudaBackend"
# The kinds of values, in the order of the union KernelTypes in program.fbs.
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
# ExecuTorch puts copies between host and device memory around a delegate. Here a tensor is always on the device.
_COPIES = ("et_copy::_h2d_copy.out", "et_copy::_d2h_copy.out")


class Dynamism(IntEnum):
    """``TensorShapeDynamism`` of program.fbs: whether sizes are exact, upper bounds, or unknown."""

    STATIC = 0
    BOUND = 1
    UNBOUND = 2


@dataclass(frozen=True)
class TensorSpec:
    """The tensors that a value of a method may hold.

    Attributes:
        dtype: the dtype.
        sizes: exact sizes if ``dynamism`` is STATIC, upper bounds if it is BOUND; only their number counts otherwise.
        dim_order: the dimensions from the outermost in memory to the innermost.
        dynamism: the meaning of ``sizes``.
        stored: whether the file has the data, as a constant or as an initial state.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    dim_order: tuple[int, ...]
    dynamism: Dynamism
    stored: bool

    def mismatch(self, tensor: torch.Tensor) -> str | None:
        """The first property of ``tensor`` that this spec does not allow; None if all are allowed."""
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            return "is not a plain tensor with data"
        if tensor.dtype != self.dtype:
            return f"has dtype {tensor.dtype}"
        shape = tuple(tensor.shape)
        allowed = len(shape) == len(self.sizes)
        if self.dynamism == Dynamism.STATIC:
            allowed = shape == self.sizes
        elif allowed and self.dynamism == Dynamism.BOUND:
            allowed = all(size <= bound for size, bound in zip(shape, self.sizes, strict=True))
        return None if allowed else f"has shape {list(shape)}"

    def __str__(self) -> str:
        sizes = list(self.sizes)
        texts = {
            Dynamism.STATIC: f"{sizes}",
            Dynamism.BOUND: f"at most {sizes}",
            Dynamism.UNBOUND: f"{len(sizes)} dimensions",
        }
        return f"{self.dtype} {texts[self.dynamism]}"


@dataclass(frozen=True)
class Value:
    """A value of a method: a tensor, a constant (number, text or None), or a list, of which only the kind is read."""

    kind: str
    tensor: TensorSpec | None = None
    constant: int | float | bool | str | None = None

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return self.kind.startswith("list")

    def __str__(self) -> str:
        if self.tensor is not None:
            return str(self.tensor)
        return self.kind if self.is_list else repr(self.constant)


@dataclass(frozen=True)
class BackendDelegate:
    """A delegate: the name of its backend and its payload."""

    backend: str
    payload: bytes | Span


@dataclass(frozen=True)
class Call:
    """Run a delegate on values. ``args`` has the inputs first and then the outputs."""

    delegate: int
    args: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """Assign value ``source`` to value ``target``."""

    source: int
    target: int


@dataclass(frozen=True)
class Free:
    """Release a value."""

    value: int


@dataclass(frozen=True)
class OtherOp:
    """An operator outside every delegate, by name."""

    name: str


Step = Call | Move | Free | OtherOp


@dataclass(frozen=True)
class Plan:
    """One method. ``inputs``, ``outputs`` and the steps have indices into ``values``."""

    name: str
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    delegates: tuple[BackendDelegate, ...]
    steps: tuple[Step, ...]

    def check_runnable(self) -> None:
        """Check that the method consists of CUDA delegates and moves of values only.

        Raises:
            DelegateError: it does not; the message names the other operators or backends.
        """
        where = f"method {self.name!r}"
        other_ops = Counter(step.name for step in self.steps if isinstance(step, OtherOp))
        if other_ops:
            names = ", ".join(f"{name} ({count} x)" if count > 1 else name for name, count in other_ops.items())
            raise DelegateError(
                f"{where} runs operators outside the CUDA delegate: {names}. Lower the model so that the delegate "
                "contains all operators, or run the .pte with ExecuTorch's own runtime"
            )
        calls = [step for step in self.steps if isinstance(step, Call)]
        backends = {self.delegates[call.delegate].backend for call in calls} - {BACKEND}
        if backends:
            raise DelegateError(
                f"{where} runs delegates of {', '.join(sorted(backends))}, but only delegates of {BACKEND} can run "
                "here. Run the .pte with ExecuTorch's own runtime"
            )
        for call in calls:
            for index in call.args:
                tensor = self.values[index].tensor
                value = f"value {index}, which is passed to delegate {call.delegate}, is"
                if tensor is None:
                    raise DelegateError(f"{where}: {value} {self.values[index]} and not a tensor")
                if tensor.stored:
                    raise DelegateError(
                        f"{where}: {value} a constant or a state outside the delegate, which cannot be read here. Run "
                        "the .pte with ExecuTorch's own runtime"
                    )


def read_plans(file: ProgramFile) -> dict[str, Plan]:
    """The methods of a .pte by name.

    Raises:
        DelegateError: a method is not valid, or two have the same name.
    """
    plans: dict[str, Plan] = {}
    for table in file.plans:
        plan = _read_plan(table, file)
        if plan.name in plans:
            table.fail(f"a second method has the name {plan.name!r}")
        plans[plan.name] = plan
    return plans


def _read_plan(table: Table, file: ProgramFile) -> Plan:
    values = tuple(_read_value(entry) for entry in table.tables(2, "values"))
    operators = [
        ".".join(filter(None, (entry.text(0, "name"), entry.text(1, "overload"))))
        for entry in table.tables(6, "operators")
    ]
    delegates = []
    for entry in table.tables(7, "delegates"):
        reference = entry.table(1, "processed")
        if reference is None:
            entry.fail("it has no payload")
        delegates.append(BackendDelegate(entry.text(0, "id"), file.payload(reference)))
    steps = [
        _read_step(entry, len(values), operators, len(delegates))
        for chain in table.tables(5, "chains")
        for entry in chain.tables(2, "instructions")
    ]
    inputs = _read_indices(table, 3, "inputs", len(values))
    outputs = _read_indices(table, 4, "outputs", len(values))
    return Plan(table.text(0, "name"), values, inputs, outputs, tuple(delegates), tuple(steps))


def _read_indices(table: Table, field: int, name: str, count: int) -> tuple[int, ...]:
    return tuple(_check_index(table, index, name, count) for index in table.integers(field, "i", name))


def _read_index(table: Table, field: int, name: str, count: int) -> int:
    return _check_index(table, table.integer(field, "i", name), name, count)


def _check_index(table: Table, index: int, name: str, count: int) -> int:
    if not 0 <= index < count:
        table.fail(f"index {index} is out of range for {count} entries", name)
    return index


def _read_step(entry: Table, values: int, operators: list[str], delegates: int) -> Step:
    """An instruction of a method that has ``values`` values, ``operators`` and ``delegates`` delegates."""
    kind, call = entry.union(0, "instr_args")
    if call is None or not 1 <= kind <= 5:
        entry.fail(f"instruction type {kind} does not exist")
    if kind == 5:
        return Free(_read_index(call, 0, "value_index", values))
    if kind == 4:
        return OtherOp("a conditional jump")
    if kind == 3:
        return Move(_read_index(call, 0, "move_from", values), _read_index(call, 1, "move_to", values))
    args = _read_indices(call, 1, "args", values)
    if kind == 2:
        return Call(_read_index(call, 0, "delegate_index", delegates), args)
    name = operators[_read_index(call, 0, "op_index", len(operators))]
    if name not in _COPIES:
        return OtherOp(name)
    if len(args) != 3 or args[1] != args[2]:
        call.fail(f"{name} has the arguments source, target and target again, but this has values {list(args)}", "args")
    return Move(args[0], args[1])


def _read_value(entry: Table) -> Value:
    number, table = entry.union(0, "val")
    if not 0 < number < len(_KINDS):
        entry.fail(f"value type {number} does not exist")
    kind = _KINDS[number]
    if table is None or kind == "None" or kind.startswith("list"):
        return Value(kind)
    if kind == "tensor":
        return Value(kind, _read_tensor(table))
    if kind == "int":
        return Value(kind, constant=table.integer(0, "q", "int_val"))
    if kind == "bool":
        return Value(kind, constant=bool(table.integer(0, "b", "bool_val")))
    if kind == "float":
        return Value(kind, constant=table.real(0, "double_val"))
    return Value(kind, constant=table.text(0, "string_val"))


def _read_tensor(table: Table) -> TensorSpec:
    code = table.integer(0, "b", "scalar_type")
    if code not in DTYPES:
        table.fail(f"dtype {code} does not exist", "scalar_type")
    sizes = table.integers(2, "i", "sizes")
    if any(size < 0 for size in sizes):
        table.fail(f"{list(sizes)} has a negative size", "sizes")
    order = table.integers(3, "B", "dim_order") or tuple(range(len(sizes)))
    if sorted(order) != list(range(len(sizes))):
        table.fail(f"{list(order)} is not an order of {len(sizes)} dimensions", "dim_order")
    dynamism = table.integer(8, "b", "shape_dynamism")
    if dynamism not in list(Dynamism):
        table.fail(f"dynamism {dynamism} does not exist", "shape_dynamism")
    if offset := table.integer(1, "i", "storage_offset"):
        table.fail(f"{offset} is not 0, the only supported offset", "storage_offset")
    extra = table.table(9, "extra_tensor_info")
    external = extra is not None and extra.integer(2, "b", "location") == 1
    stored = table.integer(5, "I", "data_buffer_idx") > 0 or external
    return TensorSpec(DTYPES[code], sizes, order, Dynamism(dynamism), stored)
