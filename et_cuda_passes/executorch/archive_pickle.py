"""Checks pickles in a .pt2 without a call of any function that they name.

``torch.load`` may call the functions that a pickle names. Here Python's unpickler first runs over the same bytes, with
a stand-in for each name that the pickle looks up. A stand-in checks its arguments and returns a value without
behaviour. A name without a stand-in is rejected. Tensor data are not read.
"""

import io
import pickle
import pickletools
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchao.quantization  # noqa: F401 - registers its tensors as safe to unpickle
from torch.utils import _pytree

from et_cuda_passes.executorch.archive_standins import (
    FunctionStandIn,
    InstanceStandIn,
    NoAttributes,
    StorageStandIn,
    TensorStandIn,
    functions,
)
from et_cuda_passes.executorch.archive_zip import Refused

# Every operation of the protocols that torch.save writes, except those that look up a name in another way.
_OPCODES = {opcode.name for opcode in pickletools.opcodes} - {
    *("EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"),
}
_MOST_VALUES = 1_000_000
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_PLACE = re.compile(r"(cpu|cuda|mps|xpu|hpu|meta)(:\d+)?")


def check_pickle(
    data: bytes, records: Mapping[str, int], check_tensor_meta: Callable[[object], None], *, tensor: bool
) -> None:
    """Reject ``data`` unless it unpickles to tensors, containers, numbers and inputs that pytree knows.

    Args:
        data: the pickle.
        records: sizes of the storages in bytes, by their keys in the pickle.
        check_tensor_meta: raises for a JSON description of a fake tensor that torch must not read.
        tensor: whether the pickle must contain one tensor; else a tuple or dict of values.

    Raises:
        Refused: it unpickles to something else; the message names the function or value.
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
    is_tensor = isinstance(found, TensorStandIn) or (isinstance(found, InstanceStandIn) and found.is_tensor)
    if tensor and not is_tensor:
        raise Refused("it holds no tensor")
    if not tensor and not isinstance(found, (tuple, dict)):
        raise Refused("it holds neither a tuple nor a dict")
    try:
        _walk(found, _MOST_VALUES)
    except RecursionError:
        raise Refused("its values are nested too deeply") from None


def _check_operations(data: bytes) -> None:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        if opcode.name not in _OPCODES:
            raise Refused(f"it uses the pickle operation {opcode.name}")
        # The memory of the unpickler grows with the largest index.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise Refused("it numbers its values with gaps")


def _walk(value: object, budget: int) -> int:
    """Reject everything but values. Each path to a value counts, because the readers of inputs follow every path."""
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
    if isinstance(value, (TensorStandIn, InstanceStandIn)):
        return _walk(value.state, budget)
    if isinstance(value, type) and issubclass(value, InstanceStandIn):
        return budget
    raise Refused(f"it holds {getattr(value, 'name', type(value).__name__)}, which is no input")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, records: Mapping[str, int], check_tensor_meta: Callable[[object], None]) -> None:
        # torch.load uses the same encoding.
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._records = records
        self._classes: dict[str, NoAttributes] = {}
        self._functions = functions(check_tensor_meta)

    def persistent_load(self, saved: Any) -> StorageStandIn:
        if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
            raise Refused("it refers to an object that is no storage")
        _, storage, key, place, numel = saved
        if not isinstance(storage, StorageStandIn) or storage.numel != -1 or type(numel) is not int or numel < 0:
            raise Refused("it describes a storage in a way that torch.save does not")
        if not isinstance(place, str) or not _PLACE.fullmatch(place):
            raise Refused(f"it asks for a storage on {place!r}")
        if not isinstance(key, str) or key not in self._records:
            raise Refused(f"it refers to storage {key!r}, which the archive does not hold")
        if numel * storage.itemsize != self._records[key]:
            raise Refused(
                f"storage {key} has {self._records[key]:,} bytes, not {numel:,} elements of {storage.itemsize}"
            )
        return StorageStandIn(storage.itemsize, numel)

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return StorageStandIn(_STORAGES[name])
        if path in self._functions:
            return FunctionStandIn(path, self._functions[path])
        if module == "torch" and isinstance(value := getattr(torch, name, None), (torch.dtype, torch.memory_format)):
            return value
        if path not in self._classes:
            allowed = _allowed_class(module, name)
            if allowed is None:
                raise Refused(f"it looks up {path}")
            standin = NoAttributes(
                name, (InstanceStandIn,), {"__slots__": (), "is_tensor": issubclass(allowed, torch.Tensor)}
            )
            self._classes[path] = standin
        return self._classes[path]


# Bytes of an element, by the class of a storage. Other dtypes are in an UntypedStorage.
_STORAGES = {
    **dict.fromkeys(
        ("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage", "QUInt8Storage", "QInt8Storage"), 1
    ),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def _allowed_class(module: str, name: str) -> type | None:
    """A class of inputs or weights that is registered in this process; found without an import."""
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
    # An export registers a cache with pytree. The layers of the cache are a part of it.
    if module == "transformers.cache_utils" and re.fullmatch(r"\w+(Cache|Layer)", name):
        found = getattr(sys.modules.get(module), name, None)
        return found if isinstance(found, type) and found.__module__ == module else None
    return None


def _is_users(cls: type) -> bool:
    """Whether a user's package registered ``cls`` with pytree, rather than Python or torch."""
    root = cls.__module__.partition(".")[0]
    return (root != "torch" and root not in sys.stdlib_module_names) or root == "__main__"
