"""The abilities of a kernel, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Kernel:
    """A kernel of a quantized weight: the layout that it reads, and the shapes and dtypes that it supports.

    Attributes:
        name: the name for a rule's option, as in ``LinearInt4(kernel=...)``.
        layout: name of the layout of the packed weight, "int8" for int8 [N, K]; part of the operator's name.
        dtypes: dtypes of the activations.
        group_sizes: group sizes along K.
        in_multiple: K must be a multiple of this.
        out_multiple: packed rows are padded to a multiple of this.
        scale_dtype: dtype of the scales and zeros, or None for the dtype of the activations.
        in_control_flow: whether the kernel compiles inside the branches of a cond and the bodies of loops.
        zeros: whether the kernel adds a zero per scale; if not, weights must be symmetric.
        per_row: whether the kernel also supports one scale per row.
        host_notes: what a report says of the kernel on a host with a certain ``get_cpu_capability()``.

    Raises:
        TypeError: dtypes or group sizes are no tuple of such.
        ValueError: a group size or a multiple is no positive number.
    """

    name: str
    layout: str
    dtypes: tuple[torch.dtype, ...]
    group_sizes: tuple[int, ...] = ()
    in_multiple: int = 1
    out_multiple: int = 1
    scale_dtype: torch.dtype | None = None
    in_control_flow: bool = True
    zeros: bool = True
    per_row: bool = False
    host_notes: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        dtypes, sizes = self.dtypes, self.group_sizes
        if not isinstance(dtypes, tuple) or not all(isinstance(each, torch.dtype) for each in dtypes):
            raise TypeError(f"kernel {self.name!r}: dtypes must be a tuple such as (torch.float16,), not {dtypes!r}")
        if not isinstance(sizes, tuple) or not all(isinstance(each, int) for each in sizes):
            raise TypeError(f"kernel {self.name!r}: group_sizes must be a tuple such as (32, 64), not {sizes!r}")
        for field_name, number in (
            *(("group_sizes", size) for size in sizes),
            ("in_multiple", self.in_multiple),
            ("out_multiple", self.out_multiple),
        ):
            if number < 1:
                raise ValueError(f"kernel {self.name!r}: {field_name} has {number}; write a number of at least 1")

    def native_group_size(self, group_size: int, in_features: int) -> int | None:
        """The group size that the kernel computes with for a weight with groups of ``group_size``.

        It is K for one scale per row, or the largest of :attr:`group_sizes` that divides ``group_size``; scales are
        repeated for the rest. None if there is neither.
        """
        if self.per_row and group_size == in_features:
            return in_features
        return max((size for size in self.group_sizes if group_size % size == 0), default=None)
