"""Runs programs lowered to CUDA delegates, from Python and without ExecuTorch's runtime.

    program = Program("model.pte")                 # reads and checks model.pte and the .ptd beside it
    prefill, decode = program.method("prefill"), program.method("decode")
    (logits,) = prefill(tokens)

The library in a .pte is code, made for this machine's GPU: opening a :class:`Program` only reads, and
:meth:`Program.method` (and :func:`load`, which calls it) executes what the file's author put there. Do that only with
files that you trust.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from et_cuda_passes.executorch.delegate_bytes import DelegateError, Span
from et_cuda_passes.executorch.delegate_format import read_ptd, read_pte
from et_cuda_passes.executorch.delegate_library import Library
from et_cuda_passes.executorch.delegate_method import Method
from et_cuda_passes.executorch.delegate_plan import BACKEND, DTYPES, Call, Plan
from et_cuda_passes.executorch.delegate_weights import Payload, Weight, read_payload

__all__ = ["DelegateError", "Method", "Program", "load"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Big enough for any dtype's elements to divide an allocation.
_GRAIN = 64


def load(
    pte_path: str | Path, data_path: str | Path | None = None, method: str = "forward", device: str = "cuda"
) -> Method:
    """Load one method of a program; see :class:`Program` for several, which then share their weights.

    THIS EXECUTES CODE FROM THE FILE: the delegate is a shared library. Load only files that you trust.

    Args:
        pte_path: a .pte lowered with :class:`~et_cuda_passes.CudaPartitioner` or the stock one of executorch 1.5.
        data_path: its .ptd; None for ``<stem>.ptd`` beside it, or the only .ptd there.
        method: the method's name.
        device: "cuda", "cuda:1", ...; or "cpu" for libraries that AOTInductor compiled for the CPU.

    Returns:
        What takes the method's inputs as tensors and gives its outputs as a list; see :class:`Method`.

    Raises:
        DelegateError: the files are damaged or do not belong together, operators lie outside the delegate, or the
            library does not load here. Nothing of the library is executed before the files are checked.
    """
    return Program(pte_path, data_path, device).method(method)


class Program:
    """A .pte and its .ptd, read and checked; a method's library and weights are loaded when it is asked for.

    A weight that methods share is put on the device once. So is a buffer that methods write to, such as a KV cache:
    what one call leaves in it the next one finds, in whichever method of this object.

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
                f"a delegate runs on cuda, or on cpu where its library was made for it; not on {device}"
            )
        file = read_pte(self.path)
        named = dict(file.named)
        self.data_path = Path(data_path) if data_path is not None else _data_beside(self.path)
        if self.data_path is not None:
            data = read_ptd(self.data_path).named
            if twice := sorted(named.keys() & data.keys()):
                raise DelegateError(f"{self.path} and {self.data_path} both hold {twice[0]!r}")
            named |= data
        self._named = named
        self._plans = file.plans
        self._payloads: dict[str, dict[int, Payload]] = {
            plan.name: {
                index: read_payload(delegate.payload, f"{self.path}: method {plan.name!r}: delegate {index}", named)
                for index, delegate in enumerate(plan.delegates)
                if delegate.backend == BACKEND
            }
            for plan in self._plans.values()
        }
        self._storages: dict[tuple[str, str], Tensor] = {}
        self._libraries: dict[Payload, Library] = {}
        self._methods: dict[str, Method] = {}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' names."""
        return tuple(self._plans)

    def plan(self, name: str) -> Plan:
        """A method as data, checked to consist of CUDA delegates alone; nothing is executed.

        Raises:
            DelegateError: there is no such method, or something else has to run in it.
        """
        if name not in self._plans:
            raise DelegateError(f"{self.path} has no method {name!r}; it has {', '.join(self._plans) or 'none'}")
        plan = self._plans[name]
        try:
            plan.check_runnable()
        except DelegateError as error:
            raise DelegateError(f"{self.path}: {error}") from None
        return plan

    def method(self, name: str = "forward") -> Method:
        """Load a method. THIS EXECUTES CODE FROM THE FILE; see :func:`load`.

        Raises:
            DelegateError: see :func:`load`.
        """
        if name in self._methods:
            return self._methods[name]
        plan = self.plan(name)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DelegateError(
                f"{self.path} runs on a CUDA device, and there is none (torch.cuda.is_available() is False)"
            )
        used = sorted({step.delegate for step in plan.steps if isinstance(step, Call)})
        payloads = {index: self._payloads[name][index] for index in used}
        libraries = {index: self._library(payload) for index, payload in payloads.items()}
        weights = {weight.fqn: self._view(weight) for payload in payloads.values() for weight in payload.weights}
        self._methods[name] = Method(plan, libraries, weights, self.device, f"{self.path}: method {name!r}")
        return self._methods[name]

    def _library(self, payload: Payload) -> Library:
        if payload not in self._libraries:
            where = f"{self.path}: library {payload.library!r}"
            weights = {
                weight.fqn: (self._view(weight), _CODES[weight.dtype], weight.nbytes) for weight in payload.weights
            }
            # The loader keeps the library's pages: the file itself is not needed once it is loaded.
            with TemporaryDirectory(prefix="et_cuda_passes-", ignore_cleanup_errors=True) as folder:
                path = Path(folder) / "delegate.so"
                _write_library(self._named[payload.library], payload.library, path)
                self._libraries[payload] = Library(path, self.device, weights, where)
        return self._libraries[payload]

    def _view(self, weight: Weight) -> Tensor:
        if weight.device == "cuda" and self.device.type != "cuda":
            raise DelegateError(f"{self.path}: weight {weight.fqn!r} belongs on a CUDA device, not on {self.device}")
        device = torch.device("cpu") if weight.device == "cpu" else self.device
        key = (weight.key, device.type)
        if key not in self._storages:
            self._storages[key] = _read(self._named[weight.key], self._slack.get(weight.key, 0), device)
        return self._storages[key].view(weight.dtype).as_strided(weight.sizes, weight.strides, weight.offset)

    @cached_property
    def _slack(self) -> Mapping[str, int]:
        """The furthest that a view begins inside each storage, in bytes.

        A library reads from where a view begins, by sizes of its own. As long again is left behind a storage, a read
        that is wrong by a damaged offset stays in memory that is ours.
        """
        slack: dict[str, int] = {}
        for payloads in self._payloads.values():
            for payload in payloads.values():
                for weight in payload.weights:
                    begin = weight.offset * weight.dtype.itemsize
                    slack[weight.key] = max(slack.get(weight.key, 0), begin)
        return slack


def _read(span: Span, slack: int, device: torch.device) -> Tensor:
    """The bytes of ``span`` on ``device``, with ``slack`` zeros or more behind them."""
    storage = torch.zeros(-(-(span.size + slack) // _GRAIN) * _GRAIN, dtype=torch.uint8, device=device)
    at = 0
    for chunk in span.chunks():
        storage[at : at + len(chunk)].copy_(torch.frombuffer(bytearray(chunk), dtype=torch.uint8))
        at += len(chunk)
    return storage


def _write_library(span: Span, key: str, path: Path) -> None:
    """Copy a library out, checked against its key, which is its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in span.chunks():
            digest.update(chunk)
            file.write(chunk)
    if key != f"{digest.hexdigest()}_so_blob":
        raise DelegateError(
            f"{span.file.path}: the library at byte {span.offset} is not what it was when it was made: "
            f"its SHA-256 is {digest.hexdigest()}, its key {key!r}"
        )


def _data_beside(pte: Path) -> Path | None:
    own = pte.with_suffix(".ptd")
    if own.exists():
        return own
    found = sorted(pte.parent.glob("*.ptd"))
    if len(found) > 1:
        raise DelegateError(
            f"several .ptd files lie beside {pte} ({', '.join(p.name for p in found)}): name the one to take"
        )
    return found[0] if found else None
