"""A CUDA delegate's payload: the name of its library, and its weights by FQN.

The layout is ``encode_cuda_weight_metadata`` of ExecuTorch 1.5's backends/cuda/cuda_weight_collector.py, little-endian:
``ETCUDAFQN3``, the library's key, a count, and per weight its FQN and key, the bytes of its storage, ScalarType, device
type, storage offset in elements, rank, sizes and strides; a string is its length in 4 bytes and UTF-8.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from et_cuda_passes.executorch.delegate_bytes import DelegateError, Reader, Span
from et_cuda_passes.executorch.delegate_plan import DTYPES

_MAGIC = b"ETCUDAFQN3"
_DEVICES = ("cpu", "cuda")
# A payload is a list of names and sizes: some hundred bytes a weight.
_LONGEST = 256 << 20
# Beyond any tensor's, and its sizes' bytes are few.
_HIGHEST_RANK = 64


@dataclass(frozen=True)
class Weight:
    """A view of a stored weight, checked to lie within what is stored.

    Attributes:
        fqn: its name in the model.
        key: its storage's name in the .ptd.
        nbytes: of its storage.
        dtype, offset, sizes, strides: the view, in elements.
        device: "cpu" or "cuda", where the library wants it.
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
        """The first byte of the storage behind the view."""
        if 0 in self.sizes:
            return 0
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Payload:
    """What a CUDA delegate consists of: the key of its library, and its weights."""

    library: str
    weights: tuple[Weight, ...]


def read_payload(payload: bytes | Span, where: str, named: Mapping[str, Span]) -> Payload:
    """Decode a delegate's payload.

    Args:
        payload: the bytes, or where they are.
        where: what to call it in messages.
        named: the named data that it refers to.

    Raises:
        DelegateError: it is no such payload, contradicts itself or names data that is not there or of another size.
    """
    if isinstance(payload, Span):
        if payload.size > _LONGEST:
            raise DelegateError(f"{where}: {payload.size} bytes at byte {payload.offset} are no list of weights")
        reader = Reader(payload.read(), where, payload.offset)
    else:
        reader = Reader(payload, f"{where} (bytes counted from its start)")
    if not reader.data.startswith(_MAGIC):
        reader.fail(
            0,
            "the payload",
            f"it begins with {reader.data[:10]!r} and not with {_MAGIC!r}; executorch 1.5 writes that: lower again",
        )
    at = len(_MAGIC)

    def take(form: str, what: str) -> tuple[int, ...]:
        nonlocal at
        numbers = reader.numbers(at, form, what)
        at += struct.calcsize(f"<{form}")
        return numbers

    def text(what: str) -> str:
        nonlocal at
        (size,) = take("I", f"the length of {what}")
        at += size
        return reader.text(at - size, size, what)

    library = text("the library's key")
    if library not in named:
        reader.fail(len(_MAGIC), "the library's key", f"there is no data {library!r} in the files")
    (count,) = take("I", "the number of weights")
    weights: dict[str, Weight] = {}
    for index in range(count):
        start, what = at, f"weight {index} of {count}"
        fqn, key = text(f"the FQN of {what}"), text(f"the key of {what}")
        what = f"weight {fqn!r}"
        nbytes, code, device, offset, rank = take("QiiqI", what)
        if rank > _HIGHEST_RANK:
            reader.fail(start, what, f"{rank} dimensions")
        sizes, strides = take(f"{rank}q", f"the sizes of {what}"), take(f"{rank}q", f"the strides of {what}")
        if code not in DTYPES:
            reader.fail(start, what, f"there is no dtype {code}")
        if device not in range(len(_DEVICES)):
            reader.fail(start, what, f"there is no device type {device}")
        if offset < 0 or any(number < 0 for number in sizes + strides):
            reader.fail(
                start, what, f"sizes {list(sizes)}, strides {list(strides)} and offset {offset} have a negative"
            )
        weight = Weight(fqn, key, nbytes, DTYPES[code], _DEVICES[device], offset, sizes, strides)
        if key not in named:
            reader.fail(start, what, f"there is no data {key!r} in the files; is the .ptd the one of this .pte?")
        if named[key].size != nbytes:
            reader.fail(start, what, f"{nbytes} bytes are wanted, and the data {key!r} has {named[key].size}")
        if max(weight.end, offset * weight.dtype.itemsize) > nbytes:
            reader.fail(start, what, f"its view ends at byte {weight.end} of a storage of {nbytes}")
        if fqn in weights:
            reader.fail(start, what, "it is there twice")
        weights[fqn] = weight
    if at != len(reader.data):
        reader.fail(at, "the end", f"{len(reader.data) - at} bytes are left over")
    return Payload(library, tuple(weights.values()))
