"""Runs a CUDA-delegated .pte from Python: the library inside it, through AOTInductor's own runner."""

import ctypes
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from torch import Tensor

_DTYPES = {0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16}
_DTYPES |= {6: torch.float32, 7: torch.float64, 11: torch.bool, 15: torch.bfloat16}


def _weights(payload: bytes, data: dict[str, bytes]) -> tuple[str, dict[str, Tensor]]:
    """The library's key and the weights by FQN, from a delegate's payload (format ETCUDAFQN3)."""
    assert payload.startswith(b"ETCUDAFQN3"), payload[:16]
    at = len(b"ETCUDAFQN3")

    def take(form: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from(form, payload, at)
        at += struct.calcsize(form)
        return values

    def text() -> str:
        nonlocal at
        (length,) = take("<I")
        at += length
        return payload[at - length : at].decode()

    library = text()
    weights = {}
    for _ in range(take("<I")[0]):
        fqn, key = text(), text()
        size, scalar_type, _, offset, rank = take("<QiiqI")
        sizes, strides = take(f"<{rank}q"), take(f"<{rank}q")
        flat = torch.frombuffer(bytearray(data[key][:size]), dtype=_DTYPES[scalar_type]).cuda()
        weights[fqn] = flat.as_strided(sizes, strides, offset)
    assert at == len(payload)
    return library, weights


def _entries(payload: Any) -> dict[str, Any]:
    """Key -> entry, of the data in a .pte (``pte_data``) or in a .ptd (``named_data``)."""
    return dict(getattr(payload, "pte_data", None) or payload.named_data)


class Delegate:
    """One method of a .pte that is a single CUDA delegate; call it with CUDA tensors."""

    def __init__(self, pte: Path, method: str = "forward") -> None:
        for name in ("libtorch_cpu.so", "libtorch_cuda.so", "libtorch.so"):
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        file = deserialize_pte_binary(pte.read_bytes())
        data: dict[str, bytes] = {}
        external = [FlatTensorSerializer().deserialize(path.read_bytes()) for path in pte.parent.glob("*.ptd")]
        for payload in [file.named_data, *external]:
            if payload is not None:
                data |= {key: payload.buffers[entry.buffer_index] for key, entry in _entries(payload).items()}
        (plan,) = (plan for plan in file.program.execution_plan if plan.name == method)
        (delegate,) = plan.delegates
        library, self.weights = _weights(bytes(file.program.backend_delegate_data[delegate.processed.index].data), data)
        self.file = tempfile.NamedTemporaryFile(suffix=".so")  # noqa: SIM115  (lives as long as the library is loaded)
        self.file.write(data[library])
        self.file.flush()
        self.runner = torch._C._aoti.AOTIModelContainerRunnerCuda(self.file.name, 1, "cuda", "")
        names = {fqn: name for name, fqn in self.runner.get_constant_names_to_original_fqns().items()}
        self.runner.update_constant_buffer(
            {names[fqn]: weight for fqn, weight in self.weights.items() if fqn in names}, False, False, True
        )

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        return self.runner.run(list(inputs))
