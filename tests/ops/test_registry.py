"""The registry of operators, and the operators that it makes of every layout."""

import pytest
import torch
import torch.nn.functional as F

from et_cuda_passes.kernels.epilogue import ACTIVATIONS
from et_cuda_passes.layouts import LAYOUTS
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT4_EXPERTS, INT4_LINEARS


def test_operators_exist_for_every_layout() -> None:
    assert list(INT4_LINEARS) == list(LAYOUTS)
    assert list(INT4_EMBEDDINGS) == [name for name, layout in LAYOUTS.items() if layout.rows is not None]
    assert list(INT4_EXPERTS) == [name for name, layout in LAYOUTS.items() if layout.experts_axis is not None]
    for name, linear in INT4_LINEARS.items():
        assert linear.layout is LAYOUTS[name]
        assert str(linear.op) == f"et_cuda_passes.int4_linear_{name}.default"


def test_activations_equal_functions_of_torch() -> None:
    y = torch.linspace(-4, 4, 33)
    functions = {
        "silu": F.silu(y),
        "gelu": F.gelu(y),
        "gelu_tanh": F.gelu(y, approximate="tanh"),
        "relu": F.relu(y),
    }
    assert functions.keys() == ACTIVATIONS.keys()
    for name, wanted in functions.items():
        assert torch.equal(ACTIVATIONS[name](y), wanted)


def test_linear_lists_activations_for_unknown_name() -> None:
    layout = LAYOUTS["mma_tiled"]
    packed = layout.pack(torch.zeros(8, 64, dtype=torch.uint8), 0, 8)
    pair = layout.pack_scales(torch.ones(8, 2), torch.zeros(8, 2), torch.float32, 64)
    with pytest.raises(ValueError, match="has no activation 'tanh'; it has silu, gelu, gelu_tanh, relu"):
        INT4_LINEARS["mma_tiled"].op(torch.zeros(1, 64), packed, pair, None, 32, 8, "tanh")
