"""Tensors in mapped files, and advice to the system about memory that is not read again soon."""

import bisect
import ctypes
import os
import sys
import tempfile
from pathlib import Path

import torch

_PAGE = os.sysconf("SC_PAGESIZE")
# Linux, include/uapi/asm-generic/mman-common.h.
_DONTNEED, _PAGEOUT = 4, 21


def mapped_empty(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """A tensor without values in a file of ``folder``. The file has no name, and is gone when no tensor uses it.

    Raises:
        OSError: the disk has not enough space, or the folder is missing or cannot be written.
    """
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if not tensor.numel():
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # A file with holes could be mapped on a full disk, and writing into the memory would end the process.
            _reserve(file.fileno(), tensor.nbytes)
        except OSError as error:
            text = f"{tensor.nbytes} bytes in {folder} for a packed constant: {error.strerror}; free some space"
            raise OSError(error.errno, f"{text}, or name another folder") from error
        # torch maps a file by its path.
        flat = torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=tensor.numel(), dtype=dtype)
    return flat.view(shape)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def forget_pages(tensor: torch.Tensor) -> None:
    """Remove the pages of a tensor of :func:`mapped_empty` from the process; its file keeps the values."""
    _advise(tensor, _DONTNEED)


class MappedFiles:
    """The memory in which files were mapped when this was created.

    The system's list has a line for each mapping. Reading it for each weight would take time with their square.
    """

    def __init__(self) -> None:
        spans = []
        if sys.platform == "linux":
            for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                span, _, _, _, inode, *_ = line.split(maxsplit=5)
                if inode != "0":
                    first, last = span.split("-")
                    spans.append((int(first, 16), int(last, 16)))
        self._spans = spans  # in the order of the addresses

    def __contains__(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        address = tensor.data_ptr()
        place = bisect.bisect_right(self._spans, address, key=lambda span: span[0]) - 1
        return place >= 0 and address < self._spans[place][1]

    def page_out(self, tensor: torch.Tensor) -> None:
        """Let the system reclaim the pages of a tensor now if it lies in a file.

        Other memory stays as it is: it could only be moved to a swap area.
        """
        if tensor in self:
            _advise(tensor, _PAGEOUT)


def trim_heap() -> None:
    """Return freed memory to the system: glibc keeps what lies between memory that is in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Advice for the whole pages of a tensor. Systems that do not know it ignore it."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.numel():
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    last = (tensor.data_ptr() + span * tensor.itemsize) // _PAGE * _PAGE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
