"""For tests of launches: a GPU that this machine does not have, and torch's own analysis of a kernel."""

from typing import Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class AbsentHopper(DriverBase):
    """A driver for an H100 that this machine does not have: torch only reads the compile target from it."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        return None


def mutated_by_analysis(launch: torch.fx.Node) -> list[str]:
    """The arguments that the kernel mutates, by torch's own analysis of its IR."""
    given: Any = launch.kwargs["kwargs"]
    values = {name: v.meta["val"] if isinstance(v, torch.fx.Node) else v for name, v in given.items()}
    numbers: Any = (launch.kwargs["kernel_idx"], launch.kwargs["constant_args_idx"])
    return get_mutated_tensors(*numbers, values, launch.kwargs["tma_descriptor_metadata"])  # type: ignore[arg-type]
