"""The generic path compared with torchao's tile_packed_to_4d, on weights that both quantize to the same numbers."""

import pytest
import torch
from torchao.quantization import Int4WeightOnlyConfig, quantize_

import et_cuda_passes as ecp
from et_cuda_passes.testing import Quantized

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("n", "k", "group"), [(256, 1024, 32), (128, 2048, 128), (64, 3072, 256)])
def test_generic_path_packs_and_computes_as_torchao_does(n: int, k: int, group: int) -> None:
    """K is a multiple of 1024, since torchao pads K to one.

    Each group contains -8 and 7 and has a power of two as scale. So torchao chooses that scale and a zero of 0 from the
    floating-point weight, and neither path rounds.
    """
    generic = Quantized(n, k, group=group, form=lambda x, w, b: torch.nn.functional.linear(x, w))
    generic.scale.copy_(2.0 ** -torch.randint(3, 8, generic.scale.shape))
    generic.data[:, ::group], generic.data[:, 1::group] = -8, 7
    x = torch.randn(7, k, dtype=torch.bfloat16)
    before = torch.export.export(generic, (x,))
    program, _ = ecp.rewrite(before, "cuda", [ecp.LinearInt4(kernel="tinygemm")], {"linear_int4": 1})
    packed, pair = (program.state_dict[f"data.{part}"].cuda() for part in ("packed", "scale_and_zero"))

    own = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    own.weight = torch.nn.Parameter(generic.weight().cuda(), requires_grad=False)
    quantize_(own, Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d"))
    assert torch.equal(packed, own.weight.qdata)
    assert torch.equal(pair, own.weight.scale_and_zero)
    op = ecp.ops.INT4_LINEARS["tile_packed_to_4d"].op
    assert torch.equal(op(x.cuda(), packed, pair, None, group, n), own(x.cuda()))
