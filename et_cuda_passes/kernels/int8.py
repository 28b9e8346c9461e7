"""What an int8 linear kernel can take, as data."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Int8Kernel:
    """An int8 linear kernel and the shapes and dtypes it has. All read int8 [N, K], row by row.

    Attributes:
        name: what ``LinearInt8(kernel=...)`` calls it.
        dtypes: dtypes of the activations.
        group_sizes: group sizes along K; one scale a row every kernel has.
        zeros: whether it adds a zero for each scale; without, weights are symmetric.
        in_multiple: K must be a multiple of this.
        scale_dtype: dtype of the scales, or None for that of the activations.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    group_sizes: tuple[int, ...] = ()
    zeros: bool = False
    in_multiple: int = 1
    scale_dtype: torch.dtype | None = None

    def native_group_size(self, group_size: int, in_features: int) -> int | None:
        """The group size that the kernel computes with: K, or the largest that divides; None where there is none."""
        if group_size == in_features:
            return in_features
        return max((size for size in self.group_sizes if group_size % size == 0), default=None)


PLAIN = Int8Kernel(
    "plain operators",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    group_sizes=(8, 16, 32, 64, 128, 256),
    zeros=True,
    scale_dtype=torch.float32,
)
"""No kernel: what ``int8_linear`` computes where there is none. The compiler makes the weight anew for each call."""
