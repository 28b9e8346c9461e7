"""An AOTInductor library with its weights, run by torch's own runner.

The runner does not check what it receives: a missing weight or input ends in an illegal memory access. So the library
is first queried for its inputs, outputs and constants, through its C interface (torch's csrc/inductor/aoti_runtime/
interface.h).
"""

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from et_cuda_passes.delegate.files import DelegateError

_PREFIX = "AOTInductorModelContainer"
# A library that also has constants on the CPU rounds the size of every constant up to a multiple of this.
_SIZE_MULTIPLE = 64


@dataclass(frozen=True)
class Constant:
    """A constant of a library: its name there, its FQN, its bytes, and its dtype as torch's ScalarType."""

    name: str
    fqn: str
    nbytes: int
    dtype: int


@dataclass(frozen=True)
class LibrarySignature:
    """The number of inputs and outputs of a library, and the constants that it does not compute itself."""

    inputs: int
    outputs: int
    constants: tuple[Constant, ...]


class Library:
    """A loaded library that has its weights.

    Args:
        path: the shared library. The file may be deleted after it was loaded.
        device: where the library runs.
        weights: by FQN: the tensor, its ScalarType and the bytes of its storage. The library keeps the tensors alive.
        where: the name of the library, for messages.
        capturable: whether calls can be captured in a CUDA graph. Then only one thread may call the library at a time:
            the usual calls record an event, to wait for another thread's call, and a captured event cannot be queried.

    Raises:
        DelegateError: the library does not load, or ``weights`` are not its weights.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        weights: Mapping[str, tuple[Tensor, int, int]],
        where: str,
        capturable: bool = False,
    ) -> None:
        self._where = where
        self._has_run = False
        _load_torch_symbols()
        self.signature = query(path, device, where)
        check_weights(self.signature, weights, where)
        self._weights = {constant.name: weights[constant.fqn][0] for constant in self.signature.constants}
        try:
            self._run = _make_runner(path, device, self._weights, capturable)
        except (RuntimeError, TypeError) as error:
            raise DelegateError(f"{where} does not load: {_first_line(error)}") from error

    def __call__(self, inputs: list[Tensor], static: bool = False) -> list[Tensor]:
        """Run the library.

        Args:
            inputs: tensors on its device, as many as its signature has.
            static: whether no input has a dynamic size. Then the library checks dtypes, sizes and strides from its
                first run on. With dynamic sizes it does not, because its check refuses sizes of 0 and 1.

        Raises:
            DelegateError: the library fails, or returns another number of outputs than its signature has.
        """
        try:
            with _input_checks() if static and not self._has_run else nullcontext():
                outputs = self._run(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise DelegateError(f"{self._where} failed: {_first_line(error)} (see stderr for the details)") from error
        self._has_run = True
        if len(outputs) != self.signature.outputs:
            raise DelegateError(
                f"{self._where} returned {len(outputs)} outputs, but its signature has {self.signature.outputs}"
            )
        return outputs


def check_weights(signature: LibrarySignature, weights: Mapping[str, tuple[Tensor, int, int]], where: str) -> None:
    """Check that ``weights`` are those of a library; the arguments are those of :class:`Library`.

    Raises:
        DelegateError: a weight is missing, is not used, is empty, is too small or has another dtype.
    """
    expected = {constant.fqn for constant in signature.constants}
    if missing := sorted(expected - set(weights)):
        raise DelegateError(f"{where} needs weights that its payload does not have: {', '.join(missing)}")
    if unused := sorted(set(weights) - expected):
        raise DelegateError(f"{where} does not use weights that its payload has: {', '.join(unused)}")
    for constant in signature.constants:
        tensor, dtype, nbytes = weights[constant.fqn]
        # An empty tensor has no address, so the library would read from address 0.
        if constant.nbytes and not tensor.numel():
            raise DelegateError(f"{where} reads weight {constant.fqn!r}, which is empty in its payload")
        if dtype != constant.dtype:
            raise DelegateError(
                f"{where} needs weight {constant.fqn!r} with ScalarType {constant.dtype}, but its payload has {dtype}"
            )
        if constant.nbytes > -(-nbytes // _SIZE_MULTIPLE) * _SIZE_MULTIPLE:
            raise DelegateError(
                f"{where} needs {constant.nbytes} bytes of weight {constant.fqn!r}, but its payload has {nbytes}"
            )


def query(path: Path, device: torch.device, where: str) -> LibrarySignature:
    """Ask a library for its signature. This creates a container of it, and deletes it again.

    Raises:
        DelegateError: the file is not a library of AOTInductor, or it does not load here.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        symbol = re.search(r"undefined symbol: (\S+)", str(error))
        reason = f"it needs {symbol[1]}, which torch {torch.__version__} does not have" if symbol else str(error)
        raise DelegateError(f"{where} does not load: {reason}") from error

    def call(name: str, *arguments: object) -> None:
        try:
            function = library[f"{_PREFIX}{name}"]
        except AttributeError:
            raise DelegateError(f"{where} is not a library of AOTInductor: it has no {_PREFIX}{name}") from None
        if function(*arguments):
            raise DelegateError(f"{where}: {_PREFIX}{name} failed; see stderr for the reason")

    container = ctypes.c_void_p()
    one = ctypes.c_size_t(1)
    call("CreateWithDevice", ctypes.byref(container), one, str(device).encode(), ctypes.c_char_p())
    try:

        def count(name: str) -> int:
            number = ctypes.c_size_t()
            call(f"GetNum{name}", container, ctypes.byref(number))
            return number.value

        constants = []
        for index in map(ctypes.c_size_t, range(count("Constants"))):
            name, fqn, size = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_size_t()
            dtype, folded = ctypes.c_int32(), ctypes.c_bool()
            parts = {"Name": name, "OriginalFQN": fqn, "DataSize": size, "Dtype": dtype, "FromFolded": folded}
            for part, value in parts.items():
                call(f"GetConstant{part}", container, index, ctypes.byref(value))
            if not folded.value:
                constants.append(
                    Constant((name.value or b"").decode(), (fqn.value or b"").decode(), size.value, dtype.value)
                )
        return LibrarySignature(count("Inputs"), count("Outputs"), tuple(constants))
    finally:
        call("Delete", container)


def _make_runner(
    path: Path, device: torch.device, weights: dict[str, Tensor], capturable: bool
) -> Callable[[list[Tensor]], list[Tensor]]:
    runner: torch._C._aoti.AOTIModelContainerRunnerCpu | torch._C._aoti.AOTIModelContainerRunnerCuda
    if device.type == "cpu":
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    elif capturable:
        # The last argument is run_single_threaded.
        runner = torch._C._aoti.AOTIModelContainerRunnerCuda(str(path), 1, str(device), "", True)  # type: ignore[call-overload]
    else:
        runner = torch._C._aoti.AOTIModelContainerRunnerCuda(str(path), 1, str(device), "")
    # In order: use_inactive, validate_full_updates (check_weights was called instead), user_managed (do not copy).
    runner.update_constant_buffer(weights, False, False, True)
    run: Callable[[list[Tensor]], list[Tensor]] = runner.run
    return run


@contextmanager
def _input_checks() -> Iterator[None]:
    """Make a library that runs for the first time check its inputs, then and later.

    It reads the environment variable in its first run only.
    """
    name = "AOTI_RUNTIME_CHECK_INPUTS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load_torch_symbols() -> None:
    """Make torch's symbols global: ExecuTorch compiles libraries that find them in the process."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu", "libtorch_cuda", "libtorch"):
        for path in folder.glob(f"{name}.[sd][oy]*"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
