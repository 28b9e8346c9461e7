"""Eager launches, outside of any tracing."""

from collections.abc import Callable
from typing import Any

import torch

from et_cuda_passes.kernels.triton_launch import launch


class Doubles:
    """A Python function in place of a kernel: y = 2 x. It records its grid."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return self.run

    def run(self, x_ptr: torch.Tensor, y_ptr: torch.Tensor, num_warps: int, SALT: int) -> None:
        y_ptr.copy_(2 * x_ptr)
        self.salt = SALT


def test_eager_launch_mutates_and_returns_the_given_tensors() -> None:
    kernel, x, y = Doubles(), torch.randn(4), torch.full((4,), float("nan"))
    arguments: dict[str, Any] = {"x_ptr": x, "y_ptr": y, "num_warps": 4}
    (written,) = launch(kernel, (3, 2), arguments, ["y_ptr"], "4")
    assert written is y
    assert torch.equal(y, 2 * x)
    assert kernel.grid == (3, 2)


def test_eager_launches_of_all_sizes_share_one_kernel() -> None:
    salts = set()
    for rows in (1, 2, 3):
        kernel, x = Doubles(), torch.randn(rows)
        launch(kernel, (rows,), {"x_ptr": x, "y_ptr": torch.empty(rows), "num_warps": 4}, ["y_ptr"], str(rows))
        salts.add(kernel.salt)
    assert len(salts) == 1
