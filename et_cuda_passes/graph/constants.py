"""Constants that several methods share: packed once per source and layout, and named after their weight."""

import itertools
import keyword
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from et_cuda_passes.mapped import MappedFiles, forget_pages, mapped_empty, trim_heap
from et_cuda_passes.threads import for_chunks


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


@dataclass(frozen=True, eq=False)
class Planned(ABC):
    """A constant that is computed when the rewrite ends, and only if the program still reads it then.

    Attributes:
        shape: of the constant, which is contiguous.
        dtype: of the constant.
        sources: the tensors that it is computed from; it is on their device.
        form: determines the values beside the bytes of ``sources``; a text that is the same in every process.
        pieces: parts that are computed independently of each other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[torch.Tensor, ...]
    form: str
    pieces: Sequence[Any]

    @property
    def device(self) -> torch.device:
        """The device of the constant."""
        return self.sources[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the constant."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def worker(self, buffers: dict[Hashable, Any]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """The function ``(piece, out)`` that writes a piece into the constant, and returns that part of it.

        It is called once in each thread. ``buffers`` are those of the thread, which several constants share.
        """


def compute(
    planned: Sequence[tuple[Planned, torch.Tensor]], written: Callable[[torch.Tensor], None] = lambda part: None
) -> None:
    """Write each constant into the tensor beside it, in several threads, and call ``written`` with each part."""

    def worker() -> Callable[[tuple[Planned, torch.Tensor, Any]], None]:
        buffers: dict[Hashable, Any] = {}
        current: list[Any] = [None, None]

        def work(piece: tuple[Planned, torch.Tensor, Any]) -> None:
            plan, out, part = piece
            if current[0] is not plan:
                current[:] = plan, plan.worker(buffers)
            written(current[1](part, out))

        return work

    pieces = [(plan, out, part) for plan, out in planned for part in plan.pieces]
    if pieces:
        for_chunks(pieces, worker, planned[0][0].device)


class Storage(Protocol):
    """Constants of other runs, by their content."""

    place: str
    damaged: int

    def load(self, plan: Planned, out: torch.Tensor) -> bool:
        """Read the constant of ``plan`` into ``out``, if it is there and undamaged."""

    def save(self, plan: Planned, tensor: torch.Tensor) -> None:
        """Write the constant of ``plan``."""


@dataclass(eq=False)
class _Entry:
    """A constant: its tensor, or its plan until it is computed; and the tensors that it was computed from."""

    name: str
    made: torch.Tensor | None
    plan: Planned | None
    sources: "_Sources"


class _Sources:
    """The tensors that a constant was computed from, by which it is found again.

    A tensor is known by its address. So it is kept alive, or where it should be freed, its end is noticed.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...], weak: bool) -> None:
        self._held = () if weak else tensors
        self._weak = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors] if weak else []
        self._versions = _versions(self._held)

    def are_as_before(self) -> bool:
        """Whether no tensor was freed or mutated since. A mutation of a tensor that is not kept is not noticed."""
        return _versions(self._held) == self._versions and not any(each.expired() for each in self._weak)


_BATCH_BYTES = 16 << 20
"""Constants are computed together until they have so many bytes: small ones then fill all threads."""
_MAPPED_BYTES = 1 << 16
"""Smaller constants stay in memory: a file has pages of 4 KB."""


class ConstantCache:
    """Packed constants by source and layout. The methods of one model share it, and so pack a weight once.

    The cache keeps the sources alive, because the address of a freed tensor could become that of another tensor. A
    source that was mutated between two rewrites is packed again.

    Args:
        stream: a folder for the constants. They lie in mapped files without names, which are gone when nothing uses
            them, and sources are freed as soon as nothing needs them.
        storage: constants of other runs.
        device: computes the packed integers of 4-bit weights; None for the device of the weights.

    Attributes:
        packed: number of constants that were computed.
        loaded: number of constants from ``storage``.
        files: with ``stream``, the files that the constants of the program may lie in.
    """

    def __init__(
        self, stream: Path | None = None, storage: Storage | None = None, device: torch.device | None = None
    ) -> None:
        self.stream, self.storage, self.device = stream, storage, device
        self.files: MappedFiles | None = None
        self.packed = self.loaded = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._by_name: dict[str, _Entry] = {}

    def get(
        self,
        fqn: str,
        sources: tuple[torch.Tensor | str | None, ...],
        layout: Hashable,
        make: Callable[[], torch.Tensor] | Planned,
    ) -> tuple[str, torch.Tensor | Planned]:
        """The FQN of ``sources`` in ``layout``, and its tensor or its plan. The first call names it ``fqn``.

        A second constant with the same FQN (one tensor of integers read with two scales) is ``<fqn>_2``, and so on.

        Args:
            fqn: the name, unless another constant has it.
            sources: tensors, and the FQNs of constants of this cache.
            layout: distinguishes constants with the same sources.
            make: computes the tensor, or is its plan.

        Raises:
            TypeError: ``sources`` is empty or contains None, for a node that is not a constant of the program; or
                ``make`` does not return a tensor.
        """
        if not sources or any(source is None for source in sources):
            raise TypeError(
                f"{fqn} needs sources, and each must be a constant of the program, to distinguish it from other "
                "constants; for a quantized weight pass weight_of(m)"
            )
        identities = (tensor_identity(each) if isinstance(each, torch.Tensor) else each for each in sources)
        key = (tuple(identities), layout)
        entry = self._entries.get(key)
        if entry is None or not entry.sources.are_as_before():
            names = (fqn if number == 1 else f"{fqn}_{number}" for number in itertools.count(1))
            name = next(name for name in names if name not in self._by_name)
            tensors = tuple(source for source in sources if isinstance(source, torch.Tensor))
            made = None if isinstance(make, Planned) else self._kept(_made(fqn, make))
            entry = _Entry(name, made, None, _Sources(tensors, weak=self.stream is not None))
            self._entries[key] = self._by_name[name] = entry
        if entry.made is None and isinstance(make, Planned):
            entry.plan = make
        made_or_plan = entry.plan if entry.made is None else entry.made
        assert made_or_plan is not None
        return entry.name, made_or_plan

    def plan(self, name: str) -> Planned | None:
        """The plan of a constant that has one, also if it is computed already."""
        return self._by_name[name].plan

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of constants; those that are only planned are computed, small ones together."""
        entries = [self._by_name[name] for name in names]
        batch: list[_Entry] = []
        size = 0
        for entry in entries:
            if entry.made is None and entry.plan is not None:
                batch.append(entry)
                size += entry.plan.nbytes
            if size >= _BATCH_BYTES:
                self._compute(batch)
                batch, size = [], 0
        self._compute(batch)
        return {entry.name: entry.made for entry in entries if entry.made is not None}

    def forget_plans(self, names: Collection[str]) -> None:
        """With ``stream``: free the sources of all plans but those of ``names``."""
        for name, entry in self._by_name.items():
            if self.stream is not None and name not in names:
                entry.plan = None

    def _compute(self, batch: Sequence[_Entry]) -> None:
        work = []
        for entry in batch:
            plan = entry.plan
            assert plan is not None
            entry.made = self._empty(plan)
            if self.storage is not None and self.storage.load(plan, entry.made):
                self.loaded += 1
            else:
                work.append((plan, entry.made))
        mapped = {entry.made.data_ptr() for entry in batch if entry.made is not None and self._is_mapped(entry.made)}

        def written(part: torch.Tensor) -> None:
            if part.untyped_storage().data_ptr() in mapped:
                forget_pages(part)

        compute(work, written)
        self.packed += len(work)
        if self.storage is not None:
            for plan, made in work:
                self.storage.save(plan, made)
        if self.stream is None:
            return
        for entry in batch:
            assert entry.plan is not None and entry.made is not None
            self.page_out(entry.plan.sources)
            if self._is_mapped(entry.made):
                forget_pages(entry.made)
            entry.plan = None
        work.clear()
        trim_heap()

    def page_out(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """With ``stream``: tensors in mapped files, which were read just now, need no memory for a while.

        The files are those that were mapped when the rewrite began.
        """
        for tensor in tensors if self.files is not None else ():
            if tensor is not None and self.files is not None:
                self.files.page_out(tensor)

    def _empty(self, plan: Planned) -> torch.Tensor:
        if self.stream is not None and self._is_mapped(plan):
            return mapped_empty(plan.shape, plan.dtype, self.stream)
        return torch.empty(plan.shape, dtype=plan.dtype, device=plan.device)

    def _is_mapped(self, constant: Planned | torch.Tensor) -> bool:
        """Whether a constant belongs into a mapped file."""
        return self.stream is not None and constant.device.type == "cpu" and constant.nbytes >= _MAPPED_BYTES

    def _kept(self, made: torch.Tensor) -> torch.Tensor:
        """A tensor that a rule computed, or with ``stream`` its copy in a mapped file."""
        if self.stream is None or not self._is_mapped(made) or not made.is_contiguous():
            return made
        copy = mapped_empty(tuple(made.shape), made.dtype, self.stream).copy_(made)
        forget_pages(copy)
        return copy


def _made(fqn: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    created: object = make()
    if not isinstance(created, torch.Tensor):
        raise TypeError(f"the function that makes {fqn} returned {created!r}; it must return a tensor")
    return created


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
