"""Pickles in a .pt2, checked without a single call of what they name.

``torch.load`` may call whatever a pickle names. Python's own unpickler runs here first over the same bytes, and each name
that the pickle looks up gives a stand-in: it checks what it is called with and returns a value without behaviour. A
name without a stand-in is refused. Tensor data are not read.
"""

import io
import json
import pickle
import pickletools
import re
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree

from et_cuda_passes.executorch.archive_zip import Refused

# Every operation of the protocols that torch.save writes, but for those that look up a name in a way of their own.
_OPCODES = {opcode.name for opcode in pickletools.opcodes} - {
    *("EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"),
}
_MOST_VALUES = 1_000_000
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
_PLACE = re.compile(r"(cpu|cuda|mps|xpu|hpu|meta)(:\d+)?")


class _Storage:
    """The class of a storage, or a storage with as many elements as its record has."""

    __slots__ = ("itemsize", "numel")

    def __init__(self, itemsize: int, numel: int = -1) -> None:
        self.itemsize, self.numel = itemsize, numel

    def __setstate__(self, state: object) -> None:
        raise Refused("a storage is given a state")


class _Tensor:
    """A tensor, without its data; ``state`` holds what the pickle attaches to it."""

    __slots__ = ("state",)

    def __init__(self, state: object = None) -> None:
        self.state = state

    def __setstate__(self, state: object) -> None:
        self.state = (self.state, _checked_state(state))


class _Call:
    """A function that a pickle may call."""

    __slots__ = ("check", "name")

    def __init__(self, name: str, check: Callable[..., Any]) -> None:
        self.name, self.check = name, check

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.check(*arguments)
        except TypeError as error:
            raise Refused(f"{self.name} is called with other arguments than torch gives it ({error})") from None

    def __setstate__(self, state: object) -> None:
        raise Refused(f"{self.name} is given a state")


class _NoAttributes(type):
    """A class whose attributes a pickle does not set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise Refused(f"the attribute {name} of a class is set")


class _Instance(metaclass=_NoAttributes):
    """An object of an allowed class; ``state`` holds what it is made from."""

    __slots__ = ("state",)
    is_tensor = False

    def __new__(cls, *arguments: Any) -> "_Instance":
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


def check_pickle(
    data: bytes, records: Mapping[str, int], check_tensor_meta: Callable[[object], None], *, tensor: bool
) -> None:
    """Refuse ``data`` unless unpickling it makes nothing but tensors, containers, numbers and inputs that pytree knows.

    Args:
        records: sizes in bytes of the storages, by the key under which the pickle refers to them.
        check_tensor_meta: raises for a description of a fake tensor, as JSON, that torch must not read.
        tensor: whether it must hold one tensor; else a tuple or dict of values.

    Raises:
        Refused: it does not; the message names what it looks up or calls.
    """
    try:
        _check_operations(data)
        found = _Unpickler(data, records, check_tensor_meta).load()
    except Refused:
        raise
    except RecursionError:
        raise Refused("its values are nested too deeply") from None
    except Exception as error:  # a damaged pickle raises anything
        raise Refused(f"it is no pickle that torch.save writes ({type(error).__name__}: {error})") from None
    is_tensor = isinstance(found, _Tensor) or (isinstance(found, _Instance) and found.is_tensor)
    if tensor and not is_tensor:
        raise Refused("it holds no tensor")
    if not tensor and not isinstance(found, (tuple, dict)):
        raise Refused("it holds neither a tuple nor a dict")
    try:
        _walk(found, _MOST_VALUES)
    except RecursionError:
        raise Refused("its values are nested too deeply") from None


def _check_operations(data: bytes) -> None:
    count = 0
    for opcode, argument, _ in pickletools.genops(data):
        count += 1
        if opcode.name not in _OPCODES:
            raise Refused(f"it uses the pickle operation {opcode.name}")
        # The unpickler's memory grows with the largest index.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument) > count:
            raise Refused("it numbers its values with gaps")


def _walk(value: object, budget: int) -> int:
    """Refuse what is not a value; every path counts, because what reads the inputs follows every path."""
    budget -= 1
    if budget < 0:
        raise Refused(f"it holds more than {_MOST_VALUES:,} values")
    if isinstance(value, _PLAIN):
        return budget
    if isinstance(value, dict):
        for key, held in value.items():
            budget = _walk(held, _walk(key, budget))
        return budget
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        for held in value:
            budget = _walk(held, budget)
        return budget
    if isinstance(value, slice):
        return _walk((value.start, value.stop, value.step), budget)
    if isinstance(value, (_Tensor, _Instance)):
        return _walk(value.state, budget)
    if isinstance(value, type) and issubclass(value, _Instance):
        return budget
    raise Refused(f"it holds {getattr(value, 'name', type(value).__name__)}, which is no input")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, records: Mapping[str, int], check_tensor_meta: Callable[[object], None]) -> None:
        # As torch.load calls it.
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._records = records
        self._classes: dict[str, type[_Instance]] = {}
        self._calls = _calls(check_tensor_meta)

    def persistent_load(self, saved: Any) -> _Storage:
        if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
            raise Refused("it refers to something else than a storage")
        _, storage, key, place, numel = saved
        if not isinstance(storage, _Storage) or storage.numel != -1 or type(numel) is not int or numel < 0:
            raise Refused("it describes a storage in a way that torch.save does not")
        if not isinstance(place, str) or not _PLACE.fullmatch(place):
            raise Refused(f"it asks for a storage on {place!r}")
        if not isinstance(key, str) or key not in self._records:
            raise Refused(f"it refers to storage {key!r}, which the archive does not hold")
        if numel * storage.itemsize != self._records[key]:
            raise Refused(f"storage {key} has {self._records[key]:,} bytes, not {numel:,} elements of {storage.itemsize}")
        return _Storage(storage.itemsize, numel)

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Storage(_STORAGES[name])
        if path in self._calls:
            return _Call(path, self._calls[path])
        if module == "torch" and isinstance(value := getattr(torch, name, None), (torch.dtype, torch.memory_format)):
            return value
        if path not in self._classes:
            allowed = _allowed_class(module, name)
            if allowed is None:
                raise Refused(f"it looks up {path}")
            made = _NoAttributes(name, (_Instance,), {"__slots__": (), "is_tensor": issubclass(allowed, torch.Tensor)})
            self._classes[path] = made
        return self._classes[path]


# Bytes of an element, by the class of a storage. Other dtypes are in an UntypedStorage.
_STORAGES = {
    **dict.fromkeys(("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage", "QUInt8Storage", "QInt8Storage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def _allowed_class(module: str, name: str) -> type | None:
    """A class of inputs or weights that was registered as such in this process, found without an import."""
    path = f"{module}.{name}"
    if path in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
        return torch.Tensor
    for entry in torch.serialization.get_safe_globals():
        cls, known = entry if isinstance(entry, tuple) else (entry, f"{entry.__module__}.{entry.__qualname__}")
        if known == path and isinstance(cls, type) and not cls.__module__.startswith("torch."):
            return cls
    for cls in _pytree.SUPPORTED_NODES:
        if f"{cls.__module__}.{cls.__qualname__}" == path and _is_users(cls):
            return cls
    # A cache is an input that pytree knows once an export registered it; its layers are a part of it.
    if module == "transformers.cache_utils" and re.fullmatch(r"\w+(Cache|Layer)", name):
        cls = getattr(sys.modules.get(module), name, None)
        return cls if isinstance(cls, type) and cls.__module__ == module else None
    return None


def _is_users(cls: type) -> bool:
    """Whether ``cls`` was registered with pytree by somebody, not by Python's or torch's own modules."""
    root = cls.__module__.partition(".")[0]
    return root != "torch" and root not in sys.stdlib_module_names or root == "__main__"


def _checked_state(state: object) -> object:
    """The attributes that an object is given, none of which may be one of Python's own."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for part in parts:
        for name in part if isinstance(part, dict) else ():
            if isinstance(name, str) and name.startswith("__"):
                raise Refused(f"it sets the attribute {name}")
    return state


def _calls(check_tensor_meta: Callable[[object], None]) -> dict[str, Callable[..., Any]]:
    """What a pickle may call, and what is checked of each call; the signatures are those of torch."""
    rebuild: dict[str, Callable[..., Any]] = {}

    def tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
        if not isinstance(storage, _Storage) or storage.numel < 0:
            raise Refused("a tensor without a storage")
        if not fits(size, stride, offset, storage.numel):
            raise Refused(f"a tensor of {size} with strides {stride} at {offset} exceeds its storage")
        return _Tensor()

    def tensor_v2(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> _Tensor:
        _no_hooks(hooks)
        if metadata is not None:
            raise Refused("a tensor with metadata of a backend")
        return tensor(storage, offset, size, stride)

    def tensor_v3(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> _Tensor:
        _no_hooks(hooks)
        if metadata is not None or not isinstance(dtype, torch.dtype) or not isinstance(storage, _Storage):
            raise Refused("a tensor with metadata of a backend")
        counted = _Storage(dtype.itemsize, storage.numel * storage.itemsize // dtype.itemsize)
        return tensor(counted, offset, size, stride)

    def parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> _Tensor:
        _no_hooks(hooks)
        return _Tensor(_tensor(data).state if state is None else (_tensor(data).state, _checked_state(state)))

    def wrapper_subclass(cls: Any, dtype: Any, size: Any, stride: Any, offset: Any, layout: Any, *rest: Any) -> _Tensor:
        _tensor_class(cls)
        return _Tensor((dtype, size, stride, offset, layout, rest))

    def from_type(function: Any, cls: Any, arguments: Any, state: Any) -> _Tensor:
        if not isinstance(function, _Call) or function.name not in rebuild:
            raise Refused("a tensor is made by another function than torch's")
        _tensor_class(cls)
        return _Tensor((_tensor(function(*arguments)).state, _checked_state(state)))

    def fake_tensor(meta: Any, is_parameter: Any) -> _Tensor:
        check_tensor_meta(json.loads(bytes(meta)))
        return _Tensor()

    rebuild |= {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor_v2,
        "torch._utils._rebuild_tensor_v3": tensor_v3,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: parameter(data, grad, hooks, state),
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
    if factory is not None and not isinstance(factory, _Call):
        raise Refused("a defaultdict makes its values in an unknown way")
    if isinstance(factory, _Call) and not re.fullmatch(r"(__builtin__|builtins)\.\w+", factory.name):
        raise Refused(f"a defaultdict makes its values with {factory.name}")
    return defaultdict(None)


def _layout(name: object) -> torch.layout:
    value = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(value, torch.layout):
        raise Refused(f"there is no layout {name!r}")
    return value


def _tensor(value: object) -> _Tensor:
    if not isinstance(value, _Tensor):
        raise Refused("a parameter without a tensor")
    return value


def _tensor_class(cls: object) -> None:
    if not (isinstance(cls, type) and issubclass(cls, _Instance) and cls.is_tensor):
        raise Refused("a tensor of a class that is none")


def _no_hooks(hooks: object) -> None:
    if hooks is not None and not (isinstance(hooks, OrderedDict) and not hooks):
        raise Refused("a tensor with hooks")


def fits(size: Any, stride: Any, offset: Any, numel: int) -> bool:
    """Whether a view of a storage with ``numel`` elements stays in it."""
    numbers = (*size, *stride, offset)
    if len(size) != len(stride) or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        return False
    if 0 in size:
        return bool(offset <= numel)
    return bool(offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) < numel)
