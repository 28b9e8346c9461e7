"""The payload of a CUDA delegate: the key of its library, and its weights by FQN.

The format is that of ``encode_cuda_weight_metadata`` in ExecuTorch 1.5's backends/cuda/cuda_weight_collector.py. It is
little-endian: ``ETCUDAFQN3``, the key of the library, the number of weights, and for each weight its FQN, its key, the
bytes of its storage, ScalarType, device type, storage offset in elements, rank, sizes and strides. A string is its
length as 4 bytes and then UTF-8.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from et_cuda_passes.delegate.files import DTYPES, Reader, Span

_MAGIC = b"ETCUDAFQN3"
_DEVICES = ("cpu", "cuda")
MAX_BYTES = 32 << 20
"""The largest size of all payloads of a program; each weight has a few hundred bytes."""
MAX_WEIGHTS = 1 << 17
"""The largest number of weights in all payloads of a program, so that reading them takes about a second."""

_MAX_RANK = 64


@dataclass(frozen=True)
class Weight:
    """A view of a stored weight, checked to lie within its storage.

    Attributes:
        fqn: its name in the model.
        key: the key of its storage in the .ptd.
        nbytes: the bytes of its storage.
        dtype, offset, sizes, strides: the view, in elements.
        device: "cpu" or "cuda", where the library expects it.
    """

    fqn: str
    key: str
    nbytes: int
    dtype: torch.dtype
    device: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """The number of bytes of the storage up to the end of the view; 0 for an empty view."""
        if 0 in self.sizes:
            return 0
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Payload:
    """The key of a library, and its weights."""

    library: str
    weights: tuple[Weight, ...]


def read_payload(
    payload: bytes | Span, where: str, named_data: Mapping[str, Span], max_weights: int = MAX_WEIGHTS
) -> Payload:
    """Decode the payload of a delegate.

    Args:
        payload: its bytes, or their place in a file.
        where: the name of the payload, for messages.
        named_data: the data of the .pte and the .ptd, to which the payload refers by key.
        max_weights: the number of weights that it may have.

    Raises:
        DelegateError: it is not valid, has too many weights, or refers to data that does not exist or has another size.
    """
    if isinstance(payload, Span):
        reader = Reader(payload.read(), where, payload.offset)
    else:
        reader = Reader(payload, f"{where} (bytes counted from its start)")
    if not reader.data.startswith(_MAGIC):
        reader.fail(
            0,
            "the payload",
            f"it begins with {reader.data[:10]!r} and not with {_MAGIC!r}, as executorch 1.5 writes it: lower the "
            "model again",
        )
    at = len(_MAGIC)

    def take(form: str, name: str) -> tuple[int, ...]:
        nonlocal at
        numbers = reader.numbers(at, form, name)
        at += struct.calcsize(f"<{form}")
        return numbers

    def take_text(name: str) -> str:
        nonlocal at
        (size,) = take("I", f"the length of {name}")
        at += size
        return reader.text(at - size, size, name)

    library = take_text("the library's key")
    if library not in named_data:
        reader.fail(len(_MAGIC), "the library's key", f"the files have no data {library!r}")
    (count,) = take("I", "the number of weights")
    if count > max_weights:
        reader.fail(at - 4, "the number of weights", f"{count} is more than the {max_weights} that may follow")
    weights: dict[str, Weight] = {}
    for index in range(count):
        start, name = at, f"weight {index} of {count}"
        fqn, key = take_text(f"the FQN of {name}"), take_text(f"the key of {name}")
        name = f"weight {fqn!r}"
        nbytes, code, device, offset, rank = take("QiiqI", name)
        if rank > _MAX_RANK:
            reader.fail(start, name, f"{rank} dimensions are more than the {_MAX_RANK} that a tensor can have")
        sizes, strides = take(f"{rank}q", f"the sizes of {name}"), take(f"{rank}q", f"the strides of {name}")
        if code not in DTYPES:
            reader.fail(start, name, f"dtype {code} does not exist")
        if device not in range(len(_DEVICES)):
            reader.fail(start, name, f"device type {device} does not exist")
        if offset < 0 or any(number < 0 for number in sizes + strides):
            reader.fail(start, name, f"sizes {list(sizes)}, strides {list(strides)} or offset {offset} is negative")
        weight = Weight(fqn, key, nbytes, DTYPES[code], _DEVICES[device], offset, sizes, strides)
        if key not in named_data:
            reader.fail(start, name, f"the files have no data {key!r}: is this the .ptd of this .pte?")
        if named_data[key].size != nbytes:
            reader.fail(start, name, f"it needs {nbytes} bytes, but the data {key!r} has {named_data[key].size}")
        if (end := max(weight.end, offset * weight.dtype.itemsize)) > nbytes:
            reader.fail(start, name, f"its view ends at byte {end} of a storage of {nbytes} bytes")
        if fqn in weights:
            reader.fail(start, name, "it occurs twice")
        weights[fqn] = weight
    if at != len(reader.data):
        reader.fail(at, "the end", f"{len(reader.data) - at} bytes follow the last weight")
    return Payload(library, tuple(weights.values()))
