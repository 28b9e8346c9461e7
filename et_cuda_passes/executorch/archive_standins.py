"""Stand-ins for the names that a pickle looks up: they check their arguments and do nothing else."""

import json
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch

from et_cuda_passes.executorch.archive_zip import Refused


class StorageStandIn:
    """The class of a storage, or a storage with the number of elements of its record."""

    __slots__ = ("itemsize", "numel")

    def __init__(self, itemsize: int, numel: int = -1) -> None:
        self.itemsize, self.numel = itemsize, numel

    def __setstate__(self, state: object) -> None:
        raise Refused("a storage is given a state")


class TensorStandIn:
    """A tensor, without its data; ``state`` holds the attributes from the pickle."""

    __slots__ = ("state",)

    def __init__(self, state: object = None) -> None:
        self.state = state

    def __setstate__(self, state: object) -> None:
        self.state = (self.state, _checked_state(state))


class FunctionStandIn:
    """A function that a pickle may call."""

    __slots__ = ("check", "name")

    def __init__(self, name: str, check: Callable[..., Any]) -> None:
        self.name, self.check = name, check

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.check(*arguments)
        except TypeError as error:
            raise Refused(f"{self.name} is called with other arguments than torch passes ({error})") from None

    def __setstate__(self, state: object) -> None:
        raise Refused(f"{self.name} is given a state")


class NoAttributes(type):
    """A class whose attributes a pickle must not set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise Refused(f"the attribute {name} of a class is set")


class InstanceStandIn(metaclass=NoAttributes):
    """An object of an allowed class; ``state`` holds its arguments."""

    __slots__ = ("state",)
    state: list[object]
    is_tensor = False

    def __new__(cls, *arguments: Any) -> "InstanceStandIn":
        if cls.is_tensor:  # torch.Tensor(2**40) would allocate so many elements
            raise Refused("a tensor is built by another function than torch's")
        instance = super().__new__(cls)
        instance.state = list(arguments)
        return instance

    def __setstate__(self, state: object) -> None:
        self.state.append(_checked_state(state))

    def append(self, value: object) -> None:
        self.state.append(value)

    def extend(self, values: list[object]) -> None:
        self.state.extend(values)

    def __setitem__(self, key: object, value: object) -> None:
        self.state.append((key, value))


def _checked_state(state: object) -> object:
    """The attributes that a pickle sets; none may be one of Python's special names."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for part in parts:
        for name in part if isinstance(part, dict) else ():
            if isinstance(name, str) and name.startswith("__"):
                raise Refused(f"it sets the attribute {name}")
    return state


def functions(check_tensor_meta: Callable[[object], None]) -> dict[str, Callable[..., Any]]:
    """The functions that a pickle may call, with the check of each call. The signatures are those of torch."""
    rebuild: dict[str, Callable[..., Any]] = {}

    def tensor(storage: Any, offset: Any, size: Any, stride: Any) -> TensorStandIn:
        if not isinstance(storage, StorageStandIn) or storage.numel < 0:
            raise Refused("a tensor without a storage")
        if not fits(size, stride, offset, storage.numel):
            raise Refused(f"a tensor of {size} with strides {stride} at {offset} exceeds its storage")
        return TensorStandIn()

    def tensor_v2(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> TensorStandIn:
        _no_hooks(hooks)
        if metadata is not None:
            raise Refused("a tensor with metadata of a backend")
        return tensor(storage, offset, size, stride)

    def tensor_v3(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> TensorStandIn:
        _no_hooks(hooks)
        if metadata is not None or not isinstance(dtype, torch.dtype) or not isinstance(storage, StorageStandIn):
            raise Refused("a tensor with metadata of a backend")
        counted = StorageStandIn(dtype.itemsize, storage.numel * storage.itemsize // dtype.itemsize)
        return tensor(counted, offset, size, stride)

    def parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> TensorStandIn:
        _no_hooks(hooks)
        return TensorStandIn(_tensor(data).state if state is None else (_tensor(data).state, _checked_state(state)))

    def wrapper_subclass(
        cls: Any, dtype: Any, size: Any, stride: Any, offset: Any, layout: Any, *rest: Any
    ) -> TensorStandIn:
        _tensor_class(cls)
        return TensorStandIn((dtype, size, stride, offset, layout, rest))

    def from_type(function: Any, cls: Any, arguments: Any, state: Any) -> TensorStandIn:
        if not isinstance(function, FunctionStandIn) or function.name not in rebuild:
            raise Refused("a tensor is built by another function than torch's")
        _tensor_class(cls)
        return TensorStandIn((_tensor(function(*arguments)).state, _checked_state(state)))

    def fake_tensor(meta: Any, is_parameter: Any) -> TensorStandIn:
        check_tensor_meta(json.loads(bytes(meta)))
        return TensorStandIn()

    rebuild |= {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor_v2,
        "torch._utils._rebuild_tensor_v3": tensor_v3,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: parameter(
            data, grad, hooks, state
        ),
        "torch._utils._rebuild_wrapper_subclass": wrapper_subclass,
    }
    containers: dict[str, Callable[..., Any]] = {
        "set": lambda values=(): set(values),
        "frozenset": lambda values=(): frozenset(values),
        "complex": lambda real=0, imaginary=0: complex(real, imaginary),
        "slice": lambda start, stop, step: slice(start, stop, step),
    }
    factories = {name: lambda: None for name in ("list", "dict", "tuple", "int", "float", "bool", "str")}
    return {
        **rebuild,
        "torch._tensor._rebuild_from_type_v2": from_type,
        "torch._export.serde.serialize._reconstruct_fake_tensor": fake_tensor,
        "torch.serialization._get_layout": _layout,
        "torch.Size": lambda sizes: tuple(sizes),
        "torch.device": lambda place, index=None: torch.device(place),
        "collections.OrderedDict": lambda pairs=(): _Ordered(pairs),
        "collections.deque": lambda values=(), most=None: deque(values, most),
        "collections.defaultdict": lambda factory=None: _default_dict(factory),
        "_codecs.encode": lambda text, encoding: text.encode("latin1" if encoding == "latin1" else "ascii"),
        **{f"{module}.{name}": call for module in ("builtins", "__builtin__") for name, call in containers.items()},
        **{f"{module}.{name}": call for module in ("builtins", "__builtin__") for name, call in factories.items()},
    }


class _Ordered(OrderedDict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        raise Refused("an OrderedDict is given a state")


def _default_dict(factory: object) -> defaultdict[Any, Any]:
    if factory is not None and not isinstance(factory, FunctionStandIn):
        raise Refused("a defaultdict creates its values in an unknown way")
    if isinstance(factory, FunctionStandIn) and not re.fullmatch(r"(__builtin__|builtins)\.\w+", factory.name):
        raise Refused(f"a defaultdict creates its values with {factory.name}")
    return defaultdict(None)


def _layout(name: object) -> torch.layout:
    value = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(value, torch.layout):
        raise Refused(f"torch has no layout {name!r}")
    return value


def _tensor(value: object) -> TensorStandIn:
    if not isinstance(value, TensorStandIn):
        raise Refused("a parameter without a tensor")
    return value


def _tensor_class(cls: object) -> None:
    if not (isinstance(cls, type) and issubclass(cls, InstanceStandIn) and cls.is_tensor):
        raise Refused("the class of a tensor is no tensor class")


def _no_hooks(hooks: object) -> None:
    if hooks is not None and not (isinstance(hooks, OrderedDict) and not hooks):
        raise Refused("a tensor with hooks")


def fits(size: Any, stride: Any, offset: Any, numel: int) -> bool:
    """Whether a view stays inside a storage with ``numel`` elements."""
    numbers = (*size, *stride, offset)
    if len(size) != len(stride) or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        return False
    if 0 in size:
        return bool(offset <= numel)
    return bool(offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) < numel)
