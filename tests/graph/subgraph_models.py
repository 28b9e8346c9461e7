"""Models with quantized linears in subgraphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.export import Dim, ExportedProgram

from et_cuda_passes.testing import Quantized

BF16 = torch.bfloat16


def square(seed: int) -> Quantized:
    """A quantized linear [64, 64] with a bias."""
    return Quantized(64, 64, seed=seed)


class Net(nn.Module):
    """Quantized linears ``a``, ``b``, ``c`` used as ``use(net, x)``."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        # Only those that are used, since the export contains the others too.
        for seed, name in enumerate(sorted(USES.get(use, "abc"))):
            self.add_module(name, square(seed))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def cond(net: Net, x: Tensor) -> Tensor:
    """``b`` is read in both subgraphs and outside, ``a`` in one subgraph only."""
    y = torch.cond(x.sum() > 0, lambda y: net.a(y) + net.b(y), lambda y: net.b(y), (x,))
    return net.c(y) + net.b(x)


def nested(net: Net, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.cond(y.max() > 1, lambda z: net.a(z) + net.b(z), lambda z: z + 1, (y,))

    return net.c(torch.cond(x.sum() > 0, inner, lambda y: net.b(y), (x,)))


def mapped(net: Net, x: Tensor) -> Tensor:
    return net.b(over(lambda row: net.a(row) + net.b(row), x.unsqueeze(1)))


def scanned(net: Net, x: Tensor) -> Any:
    def step(state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        state = net.a(row) + net.b(state)
        return state.clone(), state + 1

    return scan(step, torch.zeros(1, 64, dtype=BF16), x.unsqueeze(1))


def looped(net: Net, x: Tensor) -> Any:
    start = (torch.zeros((), dtype=torch.int64), x)
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, torch.tanh(net.a(y))), start)


def without_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    return net.b(y)


def autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=BF16):
        y = net.a(x)
    return net.b(y)


USES = {
    cond: {"a", "b", "c"},
    nested: {"a", "b", "c"},
    mapped: {"a", "b"},
    scanned: {"a", "b"},
    looped: {"a"},
    without_grad: {"a", "b"},
    autocast: {"a", "b"},
}
LINEARS = {cond: 5, nested: 4, mapped: 3, scanned: 2, looped: 1, without_grad: 2, autocast: 2}
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
INPUTS = (X.abs() * 3, X.abs() * 0.1, -X.abs())

_EXPORTED: dict[Any, ExportedProgram] = {}


def exported(use: Any, dynamic: bool = False, strict: bool = False) -> ExportedProgram:
    key = (use, dynamic, strict)
    if key not in _EXPORTED:
        rows = ({0: Dim("rows", min=2, max=64)},) if dynamic else None
        _EXPORTED[key] = torch.export.export(Net(use), (X,), dynamic_shapes=rows, strict=strict)
    return _EXPORTED[key]
