"""An AOTInductor library with its weights, run through torch's own runner.

What the library wants is asked of the library itself, through its C interface (torch's csrc/inductor/aoti_runtime/
interface.h), before it is given anything: the runner takes what it is given on trust, and a missing weight or input
ends in an illegal memory access.
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

from et_cuda_passes.executorch.delegate_bytes import DelegateError

_PREFIX = "AOTInductorModelContainer"
# A library that has constants on the CPU as well rounds every constant's size up to a multiple of this.
_ROUNDING = 64


@dataclass(frozen=True)
class Constant:
    """A constant that a library wants: its name there, its FQN, bytes, and dtype as torch numbers them."""

    name: str
    fqn: str
    nbytes: int
    dtype: int


@dataclass(frozen=True)
class Wants:
    """What a library takes and gives; constants that it folds by itself are left out."""

    inputs: int
    outputs: int
    constants: tuple[Constant, ...]


class Library:
    """A loaded library that has its weights.

    Args:
        path: the shared library; it may be deleted afterwards.
        device: where it runs.
        weights: by FQN, with the ScalarType of each and the bytes of its storage; kept alive as long as the library.
        where: what to call it in messages.

    Raises:
        DelegateError: it does not load, or wants other weights than these.
    """

    def __init__(
        self, path: Path, device: torch.device, weights: Mapping[str, tuple[Tensor, int, int]], where: str
    ) -> None:
        self._where = where
        self._ran = False
        _provide_torch()
        self.wants = _ask(path, device, where)
        _compare(self.wants, weights, where)
        self._weights = {constant.name: weights[constant.fqn][0] for constant in self.wants.constants}
        try:
            self._run = _runner(path, device, self._weights)
        except RuntimeError as error:
            raise DelegateError(f"{where} does not load: {_first_line(error)}") from error

    def __call__(self, inputs: list[Tensor], static: bool = False) -> list[Tensor]:
        """Run it on tensors of the device, whose number the caller has checked.

        Args:
            inputs: the tensors.
            static: whether no size of theirs is dynamic. Such a library is made to check dtypes, sizes and strides
                itself from its first run on. One with dynamic sizes is not: its own check refuses sizes of 0 and 1.

        Raises:
            DelegateError: the library refuses, or gives another number of outputs.
        """
        try:
            with _checks_of_inputs() if static and not self._ran else nullcontext():
                outputs = self._run(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise DelegateError(
                f"{self._where} failed: {_first_line(error)} (the library says more on stderr)"
            ) from error
        self._ran = True
        if len(outputs) != self.wants.outputs:
            raise DelegateError(f"{self._where} gave {len(outputs)} outputs, and has {self.wants.outputs}")
        return outputs


def _compare(wants: Wants, weights: Mapping[str, tuple[Tensor, int, int]], where: str) -> None:
    wanted = {constant.fqn for constant in wants.constants}
    if missing := sorted(wanted - set(weights)):
        raise DelegateError(f"{where} wants weights that its payload does not name: {', '.join(missing)}")
    if extra := sorted(set(weights) - wanted):
        raise DelegateError(f"{where} has no use for weights that its payload names: {', '.join(extra)}")
    for constant in wants.constants:
        tensor, dtype, nbytes = weights[constant.fqn]
        # An empty tensor has no address, whatever lies behind its storage's.
        if constant.nbytes and not tensor.numel():
            raise DelegateError(f"{where} reads weight {constant.fqn!r}, which its payload says is empty")
        if dtype != constant.dtype:
            raise DelegateError(
                f"{where} wants weight {constant.fqn!r} with ScalarType {constant.dtype}, its payload has {dtype}"
            )
        if constant.nbytes > -(-nbytes // _ROUNDING) * _ROUNDING:
            raise DelegateError(
                f"{where} wants {constant.nbytes} bytes of weight {constant.fqn!r}, its payload has {nbytes}"
            )


def _runner(path: Path, device: torch.device, weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    runner: torch._C._aoti.AOTIModelContainerRunnerCpu | torch._C._aoti.AOTIModelContainerRunnerCuda
    if device.type == "cpu":
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    else:
        runner = torch._C._aoti.AOTIModelContainerRunnerCuda(str(path), 1, str(device), "")
    # In order: not the inactive copy, no check by the library (it was made above), and used where they are, not copied.
    runner.update_constant_buffer(weights, False, False, True)
    run: Callable[[list[Tensor]], list[Tensor]] = runner.run
    return run


@contextmanager
def _checks_of_inputs() -> Iterator[None]:
    """Have a library that runs for the first time check its inputs for good: it asks the environment only then."""
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


def _provide_torch() -> None:
    """Make torch's symbols global: ExecuTorch links libraries without torch, for its own runtime to provide them."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu", "libtorch_cuda", "libtorch"):
        for path in folder.glob(f"{name}.[sd][oy]*"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _ask(path: Path, device: torch.device, where: str) -> Wants:
    """What the library itself says that it wants; for this a container of it is made and thrown away."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        symbol = re.search(r"undefined symbol: (\S+)", str(error))
        reason = f"it wants {symbol[1]}, which this torch ({torch.__version__}) has not" if symbol else str(error)
        raise DelegateError(f"{where} does not load: {reason}") from error

    def call(name: str, *arguments: object) -> None:
        try:
            function = library[f"{_PREFIX}{name}"]
        except AttributeError:
            raise DelegateError(f"{where} is no library of AOTInductor: it has no {_PREFIX}{name}") from None
        if function(*arguments):
            raise DelegateError(f"{where}: {_PREFIX}{name} failed; the library says why on stderr")

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
        return Wants(count("Inputs"), count("Outputs"), tuple(constants))
    finally:
        call("Delete", container)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
