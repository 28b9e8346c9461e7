"""``Conv1D`` of transformers, the linear of GPT-2: ``x @ weight + bias`` with a weight [in_features, out_features].

torchao quantizes an ``nn.Linear``. A layer that is to be quantized is replaced by one, under the same FQN.
"""

import sys
from collections.abc import Container

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Conv1D``; none exists before transformers is imported."""
    cls = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return cls is not None and type(module) is cls


def replace_conv1d(model: nn.Module, fqns: Container[str]) -> None:
    """Replace, in place, each ``Conv1D`` with a name in ``fqns`` by a linear with the transposed weight."""
    linears: dict[nn.Module, nn.Linear] = {}
    names = [(fqn, module) for fqn, module in model.named_modules(remove_duplicate=False) if is_conv1d(module)]
    chosen = {module for fqn, module in names if fqn in fqns}
    for fqn, module in names:
        if module in chosen:
            if module not in linears:
                linears[module] = _linear(module)
            model.set_submodule(fqn, linears[module])


def _linear(conv: nn.Module) -> nn.Linear:
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter)
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, *weight.shape, dtype=weight.dtype, device=weight.device)
    # Contiguous: what quantizes a view keeps its strides.
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    linear.bias = bias
    linear.train(conv.training)
    return linear
