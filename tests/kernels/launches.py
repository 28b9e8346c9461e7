"""For tests of launches: torch's own analysis of a kernel in a traced graph."""

from typing import Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors


def mutated_by_analysis(launch: torch.fx.Node) -> list[str]:
    """The arguments that the kernel mutates, by torch's own analysis of its IR."""
    given: Any = launch.kwargs["kwargs"]
    values = {name: v.meta["val"] if isinstance(v, torch.fx.Node) else v for name, v in given.items()}
    numbers: Any = (launch.kwargs["kernel_idx"], launch.kwargs["constant_args_idx"])
    return get_mutated_tensors(*numbers, values, launch.kwargs["tma_descriptor_metadata"])  # type: ignore[arg-type]
