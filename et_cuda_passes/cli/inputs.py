"""Inputs of a program, from a safetensors file or random."""

import re
from pathlib import Path

import torch
from torch import Tensor

from et_cuda_passes.cli.console import UsageError, one_line

# 4 GiB of float32. A larger upper bound of a size is not meant as an actual size.
_MOST = 1 << 30


def check_one_source(inputs: Path | None, seed: int | None) -> None:
    """Raise if both are given."""
    if inputs is not None and seed is not None:
        raise UsageError("--inputs and --random-seed each give all inputs: give one of them")


def read_inputs(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file, in the order of their numbers.

    Raises:
        UsageError: the file is missing or no safetensors file, or its names are no numbers from 0 on.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UsageError("--inputs needs safetensors: pip install safetensors") from None
    try:
        tensors = load_file(path)
    except Exception as error:  # SafetensorError, OSError and others
        raise UsageError(f"--inputs {path} cannot be read as safetensors ({one_line(error)})") from error
    if len(tensors) == 1:
        return list(tensors.values())
    wanted = [str(number) for number in range(len(tensors))]
    if set(tensors) != set(wanted):
        names = [name if name.isprintable() else repr(name) for name in sorted(tensors)]
        raise UsageError(f"--inputs {path} holds {', '.join(names)}: name the inputs 0, 1, ... in order")
    return [tensors[name] for name in wanted]


def random_tensor(
    sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, low: int = 0, high: int = 1
) -> Tensor:
    """Normally distributed floats, or integers from ``low`` to ``high``, which for bool are both values.

    Raises:
        UsageError: the tensor would exceed 4 GiB, or the dtype has no random numbers.
    """
    if torch.Size(sizes).numel() > _MOST:
        raise UsageError(
            f"an input has the upper bounds {list(sizes)}: give an input of the intended size with --inputs"
        )
    if dtype == torch.bool:
        return torch.randint(0, 2, sizes, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    if not re.fullmatch(r"torch\.u?int\d+", str(dtype)):
        raise UsageError(f"random inputs of {dtype} are not supported: give them with --inputs")
    return torch.randint(low, high + 1, sizes, generator=generator).to(dtype)
