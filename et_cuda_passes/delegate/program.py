"""A .pte with its .ptd: reads both, and loads libraries and weights when a method needs them."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from et_cuda_passes.delegate.files import DTYPES, DelegateError, Span, read_ptd, read_pte
from et_cuda_passes.delegate.graphs import GraphMethod, capture_problem
from et_cuda_passes.delegate.library import Library
from et_cuda_passes.delegate.method import Method
from et_cuda_passes.delegate.operators import OPERATORS, bind
from et_cuda_passes.delegate.payload import MAX_BYTES, MAX_WEIGHTS, Payload, Weight, read_payload
from et_cuda_passes.delegate.plan import BACKEND, Call, Kernel, Plan, TensorSpec, read_plans
from et_cuda_passes.unfinished import TemporaryFolder

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Storages have a multiple of this many bytes, so that every dtype can view them.
_STORAGE_MULTIPLE = 64


def load(
    pte_path: str | Path,
    data_path: str | Path | None = None,
    method: str = "forward",
    device: str = "cuda",
    *,
    cuda_graph: bool = False,
) -> Method:
    """Load one method of a program. To load several that share their weights, use :class:`Program`.

    THIS EXECUTES CODE FROM THE FILE: the delegate is a shared library. Load only files that you trust.

    Args:
        pte_path: a .pte lowered with :class:`~et_cuda_passes.CudaPartitioner` or the stock one of executorch 1.5.
        data_path: its .ptd. None means ``<stem>.ptd`` in the same folder, or else the only .ptd there.
        method: the name of the method.
        device: "cuda", "cuda:1", ...; or "cpu" for a library that AOTInductor compiled for the CPU.
        cuda_graph: capture the kernels of a call in a CUDA graph, and replay it, for a method without dynamic sizes:
            see :class:`~et_cuda_passes.delegate.graphs.GraphMethod`.

    Returns:
        The method. Call it with its inputs as tensors; it returns its outputs as a list.

    Raises:
        DelegateError: the files are damaged or do not belong together, the method runs an operator or a backend that
            is not available here, the library does not load, or a graph cannot capture the method. The files are
            checked before any code in them runs.
    """
    return Program(pte_path, data_path, device).method(method, cuda_graph=cuda_graph)


class Program:
    """A .pte and its .ptd, read and checked. A library and its weights are loaded with the first method that uses them.

    The methods of one object share their weights, which are on the device once. They also share buffers that they
    write to, such as a KV cache: each call reads what the last call of any method wrote.

    Args:
        pte_path, data_path, device: see :func:`load`.

    Raises:
        DelegateError: see :func:`load`.
    """

    def __init__(
        self, pte_path: str | Path, data_path: str | Path | None = None, device: str | torch.device = "cuda"
    ) -> None:
        self.path = Path(pte_path)
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise DelegateError(
                f"a delegate runs on cuda, or on cpu if its library was compiled for it, but not on {device}"
            )
        file = read_pte(self.path)
        named_data = dict(file.named_data)
        self.data_path = Path(data_path) if data_path is not None else _find_data(self.path)
        if self.data_path is not None:
            data = read_ptd(self.data_path)
            if common := sorted(named_data.keys() & data.keys()):
                raise DelegateError(f"{self.path} and {self.data_path} both have data {common[0]!r}")
            named_data |= data
        self._named_data = named_data
        self._plans = read_plans(file)
        self._payloads = self._read_payloads()
        self._storages: dict[tuple[str, str], Tensor] = {}
        self._constants: dict[tuple[Path, int, int], Tensor] = {}
        self._libraries: dict[tuple[Payload, bool], Library] = {}
        self._methods: dict[tuple[str, bool], Method] = {}

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods."""
        return tuple(self._plans)

    def plan(self, name: str) -> Plan:
        """A method as data, checked to consist of CUDA delegates and operators that torch has. No code is executed.

        Raises:
            DelegateError: the method does not exist, it runs something else, or data that it needs does not exist.
        """
        if name not in self._plans:
            raise DelegateError(f"{self.path} has no method {name!r}; it has {', '.join(self._plans) or 'none'}")
        plan = self._plans[name]
        try:
            plan.check_runnable(OPERATORS)
            for step in plan.steps:
                if isinstance(step, Kernel):
                    bind(step, plan.values)
        except DelegateError as error:
            raise DelegateError(f"{self.path}: {error}") from None
        for value in plan.values:
            if value.tensor is not None and value.tensor.stored:
                self._span(value.tensor)
        return plan

    def method(self, name: str = "forward", *, cuda_graph: bool = False) -> Method:
        """Load a method. THIS EXECUTES CODE FROM THE FILE; see :func:`load`.

        Raises:
            DelegateError: see :func:`load`.
        """
        if (name, cuda_graph) in self._methods:
            return self._methods[name, cuda_graph]
        plan = self.plan(name)
        if cuda_graph and (problem := capture_problem(plan, self.device)):
            raise DelegateError(f"{self.path}: method {name!r} cannot be captured in a CUDA graph: {problem}")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DelegateError(
                f"{self.path} needs a CUDA device, and torch finds no such device (torch.cuda.is_available() is False)"
            )
        used = sorted({step.delegate for step in plan.steps if isinstance(step, Call)})
        payloads = {index: self._payloads[name][index] for index in used}
        libraries = {index: self._library(payload, cuda_graph) for index, payload in payloads.items()}
        weights = {weight.fqn: self._view(weight) for payload in payloads.values() for weight in payload.weights}
        stored = {
            index: self._tensor(value.tensor)
            for index, value in enumerate(plan.values)
            if value.tensor is not None and value.tensor.stored
        }
        where = f"{self.path}: method {name!r}"
        kind = GraphMethod if cuda_graph else Method
        self._methods[name, cuda_graph] = kind(plan, libraries, weights, stored, self.device, where)
        return self._methods[name, cuda_graph]

    def _span(self, spec: TensorSpec) -> Span:
        """The place of the data of a constant or of an initial state."""
        if spec.key is None:
            assert spec.data is not None
            return spec.data
        if spec.key not in self._named_data:
            raise DelegateError(f"{self.path}: the files have no data {spec.key!r}: is this the .ptd of this .pte?")
        span = self._named_data[spec.key]
        if span.size != spec.nbytes:
            raise DelegateError(f"{self.path}: {spec.nbytes} bytes of data {spec.key!r} are needed, not {span.size}")
        return span

    def _tensor(self, spec: TensorSpec) -> Tensor:
        """A constant or an initial state on the device. Those with the same data share it."""
        span = self._span(spec)
        key = (span.file.path, span.offset, spec.nbytes)
        if key not in self._constants:
            # The constants of a valid file do not overlap.
            size = sum(nbytes for _, _, nbytes in self._constants) + spec.nbytes
            limit = sum(file.size for file in {span.file for span in (*self._named_data.values(), span)})
            if size > limit:
                raise DelegateError(f"{self.path}: its constants have more bytes than its files, {limit}: they overlap")
            self._constants[key] = _read_storage(replace(span, size=spec.nbytes), 0, self.device)
        memory = self._constants[key][: spec.nbytes].view(spec.dtype)
        inverse = sorted(range(len(spec.sizes)), key=spec.dim_order.__getitem__)
        return memory.view([spec.sizes[dimension] for dimension in spec.dim_order]).permute(inverse)

    def _read_payloads(self) -> dict[str, dict[int, Payload]]:
        """The payload of each CUDA delegate by method and index."""
        delegates = [
            (plan.name, index, delegate.payload)
            for plan in self._plans.values()
            for index, delegate in enumerate(plan.delegates)
            if delegate.backend == BACKEND
        ]
        # Segments may overlap, so the sum of their sizes can exceed the size of the file.
        size = sum(payload.size if isinstance(payload, Span) else len(payload) for _, _, payload in delegates)
        if size > MAX_BYTES:
            raise DelegateError(f"{self.path}: the payloads of all delegates have {size} bytes, more than {MAX_BYTES}")
        payloads: dict[str, dict[int, Payload]] = {name: {} for name in self._plans}
        max_weights = MAX_WEIGHTS
        for name, index, payload in delegates:
            where = f"{self.path}: method {name!r}: delegate {index}"
            payloads[name][index] = read_payload(payload, where, self._named_data, max_weights)
            max_weights -= len(payloads[name][index].weights)
        return payloads

    def _library(self, payload: Payload, capturable: bool) -> Library:
        if (payload, capturable) not in self._libraries:
            where = f"{self.path}: library {payload.library!r}"
            weights = {
                weight.fqn: (self._view(weight), _CODES[weight.dtype], weight.nbytes) for weight in payload.weights
            }
            # A loaded library stays in memory without its file.
            with TemporaryFolder() as folder:
                path = folder / "delegate.so"
                _write_library(self._named_data[payload.library], payload.library, path)
                self._libraries[payload, capturable] = Library(path, self.device, weights, where, capturable)
        return self._libraries[payload, capturable]

    def _view(self, weight: Weight) -> Tensor:
        if weight.device == "cuda" and self.device.type != "cuda":
            raise DelegateError(f"{self.path}: weight {weight.fqn!r} must be on a CUDA device, not on {self.device}")
        device = torch.device("cpu") if weight.device == "cpu" else self.device
        key = (weight.key, device.type)
        if key not in self._storages:
            self._storages[key] = _read_storage(self._named_data[weight.key], self._paddings.get(weight.key, 0), device)
        return self._storages[key].view(weight.dtype).as_strided(weight.sizes, weight.strides, weight.offset)

    @cached_property
    def _paddings(self) -> Mapping[str, int]:
        """For each storage, the largest offset of a view into it, in bytes.

        A library reads from the start of a view, with sizes of its own. If a damaged file makes a view start too late,
        the library reads as many bytes past the end of the storage. They are allocated as padding.
        """
        paddings: dict[str, int] = {}
        for payloads in self._payloads.values():
            for payload in payloads.values():
                for weight in payload.weights:
                    start = weight.offset * weight.dtype.itemsize
                    paddings[weight.key] = max(paddings.get(weight.key, 0), start)
        return paddings


def _read_storage(span: Span, padding: int, device: torch.device) -> Tensor:
    """The bytes of ``span`` on ``device``, followed by at least ``padding`` zeros."""
    size = -(-(span.size + padding) // _STORAGE_MULTIPLE) * _STORAGE_MULTIPLE
    storage = torch.zeros(size, dtype=torch.uint8, device=device)
    at = 0
    for chunk in span.chunks():
        storage[at : at + len(chunk)].copy_(torch.frombuffer(bytearray(chunk), dtype=torch.uint8))
        at += len(chunk)
    return storage


def _write_library(span: Span, key: str, path: Path) -> None:
    """Write a library to ``path``, and check it against its key, which has its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in span.chunks():
            digest.update(chunk)
            file.write(chunk)
    if key != f"{digest.hexdigest()}_so_blob":
        raise DelegateError(
            f"{span.file.path}: the library at byte {span.offset} was changed after it was compiled: its SHA-256 is "
            f"{digest.hexdigest()}, its key {key!r}"
        )


def _find_data(pte: Path) -> Path | None:
    """The .ptd of a .pte in the same folder, if there is one."""
    own = pte.with_suffix(".ptd")
    if own.exists():
        return own
    found = sorted(pte.parent.glob("*.ptd"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DelegateError(f"several .ptd files are in the folder of {pte} ({names}): name the one that belongs to it")
    return found[0] if found else None
