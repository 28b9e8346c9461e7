"""For tests of launches: torch's own analysis of a kernel in a traced graph."""

from typing import Any

import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from triton.runtime.autotuner import Autotuner


def mutated_by_analysis(launch: torch.fx.Node) -> list[str]:
    """The arguments that the kernel mutates, by torch's own analysis of its IR.

    The node holds a kernel that stands for it in Inductor's analysis: that one must give the same.
    """
    given: Any = launch.kwargs["kwargs"]
    values = {name: v.meta["val"] if isinstance(v, torch.fx.Node) else v for name, v in given.items()}
    index: Any = launch.kwargs["kernel_idx"]
    # torch makes an autotuner of one choice out of num_warps and num_stages.
    held: Any = kernel_side_table.get_kernel(index)
    tuned = isinstance(held, Autotuner)
    real = triton.autotune(held.configs, key=[])(held.fn.launched) if tuned else held.launched
    real_index = kernel_side_table.add_kernel(real)
    assert real_index != index

    def analysed(kernel: int) -> list[str]:
        others: Any = (launch.kwargs["constant_args_idx"], values, launch.kwargs["tma_descriptor_metadata"])
        return get_mutated_tensors(kernel, *others)

    mutated = analysed(real_index)
    assert analysed(index) == mutated
    return mutated
