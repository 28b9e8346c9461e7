"""metal: ExecuTorch's Metal backend by default, plain AOTInductor on MPS with ``LinearInt4(kernel="mps")``."""

import torch

from et_cuda_passes.kernels.int4 import Int4Kernel
from et_cuda_passes.kernels.int8 import PLAIN
from et_cuda_passes.quant.advised import SuggestedSchemes
from et_cuda_passes.rules.bmm_int4 import BmmInt4
from et_cuda_passes.rules.chosen_experts_int4 import ChosenExpertsInt4
from et_cuda_passes.rules.conv_int4 import ConvInt4
from et_cuda_passes.rules.einsum_int4 import EinsumInt4
from et_cuda_passes.rules.embedding_int4 import EmbeddingInt4
from et_cuda_passes.rules.embedding_int8 import EmbeddingInt8
from et_cuda_passes.rules.grouped_mm_int4 import GroupedMmInt4
from et_cuda_passes.rules.linear_int4 import LinearInt4
from et_cuda_passes.rules.linear_int8 import LinearInt8
from et_cuda_passes.rules.linear_views import LinearViews
from et_cuda_passes.targets.target import Target

# ExecuTorch's build of the kernel has no fp16, torchao's has; what lowers to the delegate must run in it.
_TORCHAO = Int4Kernel(
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
    int4_kernels=(
        _TORCHAO,
        Int4Kernel(
            "mps",
            layout="mps",
            dtypes=(torch.bfloat16, torch.float16, torch.float32),
            group_sizes=(32, 64, 128, 256),
            in_multiple=32,
            out_multiple=8,
        ),
    ),
    # Rows of a table are plain operators, which Inductor fuses there as everywhere.
    int4_table=_TORCHAO,
    # It has no int8 linear.
    int8_plain=PLAIN,
    advised=SuggestedSchemes(eight_bits=SuggestedSchemes.four_bits),
    passes=lambda: [
        LinearInt4(),
        LinearInt8(),
        ConvInt4(),
        BmmInt4(),
        ChosenExpertsInt4(),
        GroupedMmInt4(),
        EinsumInt4(),
        EmbeddingInt4(),
        EmbeddingInt8(),
        LinearViews(),
    ],
)
