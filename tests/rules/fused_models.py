"""A block whose linears share inputs, and the passes that fuse them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

import et_cuda_passes as ecp

BF16 = torch.bfloat16
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(BF16)


class Block(nn.Module):
    """Attention and a feed-forward layer: seven linears, of which o and down have an input of their own."""

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 32)
        self.o = nn.Linear(64, 64, bias=False)
        self.gate, self.up = nn.Linear(64, 100, bias=False), nn.Linear(64, 100, bias=False)
        self.down = nn.Linear(64, 64)
        self.to(dtype)
        quantize_(self, INT4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        # Views split the heads; they need a layout that a slice does not have.
        q = q.view(2, -1, 4, 16).transpose(1, 2)
        k, v = (t.view(2, -1, 2, 16).repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.o(y)
        inner = F.silu(self.gate(x)) * self.up(x)
        return x + self.down(inner[..., :64])


PASSES = [ecp.FusedLinearInt4(), ecp.LinearInt4(), ecp.RemoveLinearViews()]
