"""A method of a .pte as data: its values, its delegates, and the steps that run it."""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
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
# The lists, and the ``struct`` formats of their items.
_ITEM_FORMATS = {
    "list of int": "q",
    "list of float": "d",
    "list of bool": "?",
    "list of tensors": "i",
    "list of optional tensors": "i",
}
_MAX_RANK = 16
# ExecuTorch puts copies between host and device memory around a delegate.
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
        place: where the tensor is in the memory that ExecuTorch plans: the number of an arena, and an offset in it.
        data: the data if it is in the .pte: of a constant, or, if there is a ``place``, of an initial state.
        key: the key of the data if it is in the .ptd.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    dim_order: tuple[int, ...]
    dynamism: Dynamism
    place: tuple[int, int] | None = None
    data: Span | None = None
    key: str | None = None

    @property
    def stored(self) -> bool:
        """Whether the files have the data."""
        return self.data is not None or self.key is not None

    @property
    def numel(self) -> int:
        """The number of elements, or its upper bound."""
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        """The bytes of the elements, or their upper bound."""
        return self.numel * self.dtype.itemsize

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
    """A value of a method: a tensor, a constant (number, text or None), or a list.

    The items of a list of integers or tensors are indices of values. In a list of optional tensors, -1 is None.
    """

    kind: str
    tensor: TensorSpec | None = None
    constant: int | float | bool | str | None = None
    items: tuple[float, ...] = ()

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
class Kernel:
    """Run an operator outside the delegates. ``args`` has its arguments and then its result."""

    name: str
    args: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """Assign value ``source`` to value ``target``."""

    source: int
    target: int


@dataclass(frozen=True)
class Copy:
    """Copy value ``source`` to value ``target``, in ExecuTorch between the memories of host and device."""

    source: int
    target: int


@dataclass(frozen=True)
class Free:
    """Release a value."""

    value: int


@dataclass(frozen=True)
class Jump:
    """Continue at another step if a value is False."""


Step = Call | Kernel | Move | Copy | Free | Jump


@dataclass(frozen=True)
class Plan:
    """One method. ``inputs``, ``outputs`` and the steps have indices into ``values``."""

    name: str
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    delegates: tuple[BackendDelegate, ...]
    steps: tuple[Step, ...]

    def check_runnable(self, operators: Collection[str]) -> None:
        """Check that the method consists of CUDA delegates, moves of values, and operators from ``operators``.

        Raises:
            DelegateError: it does not; the message names the other operators or backends.
        """
        where = f"method {self.name!r}"
        others = Counter(step.name for step in self.steps if isinstance(step, Kernel) and step.name not in operators)
        if others:
            names = ", ".join(f"{name} ({count} x)" if count > 1 else name for name, count in others.items())
            raise DelegateError(
                f"{where} runs operators outside the CUDA delegate that are not available here: {names}. Lower the "
                "model so that the delegate contains them, or run the .pte with ExecuTorch's own runtime"
            )
        if any(isinstance(step, Jump) for step in self.steps):
            raise DelegateError(
                f"{where} has branches or loops outside the CUDA delegate. Lower the model so that the delegate "
                "contains them, or run the .pte with ExecuTorch's own runtime"
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
                if self.values[index].tensor is None:
                    raise DelegateError(
                        f"{where}: value {index}, which is passed to delegate {call.delegate}, is "
                        f"{self.values[index]} and not a tensor"
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
    entries = table.tables(2, "values")
    values = tuple(_read_value(entry, len(entries), file) for entry in entries)
    operators = [
        # Overload "default" is that without a name.
        f"{entry.text(0, 'name')}.{entry.text(1, 'overload')}".removesuffix(".default").removesuffix(".")
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
        return Jump()
    if kind == 3:
        return Move(_read_index(call, 0, "move_from", values), _read_index(call, 1, "move_to", values))
    args = _read_indices(call, 1, "args", values)
    if kind == 2:
        return Call(_read_index(call, 0, "delegate_index", delegates), args)
    name = operators[_read_index(call, 0, "op_index", len(operators))]
    if name not in _COPIES:
        return Kernel(name, args)
    if len(args) != 3 or args[1] != args[2]:
        call.fail(f"{name} has the arguments source, target and target again, but this has values {list(args)}", "args")
    return Copy(args[0], args[1])


def _read_value(entry: Table, count: int, file: ProgramFile) -> Value:
    """A value of a method that has ``count`` values."""
    number, table = entry.union(0, "val")
    if not 0 < number < len(_KINDS):
        entry.fail(f"value type {number} does not exist")
    kind = _KINDS[number]
    if table is None or kind == "None":
        return Value("None" if table is None else kind)
    if kind in _ITEM_FORMATS:
        items = table.integers(0, _ITEM_FORMATS[kind], "items")
        if kind in ("list of float", "list of bool"):
            return Value(kind, items=items)
        least = -1 if kind == "list of optional tensors" else 0
        return Value(
            kind, items=tuple(item if item == least else _check_index(table, item, "items", count) for item in items)
        )
    if kind == "tensor":
        return Value(kind, _read_tensor(table, file))
    if kind == "int":
        return Value(kind, constant=table.integer(0, "q", "int_val"))
    if kind == "bool":
        return Value(kind, constant=bool(table.integer(0, "b", "bool_val")))
    if kind == "float":
        return Value(kind, constant=table.real(0, "double_val"))
    return Value(kind, constant=table.text(0, "string_val"))


def _read_tensor(table: Table, file: ProgramFile) -> TensorSpec:
    code = table.integer(0, "b", "scalar_type")
    if code not in DTYPES:
        table.fail(f"dtype {code} does not exist", "scalar_type")
    sizes = table.integers(2, "i", "sizes")
    if len(sizes) > _MAX_RANK:
        table.fail(f"{len(sizes)} dimensions are more than the {_MAX_RANK} that ExecuTorch allows", "sizes")
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
    allocation, place = table.table(6, "allocation_info"), None
    if allocation is not None:
        low, high = (allocation.integer(field, "I", "memory_offset") for field in (1, 2))
        place = (allocation.integer(0, "I", "memory_id"), low | high << 32)
    spec = TensorSpec(DTYPES[code], sizes, order, Dynamism(dynamism), place)
    extra = table.table(9, "extra_tensor_info")
    if extra is not None and extra.integer(2, "b", "location") == 1:
        return replace(spec, key=extra.text(1, "fully_qualified_name"))
    index = table.integer(5, "I", "data_buffer_idx")
    if index == 0:
        return spec
    part = None if place is None else 0 if extra is None else extra.integer(0, "Q", "mutable_data_segments_idx")
    return replace(spec, data=file.stored(table, part, index, spec.nbytes))
