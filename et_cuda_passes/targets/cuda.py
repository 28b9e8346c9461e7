"""cuda: ExecuTorch's CUDA backend and plain AOTInductor on CUDA."""

import torch

from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.rules.attention_views import AttentionViews
from et_cuda_passes.rules.bmm_int4 import BmmInt4
from et_cuda_passes.rules.chosen_experts_int4 import ChosenExpertsInt4
from et_cuda_passes.rules.conv_int4 import ConvInt4
from et_cuda_passes.rules.conv_int8 import ConvInt8
from et_cuda_passes.rules.einsum_int4 import EinsumInt4
from et_cuda_passes.rules.embedding_int4 import EmbeddingInt4
from et_cuda_passes.rules.embedding_int8 import EmbeddingInt8
from et_cuda_passes.rules.fused_linear_int4 import FusedLinearInt4
from et_cuda_passes.rules.grouped_mm_int4 import GroupedMmInt4
from et_cuda_passes.rules.int4_activation import Int4Activation
from et_cuda_passes.rules.int4_gate import Int4Gate
from et_cuda_passes.rules.int4_product import Int4Product
from et_cuda_passes.rules.int4_sum import Int4Sum
from et_cuda_passes.rules.linear_int4 import LinearInt4
from et_cuda_passes.rules.linear_int8 import LinearInt8
from et_cuda_passes.rules.linear_views import LinearViews
from et_cuda_passes.rules.unmasked_attention import UnmaskedAttention
from et_cuda_passes.targets.target import INT8, Target

_TRITON = Kernel(
    "triton",
    layout="mma_tiled",
    dtypes=(torch.bfloat16, torch.float16),
    group_sizes=(32, 64, 128),
    in_multiple=32,
)

CUDA = Target(
    "cuda",
    "ExecuTorch CUDA delegate, or AOTInductor on CUDA",
    kernels={
        "int4_linear": (
            _TRITON,
            Kernel(
                "tinygemm",
                layout="tile_packed_to_4d",
                dtypes=(torch.bfloat16,),
                group_sizes=(32, 64, 128, 256),
                in_multiple=32,
                out_multiple=8,
                scale_dtype=torch.bfloat16,
            ),
        ),
        "int4_table": (_TRITON,),
        "int4_experts": (_TRITON,),
        "int4_indexed_experts": (_TRITON,),
        "int8_linear": (
            Kernel(
                "triton",
                layout=INT8,
                dtypes=(torch.bfloat16, torch.float16),
                group_sizes=(16, 32, 64, 128, 256),
                in_multiple=16,
                per_row=True,
            ),
        ),
    },
    passes=lambda: [
        FusedLinearInt4(max_out_features=4096, max_together=4, leave_epilogues=True),
        LinearInt4(),
        LinearInt8(),
        ConvInt4(),
        ConvInt8(),
        BmmInt4(),
        ChosenExpertsInt4(),
        GroupedMmInt4(),
        EinsumInt4(),
        EmbeddingInt4(),
        EmbeddingInt8(),
        LinearViews(),
        Int4Activation(),
        Int4Gate(),
        Int4Product(),
        Int4Sum(),
        UnmaskedAttention(),
        AttentionViews(),
    ],
)
