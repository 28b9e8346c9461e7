"""A launch outside of any tracing writes to the tensors that it is given."""

from collections.abc import Callable
from typing import Any

import torch

from et_cuda_passes.kernels.known_writes import launch


class Doubles:
    """Stands for a kernel: y = 2 x, over a grid that it keeps."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return self.run

    def run(self, x_ptr: torch.Tensor, y_ptr: torch.Tensor, num_warps: int) -> None:
        y_ptr.copy_(2 * x_ptr)


def test_it_writes_in_place_and_returns_what_it_was_given() -> None:
    kernel, x, y = Doubles(), torch.randn(4), torch.full((4,), float("nan"))
    arguments: dict[str, Any] = {"x_ptr": x, "y_ptr": y, "num_warps": 4}
    (written,) = launch(kernel, (3, 2), arguments, ["y_ptr"])
    assert written is y
    assert torch.equal(y, 2 * x)
    assert kernel.grid == (3, 2)
