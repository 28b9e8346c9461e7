"""Constants that several methods share: packed once per source and layout, and named after their weight."""

import itertools
import keyword
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node


class Decoded(ABC):
    """Values that are decoded from constants, such as a quantized weight."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Node, ...]:
        """The nodes of the constants."""

    @property
    @abstractmethod
    def values_key(self) -> Hashable:
        """Everything beside :attr:`sources` that determines the values; a part of the key of a packed constant."""


class ConstantCache:
    """Packed constants by source and layout. The methods of one model share it, and so pack a weight once.

    The cache keeps the sources alive, because the address of a freed tensor could become that of another tensor. A
    source that was mutated between two rewrites is packed again.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[str, torch.Tensor, tuple[torch.Tensor, ...], list[int]]] = {}
        self._names: set[str] = set()

    def get(
        self, fqn: str, sources: tuple[torch.Tensor | None, ...], layout: Hashable, make: Callable[[], torch.Tensor]
    ) -> tuple[str, torch.Tensor]:
        """The FQN and tensor of ``sources`` in ``layout``. The first call computes the tensor and names it ``fqn``.

        A second constant with the same FQN (one tensor of integers read with two scales) is ``<fqn>_2``, and so on.

        Raises:
            TypeError: ``sources`` is empty or contains None, for a node that is not a constant of the program; or
                ``make`` does not return a tensor.
        """
        held = tuple(source for source in sources if source is not None)
        if not held or len(held) < len(sources):
            raise TypeError(
                f"{fqn} needs sources, and each must be a constant of the program, to distinguish it from other "
                "constants; for a quantized weight pass weight_of(m)"
            )
        key = (tuple(map(tensor_identity, held)), layout)
        if key not in self._entries or _versions(self._entries[key][2]) != self._entries[key][3]:
            names = (fqn if number == 1 else f"{fqn}_{number}" for number in itertools.count(1))
            name = next(name for name in names if name not in self._names)
            created: object = make()
            if not isinstance(created, torch.Tensor):
                raise TypeError(f"the function that makes {fqn} returned {created!r}; it must return a tensor")
            self._names.add(name)
            self._entries[key] = (name, created, held, _versions(held))
        name, tensor, *_ = self._entries[key]
        return name, tensor


_MODULE_ATTRIBUTES = frozenset(dir(torch.nn.Module()))
_ROOT_ATTRIBUTES = _MODULE_ATTRIBUTES | frozenset(dir(GraphModule)) | {"meta"}


def check_name(name: str, modules: Collection[str], added: Collection[str]) -> None:
    """Check that a module can hold a new constant ``name`` beside the constants of the program.

    Args:
        name: the FQN of the new constant.
        modules: the FQNs of the modules of the program; their names, which the user chose, are not checked.
        added: the FQNs of the new constants that the program has already.

    Raises:
        ValueError: ``name`` is not a dotted identifier, a part of it is a keyword or an attribute of every module, or a
            part of the name is the FQN of another constant.
    """
    example = "; write the FQN of the weight and a suffix, such as 'layers.0.weight.packed'"
    if not isinstance(name, str):
        raise TypeError(f"the name of a constant must be text, not {name!r}{example}")
    if name in modules:
        raise ValueError(f"the name {name!r} is that of a module with constants of its own{example}")
    parts = name.split(".")
    paths = [".".join(parts[: index + 1]) for index in range(len(parts))]
    for index, (path, part) in enumerate(zip(paths, parts, strict=True)):
        if path in modules:
            continue
        if path != name and path in added:
            raise ValueError(f"the name {name!r} extends that of the new constant {path!r}; rename one of them")
        wrong = ""
        if not part:
            wrong = "has an empty part"
        elif not part.isidentifier() and not (part.isascii() and part.isdecimal()):
            wrong = f"has the part {part!r}, which is not an identifier"
        elif keyword.iskeyword(part):
            wrong = f"has the part {part!r}, which is a keyword of Python"
        elif part in (_MODULE_ATTRIBUTES if index else _ROOT_ATTRIBUTES):
            wrong = f"has the part {part!r}, which is an attribute of every torch.nn.Module"
        if wrong:
            raise ValueError(f"the name {name!r} of a constant {wrong}{example}")


def module_names(names: Iterable[str]) -> set[str]:
    """The FQNs of the modules that hold constants with these FQNs: ``a`` and ``a.b`` for ``a.b.weight``."""
    found: set[str] = set()
    for name in names:
        path = name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """How often each tensor was mutated; torch does not count this for inference tensors."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def tensor_identity(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors with the same memory, dtype, shape and strides; for subclasses, for the same object."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())


def strip_parametrization(target: str) -> str:
    """``l.weight`` for ``l.parametrizations.weight.original0``; any other name unchanged."""
    parts = target.split(".")
    if len(parts) >= 3 and parts[-3] == "parametrizations" and parts[-1].startswith("original"):
        return ".".join((*parts[:-3], parts[-2]))
    return target


def constant_bytes(exported: ExportedProgram) -> int:
    """The bytes of all constants of a program: each tensor counts once, a subclass by its inner tensors."""
    return tensor_bytes((*exported.state_dict.values(), *exported.constants.values()))


def tensor_bytes(tensors: Iterable[object]) -> int:
    """The bytes of ``tensors``: each counts once, a subclass by its inner tensors."""
    seen: dict[int, int] = {}

    def add(tensor: object) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            for attribute in flatten()[0]:
                add(getattr(tensor, attribute))
        else:
            seen[id(tensor)] = tensor.numel() * tensor.element_size()

    for tensor in tensors:
        add(tensor)
    return sum(seen.values())
