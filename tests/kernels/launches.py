"""Launches of Triton kernels in a traced graph, read by the tests of launches."""

from typing import Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors


def found_written(launch: torch.fx.Node) -> list[str]:
    """What torch finds that the kernel writes to, from its IR."""
    given: Any = launch.kwargs["kwargs"]
    values = {name: v.meta["val"] if isinstance(v, torch.fx.Node) else v for name, v in given.items()}
    numbers: Any = (launch.kwargs["kernel_idx"], launch.kwargs["constant_args_idx"])
    return get_mutated_tensors(*numbers, values, launch.kwargs["tma_descriptor_metadata"])  # type: ignore[arg-type]
