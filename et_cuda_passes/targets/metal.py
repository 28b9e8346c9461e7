"""metal: ExecuTorch's Metal backend by default, plain AOTInductor on MPS with ``LinearInt4(kernel="mps")``."""

import torch

from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.quant.unsupported import SuggestedSchemes
from et_cuda_passes.rules.embedding import EmbeddingInt4, EmbeddingInt8
from et_cuda_passes.rules.epilogue import RemoveLinearViews
from et_cuda_passes.rules.experts import BmmInt4, EinsumInt4, GroupedMmInt4, IndexedBmmInt4
from et_cuda_passes.rules.fold import FoldFloats
from et_cuda_passes.rules.linear import ConvInt4, LinearInt4, LinearInt8
from et_cuda_passes.rules.restore import restoring
from et_cuda_passes.targets.target import PLAIN, Target

# torchao's build of the kernel has fp16 and ExecuTorch's has not; a lowered program must run in ExecuTorch.
_TORCHAO = Kernel(
    "torchao",
    layout="metal",
    dtypes=(torch.bfloat16, torch.float32),
    group_sizes=(32, 64, 128, 256),
    in_multiple=32,
    out_multiple=4,
)

METAL = Target(
    "metal",
    "ExecuTorch Metal delegate, or AOTInductor on MPS",
    kernels={
        "int4_linear": (
            _TORCHAO,
            Kernel(
                "mps",
                layout="mps",
                dtypes=(torch.bfloat16, torch.float16, torch.float32),
                group_sizes=(32, 64, 128, 256),
                in_multiple=32,
                out_multiple=8,
            ),
        ),
        "int4_table": (_TORCHAO,),
        # Metal has no int8 linear.
        "int8_plain": (PLAIN,),
    },
    advised=SuggestedSchemes(eight_bits=SuggestedSchemes.four_bits),
    passes=lambda: [
        *restoring(),
        # int4 is before int8: its constants are half as large.
        LinearInt4(),
        LinearInt8(),
        ConvInt4(),
        BmmInt4(),
        IndexedBmmInt4(),
        GroupedMmInt4(),
        EinsumInt4(),
        EmbeddingInt4(),
        EmbeddingInt8(),
        FoldFloats(),
        RemoveLinearViews(),
    ],
)
