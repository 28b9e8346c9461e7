"""What an int4 linear kernel can take, as data."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Int4Kernel:
    """An int4 linear kernel: the layout it reads and the shapes and dtypes it has.

    Attributes:
        name: what ``LinearInt4(kernel=...)`` calls it.
        layout: layout of the packed weight; also names the operator that stands for the kernel.
        dtypes: dtypes of the activations.
        group_sizes: group sizes along K.
        in_multiple: K must be a multiple of this.
        out_multiple: packed rows are padded to a multiple of this.
        scale_dtype: dtype of scale_and_zero, or None for that of the activations.
        in_control_flow: whether it is compiled inside the branches of a cond and the bodies of loops too.
    """

    name: str
    layout: str
    dtypes: tuple[torch.dtype, ...]
    group_sizes: tuple[int, ...]
    in_multiple: int
    out_multiple: int
    scale_dtype: torch.dtype | None = None
    in_control_flow: bool = True
