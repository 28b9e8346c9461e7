"""Stacks of experts' matrices, which a mixture of experts in transformers keeps in parameters of three dimensions.

torchao quantizes matrices. Each expert's is quantized as the weight of a linear, and the stack becomes integers, scales
and zero points, which a parametrization of PyTorch dequantizes whenever the module reads the parameter. So the module's
code stays as it is, and an exported program has one ``dequantize_affine`` for each product of experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.quant_primitives import _DTYPE_TO_QVALUE_BOUNDS, dequantize_affine


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` has a matrix for each of several experts in parameters of three dimensions.

    transformers marks the classes of such modules (``use_experts_implementation``). Their parameters of two dimensions
    are biases.
    """
    return isinstance(getattr(module, "is_transposed", None), bool) and hasattr(module, "_apply_gate")


def matrices(module: nn.Module, stack: Tensor) -> Tensor:
    """A view of a stack as [experts, out_features, in_features], as the module's ``is_transposed`` says."""
    return stack.transpose(1, 2) if module.is_transposed else stack


def is_quantized_stack(module: nn.Module) -> bool:
    """Whether ``module`` is the parametrization that holds a stack which is quantized already."""
    return isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], _Dequantize)


def quantized_stacks(module: nn.Module) -> dict[str, Tensor]:
    """The integers of the stacks of ``module`` that are quantized already, by name, as :func:`matrices` views them."""
    lists: Any = getattr(module, "parametrizations", nn.ModuleDict())
    return {name: matrices(module, each.original0) for name, each in lists.items() if is_quantized_stack(each)}


class _Dequantize(nn.Module):
    """The parametrization of a stack: from integers, scales and zero points to floating-point weights and back.

    Args:
        config: torchao's configuration for each matrix.
        transposed: whether the stack is [experts, in_features, out_features].
    """

    def __init__(self, config: AOBaseConfig, transposed: bool) -> None:
        super().__init__()
        self._config, self._transposed = config, transposed
        self._block: list[int] = []
        self._bounds = (0, 0)

    def right_inverse(self, stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a stack, one expert after the other, so that only one is held in fp32."""
        whole: list[Tensor] = []
        for number, each in enumerate(stack.transpose(1, 2) if self._transposed else stack):
            rows, columns = each.shape
            linear = nn.utils.skip_init(nn.Linear, columns, rows, bias=False, dtype=each.dtype, device=each.device)
            linear.weight = nn.Parameter(each.detach().contiguous(), requires_grad=False)
            quantize_(linear, self._config)
            weight: Any = linear.weight
            parts = [weight.qdata, weight.scale, weight.zero_point]
            if self._transposed:
                parts = [part.t() for part in parts]
            whole = whole or [part.new_empty((len(stack), *part.shape)) for part in parts]
            for into, part in zip(whole, parts, strict=True):
                into[number] = part
            self._block = [1, *(weight.block_size[::-1] if self._transposed else weight.block_size)]
            self._bounds = _DTYPE_TO_QVALUE_BOUNDS[weight.target_dtype]
        integers, scale, zero = whole
        return integers, scale, zero

    def forward(self, integers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The stack in the dtype of the scales."""
        given: Any = (integers, self._block, scale, zero, torch.int8, *self._bounds)
        found: Tensor = dequantize_affine(*given, output_dtype=scale.dtype)
        return found


def quantize_stack(module: nn.Module, name: str, config: AOBaseConfig) -> None:
    """Quantize the stack ``name`` of ``module`` in place, each matrix by torchao's configuration of a linear."""
    # A parameter of its own: copies of a model share parameters, and only this one has no gradient.
    setattr(module, name, nn.Parameter(module.get_parameter(name).detach(), requires_grad=False))
    # Unsafe means without a trial run, which would hold the stack twice.
    parametrize.register_parametrization(module, name, _Dequantize(config, bool(module.is_transposed)), unsafe=True)
